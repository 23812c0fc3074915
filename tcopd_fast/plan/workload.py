"""What one step asks of one rank: sequences, tokens, and the models that score them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from tcopd_fast.config import Config
from tcopd_fast.config_sections import FrozenModelConfig
from tcopd_fast.errors import UserError
from tcopd_fast.models import DTYPES, base_path, described_by, is_adapter, resolve_path
from tcopd_fast.plan.shapes import Shape, read_shape
from tcopd_fast.reward import reference_ever_needed
from tcopd_fast.scoring import REFERENCE
from tcopd_fast.scoring.delta import is_delta
from tcopd_fast.scoring.weights import CheckpointFolder, same_checkpoint


@dataclass(frozen=True)
class Workload:
    """Tokens of one rank and step. prompt, response: mean tokens; longest: what one sequence may have."""

    sequences: int
    prompt: float
    response: float
    longest: int
    minibatches: int
    epochs: int
    learner_budget: int
    scoring_budget: int
    trip_budget: int

    @property
    def tokens(self) -> int:
        """Packed tokens of all sequences: the last token of each needs no forward."""
        return ceil(self.sequences * (self.prompt + self.response - 1))

    @property
    def predicted(self) -> int:
        """Response tokens of all sequences."""
        return ceil(self.sequences * self.response)

    def packed(self, budget: int, tokens: int | None = None) -> int:
        """Tokens of the fullest forward under a token budget, which one longer sequence may exceed."""
        return max(1, min(tokens or self.tokens, max(budget, self.longest)))

    @property
    def minibatch_tokens(self) -> int:
        return ceil(self.tokens / self.minibatches)

    @property
    def microbatch(self) -> int:
        """Tokens of the largest micro-batch of the learner."""
        return self.packed(self.learner_budget, self.minibatch_tokens)

    @property
    def microbatches(self) -> int:
        """Micro-batches of one optimizer step."""
        return ceil(self.minibatch_tokens / self.microbatch)

    def predicted_of(self, tokens: int) -> int:
        """Response tokens among so many packed ones."""
        return min(self.predicted, ceil(tokens * self.response / max(1.0, self.prompt + self.response - 1)))


def workload_of(config: Config, ranks: int, prompt: float | None = None, response: float | None = None) -> Workload:
    """prompt, response: mean tokens; their bounds (data.max_prompt_tokens, rollout.max_new_tokens) when None."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for option, value, key, bound in (
        ("--mean-prompt-tokens", prompt, "data.max_prompt_tokens", config.data.max_prompt_tokens),
        ("--mean-response-tokens", response, "rollout.max_new_tokens", config.rollout.max_new_tokens),
    ):
        if value is not None and not 1 <= value <= bound:
            raise UserError(f"{option} {value:g}: must lie between 1 and {key}={bound}")
    return Workload(
        sequences=ceil(config.rollout.prompts_per_step / ranks) * config.rollout.samples_per_prompt,
        prompt=prompt or config.data.max_prompt_tokens,
        response=response or config.rollout.max_new_tokens,
        longest=longest,
        minibatches=config.learner.minibatches,
        epochs=config.learner.epochs,
        learner_budget=config.learner.max_tokens_per_microbatch,
        scoring_budget=config.scoring.max_tokens_per_forward,
        trip_budget=config.scoring.max_tokens_per_trip,
    )


@dataclass(frozen=True)
class Frozen:
    """One distinct frozen checkpoint: who uses it, its shape, and where it is to live (None: the plan decides).

    factors: weights that a LoRA adapter adds to its base, whose shape it has. shardable: not the base of an adapter.
    """

    roles: tuple[str, ...]
    path: str
    shape: Shape
    dtype: str
    placement: str | None
    factors: int = 0
    shardable: bool = True

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """All weights in the compute dtype; of an adapter its factors."""
        return (self.factors or self.shape.weights) * self.itemsize

    @property
    def group(self) -> int:
        """Bytes of the largest group of weights that is streamed at once: a layer, or the head."""
        return max(self.shape.layer, self.shape.head) * self.itemsize

    @property
    def fixed(self) -> bool:
        """Whether its placement follows from what it is."""
        return self.placement in ("delta", "lora", "server", "student")


def shapes_of(config: Config, folders: Mapping[str, str]) -> dict[str, Shape]:
    """Shape of every model in the configuration, by the path whose config.json describes it.

    folders: folders with a config.json to read in place of what is configured, by role (`student`, `reference`, a
    teacher's name); `""` stands for all models. Raises UserError for a role that does not exist.
    """
    paths = {"student": config.model.path}
    if config.reference is not None:
        paths[REFERENCE] = config.reference.path
    for name, teacher in config.teachers.items():
        paths[name] = described_by(config, teacher)
        if teacher.base is not None:
            paths[f"{name}.base"] = teacher.base
    if unknown := sorted(folders.keys() - paths.keys() - {""}):
        raise UserError(f"--shape {unknown[0]}=…: no such model; give one of {', '.join(paths)}")
    for folder in folders.values():
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"--shape {folder}: no config.json there; give a folder that holds the model's config.json")
    found: dict[str, Shape] = {}
    for role, path in paths.items():
        source = folders.get(role, folders.get("", path))
        try:
            found[path] = read_shape(source, config.model.trust_remote_code)
        except UserError as error:
            if source != path:
                raise
            raise UserError(f"{error}; for a plan a config.json is enough: --shape {role}=FOLDER") from error
    return found


def frozen_models(config: Config, shapes: Mapping[str, Shape], teachers: int | None = None) -> tuple[Frozen, ...]:
    """The distinct frozen checkpoints that some sample needs, the reference first, as `Scorer` loads them.

    teachers: pretend to have so many, repeating the configured ones, each as a checkpoint of its own.
    """
    wanted: list[tuple[str, FrozenModelConfig, int]] = []
    if reference_ever_needed(config):
        wanted.append((REFERENCE, config.reference or FrozenModelConfig(path=config.model.path), 0))
    active = [n for n in config.teachers if any(table.get(n) for table in config.lambda_tables().values())]
    count = len(active) if teachers is None else teachers
    for i in range(count):
        name, copy = active[i % len(active)], i // len(active)
        teacher = config.teachers[name]
        wanted.append((f"{name}#{copy + 1}" if copy else name, teacher, copy))
        if not copy and (own_base := teacher.own_base()):
            wanted.append((f"{name}.base", own_base, 0))
    found: list[tuple[Frozen, int]] = []
    for role, spec, copy in wanted:
        dtype = spec.dtype or config.model.dtype
        same = next((i for i, (f, c) in enumerate(found) if c == copy and f.dtype == dtype and _same(f, spec)), None)
        if same is not None and spec.server is None:
            model = found[same][0]
            found[same] = (replace(model, roles=(*model.roles, role)), copy)
            continue
        placement, factors = _placement(config, spec), 0
        if placement != "server" and _is_student_base(config, spec.path, dtype):
            placement = "student"
        if placement == "lora":
            factors = CheckpointFolder(resolve_path(spec.path)).weights()
            _add_base(found, config, base_path(config, spec), shapes[described_by(config, spec)], dtype)
        found.append((Frozen((role,), spec.path, shapes[described_by(config, spec)], dtype, placement, factors), copy))
    return tuple(model for model, _ in found)


def _add_base(found: list[tuple[Frozen, int]], config: Config, path: str, shape: Shape, dtype: str) -> None:
    """An adapter's base: a model that is there, which must then not be sharded, or one loaded for adapters alone."""
    spec = FrozenModelConfig(path=path)
    for i, (model, copy) in enumerate(found):
        whole = model.placement == "student" or not model.fixed
        if not copy and model.dtype == dtype and whole and _same(model, spec):
            found[i] = (replace(model, shardable=False), 0)
            return
    placement = "student" if _is_student_base(config, path, dtype) else _placement(config, spec)
    found.append((Frozen(("base of adapters",), path, shape, dtype, placement, shardable=False), 0))


def _is_student_base(config: Config, path: str, dtype: str) -> bool:
    """Whether the learner holds these weights anyway, whole and frozen, under a LoRA student."""
    if config.model.lora is None or config.learner.zero_stage == 3 or dtype != config.model.dtype:
        return False
    return _same_path(path, config.model.path)


def _same(model: Frozen, spec: FrozenModelConfig) -> bool:
    return model.placement != "server" and _same_path(model.path, spec.path)


def _same_path(a: str, b: str) -> bool:
    both_here = all(Path(path).expanduser().is_dir() for path in (a, b))
    return a == b or (both_here and same_checkpoint(a, b))


def _placement(config: Config, spec: FrozenModelConfig) -> str | None:
    if spec.placement == "server":
        return "server"
    if Path(spec.path).expanduser().is_dir() and is_delta(resolve_path(spec.path)):
        return "delta"
    if is_adapter(spec.path):
        return "lora"
    placement = spec.placement or config.scoring.placement
    return None if placement == "auto" else placement
