"""A miniature of the experiment: a student of 0.34M parameters, an expert, an anti-expert, problem files."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
_FILES = {
    "base": "base",
    "expert": "expert",
    "anti_expert": "anti_expert",
    "train": "train.jsonl",
    "heldout": "heldout.jsonl",
    "heldout_largest": "heldout_largest.jsonl",
    "build_report": "build_report.json",
}


def asset(name: str) -> Path:
    """Return the path of a shipped checkpoint folder or problem file.

    Raises KeyError for an unknown name and FileNotFoundError if the asset was not installed.
    """
    if name not in _FILES:
        raise KeyError(f"miniature asset {name!r} is unknown; choose one of {', '.join(_FILES)}")
    path = ASSETS / _FILES[name]
    if not path.exists():
        raise FileNotFoundError(
            f"miniature asset {name!r} is missing at {path}; rebuild it with "
            f"`python -m tcopd_fast.miniature.build {ASSETS}`"
        )
    return path
