"""A mid-size run on one GPU: what teachers cost in a training step of long sequences, by placement and without logits.

    python bench/midsize.py [--out runs/midsize] [--shapes qwen3_0.6b,qwen3_4b] [--teachers 1,2,4]
                            [--placements resident,offload,delta,lora] [--tokens 16384] [--budget-s 280] [--tiny]
    python bench/midsize.py --predict [--shapes …] [--teachers …] [--placements …] [--tokens …]
    python bench/midsize.py --report

For every shape, placement and number of teachers a fresh process trains a student of random weights for three steps, of
which the last two count: the trainer's own Scorer, reward, batch and Learner (DeepSpeed ZeRO-1 on one rank, gradient
checkpointing) on sequences of --tokens packed tokens. Recorded are seconds and peak memory of every stage, beside what
`tcopd plan` predicts. The comparison `logits` is the paper's way: the same models, all resident, the same optimizer,
and logits of every response token materialised (midsize_logits.py). The 0.6B student trains all its weights, the 4B
student a LoRA adapter, because Adam's state of 4B weights leaves no room for teachers on one card.

Not measured here: rollout and weight_sync. Rollouts are random tokens; there is no engine, nor its copy of the student.

Cells are begun in the order of what they tell until --budget-s seconds have passed; what is then left, or does not end
in time, is reported as skipped. Running out of GPU memory is a result. A run on a GPU with the arguments left as they
are writes bench/results/midsize_gpu.json, the figure beside it and the tables of docs/performance.md and the README;
any other one writes its JSON to OUT. --tiny does everything with models of 0.6 MB, on a CPU too.

--predict runs nothing and needs neither GPU nor weights: what `tcopd plan` says of every cell on one H100 of 80 GB goes
to bench/results/midsize_predicted.json. Its table stands in docs/performance.md until there is a measurement, which has
measured over predicted in a table of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from midsize_models import SHAPES, TINY
from midsize_plan import PLACEMENTS, Cell, config_tree, plan, predict, sizes
from midsize_predict import block, predictions
from midsize_report import BEGIN, END, README_BEGIN, README_END, cell_line, insert, markdown, summary
from table1 import ended_cleanly
from teacher_memory_plan import child_environment

from tcopd_fast.errors import UserError
from tcopd_fast.rundir import environment, write_atomically

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULT, PREDICTED = HERE / "results" / "midsize_gpu.json", HERE / "results" / "midsize_predicted.json"
DOC, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
DEFAULT_SHAPES, COUNTS, TOKENS = ("qwen3_0.6b", "qwen3_4b"), (1, 2, 4), 16384
TINY_COUNTS, TINY_TOKENS = (1, 2), 64
MEASURED_STEPS = 2
BUDGET_S = 280.0
# Far more than any cell takes that works.
CELL_LIMIT_S = 120.0
SHOWN_LINES = 12


class Waiting:
    """A process that imports everything while the cell before it is measured, and then waits for a cell of its own."""

    def __init__(self, log: Path, env: dict[str, str]) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "midsize_child.py")],
                env=env,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def begin(self, cell: dict[str, Any]) -> None:
        """Hand it its cell; one that has ended already is found out by `wait`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(cell) + "\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass

    def wait(self, timeout_s: float) -> int | None:
        """Its exit status; None when it was ended because it took longer."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])


class Bench:
    """The cells of one run, one after another, and the record that is written after each of them."""

    def __init__(self, arguments: argparse.Namespace, about: dict[str, Any]) -> None:
        self.began = time.monotonic()
        self.deadline = self.began + arguments.budget_s
        self.folder = Path(arguments.out).resolve()
        self.file, self.tokens, self.most = arguments.file, arguments.tokens, arguments.teachers[-1]
        self.on_gpu = torch.cuda.is_available()
        self.memory = torch.cuda.get_device_properties(0).total_memory if self.on_gpu else None
        threads = (os.cpu_count() or 1) if self.on_gpu else int(os.environ.get("OMP_NUM_THREADS", "1"))
        self.env = child_environment("cuda" if self.on_gpu else "cpu", threads)
        self.broken: dict[str, str] = {}
        self.cells = plan(arguments.shapes, arguments.teachers, arguments.placements)
        self.data: dict[str, Any] = {
            "environment": about,
            "device": "cuda" if self.on_gpu else "cpu",
            "device_bytes": self.memory,
            "tiny": arguments.tiny,
            "tokens": self.tokens,
            "measured_steps": MEASURED_STEPS,
            "budget_s": arguments.budget_s,
            "shapes": {name: asdict(SHAPES[name]) | sizes(SHAPES[name], self.tokens) for name in arguments.shapes},
            "preparation_s": {},
            "cells": [],
        }

    def run(self) -> dict[str, Any]:
        """Every cell. What went wrong with one is in its record; only Ctrl-C ends this early."""
        waiting: Waiting | None = None
        try:
            for number, cell in enumerate(self.cells):
                own, waiting = waiting or self._start(cell), None
                try:
                    if number + 1 < len(self.cells):
                        waiting = self._start(self.cells[number + 1])
                    row = self._measure(cell, own)
                finally:
                    if own is not None:
                        own.end()
                self.data["cells"].append(row)
                self.data["seconds"] = time.monotonic() - self.began
                write_atomically(self.file, json.dumps(self.data, indent=1) + "\n")
                print(f"{self.data['seconds']:5.0f} s  {cell_line(row)}", flush=True)
        finally:
            if waiting is not None:
                waiting.end()
        return self.data

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _start(self, cell: Cell) -> Waiting | None:
        """None when no time is left for it."""
        return Waiting(self.folder / "cells" / f"{cell.name}.log", self.env) if self._left() > 0 else None

    def _measure(self, cell: Cell, process: Waiting | None) -> dict[str, Any]:
        row = {**asdict(cell), "result": "skipped"}
        out = self.folder / "cells" / f"{cell.name}.json"
        if process is None or self._left() <= 0:
            return row
        out.unlink(missing_ok=True)
        trouble = self._prepare(cell)
        if self._left() <= 0:
            return row
        if trouble:
            return row | {"result": "failed", "message": trouble}
        tree = config_tree(self.folder / cell.shape, cell, self.tokens)
        spec = {"config": tree, "placement": cell.placement, "tokens": self.tokens, "steps": MEASURED_STEPS}
        began = time.monotonic()
        process.begin(spec | {"out": str(out)})
        row["predicted"] = predict(tree, cell, self.memory)
        cut_short = self._left() < CELL_LIMIT_S
        status = process.wait(max(1.0, min(CELL_LIMIT_S, self._left())))
        row["cell_s"] = time.monotonic() - began
        if status is None and cut_short:
            return row
        if status != 0 or not out.is_file():
            ended = f"took more than {CELL_LIMIT_S:.0f} s" if status is None else f"ended with status {status}"
            return row | {"result": "failed", "message": f"{ended}:\n{process.last_lines()}"}
        found = json.loads(out.read_text())
        return row | found | {"result": "out of memory" if "out_of_memory" in found else "measured"}

    def _prepare(self, cell: Cell) -> str | None:
        """Write the checkpoints that a cell needs, unless that was done or tried; what went wrong, if something did."""
        for kind in dict.fromkeys(("base", cell.kind)):
            name = f"{cell.shape} {kind}"
            if name in self.data["preparation_s"]:
                continue
            if name not in self.broken:
                began = time.monotonic()
                trouble = self._write(cell.shape, kind)
                if trouble is None:
                    self.data["preparation_s"][name] = time.monotonic() - began
                    continue
                self.broken[name] = f"writing {name} {trouble}"
            return self.broken[name]
        return None

    def _write(self, shape: str, kind: str) -> str | None:
        """In a process of its own, so that this one keeps nothing on the GPU."""
        limit = max(1.0, min(CELL_LIMIT_S, self._left()))
        command = [sys.executable, str(HERE / "midsize_models.py"), str(self.folder / shape), shape, kind]
        try:
            made = subprocess.run(
                [*command, str(self.most)], env=self.env, capture_output=True, text=True, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return f"took more than {limit:.0f} s"
        if made.returncode == 0:
            return None
        tail = "\n".join((made.stdout + made.stderr).splitlines()[-SHOWN_LINES:])
        return f"ended with status {made.returncode}:\n{tail}"


def blocks() -> list[tuple[Path, str, str, str]]:
    """(document, its block, markers) from bench/results: of the measurement, until there is one of the prediction.
    Raises UserError when there is neither."""
    if RESULT.is_file():
        data, link = json.loads(RESULT.read_text()), f"bench/results/{RESULT.name}"
        tables = markdown(data, f"../{link}", f"../{link.replace('.json', '.svg')}")
        return [(DOC, tables, BEGIN, END), (README, summary(data, link), README_BEGIN, README_END)]
    if PREDICTED.is_file():
        data = json.loads(PREDICTED.read_text())
        return [(DOC, block(data, f"../bench/results/{PREDICTED.name}"), BEGIN, END)]
    raise UserError(f"--report: there is neither {RESULT} nor {PREDICTED}; run on a GPU, or with --predict, first")


def report() -> None:
    """Figure, tables and the README's paragraph from bench/results. Raises UserError when there is nothing."""
    found = blocks()
    if RESULT.is_file():
        from midsize_figure import draw

        draw(json.loads(RESULT.read_text()), RESULT.with_suffix(".svg"))
    for doc, text, begin, end in found:
        if not insert(doc, text, begin, end):
            print(f"note: {doc.name} has no lines {begin} and {end}; nothing was written there")


def predict_all(arguments: argparse.Namespace, about: dict[str, Any]) -> int:
    """The JSON of --predict and its table."""
    data = predictions(about, arguments.shapes, arguments.teachers, arguments.placements, arguments.tokens)
    write_atomically(arguments.file, json.dumps(data, indent=1) + "\n")
    print(block(data, arguments.file.name))
    if arguments.file.resolve() == PREDICTED:
        report()
    return 0


def words(valid: Sequence[str], what: str) -> Any:
    """An argument type: words with commas between them, each one of `valid`, in that order."""

    def parse(text: str) -> tuple[str, ...]:
        given = [word.strip() for word in text.split(",")]
        if unknown := [word for word in given if word not in valid]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: {what} are {', '.join(valid)}")
        return tuple(name for name in valid if name in given)

    return parse


def counts(text: str) -> tuple[int, ...]:
    """`4,1` -> (1, 4)."""
    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of teachers from 1 on, for example 1,2,4")
    return tuple(found)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, completed: what --tiny changes, and `file`, where the JSON goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/midsize", metavar="DIR", help="work folder (default %(default)s)")
    parser.add_argument("--shapes", type=words([*SHAPES], "shapes"), metavar="S,…", help="default both")
    parser.add_argument("--teachers", type=counts, metavar="K,…", help="default 1,2,4; of --tiny 1,2")
    parser.add_argument("--placements", type=words(PLACEMENTS, "placements"), metavar="P,…", help="default all")
    parser.add_argument("--tokens", type=int, metavar="N", help="of a sequence (default 16384; of --tiny 64)")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, metavar="S", help="default %(default)s")
    parser.add_argument("--tiny", action="store_true", help="models of 0.6 MB: shows that everything works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default bench/results; OUT for a reduced run")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--predict", action="store_true", help="measure nothing, write what `tcopd plan` says of it")
    only.add_argument("--report", action="store_true", help="measure nothing, write figure and tables again")
    arguments = parser.parse_args(argv)
    given = (arguments.shapes, arguments.teachers, arguments.placements, arguments.tokens)
    reduced = arguments.tiny or any(given) or not (arguments.predict or torch.cuda.is_available())
    result = PREDICTED if arguments.predict else RESULT
    arguments.shapes = arguments.shapes or (TINY if arguments.tiny else DEFAULT_SHAPES)
    arguments.teachers = arguments.teachers or (TINY_COUNTS if arguments.tiny else COUNTS)
    arguments.placements = arguments.placements or PLACEMENTS
    arguments.tokens = arguments.tokens or (TINY_TOKENS if arguments.tiny else TOKENS)
    arguments.file = arguments.json or (Path(arguments.out) / result.name if reduced else result)
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """What can be refused before anything starts. Raises UserError."""
    if arguments.tokens < 32:
        raise UserError(f"--tokens {arguments.tokens}: at least 32, one of them for the prompt")
    if arguments.budget_s <= 0:
        raise UserError(f"--budget-s {arguments.budget_s:g}: must be above 0")
    large = [name for name in arguments.shapes if name not in TINY]
    if large and not arguments.predict and not torch.cuda.is_available():
        raise UserError(
            f"--shapes {large[0]}: torch sees no CUDA device; --tiny rehearses the same steps on a CPU, --predict "
            "says what a GPU would do"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring. Exit status 1 when a cell failed, or none was measured."""
    arguments = parse(argv)
    return ended_cleanly(lambda: make(arguments), "interrupted; what was measured is in the JSON")


def make(arguments: argparse.Namespace) -> int:
    """Measure and write, or write again."""
    if arguments.report:
        report()
        return 0
    check(arguments)
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    about = environment()
    # A copy of the tree may have no .git.
    about["git_sha"] = about["git_sha"] or os.environ.get("GIT_SHA")
    about["command"] = f"python bench/{about['command']}"
    if arguments.predict:
        return predict_all(arguments, about)
    data = Bench(arguments, about).run()
    print(markdown(data, arguments.file.name, arguments.file.with_suffix(".svg").name))
    if arguments.file.resolve() == RESULT:
        report()
    else:
        from midsize_figure import draw

        draw(data, arguments.file.with_suffix(".svg"))
    results = [cell["result"] for cell in data["cells"]]
    for message in dict.fromkeys(cell["message"] for cell in data["cells"] if cell["result"] == "failed"):
        print(f"failed: {message}", file=sys.stderr)
    return 1 if "failed" in results or "measured" not in results else 0


if __name__ == "__main__":
    sys.exit(main())
