"""The judge of soak.py's runs, `judge.default: soak_judge:verdict`: the last boxed number; hostile on request."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

FILE = "SOAK_JUDGE"
"""Environment variable with the path of a file; when it exists, one verdict does what the word in it says."""
_BOXED = re.compile(r"\\boxed\{(\d+)\}")


def verdict(response: str, answer: str) -> bool:
    """Whether the last boxed number of the response is the answer."""
    order = Path(os.environ[FILE])
    if order.exists():
        _misbehave(order)
    boxed = _BOXED.findall(response)
    return bool(boxed) and int(boxed[-1]) == int(answer)


def _misbehave(order: Path) -> None:
    taken = order.with_suffix(".taken")
    try:
        order.rename(taken)
    except FileNotFoundError:  # the other rank's judge was faster
        return
    if taken.read_text() == "hang":
        time.sleep(3600)
    os._exit(1)
