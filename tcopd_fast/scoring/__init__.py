"""Stage 3, scoring: the logprob of every sampled token under reference and teachers."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from tcopd_fast.config import Config
from tcopd_fast.config_sections import FrozenModelConfig
from tcopd_fast.dist import World
from tcopd_fast.models import ModelSet, resolve_path
from tcopd_fast.reward import reference_cancels, reference_ever_needed
from tcopd_fast.scoring.placement import FrozenModel, Placer, ServedModel
from tcopd_fast.types import Rollout, ScoredRollout

REFERENCE = "reference"
ModelKey = tuple[str, str]


class Scorer:
    """Frozen models, each distinct checkpoint loaded once, run only on the samples that need them.

    roles maps a role ("reference", a teacher's name, "NAME.base") to a key of `models`: (path, dtype), or the URLs and
    the model's name there.
    """

    def __init__(self, config: Config, models: ModelSet, world: World) -> None:
        """A collective when some model is sharded."""
        self.config = config
        self.roles: dict[str, ModelKey] = {}
        self.models: dict[ModelKey, FrozenModel | ServedModel] = {}
        placer = Placer(config, models, world)
        for role, spec in self._wanted().items():
            dtype = spec.dtype or config.model.dtype
            key = self._key(spec, dtype)
            self.roles[role] = key
            if key not in self.models:
                self.models[key] = placer.place(spec, dtype)

    def _key(self, spec: FrozenModelConfig, dtype: str) -> ModelKey:
        if spec.server is not None:
            # Its path may be no more than a source of the tokenizer; the weights are whatever is served there.
            return " ".join(spec.server.urls), f"server of {spec.server.model or 'its model'}"
        return next((k for k in self.models if k[1] == dtype and same_checkpoint(k[0], spec.path)), (spec.path, dtype))

    def _wanted(self) -> dict[str, FrozenModelConfig]:
        """The models that some sample needs, by role; the reference first."""
        config = self.config
        wanted: dict[str, FrozenModelConfig] = {}
        if reference_ever_needed(config):
            wanted[REFERENCE] = config.reference or FrozenModelConfig(path=config.model.path)
        for name, teacher in config.teachers.items():
            if self._ever_active(name):
                wanted[name] = teacher
                if teacher.base is not None:
                    here = None if teacher.placement == "server" else teacher.placement
                    wanted[f"{name}.base"] = FrozenModelConfig(path=teacher.base, dtype=teacher.dtype, placement=here)
        return wanted

    def placements(self) -> list[str]:
        """One line per distinct model: who it is, where it lives, and why."""
        return [
            f"{', '.join(role for role, k in self.roles.items() if k == key)}: {model.choice.placement} "
            f"({model.choice.reason})"
            for key, model in self.models.items()
        ]

    def _ever_active(self, teacher: str) -> bool:
        return any(table.get(teacher, 0.0) for table in self.config.lambda_tables().values())

    def score(
        self,
        rollouts: Sequence[Rollout],
        lambdas: Sequence[Mapping[str, float]],
        old_logprobs: Sequence[Tensor] | None = None,
    ) -> list[ScoredRollout]:
        """Score rollouts at the sampling temperature; a teacher sees only samples where its λ is not 0.

        lambdas: teacher -> λ, one table per rollout. old_logprobs: the learner's own, passed through.
        """
        needs: dict[ModelKey, set[int]] = {key: set() for key in self.models}
        roles_of = [self._roles_for(table) for table in lambdas]
        for i, roles in enumerate(roles_of):
            for role in roles:
                needs[self.roles[role]].add(i)
        scores = {
            key: self.logprobs(key, rollouts, sorted(indices))
            for key, indices in needs.items()
            if indices or self.models[key].collective
        }

        def of(role: str, i: int) -> Tensor:
            return scores[self.roles[role]][i]

        return [
            ScoredRollout(
                rollout=rollout,
                ref_logprob=of(REFERENCE, i) if REFERENCE in roles_of[i] else None,
                teacher_logprobs={name: of(name, i) for name in self.config.teachers if name in roles_of[i]},
                teacher_ref_logprobs={
                    name: of(f"{name}.base", i) for name in self.config.teachers if f"{name}.base" in roles_of[i]
                },
                old_logprob=None if old_logprobs is None else old_logprobs[i],
            )
            for i, rollout in enumerate(rollouts)
        ]

    def _roles_for(self, lambdas: Mapping[str, float]) -> list[str]:
        active = [name for name, value in lambdas.items() if value]
        bases = [f"{name}.base" for name in active if f"{name}.base" in self.roles]
        reference = [] if reference_cancels(self.config, lambdas) else [REFERENCE]
        return reference + active + bases

    def logprobs(
        self, key: ModelKey, rollouts: Sequence[Rollout], indices: Sequence[int], temperature: float | None = None
    ) -> dict[int, Tensor]:
        """Rollout index -> float32 [L] on the CPU, under one model."""
        scores = self.models[key].score([rollouts[i] for i in indices], temperature or self.config.rollout.temperature)
        return dict(zip(indices, scores, strict=True))


def weight_files(path: str) -> tuple[Path, ...]:
    """The checkpoint's weight files with every link resolved; empty for a hub id."""
    return tuple(sorted(file.resolve() for file in Path(resolve_path(path)).glob("*.safetensors")))


def same_checkpoint(a: str, b: str) -> bool:
    """True when two paths name the same weights: one path, the same files, or files and config of equal content.

    Fine-tunes of one base differ in their first pages, so comparing them reads little.
    """
    if a == b:
        return True
    files_a, files_b = weight_files(a), weight_files(b)
    if not files_a or len(files_a) != len(files_b):
        return False
    if files_a == files_b:
        return True
    configs = [Path(resolve_path(path)) / "config.json" for path in (a, b)]
    pairs = [*zip(files_a, files_b, strict=True), (configs[0], configs[1])]
    return all(filecmp.cmp(x, y, shallow=False) for x, y in pairs)
