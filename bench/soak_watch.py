"""The processes of a soak: who they are, how much memory they hold, and whether any is left."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

import psutil
from soak_plan import Sample

MARK = "TCOPD_SOAK"
"""Environment variable that every process of a soak inherits; its value tells this soak from others."""
EVERY_S = 1.0
PAGE = resource.getpagesize()
RANK, ENGINE = "rank", "engine"
LEASH = "tcopd_fast.rollout.leash"


@dataclass(frozen=True)
class Member:
    """A trainer rank or an engine: `number` among its kind, and its first process."""

    kind: str
    number: int
    process: psutil.Process

    @property
    def name(self) -> str:
        """For example `rank 0`."""
        return f"{self.kind} {self.number}"


@dataclass
class Life:
    """Memory of one member from its first to its last sample."""

    name: str
    pid: int
    samples: list[Sample] = field(default_factory=list)


def marked(token: str) -> list[psutil.Process]:
    """Every process that carries the mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


Tree = Mapping[int, Sequence[psutil.Process]]
"""Process id -> its children."""


def tree(root: int) -> Tree:
    """Everything below a process."""
    below: dict[int, list[psutil.Process]] = {}
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(root).children(recursive=True):
            with suppress(psutil.Error):
                below.setdefault(process.ppid(), []).append(process)
    return below


def members(below: Tree) -> list[Member]:
    """Ranks and engines of a run."""
    found = []
    for process in chain.from_iterable(below.values()):
        with suppress(psutil.Error):
            if member := _member(process):
                found.append(member)
    return sorted(found, key=lambda member: member.name)


def _member(process: psutil.Process) -> Member | None:
    words = process.cmdline()
    if LEASH in words:
        return Member(ENGINE, 0, process)
    # The launchers' command lines name the module, too.
    if "tcopd_fast.train" in words and not any("launcher" in word for word in words):
        return Member(RANK, int(process.environ()["RANK"]), process)
    return None


def memory(member: Member, below: Tree) -> tuple[int, int]:
    """Resident set and its anonymous part, bytes: of the process and its children, a rank's without its engines."""
    resident = anonymous = 0
    queue = [member.process]
    while queue:
        process = queue.pop()
        with suppress(psutil.Error):
            if member.kind == RANK and process != member.process and LEASH in process.cmdline():
                continue
            info = process.memory_info()
            resident += info.rss
            anonymous += info.rss - info.shared
            queue += below.get(process.pid, ())
    return resident, anonymous


class Watch:
    """Samples the memory of every member each second, from a thread, while it is open.

    launcher: the process that starts the ranks, None between two lives. steps: how many are logged.
    """

    def __init__(self, launcher: Callable[[], int | None], steps: Callable[[], int]) -> None:
        self.lives: list[Life] = []
        self._launcher, self._steps = launcher, steps
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="soak watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def now(self) -> float:
        """Seconds since the soak began."""
        return time.monotonic() - self._began

    def _run(self) -> None:
        while not self._ended.wait(EVERY_S):
            pid = self._launcher()
            below = {} if pid is None else tree(pid)
            for member in members(below):
                resident, anonymous = memory(member, below)
                # A process that is about to end has given its memory back.
                if resident:
                    self._life(member).samples.append(Sample(self.now(), self._steps(), resident, anonymous))

    def _life(self, member: Member) -> Life:
        pid = member.process.pid
        for life in reversed(self.lives):
            if (life.name, life.pid) == (member.name, pid):
                return life
        self.lives.append(Life(member.name, pid))
        return self.lives[-1]
