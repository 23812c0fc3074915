"""Tile choices kept on disk, so that a new process need not time them again.

One JSON object {key: tile fields} in `TCOPD_KERNELS_CACHE` (a directory), or ~/.cache/tcopd_kernels. A file that
cannot be read or written is ignored with one warning per process: it only costs the timing.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

VERSION = 1  # of the kernels' tiles: raise it when old choices no longer mean the same

_warned = False


def cache_path() -> Path:
    folder = os.environ.get("TCOPD_KERNELS_CACHE") or Path.home() / ".cache" / "tcopd_kernels"
    return Path(folder) / f"tiles-{VERSION}.json"


def load() -> dict[str, dict[str, int]]:
    """The choices on disk; empty when there are none or the file is damaged."""
    path = cache_path()
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(path, f"cannot be read ({error})")
        return {}
    if not isinstance(content, dict) or not all(isinstance(tile, dict) for tile in content.values()):
        _warn(path, "does not hold an object of tiles")
        return {}
    return content


def save(key: str, tile: Mapping[str, int]) -> None:
    """Adds one choice to the file. The file is replaced as a whole, so a reader never sees half of it.

    Of two processes that save at the same moment one may lose its choice, and times it again another day.
    """
    path = cache_path()
    content = load() | {key: dict(tile)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        _warn(path, f"cannot be written ({error})")


def _warn(path: Path, trouble: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"the tile cache {path} {trouble}; tiles are timed in every process", stacklevel=3)
