"""Stage 3, scoring: the logprob of every sampled token under reference and teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tcopd_fast.config import Config
from tcopd_fast.config_sections import FrozenModelConfig
from tcopd_fast.dist import World
from tcopd_fast.models import ModelSet, base_path, is_adapter
from tcopd_fast.reward import reference_cancels, reference_ever_needed
from tcopd_fast.scoring.delta import is_delta
from tcopd_fast.scoring.placement import FrozenModel, Placer, ServedModel
from tcopd_fast.scoring.weights import WeightSource, same_checkpoint
from tcopd_fast.types import Rollout, ScoredRollout

REFERENCE = "reference"
ModelKey = tuple[str, str]


class Scorer:
    """Frozen models, each distinct checkpoint loaded once, run only on the samples that need them.

    roles maps a role ("reference", a teacher's name, "NAME.base") to a key of `models`: (path, dtype), of an adapter
    (path, dtype and its base), or the URLs and the model's name there.
    """

    def __init__(
        self, config: Config, models: ModelSet, world: World, student_base: WeightSource | None = None
    ) -> None:
        """A collective when some model is sharded. student_base: see `Placer`."""
        self.config = config
        self.models: dict[ModelKey, FrozenModel | ServedModel] = {}
        placer = Placer(config, models, world, student_base)
        keys: dict[str, ModelKey] = {}
        wanted = self._wanted()
        # What a delta or an adapter builds on is there before it.
        for role in sorted(wanted, key=lambda role: _builds_on(wanted[role])):
            spec = wanted[role]
            dtype = spec.dtype or config.model.dtype
            keys[role] = self._key(spec, dtype)
            if keys[role] not in self.models:
                self.models[keys[role]] = placer.place(spec, dtype)
        self.roles = {role: keys[role] for role in wanted}

    def _key(self, spec: FrozenModelConfig, dtype: str) -> ModelKey:
        if spec.server is not None:
            # Its path may be no more than a source of the tokenizer; the weights are whatever is served there.
            return " ".join(spec.server.urls), f"server of {spec.server.model or 'its model'}"
        if is_adapter(spec.path):
            base, _ = self._known(base_path(self.config, spec), dtype)
            return self._known(spec.path, f"{dtype} on {base}")
        return self._known(spec.path, dtype)

    def _known(self, path: str, variant: str) -> ModelKey:
        """The key of the model that is loaded with these weights in this variant, or its own."""
        there = (k for k in self.models if k[1] == variant and same_checkpoint(k[0], path))
        return next(there, (path, variant))

    def _wanted(self) -> dict[str, FrozenModelConfig]:
        """The models that some sample needs, by role; the reference first."""
        config = self.config
        wanted: dict[str, FrozenModelConfig] = {}
        if reference_ever_needed(config):
            wanted[REFERENCE] = config.reference or FrozenModelConfig(path=config.model.path)
        for name, teacher in config.teachers.items():
            if self._ever_active(name):
                wanted[name] = teacher
                if own_base := teacher.own_base():
                    wanted[f"{name}.base"] = own_base
        return wanted

    def placements(self) -> list[str]:
        """One line per distinct model: who it is, where it lives, and why."""
        return [
            f"{', '.join(role for role, k in self.roles.items() if k == key)}: {model.choice.placement} "
            f"({model.choice.reason})"
            for key, model in self.models.items()
        ]

    def routing(self, domains: Sequence[str]) -> str | None:
        """Which teacher scores which of these domains, in words; None when every teacher scores all of them."""
        scored = {
            name: [domain for domain in domains if self.config.lambdas_for(domain)[name]]
            for name in self.config.teachers
        }
        if all(len(its) == len(domains) for its in scored.values()):
            return None
        return "; ".join(
            f"{name} scores {'every domain' if len(its) == len(domains) else ', '.join(its) or 'none'}"
            for name, its in scored.items()
        )

    def _ever_active(self, teacher: str) -> bool:
        return any(table.get(teacher, 0.0) for table in self.config.lambda_tables().values())

    def score(
        self,
        rollouts: Sequence[Rollout],
        lambdas: Sequence[Mapping[str, float]],
        old_logprobs: Sequence[Tensor] | None = None,
        known: Sequence[Mapping[ModelKey, Tensor]] | None = None,
    ) -> list[ScoredRollout]:
        """Score rollouts at the sampling temperature; a teacher sees only samples where its λ is not 0.

        lambdas: teacher -> λ, one table per rollout. old_logprobs: the learner's own, passed through. known: what
        models have said of each rollout already; they are not asked again.
        """
        roles_of = [self._roles_for(table) for table in lambdas]
        known = [{}] * len(rollouts) if known is None else known
        scores: dict[ModelKey, dict[int, Tensor]] = {}
        for key, indices in self.needs(lambdas).items():
            scores[key] = {i: known[i][key] for i in indices if key in known[i]}
            left = [i for i in indices if i not in scores[key]]
            if left or self.models[key].collective:
                scores[key] |= self.logprobs(key, rollouts, left)

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

    def needs(self, lambdas: Sequence[Mapping[str, float]]) -> dict[ModelKey, list[int]]:
        """Indices of the samples that every distinct model has to score, ascending; lambdas as in `score`."""
        needs: dict[ModelKey, list[int]] = {key: [] for key in self.models}
        for i, table in enumerate(lambdas):
            for key in self.keys_for(table):
                needs[key].append(i)
        return needs

    def keys_for(self, lambdas: Mapping[str, float]) -> set[ModelKey]:
        """The distinct models that a sample with these coefficients needs."""
        return {self.roles[role] for role in self._roles_for(lambdas)}

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


def _builds_on(spec: FrozenModelConfig) -> int:
    """0 for a whole checkpoint, 1 for a delta, 2 for an adapter, which may be on a delta."""
    if spec.server is not None:
        return 0
    return 2 if is_adapter(spec.path) else int(is_delta(spec.path))
