"""Re-create the miniature's checkpoints and problem files from nothing.

Base: supervised on a mix of both domains, half of the responses with work, some problems under the wrong tag.
Expert: GRPO on ``math`` from the base, stopped early. Anti-expert: the base fine-tuned on ``largest``, whose
answers need no work. ``python -m tcopd_fast.miniature.build OUT_DIR`` runs it; it takes a few minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from tcopd_fast.miniature.task import (
    DOMAINS,
    TAGS,
    Problem,
    chain_of,
    distinct_problems,
    problem_stream,
    response_to,
    write_problems,
)
from tcopd_fast.miniature.tokenizer import make_tokenizer
from tcopd_fast.miniature.training import MAX_RESPONSE_TOKENS, Example, grpo, measure, supervised_fine_tune

MODELS = ("base", "expert", "anti_expert")
HELDOUT_FILES = {"math": "heldout.jsonl", "largest": "heldout_largest.jsonl"}
TRAIN_FILES = {"math": "train.jsonl", "largest": "train_largest.jsonl"}


@dataclass(frozen=True)
class Recipe:
    """Every number that shapes the miniature. Shares are probabilities in 0..1, batches count sequences."""

    train_problems: int = 4096
    heldout_problems: int = 512
    measure_samples: int = 4

    batch: int = 128
    base_steps: int = 1500
    base_lr: float = 2e-3
    math_share: float = 0.7
    work_share: float = 0.5
    wrong_tag_share: float = 0.15

    expert_steps: int = 10
    expert_lr: float = 1e-4
    expert_prompts: int = 32
    expert_group: int = 8

    anti_expert_steps: int = 40
    anti_expert_lr: float = 3e-4


def build(
    out_dir: Path, *, seed: int = 0, recipe: Recipe | None = None, progress: Callable[[str], None] = print
) -> dict:
    """Write base, expert, anti_expert (each with its tokenizer), the problem files and ``build_report.json``.

    It runs on one CPU thread in float32: the same machine, library versions, seed and recipe give the same
    weights bit for bit. Files of the same names in `out_dir` are overwritten.

    Returns the report: seconds per stage, accuracies with standard errors, recipe, versions, device.
    """
    recipe = recipe or Recipe()
    out_dir.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = _build(out_dir, seed, recipe, progress)
    finally:
        torch.set_num_threads(threads)
    (out_dir / "build_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _build(out_dir: Path, seed: int, recipe: Recipe, progress: Callable[[str], None]) -> dict:
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(stage: str) -> None:
        seconds[stage] = round(time.perf_counter() - started - sum(seconds.values()), 1)
        progress(f"{stage}: done in {seconds[stage]} s")

    tokenizer = make_tokenizer()
    heldout = write_problem_files(out_dir, seed, recipe)
    heldout_chains = {chain_of(p.problem) for problems in heldout.values() for p in problems}
    lap("problems")

    models = {"base": new_model(tokenizer, seed)}
    train_base(models["base"], tokenizer, recipe, seed, heldout_chains, progress)
    lap("base")
    models["expert"] = copy.deepcopy(models["base"])
    train_expert(models["expert"], tokenizer, recipe, seed, heldout_chains, progress)
    lap("expert")
    models["anti_expert"] = copy.deepcopy(models["base"])
    train_anti_expert(models["anti_expert"], tokenizer, recipe, seed, heldout_chains, progress)
    lap("anti_expert")

    measured: dict[str, dict] = {}
    for name, model in models.items():
        model.save_pretrained(out_dir / name)
        tokenizer.save_pretrained(out_dir / name)
        measured[name] = measure_all(model, tokenizer, heldout, recipe.measure_samples)
        sampled = {domain: values["sampled"]["accuracy"] for domain, values in measured[name].items()}
        shares = ", ".join(f"{domain} {100 * share:.1f}%" for domain, share in sampled.items())
        progress(f"{name}: {shares} at T=1")
    lap("measure")
    return {
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
        "heldout": measured,
        "parameters": sum(p.numel() for p in models["base"].parameters()),
        "seed": seed,
        "recipe": asdict(recipe),
        "device": f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        "threads": 1,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def write_problem_files(out_dir: Path, seed: int, recipe: Recipe) -> dict[str, list[Problem]]:
    """Write held-out and train problems, no chain in two of them; return the held-out ones by domain."""
    heldout: dict[str, list[Problem]] = {}
    taken: set[str] = set()
    for domain in DOMAINS:
        heldout[domain] = distinct_problems(
            domain, recipe.heldout_problems, seed, split="heldout", exclude=frozenset(taken)
        )
        taken |= {chain_of(p.problem) for p in heldout[domain]}
        write_problems(out_dir / HELDOUT_FILES[domain], heldout[domain])
    for domain in DOMAINS:
        train = distinct_problems(domain, recipe.train_problems, seed + 1, split="train", exclude=frozenset(taken))
        taken |= {chain_of(p.problem) for p in train}
        write_problems(out_dir / TRAIN_FILES[domain], train)
    return heldout


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    """Return a freshly initialised Qwen3 of 0.34M parameters, float32, tied embeddings.

    The vocabulary is padded to 32 rows; head_dim 32 is the smallest that common inference engines accept.
    """
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=MAX_RESPONSE_TOKENS,
        do_sample=True,
        temperature=1.0,
    )
    return model


def train_base(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    seed: int,
    heldout_chains: Collection[str],
    progress: Callable[[str], None],
) -> None:
    """Supervise on the mix; a wrong tag gives a problem the response of the other domain."""
    rng = random.Random(f"mix-{seed}")
    streams = {domain: problem_stream(domain, seed + 2, exclude=heldout_chains) for domain in DOMAINS}
    other_tag = {TAGS["math"]: TAGS["largest"], TAGS["largest"]: TAGS["math"]}

    def example() -> Example:
        problem = next(streams["math" if rng.random() < recipe.math_share else "largest"])
        response = response_to(problem, show_work=rng.random() < recipe.work_share)
        if rng.random() < recipe.wrong_tag_share:
            problem = other_tag[problem[0]] + problem[1:]
        return Example(problem, response)

    supervised_fine_tune(
        model,
        tokenizer,
        lambda: [example() for _ in range(recipe.batch)],
        steps=recipe.base_steps,
        lr=recipe.base_lr,
        on_step=_step_reporter("base", "loss", recipe.base_steps, 250, progress),
    )


def train_expert(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    seed: int,
    heldout_chains: Collection[str],
    progress: Callable[[str], None],
) -> None:
    """Run a fixed, small number of GRPO steps on ``math``, so that the expert stays imperfect."""
    problems = problem_stream("math", seed + 3, exclude=heldout_chains)
    grpo(
        model,
        tokenizer,
        lambda: [next(problems) for _ in range(recipe.expert_prompts)],
        steps=recipe.expert_steps,
        group=recipe.expert_group,
        lr=recipe.expert_lr,
        generator=torch.Generator().manual_seed(seed),
        on_step=_step_reporter("expert", "mean reward", recipe.expert_steps, 5, progress),
    )


def train_anti_expert(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    seed: int,
    heldout_chains: Collection[str],
    progress: Callable[[str], None],
) -> None:
    """Fine-tune on correct, correctly tagged, direct answers of ``largest``."""
    problems = problem_stream("largest", seed + 4, exclude=heldout_chains)

    def example() -> Example:
        problem = next(problems)
        return Example(problem, response_to(problem, show_work=False))

    supervised_fine_tune(
        model,
        tokenizer,
        lambda: [example() for _ in range(recipe.batch)],
        steps=recipe.anti_expert_steps,
        lr=recipe.anti_expert_lr,
        on_step=_step_reporter("anti_expert", "loss", recipe.anti_expert_steps, 10, progress),
    )


def measure_all(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    heldout: dict[str, list[Problem]],
    samples: int,
) -> dict[str, dict]:
    """Return, per domain, the measurement at T=1 (`samples` responses per problem) and the greedy one."""
    run = partial(measure, model, tokenizer)
    return {
        domain: {
            "sampled": asdict(run(problems, samples=samples, temperature=1.0)),
            "greedy": asdict(run(problems, temperature=0.0)),
        }
        for domain, problems in heldout.items()
    }


def _step_reporter(
    stage: str, quantity: str, steps: int, every: int, progress: Callable[[str], None]
) -> Callable[[int, float], None]:
    started = time.perf_counter()

    def report(step: int, value: float) -> None:
        if (step + 1) % every == 0:
            elapsed = time.perf_counter() - started
            left = elapsed / (step + 1) * (steps - step - 1)
            at = f"{stage}: step {step + 1}/{steps}"
            progress(f"{at}, {quantity} {value:.3f}, {elapsed:.0f} s, {left:.0f} s left")

    return report


def main() -> None:
    """Build into the folder named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tcopd_fast.miniature.build", description=__doc__)
    parser.add_argument("out_dir", type=Path, help="folder that receives the checkpoints and problem files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build(args.out_dir, seed=args.seed)


if __name__ == "__main__":
    main()
