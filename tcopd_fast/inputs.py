"""What a run reads and checks before any weight is loaded, and which prompts each step gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain

import torch

from tcopd_fast import checkpoints
from tcopd_fast.adapter import check_targets
from tcopd_fast.config import Config, longest_sequence
from tcopd_fast.config_sections import LengthBucket
from tcopd_fast.data import load_eval_sets, load_prompts
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.judges import Judges
from tcopd_fast.models import ModelSet, check_models
from tcopd_fast.order import batch_for_step, weighted_prompts
from tcopd_fast.scoring.delta import tensor_digests
from tcopd_fast.scoring.lora import check_adapters
from tcopd_fast.types import Prompt


@dataclass(frozen=True)
class Inputs:
    """What was read and checked before any weight was loaded.

    domains: every domain of the training prompts, sorted. eval_sets: name -> held-out problems.
    """

    models: ModelSet
    prompts: tuple[Prompt, ...]
    dropped_overlong: int
    domains: tuple[str, ...]
    eval_sets: Mapping[str, tuple[Prompt, ...]]


def read_inputs(config: Config, world_size: int = 1) -> Inputs:
    """Read configs, tokenizers and prompts and refuse whatever could not work. Raises UserError."""
    if config.rollout.prompts_per_step < world_size:
        raise UserError(
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}: fewer than the {world_size} ranks; raise it"
        )
    vllm = config.rollout.vllm
    apart = config.rollout.engine == "vllm" and vllm.mode == "server" and not vllm.server.urls
    if apart and torch.cuda.is_available() and not vllm.server.gpus:
        raise UserError(
            "rollout.vllm.server.gpus: not set; name the GPUs of every engine, apart from the learner's, "
            "for example [[7]]"
        )
    models = check_models(config)
    check_targets(config)
    check_adapters(config)
    loaded = load_prompts(config.data.train, models.tokenizer, config.data)
    prompts = weighted_prompts(loaded.prompts, config.data.domain_weights)
    domains = tuple(sorted({prompt.domain for prompt in prompts}))
    tables = config.lambda_tables()
    if None not in tables and set(domains) - set(tables):
        unknown = sorted(set(domains) - set(tables))[0]
        raise UserError(
            f"objective.lambdas: training prompts have the domain {unknown!r} but the table only has "
            f"{', '.join(map(str, tables))}; add it or set data.train[].domain"
        )
    sets = load_eval_sets(config.eval.data, models.tokenizer, config.data)
    with Judges(config.judge) as judges:
        judges.check(chain(prompts, *sets.values()))
    longest = longest_sequence(config)
    if longest > models.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}: the models hold "
            f"{models.max_position_embeddings} positions; lower one of them"
        )
    checkpoints.check(config.checkpoint, sets)
    return Inputs(models, prompts, loaded.dropped_overlong, domains, sets)


def origin_of(config: Config, inputs: Inputs, world: World) -> checkpoints.Origin:
    """What the run's checkpoints need beside themselves; it resumes with nothing else. A collective."""
    base = None if config.model.lora is None else checkpoint_fingerprint(config.model.path, world)
    return checkpoints.Origin(checkpoints.fingerprint(inputs.prompts), base)


def checkpoint_fingerprint(path: str, world: World) -> str:
    """SHA-256 over the `tensor_digests` of a checkpoint, of which every rank makes a share. A collective.

    Raises UserError when there is no checkpoint.
    """
    own = world.together(lambda: tensor_digests(path, world.rank, world.size))
    digests = {name: found for share in world.gather(own) for name, found in share.items()}
    return sha256("".join(f"{name}|{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def sampling_seed(seed: int, step: int) -> int:
    """Seed of one step's sampling: a function of run seed and step, so that a resumed run samples alike."""
    return (seed * 1_000_003 + step) & 0x7FFFFFFF


def prompts_of_step(config: Config, inputs: Inputs, step: int) -> list[Prompt]:
    """The step's prompts over all ranks, each with the limit of its length bucket.

    A prompt met twice in one step gets its own id, hence its own samples.
    """
    chosen = batch_for_step(
        inputs.prompts,
        step,
        config.rollout.prompts_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
        weights=config.data.domain_weights,
    )
    seen: dict[str, int] = {}
    out = []
    for prompt in chosen:
        seen[prompt.id] = seen.get(prompt.id, 0) + 1
        name = prompt.id if seen[prompt.id] == 1 else f"{prompt.id}@{seen[prompt.id]}"
        limit = bucket_limit(len(prompt.token_ids), config.rollout.length_buckets)
        out.append(replace(prompt, id=name, max_new_tokens=limit))
    return out


def bucket_limit(prompt_tokens: int, buckets: Sequence[LengthBucket]) -> int | None:
    """Longest response to a prompt of this length, None where no bucket holds it. buckets: ascending."""
    return next((b.max_new_tokens for b in buckets if prompt_tokens <= b.max_prompt_tokens), None)
