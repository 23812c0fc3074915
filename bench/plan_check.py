"""How far `tcopd plan` is from measured runs: real training runs on the CPU, in fresh processes, stage by stage.

    python bench/plan_check.py --out runs/plan_check [--only NAME …] [--json FILE] [--only-report]

Every case trains a randomly initialised Qwen3 for two steps with this trainer and reads peak_memory_bytes/<stage> of
the second, the resident size of the largest rank. Subtracted is what the process takes without a model to speak of: the
same stage of a run of the same kind whose model has 50 thousand weights. glibc is told to hand every block of 64 KiB or
more back to the system when it is freed, so that resident memory is memory in use. Finished cases are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from plan_report import CHECK_JSON, write_blocks
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tcopd_fast.config import Config
from tcopd_fast.config_io import validate
from tcopd_fast.data import load_prompts
from tcopd_fast.dist import free_port
from tcopd_fast.miniature import asset
from tcopd_fast.models import DTYPES
from tcopd_fast.plan.devices import Cluster
from tcopd_fast.plan.memory import memory_of
from tcopd_fast.plan.shapes import student_shape
from tcopd_fast.plan.workload import frozen_models, shapes_of, workload_of
from tcopd_fast.rundir import environment

STAGES = ("rollout", "scoring", "loss", "learner", "weight_sync")
MODELS = {
    "tiny": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64},
    "21M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 16384},
    "13M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 8192},
    "33M": {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 9, "vocab_size": 24000},
    "78M": {
        "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 3, "vocab_size": 50304,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
TIMEOUT_S = 600


@dataclass(frozen=True)
class Case:
    """One run. teachers: checkpoints beside the reference's (0: the teacher is the reference's checkpoint).

    settings: sections of the configuration, over those in `tree`.
    """

    name: str
    model: str
    ranks: int = 1
    dtype: str = "float32"
    teachers: int = 1
    placement: str = "resident"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def baseline(self) -> Case:
        """The same process with hardly any weights; it imports what the case does."""
        kinds: dict[str, Mapping[str, Any]] = {}
        if "lora" in self.settings.get("model", {}):
            kinds["lora"] = lora(1)
        if "offload" in self.settings.get("learner", {}):
            kinds["offload"] = {"learner": {"offload": "optimizer"}}
        name = "-".join(["baseline", str(self.ranks), self.dtype, *kinds])
        sections = {key: values for kind in kinds.values() for key, values in kind.items()}
        return Case(name, "tiny", self.ranks, self.dtype, 0, settings=sections)


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"learner": {"zero_stage": stage, **more}}


def lora(rank: int) -> dict[str, Any]:
    return {"model": {"lora": {"rank": rank, "alpha": 2 * rank}}}


HALVES = {"minibatches": 2}
MICRO = {"max_tokens_per_microbatch": 150}
LONG = {"rollout": {"prompts_per_step": 12, "max_new_tokens": 160}}
CHECKPOINTING = {"model": {"gradient_checkpointing": True}}
CASES = (
    Case("zero1", "21M", teachers=0, settings=zero(1)),
    Case("zero2", "21M", settings=zero(2)),
    Case("zero3", "21M", settings=zero(3)),
    Case("zero1-micro", "21M", settings=zero(1, max_tokens_per_microbatch=200)),
    Case("zero2-micro", "21M", settings=zero(2, max_tokens_per_microbatch=200)),
    Case("old-logprobs", "13M", settings=zero(2, minibatches=2)),
    Case("activations", "13M", settings={**zero(2), **LONG}),
    Case("checkpointing", "13M", settings={**zero(2), **LONG, **CHECKPOINTING}),
    Case("resident-3", "21M", teachers=3, settings=zero(2)),
    Case("offload-3", "21M", teachers=3, placement="offload", settings=zero(2)),
    Case("untied", "78M", settings=zero(2)),
    Case("untied-offload", "78M", placement="offload", settings=zero(2)),
    Case("ranks2-zero1", "21M", 2, settings=zero(1)),
    Case("ranks2-zero2", "21M", 2, settings=zero(2)),
    Case("ranks2-zero3", "21M", 2, settings=zero(3)),
    Case("ranks2-sharded-3", "21M", 2, teachers=3, placement="sharded", settings=zero(3)),
    Case("bf16-zero1", "21M", dtype="bfloat16", settings=zero(1)),
    Case("bf16-zero2", "21M", dtype="bfloat16", settings=zero(2)),
    Case("bf16-ranks2-zero3", "21M", 2, "bfloat16", settings=zero(3)),
    Case("lora-zero1", "21M", settings={**zero(1), **lora(16)}),
    Case("lora-zero2-r256", "21M", settings={**zero(2), **lora(256)}),
    Case("lora-ranks2-zero3", "21M", 2, settings={**zero(3), **lora(256)}),
    Case("bf16-lora-zero2", "21M", dtype="bfloat16", settings={**zero(2), **lora(256)}),
    Case("offload-zero1", "21M", settings=zero(1, offload="optimizer")),
    Case("offload-zero2", "21M", settings=zero(2, offload="optimizer")),
    Case("offload-ranks2-zero3", "21M", 2, settings=zero(3, offload="optimizer_and_weights")),
    Case("bf16-offload-zero2", "21M", dtype="bfloat16", settings=zero(2, offload="optimizer")),
    Case("offload-ranks2-zero2-micro", "33M", 2, teachers=2, settings=zero(2, **MICRO, offload="optimizer")),
    Case("bf16-offload-zero1-micro", "33M", dtype="bfloat16", settings=zero(1, **MICRO, **HALVES, offload="optimizer")),
)
# First run when the model was finished, which was not fitted to them: the first four when it knew neither LoRA
# students nor offload, the others when it did.
HELD_OUT = (
    Case("held-out-1", "33M", 2, teachers=3, placement="sharded", settings=zero(2, **MICRO)),
    Case("held-out-2", "33M", teachers=2, placement="offload", settings={**zero(1, minibatches=2), **CHECKPOINTING}),
    Case("held-out-3", "33M", 2, teachers=2, settings={**zero(3, **MICRO), **CHECKPOINTING}),
    Case("held-out-4", "33M", dtype="bfloat16", settings={**zero(2, minibatches=2), **LONG}),
    Case("held-out-5", "33M", 2, settings={**zero(3, **MICRO), "model": lora(64)["model"] | CHECKPOINTING["model"]}),
    Case("held-out-6", "33M", placement="offload", settings={**zero(2, offload="optimizer"), **lora(128), **LONG}),
    Case("held-out-7", "33M", 2, "bfloat16", settings={**zero(2, **MICRO, offload="optimizer"), **LONG}),
    Case("held-out-8", "13M", teachers=2, settings={**zero(1, **MICRO, offload="optimizer"), **lora(128)}),
)


def checkpoint(folder: Path, model: str, dtype: str, seed: int) -> Path:
    """A randomly initialised Qwen3 with the miniature's tokenizer, written once."""
    path = folder / "models" / f"{model}-{dtype}-{seed}"
    if not path.is_dir():
        torch.manual_seed(seed)
        shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True}
        config = Qwen3Config(**{**shape, **MODELS[model]}, max_position_embeddings=4096, eos_token_id=1, pad_token_id=0)
        partial = path.with_name(path.name + ".partial")
        Qwen3ForCausalLM(config).to(DTYPES[dtype]).save_pretrained(partial)
        AutoTokenizer.from_pretrained(str(asset("base"))).save_pretrained(partial)
        partial.rename(path)
    return path


def tree(case: Case, folder: Path) -> dict[str, Any]:
    """The configuration of a case."""
    student = checkpoint(folder, case.model, case.dtype, 0)
    teachers = [checkpoint(folder, case.model, case.dtype, k) for k in range(1, case.teachers + 1)] or [student]
    sections: dict[str, Any] = {
        "run_dir": str(folder / case.name),
        "steps": 2,
        "model": {"path": str(student), "dtype": case.dtype},
        "teachers": {f"t{k}": {"path": str(path)} for k, path in enumerate(teachers, 1)},
        "data": {"train": [{"path": "miniature:train", "limit": 256}], "max_prompt_tokens": 32},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 64},
        "objective": {"lambdas": {f"t{k}": 1.5 for k in range(1, len(teachers) + 1)}},
        "scoring": {"placement": case.placement},
        "logging": {"tensorboard": False, "token_samples": 0},
    }
    for name, values in case.settings.items():
        sections[name] = {**sections.get(name, {}), **values}
    return sections


def measure(case: Case, folder: Path) -> dict[str, int]:
    """Peak resident bytes by stage, of the second step and the largest rank; runs the case unless it is finished."""
    run_dir = folder / case.name
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file() or len(metrics.read_text().splitlines()) < 2:
        shutil.rmtree(run_dir, ignore_errors=True)
        config = folder / f"{case.name}.yaml"
        config.write_text(yaml.safe_dump(tree(case, folder)))
        start_ranks([sys.executable, "-m", "tcopd_fast.train", "--config", str(config)], case.ranks)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    last = json.loads(metrics.read_text().splitlines()[-1])
    return {stage: int(last[f"peak_memory_bytes/{stage}"]) for stage in STAGES}


def start_ranks(command: Sequence[str], ranks: int) -> None:
    """One process per rank, one thread each. Raises RuntimeError with the output when one fails."""
    shared = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(outputs)[-4000:])


def predict(case: Case, folder: Path) -> dict[str, Any]:
    """Bytes by stage for ranks on a CPU, and what the model is."""
    config = validate(tree(case, folder), Config)
    shapes = shapes_of(config, {})
    models = [replace(m, placement=m.placement or "resident") for m in frozen_models(config, shapes)]
    # Of the data the mean prompt is known; random models end a response about once in V tokens.
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    prompts = load_prompts(config.data.train, tokenizer, config.data).prompts
    work = workload_of(
        config, case.ranks, fmean(len(p.token_ids) for p in prompts), float(config.rollout.max_new_tokens)
    )
    student = student_shape(shapes[config.model.path], config.model.lora)
    memory = memory_of(config, student, models, work, Cluster(case.ranks, 1 << 50, on_cpu=True))
    return {
        "weights": student.weights,
        "frozen_models": len(models),
        "placement": ", ".join(dict.fromkeys(str(m.placement) for m in models)),
        "stages": {stage: memory.stage_peak(stage) for stage in STAGES},
    }


def compare(case: Case, measured: Mapping[str, int], base: Mapping[str, int], predicted: Mapping[str, Any]) -> dict:
    """One row of the result: bytes above the baseline by stage, and relative errors of the prediction."""
    above = {stage: measured[stage] - base[stage] for stage in STAGES}
    guess = predicted["stages"]
    peak, guessed = max(above.values()), max(guess.values())
    return {
        "case": case.name,
        "held_out": case in HELD_OUT,
        "model": case.model,
        "weights": predicted["weights"],
        "frozen_models": predicted["frozen_models"],
        "ranks": case.ranks,
        "dtype": case.dtype,
        "placement": predicted["placement"],
        "settings": case.settings,
        "measured_bytes": above,
        "baseline_bytes": dict(base),
        "predicted_bytes": guess,
        "error": {stage: guess[stage] / above[stage] - 1 for stage in STAGES},
        "peak_measured_bytes": peak,
        "peak_predicted_bytes": guessed,
        "peak_error": guessed / peak - 1,
    }


def commit_of(case: Case, folder: Path) -> str | None:
    """The commit that a case was measured at: finished cases are not run again when the tree moves on."""
    return json.loads((folder / case.name / "environment.json").read_text())["git_sha"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/plan_check"), metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES + HELD_OUT], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/plan_check.json")
    parser.add_argument("--only-report", action="store_true", help="write docs/plan.md from the JSON, run nothing")
    arguments = parser.parse_args()
    if arguments.only_report:
        write_blocks()
        return 0
    folder = arguments.out.resolve()
    (folder / "models").mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    rows = []
    for case in CASES + HELD_OUT:
        if arguments.only and case.name not in arguments.only:
            continue
        base, measured = measure(case.baseline, folder), measure(case, folder)
        rows.append(compare(case, measured, base, predict(case, folder)) | {"commit": commit_of(case, folder)})
        errors = "  ".join(f"{stage} {100 * error:+.1f}" for stage, error in rows[-1]["error"].items())
        print(f"{case.name:18} peak {100 * rows[-1]['peak_error']:+.1f} %   {errors}", flush=True)
    about = environment()
    about |= {"command": f"python bench/{about['command']}"}
    result = {"environment": about, "seconds": time.monotonic() - started, "rows": rows}
    # A part of the cases is no result.
    target = arguments.json or (folder / CHECK_JSON.name if arguments.only else CHECK_JSON)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {target}")
    if target == CHECK_JSON:
        write_blocks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
