"""One cell of the teachers' memory benchmark, in a process (or one per rank) that does nothing else.

    python bench/teacher_memory_child.py CELL.json        (started by teacher_memory.py)

CELL.json holds `config` (a configuration tree, or null for a process without frozen models), `rollouts`, `passes`,
`out` and `scores`. The project's own Scorer is built from the configuration and scores the rollouts `passes` times;
the measurement goes to OUT.RANK.json and, of rank 0, the logprobs to SCORES.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tcopd_fast.config import Config
from tcopd_fast.config_io import validate
from tcopd_fast.dist import World, init_world
from tcopd_fast.models import check_models
from tcopd_fast.scoring import REFERENCE, Scorer
from tcopd_fast.types import Prompt, Rollout, ScoredRollout

PAGE = 4096
SAMPLE_EVERY_S = 0.002
ANONYMOUS, MAPPED = "anonymous_bytes", "mapped_bytes"


@dataclass
class MemoryWatch:
    """Peaks while it is open. On a CPU: the resident set (exact), and of its two parts, looked at every 2 ms.

    The parts are anonymous memory, which only swapping could take away, and mapped file pages, which the kernel may
    drop and read again. On a GPU also what torch's allocator had given out.
    """

    device: torch.device
    peaks: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> MemoryWatch:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.peaks["resident_set_bytes"] = resident_peak()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.peaks["cuda_allocated_bytes"] = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        self.peaks = resident_parts()
        while not self._ended.wait(SAMPLE_EVERY_S):
            for name, size in resident_parts().items():
                self.peaks[name] = max(self.peaks[name], size)


def resident_peak() -> int:
    """VmHWM, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def resident_parts() -> dict[str, int]:
    """Resident bytes: anonymous, and of mapped files and shared memory."""
    _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return {ANONYMOUS: (resident - shared) * PAGE, MAPPED: shared * PAGE}


def read_rollouts(file: Path) -> list[Rollout]:
    return [
        Rollout(Prompt(f"p{i}", "d", tuple(row["prompt"]), "", None, ""), 0, tuple(row["response"]),
                torch.zeros(len(row["response"])), "length", 0, "")
        for i, row in enumerate(json.loads(file.read_text()))
    ]  # fmt: skip


def measure(tree: dict[str, Any] | None, rollouts: Sequence[Rollout], passes: int, world: World) -> dict[str, Any]:
    """Memory after loading and over every pass, seconds of every pass, and the scores of the last one."""
    # The first computation brings up torch's thread pool and GEMM library, which no frozen model is to be charged for.
    torch.ones(64, 64, device=world.device) @ torch.ones(64, 64, device=world.device)
    found: dict[str, Any] = {"rank": world.rank, "start": resident_parts(), "passes": []}
    with MemoryWatch(world.device) as loading:
        scorer = None
        if tree is not None:
            config = validate(tree, Config)
            scorer = Scorer(config, check_models(config), world)
            found["placements"] = [line.split(" (")[0] for line in scorer.placements()]
    found["loading"] = loading.peaks
    scored: list[ScoredRollout] = []
    for _ in range(passes):
        world.barrier()
        with MemoryWatch(world.device) as watch:
            began = time.perf_counter()
            if scorer is not None:
                scored = scorer.score(rollouts, [config.lambdas_for("d")] * len(rollouts))
            seconds = time.perf_counter() - began
        found["passes"].append({"seconds": seconds, **watch.peaks})
    found["scores"] = by_role(scored)
    return found


def by_role(scored: Sequence[ScoredRollout]) -> dict[str, torch.Tensor]:
    """Model -> logprobs of all rollouts, float32 [N]."""
    if not scored:
        return {}
    out = {name: torch.cat([s.teacher_logprobs[name] for s in scored]) for name in scored[0].teacher_logprobs}
    if scored[0].ref_logprob is not None:
        out[REFERENCE] = torch.cat([s.ref_logprob for s in scored if s.ref_logprob is not None])
    return out


def main() -> int:
    cell = json.loads(Path(sys.argv[1]).read_text())
    world = init_world()
    found = measure(cell["config"], read_rollouts(Path(cell["rollouts"])), cell["passes"], world)
    scores = found.pop("scores")
    if world.is_main:
        torch.save(scores, cell["scores"])
    Path(f"{cell['out']}.{world.rank}.json").write_text(json.dumps(found))
    world.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
