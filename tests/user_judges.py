"""Judges as users write them, careless ones; imports nothing heavy, since judges run in processes of their own."""

from __future__ import annotations

import os
import time
from pathlib import Path


def hostile(response: str, answer: str) -> bool:
    """What a response says, it does."""
    if response == "hang":
        time.sleep(600)
    if response == "spin":
        return sum(iter(int, 1)) > 0
    if response == "eat":
        return len(bytearray(4 << 30)) > 0
    if response == "exit":
        os._exit(0)
    return int(response) == int(answer)


def never(response: str, answer: str) -> bool:
    """Hangs, after it has made a file to be seen by."""
    Path(os.environ["JUDGING"]).touch()
    time.sleep(3600)
    return True
