r"""The judge of final answers: the last \boxed{…} of a response against the reference, by math-verify.

Model output is hostile input: expressions that take for ever or all memory. Comparisons therefore run in
persistent child processes with a deadline and a memory limit; a child that breaks either is killed and replaced,
and its case counts as wrong. Plain integers and literally equal answers, which are most cases, are decided here.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import select
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

from tcopd_fast.errors import UserError
from tcopd_fast.verify_worker import READY

TAIL_CHARS = 600
"""How much of a response without a box is searched for an answer."""
MAX_ANSWER_CHARS = 8192
"""Longer predictions are wrong unless literally equal to the reference."""
MEMORY_BYTES = 2 << 30
"""Address space of one worker; math-verify itself takes about a tenth of it."""
CACHE_SIZE = 1 << 16
START_TIMEOUT_S = 120.0

_BRACE = re.compile(r"\\boxed\s*\{|\\(?!\\?boxed)[\\{}]|[{}]")
_INTEGER = re.compile(r"([+-]?)0*([0-9]+)")
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_SPACING = re.compile(r"\s+|\\[,;:!]|\\ |\\left(?![a-zA-Z])|\\right(?![a-zA-Z])")
_LIST_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b")
_LIST_FILLER = re.compile(r"[\s${}]|\\[()\[\],; ]|\\q?quad|\\text")
# The parent's import path as it is, so that the child finds this package however it was found here.
_START = (
    "import sys; sys.path[:] = sys.argv[3:]; from tcopd_fast.verify_worker import main; "
    "main(float(sys.argv[1]), int(sys.argv[2]))"
)
_START_FUNCTION = (
    "import sys; sys.path[:] = sys.argv[4:]; from tcopd_fast.verify_worker import serve_function; "
    "serve_function(sys.argv[3], float(sys.argv[1]), int(sys.argv[2]))"
)

_Question = tuple[str, str, bool]
Q = TypeVar("Q")
R = TypeVar("R")


def judge(response: str, answer: str, timeout_s: float = 5.0) -> bool:
    """Whether `response` ends in `answer`; one worker process is started on first need and kept."""
    return _shared_judge(timeout_s).many([(response, answer)])[0]


@functools.cache
def _shared_judge(timeout_s: float) -> Judge:
    shared = Judge(timeout_s=timeout_s)
    atexit.register(shared.close)
    return shared


def boxed_answer(text: str) -> str | None:
    r"""Content of the last complete \boxed{…}, or None; one pass over the text.

    Boxes joined by nothing but commas, "and" or "or" are one answer, a list: `\boxed{1} and \boxed{2}` gives
    "1, 2". Of nested boxes the innermost counts.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    first, start, end = boxes.pop()
    contents = [text[start:end].strip()]
    while boxes and _is_list_separator(text, boxes[-1][2] + 1, first):
        first, start, end = boxes.pop()
        contents.append(text[start:end].strip())
    return ", ".join(dict.fromkeys(reversed(contents)))


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(position of the box, start and end of its content) of all complete innermost boxes, left to right."""
    open_boxes: list[tuple[int, int] | None] = []
    boxes: list[tuple[int, int, int]] = []
    first = text.find("\\boxed")
    if first < 0:
        return boxes
    for match in _BRACE.finditer(text, first):
        token = match.group()
        if token.startswith("\\boxed"):
            open_boxes.append((match.start(), match.end()))
        elif token == "{":
            open_boxes.append(None)
        elif token == "}" and open_boxes:
            box = open_boxes.pop()
            if box is not None and (not boxes or box[0] > boxes[-1][0]):
                boxes.append((*box, match.start()))
    return boxes


def _is_list_separator(text: str, start: int, end: int) -> bool:
    between = text[start:end] if end - start < 64 else ""
    return bool(_LIST_SEPARATOR.search(between)) and not _LIST_SEPARATOR.sub("", _LIST_FILLER.sub("", between))


class Judge:
    """Judges many responses with `workers` child processes, each verdict within `timeout_s` seconds.

    Children start on the first case that needs one. Verdicts are remembered by (prediction, answer), the last
    65536 of them. Safe to call from several threads. Use as a context manager, or call `close`.
    """

    def __init__(self, workers: int = 1, timeout_s: float = 5.0, memory_bytes: int = MEMORY_BYTES) -> None:
        self._workers = [Worker(timeout_s, memory_bytes) for _ in range(workers)]
        self._cache: OrderedDict[_Question, bool] = OrderedDict()
        self._lock = threading.Lock()

    def many(self, pairs: Iterable[tuple[str, str]]) -> list[bool]:
        r"""Verdict for every (response, answer), in order.

        The prediction is the content of the last complete \boxed{…}; without one, math-verify searches the end of
        the response. Raises UserError only when a worker cannot start at all (math-verify missing).
        """
        with self._lock:
            questions = [_question(response, answer) for response, answer in pairs]
            verdicts = [self._known(question) for question in questions]
            unknown = list(dict.fromkeys(q for q, verdict in zip(questions, verdicts, strict=True) if verdict is None))
            answered = dict(zip(unknown, ask_all(self._workers, Worker.ask, unknown), strict=True))
            self._cache.update(answered)
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
            return [
                answered[question] if verdict is None else verdict
                for question, verdict in zip(questions, verdicts, strict=True)
            ]

    def close(self) -> None:
        """End the worker processes; a later call starts new ones."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _known(self, question: _Question) -> bool | None:
        verdict = _shortcut(question)
        if verdict is None and question in self._cache:
            self._cache.move_to_end(question)
            verdict = self._cache[question]
        return verdict


def ask_all(workers: Sequence[Worker], ask: Callable[[Worker, Q], R], questions: Sequence[Q]) -> list[R]:
    """`ask(worker, question)` for every question, in order, each worker busy with one at a time."""
    if len(questions) <= 1 or len(workers) == 1:
        return [ask(workers[0], question) for question in questions]
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def ask_next_idle(question: Q) -> R:
        worker = idle.get()
        try:
            return ask(worker, question)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(len(workers)) as threads:
        return list(threads.map(ask_next_idle, questions))


class Worker:
    """One child process, restarted when it is needed and not there.

    A plain subprocess, not multiprocessing: that would import the trainer's main module, and with it torch, again.
    function: MODULE:FUNCTION that gives the verdicts; math-verify when None.
    """

    def __init__(self, timeout_s: float, memory_bytes: int, function: str | None = None) -> None:
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._function = function
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: Sequence[str | bool]) -> bool:
        """The child's verdict; False when it exceeds its limits or dies."""
        return self.reply(question) == "1"

    def reply(self, question: Sequence[str | bool]) -> str | None:
        """The child's line, "1" or "0" and perhaps a remark; None when it exceeds its limits or dies."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            # The child's own alarm comes first; this deadline is for a child that cannot be scheduled at all.
            reply = _read_line(process, self._timeout_s + 1.0)
        except OSError:
            reply = None
        if reply is None:
            self.stop()
        return reply

    def stop(self) -> None:
        """Kill the child, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # unsent bytes of the question that killed it
                    pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        limits = (str(self._timeout_s), str(self._memory_bytes))
        start = [_START, *limits] if self._function is None else [_START_FUNCTION, *limits, self._function]
        self._process = subprocess.Popen(
            [sys.executable, "-c", *start, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        reply = _read_line(self._process, START_TIMEOUT_S)
        if reply != READY:
            self.stop()
            name, remedy = "judge", "install math-verify, or leave answers out of the data"
            if self._function is not None:
                name, remedy = f"judge {self._function}", "make it importable by a process of its own"
            raise UserError(f"{name}: its worker process does not start ({reply or 'no reply'}); {remedy}")
        return self._process


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> str | None:
    """One line of the child's output, or None when it is late or gone. A line is far shorter than a pipe's buffer."""
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        return None
    return process.stdout.readline().decode().strip() or None


def _question(response: str, answer: str) -> _Question:
    """(prediction, bare answer, whether the prediction was boxed), all of bounded length."""
    boxed = boxed_answer(response)
    if boxed is not None:
        return boxed.strip(), _bare(answer), True
    return response[-TAIL_CHARS:].strip(), _bare(answer), False


def _bare(text: str) -> str:
    r"""Take off surrounding $…$, \(…\), \[…\] and \boxed{…}; of a longer text with a box keep the box's content."""
    text = text.strip()
    boxed = boxed_answer(text)
    if boxed is not None:
        text = boxed.strip()
    for opening, closing in _WRAPPERS:
        inner = text[len(opening) : -len(closing)]
        if inner and text.startswith(opening) and text.endswith(closing) and opening not in inner:
            return inner.strip()
    return text


def _shortcut(question: _Question) -> bool | None:
    """The verdict where it needs no algebra: equal text, two integers, or a prediction that is empty or huge."""
    prediction, answer, _ = question
    if not prediction or not answer:
        return False
    bare = _bare(prediction)
    if len(bare) <= MAX_ANSWER_CHARS and _SPACING.sub("", bare) == _SPACING.sub("", answer):
        return True
    predicted, expected = _INTEGER.fullmatch(bare), _INTEGER.fullmatch(answer)
    if predicted and expected:
        return _integer(predicted) == _integer(expected)
    return False if len(prediction) > MAX_ANSWER_CHARS or len(answer) > MAX_ANSWER_CHARS else None


def _integer(match: re.Match[str]) -> str:
    sign, digits = match.groups()
    return "-" + digits if sign == "-" and digits != "0" else digits
