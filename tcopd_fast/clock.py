"""How long each stage of a step takes, what memory it needs, and when it ran."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tcopd_fast.timeline import Span, epoch_seconds, fold

STAGES = ("data", "rollout", "scoring", "reward", "batch", "loss", "learner", "weight_sync")


@dataclass(frozen=True)
class StepTimes:
    """One rank's step. metrics: `time_s/*` and `peak_memory_bytes/*`. spans: when it was in which stage, at most
    `timeline.SPANS_PER_TRACK` (see `timeline.fold`). start, end: of the step, seconds since the epoch."""

    metrics: dict[str, float]
    spans: list[Span]
    start: float
    end: float


class StageClock:
    """Seconds, peak memory and spans of every stage of a step.

    Time, memory and spans are charged to the innermost open stage only, so the stages of a step never add up to more
    than the step. A stage may be entered several times: its seconds add up and its peak is the largest seen.

    device: "cuda": peak of torch's allocator on that device, in bytes. Anything else: the largest resident
    set of this process while the stage ran, in bytes; where a process may not reset its own high-water mark
    the value is the peak since the process started (`resets_peak` is False then).
    synchronize: wait for the device at stage borders, so that queued kernels count where they were launched.
    """

    def __init__(self, device: torch.device | str, synchronize: bool = True) -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._synchronize = synchronize and self._cuda
        self.resets_peak = self._cuda or _can_reset_resident_peak()
        self._open: list[str] = []
        self._clear()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the block to stage `name`. Raises ValueError for a name that is not one of STAGES."""
        if name not in STAGES:
            raise ValueError(f"unknown stage {name!r}; stages are {', '.join(STAGES)}")
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def collect(self) -> StepTimes:
        """The step's `time_s/<stage>`, `peak_memory_bytes/<stage>`, `time_s/step` and spans; the next step starts.

        Only stages that were entered appear. The step runs from its first stage's entry to this call. Raises
        RuntimeError inside an open stage.
        """
        if self._open:
            raise RuntimeError(f"collect() inside the open stage {self._open[-1]!r}")
        now = self._now()
        entered = [name for name in STAGES if name in self._seconds]
        metrics: dict[str, float] = {f"time_s/{name}": self._seconds[name] for name in entered}
        metrics |= {f"peak_memory_bytes/{name}": self._peak[name] for name in entered}
        start = now if self._first is None else self._first
        metrics["time_s/step"] = now - start
        times = StepTimes(metrics, fold(self._spans), start, now)
        self._clear()
        return times

    def _clear(self) -> None:
        self._seconds: dict[str, float] = {}
        self._peak: dict[str, int] = {}
        self._spans: list[Span] = []
        self._first: float | None = None
        self._since = 0.0

    def _charge(self) -> None:
        """Charge what happened since the last border to the innermost open stage."""
        now = self._now()
        self._first = now if self._first is None else self._first
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
            self._spans.append(Span(name, self._since, now))
            self._peak[name] = max(self._peak.get(name, 0), self._read_peak())
        self._reset_peak()
        self._since = self._now()

    def _now(self) -> float:
        if self._synchronize:
            torch.cuda.synchronize(self._device)
        return epoch_seconds()

    def _read_peak(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device)
        return _resident_peak() if self.resets_peak else _process_peak()

    def _reset_peak(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self.resets_peak:
            _reset_resident_peak()


def _reset_resident_peak() -> None:
    """Set VmHWM of this process to its present resident set (proc_pid_clear_refs(5), value 5)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _resident_peak() -> int:
    """VmHWM of this process, bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _process_peak() -> int:
    """Largest resident set since the process started, bytes."""
    # ru_maxrss is in bytes on macOS and in KiB elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _can_reset_resident_peak() -> bool:
    try:
        _reset_resident_peak()
        _resident_peak()
    except OSError:
        return False
    return True
