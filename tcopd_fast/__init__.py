"""tcopd-fast: teacher-contrastive on-policy distillation for language models."""

from __future__ import annotations

__version__ = "0.1.0"
