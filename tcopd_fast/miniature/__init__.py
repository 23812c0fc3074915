"""A miniature of the experiment: a student of 0.34M parameters, an expert, an anti-expert, problem files."""

from __future__ import annotations

from pathlib import Path

from tcopd_fast.config import nearest
from tcopd_fast.errors import UserError

ASSETS = Path(__file__).parent / "assets"
_FILES = {
    "base": "base",
    "expert": "expert",
    "anti_expert": "anti_expert",
    # The anti-expert of math is the expert of the other domain.
    "largest_expert": "anti_expert",
    "train": "train.jsonl",
    "train_largest": "train_largest.jsonl",
    "heldout": "heldout.jsonl",
    "heldout_largest": "heldout_largest.jsonl",
    "build_report": "build_report.json",
}


def asset(name: str) -> Path:
    """Return the path of a shipped checkpoint folder or problem file.

    Raises UserError for an unknown name and for an asset that was not installed.
    """
    if name not in _FILES:
        raise UserError(f"miniature:{name}: no such asset{nearest(name, _FILES)}")
    path = ASSETS / _FILES[name]
    if not path.exists():
        raise UserError(f"miniature:{name}: missing at {path}; rebuild it with `tcopd miniature build --out {ASSETS}`")
    return path
