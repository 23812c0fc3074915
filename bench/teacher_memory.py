"""What frozen teachers cost: memory of K teachers in every placement, and their share of a training step.

    python bench/teacher_memory.py [--out runs/teacher_memory] [--device cpu|cuda] [--no-steps] [--tiny]

Memory: for every placement and every K a fresh process (sharded: also two ranks) builds the trainer's own Scorer and
scores the same rollouts, which the student has sampled; recorded are peaks over two scoring passes, their seconds, and
the largest difference to the logprobs of the same teachers, resident. Share of a step: `tcopd train` runs with
1, 2 and 4 teachers (on the CPU; --no-steps leaves them out). The checkpoints are random Qwen3 models
(teacher_memory_models.py), written to --out. A whole run writes its JSON to bench/results, figure and tables of
docs/teachers.md; a reduced one (--tiny, --teachers, --placements) only its JSON, to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from teacher_memory_figure import draw
from teacher_memory_models import SHAPES, file_bytes, write_models
from teacher_memory_plan import (
    PLACEMENTS,
    Cell,
    child_environment,
    config_tree,
    largest_difference,
    measure_cell,
    plan,
)
from teacher_memory_report import (
    BEGIN,
    END,
    README_BEGIN,
    README_END,
    insert,
    memory_block,
    readme_block,
    summary_lines,
)
from teacher_memory_steps import measure_steps

from tcopd_fast.config import Config
from tcopd_fast.config_io import validate
from tcopd_fast.data import load_prompts
from tcopd_fast.errors import UserError
from tcopd_fast.models import check_models
from tcopd_fast.rollout.hf import HfEngine
from tcopd_fast.rundir import environment, write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOC = ROOT / "docs" / "teachers.md"
README = ROOT / "README.md"
# Device -> its file in bench/results.
DOCUMENTED = {"cpu": "teacher_memory.json", "cuda": "teacher_memory_gpu.json"}
COUNTS = (0, 1, 2, 4, 8)
# The first pass also warms caches; the memory of all counts.
PASSES = 2


def sample(tree: dict[str, Any], device: str) -> list[dict[str, list[int]]]:
    """Rollouts of the configured prompts from the student, by the project's own engine."""
    config = validate(tree, Config)
    models = check_models(config)
    prompts = load_prompts(config.data.train, models.tokenizer, config.data).prompts
    limit = config.rollout.max_new_tokens
    engine = HfEngine(
        config.model.path, models.tokenizer, dtype=config.model.dtype, max_batch_size=config.rollout.max_batch_size,
        vocab_size=models.vocab_size, device=torch.device(device),
    )  # fmt: skip
    chosen = prompts[: config.rollout.prompts_per_step]
    rollouts = engine.generate(chosen, samples=1, max_new_tokens=limit, temperature=1.0, seed=0)
    return [{"prompt": list(r.prompt.token_ids), "response": list(r.token_ids)} for r in rollouts]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the models, run every cell, compare scores; the JSON without the steps."""
    folder, device, counts = Path(arguments.out).resolve() / "models", arguments.device, arguments.teachers
    shape = SHAPES["tiny" if arguments.tiny else "gpu" if device == "cuda" else "cpu"]
    began = time.perf_counter()
    write_models(folder, shape, arguments.placements, max(1, *counts), arguments.jobs)

    def tree(series: str, count: int) -> dict[str, Any]:
        return config_tree(folder, series, count, shape.sequences, shape.response_tokens)

    rollouts = sample(tree("resident", 0), device)
    (folder / "rollouts.json").write_text(json.dumps(rollouts))
    print(f"checkpoints and rollouts: {time.perf_counter() - began:.0f} s", flush=True)
    env = child_environment(device, threads=1)

    def run(cell: Cell) -> dict[str, Any]:
        config = None if cell.teachers is None else tree(cell.series, cell.teachers)
        found = measure_cell(cell, folder, config, PASSES, env)
        seconds = [one["seconds"] for one in found["processes"][0]["passes"]]
        print(f"{cell.name}: passes of {', '.join(f'{s:.1f}' for s in seconds)} s", flush=True)
        return found

    ranks = [size for size in (1, 2) if device == "cpu" or size <= torch.cuda.device_count()]
    cells = plan(arguments.placements, counts, ranks)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        measured = list(pool.map(run, cells))
    for cell, row in zip(cells, measured, strict=True):
        row["max_abs_difference"] = largest_difference(folder, cell, max(counts))
    return {
        "device": device,
        "jobs": arguments.jobs,
        "threads": 1,
        "shape": asdict(shape),
        "scored_tokens": sum(len(row["response"]) for row in rollouts),
        "packed_tokens": sum(len(row["prompt"]) + len(row["response"]) - 1 for row in rollouts),
        "bytes": {kind: file_bytes(folder / f"{kind}_1") for kind in ("full", "delta", "lora")},
        "cells": measured,
    }


def runs_to_report() -> list[tuple[dict[str, Any], str, str]]:
    """(content, link from docs/ to it, link to its figure) of the JSON files that the document's tables show."""
    files = [RESULTS / name for name in DOCUMENTED.values() if (RESULTS / name).is_file()]
    links = [f"../bench/results/{file.name}" for file in files]
    return [(json.loads(f.read_text()), link, link.replace(".json", ".svg")) for f, link in zip(files, links)]


def from_root(runs: Sequence[tuple[dict[str, Any], str, str]]) -> list[tuple[dict[str, Any], str, str]]:
    """The same with links from the README."""
    return [(data, link.removeprefix("../"), figure.removeprefix("../")) for data, link, figure in runs]


def report() -> None:
    """Figures and tables from what is in bench/results. Raises UserError when there is nothing."""
    runs = runs_to_report()
    if not runs:
        raise UserError(f"--report: {RESULTS} has no {' or '.join(DOCUMENTED.values())}; run without --report first")
    for data, _, figure in runs:
        draw(data, RESULTS / Path(figure).name)
    insert(DOC, memory_block(runs), BEGIN, END)
    insert(README, readme_block(from_root(runs)), README_BEGIN, README_END)


def numbers(text: str) -> list[int]:
    """`0,1,4` -> [0, 1, 4]."""
    found = sorted({int(word) for word in text.split(",")})
    if not found or found[0] < 0 or len(found) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: give at least two counts of teachers, for example 0,1,2")
    return found


def placements(text: str) -> tuple[str, ...]:
    """`delta,offload` -> ("offload", "delta")."""
    words = text.split(",")
    if unknown := [word for word in words if word not in PLACEMENTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: placements are {', '.join(PLACEMENTS)}")
    return tuple(name for name in PLACEMENTS if name in words)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/teacher_memory", metavar="DIR", help="work folder (default %(default)s)")
    parser.add_argument("--device", choices=[*DOCUMENTED], default="cpu")
    parser.add_argument("--teachers", type=numbers, default=list(COUNTS), metavar="K,…", help="default 0,1,2,4,8")
    parser.add_argument("--placements", type=placements, default=PLACEMENTS, metavar="P,…", help="default all")
    parser.add_argument("--tiny", action="store_true", help="models of 0.2 MB: shows that everything works")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; above 1 their seconds say little")
    parser.add_argument("--no-steps", action="store_true", help="leave out the training runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default bench/results; OUT for a reduced run")
    parser.add_argument("--report", action="store_true", help="measure nothing, write figures and tables again")
    arguments = parser.parse_args(argv)
    reduced = arguments.tiny or arguments.teachers != list(COUNTS) or arguments.placements != PLACEMENTS
    name = DOCUMENTED[arguments.device]
    file = arguments.json or (Path(arguments.out) if reduced else RESULTS) / name
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device; leave it out to measure on the CPU")
        if not arguments.report:
            about = environment()
            data = {"environment": about | {"command": f"python bench/{about['command']}"}, **measure(arguments)}
            if not arguments.no_steps:
                data["steps"] = measure_steps(Path(arguments.out).resolve() / "steps", arguments.tiny)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(data, indent=1) + "\n")
            print("\n".join(summary_lines(data)))
        if arguments.report or file.resolve() == RESULTS / name:
            report()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
