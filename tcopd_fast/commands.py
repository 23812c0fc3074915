"""`tcopd eval` and `tcopd score`: single-process commands on finished checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tcopd_fast import rundir
from tcopd_fast.config import EvalRunConfig
from tcopd_fast.config_io import dump_config, read_tree, validate
from tcopd_fast.config_sections import LoggingConfig
from tcopd_fast.data import load_eval_sets
from tcopd_fast.dist import init_world
from tcopd_fast.errors import UserError
from tcopd_fast.evaluate import evaluate, write_samples
from tcopd_fast.judges import Judges
from tcopd_fast.models import (
    PackedCausalLM,
    check_tokenizer,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
    max_positions,
)
from tcopd_fast.monitor import MetricsLog, Progress
from tcopd_fast.packing import pack, split_by_tokens
from tcopd_fast.rollout.build import build_engine
from tcopd_fast.run import counter


def run_eval(
    model: str, data: Sequence[str], out: Path, overrides: Sequence[str], name: str | None, split: str | None
) -> int:
    """Evaluate a checkpoint: OUT/eval.jsonl, every sample to parquet, and a printed line per problem set.

    name, split: of Hugging Face datasets among `data`.
    """
    source = {key: value for key, value in (("name", name), ("split", split)) if value is not None}
    defaults = {
        "model": {"path": model, "dtype": "bfloat16" if torch.cuda.is_available() else "float32"},
        "data": {"train": [{"path": path, **source} for path in data]},
    }
    config = validate(read_tree(None, overrides, defaults), EvalRunConfig)
    if (out / "config.yaml").exists():
        raise UserError(f"--out {out}: already holds results; give another folder")
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    sets = load_eval_sets(config.data.train, tokenizer, config.data)
    new_tokens = config.eval.max_new_tokens or config.rollout.max_new_tokens
    longest = max(len(prompt.token_ids) for prompts in sets.values() for prompt in prompts) + new_tokens
    positions = max_positions(load_model_config(config.model.path, config.model.trust_remote_code))
    if longest > positions:
        raise UserError(
            f"rollout.max_new_tokens={new_tokens}: with the longest prompt that is {longest} tokens, and {model} holds "
            f"{positions}; lower it"
        )
    with Judges(config.judge) as judges:
        judges.check(chain(*sets.values()))
    out.mkdir(parents=True, exist_ok=True)
    world = init_world()
    engine = build_engine(
        config.model,
        config.rollout,
        tokenizer,
        max_model_len=longest,
        vocab_size=None,
        seed=config.seed,
        world=world,
    )
    log = MetricsLog(out, LoggingConfig(tensorboard=False), resume_step=-1)
    with Judges(config.judge) as judges, Progress(1) as progress:
        for set_name, prompts in sets.items():
            result = evaluate(
                engine,
                prompts,
                judges,
                samples=config.eval.samples,
                temperature=config.eval.temperature,
                max_new_tokens=new_tokens,
                seed=config.seed,
                on_finished=counter(progress, f"evaluating {set_name}", len(prompts) * config.eval.samples),
            )
            record = {
                "step": 0,
                "set": set_name,
                "domain": prompts[0].domain,
                "temperature": config.eval.temperature,
                **result.summary(),
                "reverse_kl": {},
            }
            write_samples(result, out / "eval" / f"step_000000_{set_name}.parquet")
            log.log_eval(record)
            progress.evaluation(record)
    log.close()
    engine.close()
    world.leave()
    (out / "environment.json").write_text(json.dumps(rundir.environment(config.seed), indent=1) + "\n")
    rundir.write_atomically(out / "config.yaml", dump_config(config))
    return 0


def run_score(models: Sequence[str], text: Path, out: Path, temperature: float, dtype: str, max_tokens: int) -> int:
    """Write one row per text: its tokens and, per model, the logprob of every scored token.

    A `text` row is scored from its second token on, a `prompt`/`response` row on the response. Columns: row,
    token_ids, tokens, and logprob/NAME (float32 lists of equal length), in nats.
    """
    named = dict(_named(item) for item in models)
    if len(named) != len(models):
        raise UserError("--model: two models have the same name; give each its own, NAME=PATH")
    paths = list(named.items())
    tokenizer = load_tokenizer(paths[0][1])
    for name, path in paths[1:]:
        check_tokenizer(f"--model {name}", path, tokenizer, load_tokenizer(path))
    pairs = [_token_pair(row, number, text, tokenizer) for number, row in _jsonl(text)]
    if not pairs:
        raise UserError(f"--text {text}: no rows; give one JSON object a line with `text`, or `prompt` and `response`")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    columns: dict[str, list[Any]] = {
        "row": list(range(len(pairs))),
        "token_ids": [target for _, target in pairs],
        "tokens": [[tokenizer.decode([token]) for token in target] for _, target in pairs],
    }
    for name, path in paths:
        lm = load_causal_lm(path, dtype=dtype, attention="sdpa", vocab_size=None).to(device).eval()
        columns[f"logprob/{name}"] = _score(lm, pairs, temperature, max_tokens, device)
        del lm  # before the next one is loaded
        print(f"{name}: {sum(len(target) for _, target in pairs)} tokens scored")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    pq.write_table(pa.table(columns), partial)
    partial.replace(out)
    print(f"written: {out}")
    return 0


@torch.inference_mode()
def _score(
    lm: PackedCausalLM,
    pairs: Sequence[tuple[list[int], list[int]]],
    temperature: float,
    budget: int,
    device: torch.device,
) -> list[list[float]]:
    out: list[list[float]] = [[] for _ in pairs]
    for group in split_by_tokens([len(context) + len(target) - 1 for context, target in pairs], budget):
        tokens = pack([pairs[i][0] for i in group], [pairs[i][1] for i in group]).to(device)
        logprob_N = lm.logprobs(tokens, temperature=temperature).logprob.cpu()
        for i, part in zip(group, logprob_N.split([len(pairs[i][1]) for i in group]), strict=True):
            out[i] = part.tolist()
    return out


def _named(item: str) -> tuple[str, str]:
    name, separator, path = item.partition("=")
    if not separator or not name or not path:
        raise UserError(f"--model {item}: write NAME=PATH, for example student=miniature:base")
    return name, path


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise UserError(f"--text {path}: no such file; give a JSONL file with `text`, or `prompt` and `response`")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error}); write one object a line") from error


def _token_pair(row: Any, number: int, path: Path, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(context, scored tokens) of one row."""
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        context = tokenizer(row["prompt"])["input_ids"]
        target = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    elif isinstance(row, dict) and isinstance(row.get("text"), str):
        ids = tokenizer(row["text"])["input_ids"]
        context, target = ids[:1], ids[1:]
    else:
        raise UserError(f"{path}:{number}: needs `text`, or `prompt` and `response`, as strings")
    if not context or not target:
        raise UserError(
            f"{path}:{number}: nothing to score; at least one token of context and one scored token are needed"
        )
    return context, target
