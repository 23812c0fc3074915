"""The judge of delta_sizes.py's training runs: `judge.default: delta_sizes_judge:first_line`."""

from __future__ import annotations


def first_line(response: str, answer: str) -> bool:
    """True when the response's first line is the answer; a pre-trained model goes on with the next example."""
    return response.split("\n")[0].strip() == answer
