"""The child process of a judge: reads one question per line, answers one verdict per line.

Imports math-verify, or the module of the user's function, and little else. Whatever happens to this process, the
parent only loses one verdict.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

READY = "ready"
MAX_REPLY_CHARS = 500
_MARKED = ("$", "\\boxed", "\\(", "\\[")


def main(timeout_s: float, memory_bytes: int) -> None:
    """Serve `[prediction, answer, is_boxed]` JSON lines on stdin with "1" or "0" lines until stdin closes.

    The kernel kills the process when a verdict takes longer than `timeout_s`, even inside C code and after the
    parent has died; an allocation beyond `memory_bytes` of address space fails and ends the process.
    """
    verdicts = _open()
    try:
        _agree("1", "1", True)
    except ImportError as error:
        _send(verdicts, str(error))
        return
    _serve(verdicts, _agree, timeout_s, memory_bytes)


def serve_function(path: str, timeout_s: float, memory_bytes: int) -> None:
    """As `main`, with MODULE:FUNCTION (response, answer) -> bool for `[response, answer]` lines.

    Its module may need any amount of address space; memory_bytes come on top. A verdict that fell to an exception is
    followed by the exception's repr.
    """
    verdicts = _open()
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of the user's may fail in any way
        _send(verdicts, repr(error))
        return
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _serve(verdicts, function, timeout_s, taken + memory_bytes)


def _open() -> TextIO:
    # Libraries may print; the verdicts keep the original stdout for themselves.
    verdicts = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # A trainer that is asked to stop still wants its verdicts; closed stdin is what ends this process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    return verdicts


def _serve(verdicts: TextIO, judge: Callable[..., Any], timeout_s: float, memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    _send(verdicts, READY)
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            verdict = "1" if judge(*question) else "0"
        except MemoryError:
            os._exit(1)
        except Exception as error:  # any failure inside the parser of a hostile text is one wrong answer
            verdict = f"0 {error!r}"[:MAX_REPLY_CHARS]
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(verdicts, verdict)


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
