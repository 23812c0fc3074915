"""The child process of the judge: reads one question per line, answers one verdict per line.

Imports math-verify and little else. Whatever happens to this process, the parent only loses one verdict.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import signal
import sys
from typing import Any, TextIO

READY = "ready"
_MARKED = ("$", "\\boxed", "\\(", "\\[")


def main(timeout_s: float, memory_bytes: int) -> None:
    """Serve `[prediction, answer, is_boxed]` JSON lines on stdin with "1" or "0" lines until stdin closes.

    The kernel kills the process when a verdict takes longer than `timeout_s`, even inside C code and after the
    parent has died; an allocation beyond `memory_bytes` of address space fails and ends the process.
    """
    # Libraries may print; the verdicts keep the original stdout for themselves.
    verdicts = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # A trainer that is asked to stop still wants its verdicts; closed stdin is what ends this process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    try:
        _agree("1", "1", True)
    except ImportError as error:
        _send(verdicts, str(error))
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    _send(verdicts, READY)
    for line in sys.stdin:
        prediction, answer, is_boxed = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            verdict = _agree(prediction, answer, is_boxed)
        except MemoryError:
            os._exit(1)
        except Exception:  # any failure inside the parser of a hostile text is one wrong answer
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(verdicts, "1" if verdict else "0")


def _send(stream: TextIO, line: str) -> None:
    stream.write(line.replace("\n", " ") + "\n")
    stream.flush()


def _agree(prediction: str, answer: str, is_boxed: bool) -> bool:
    # Its own time limits are off: they use SIGALRM, which belongs to the limit above.
    from math_verify import parse, verify

    predicted = parse(_boxed(prediction) if is_boxed else prediction, parsing_timeout=None)  # type: ignore[arg-type]
    return bool(verify(_gold(answer), predicted, timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def _gold(answer: str) -> Any:
    from math_verify import parse

    marked = any(mark in answer for mark in _MARKED)
    return parse(answer if marked else _boxed(answer), parsing_timeout=None)  # type: ignore[arg-type]


def _boxed(text: str) -> str:
    return rf"\boxed{{{text}}}"
