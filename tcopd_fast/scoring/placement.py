"""Where a frozen model's weights live, and the models that score from there.

resident   on the scoring device, whole
offload    on disk or in pinned host memory; one layer at a time passes through the device
sharded    spread over the ranks, one layer at a time gathered from all of them
delta      as a lossless difference to a base; one layer at a time is rebuilt
lora       as low-rank factors beside a base; one layer at a time is summed
student    under the adapter of a LoRA student, which the learner holds anyway
server     in other processes that answer over HTTP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from tcopd_fast.config import Config, longest_sequence
from tcopd_fast.config_sections import FrozenModelConfig
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.models import (
    ADAPTER_CONFIG,
    DTYPES,
    ModelSet,
    base_path,
    described_by,
    is_adapter,
    load_causal_lm,
    load_model_config,
    local_folder,
    text_config,
)
from tcopd_fast.packing import pack, split_by_tokens
from tcopd_fast.scoring.delta import DeltaFolder, DeltaWeights, checkpoint_digest, is_delta
from tcopd_fast.scoring.heap import return_large_blocks
from tcopd_fast.scoring.lora import LowRank, LowRankWeights, linear_shapes, other_base, read_adapter
from tcopd_fast.scoring.server import TeacherClient
from tcopd_fast.scoring.sharded import ShardedLM
from tcopd_fast.scoring.streamed import StreamedCausalLM, empty_model
from tcopd_fast.scoring.weights import (
    CheckpointFolder,
    MappedWeights,
    PinnedWeights,
    ResidentWeights,
    WeightSource,
    pinned_bytes,
    same_checkpoint,
)
from tcopd_fast.types import PackedTokens, Rollout

Forward = Callable[[Sequence[PackedTokens], float], list[Tensor]]


@dataclass(frozen=True)
class Choice:
    """Placement of one model and why, in words for the run's output."""

    placement: str
    reason: str


@dataclass(frozen=True)
class Held:
    """Weights of a model that is there, for deltas and adapters to build on."""

    path: str
    dtype: str
    choice: Choice
    weights: WeightSource


@dataclass(frozen=True)
class FrozenModel:
    """Scores rollouts: packs them, and runs groups of packed tokens through `forward`.

    forward: groups, temperature -> float32 logprobs [N] of each. It is given as many groups at once as
    `tokens_per_trip` allows; with tokens_per_trip None all of them, in exactly one call, which all ranks make together.
    """

    choice: Choice
    forward: Forward
    tokens_per_forward: int
    tokens_per_trip: int | None
    device: torch.device
    served = False

    @property
    def collective(self) -> bool:
        """Whether every rank must score whenever one does."""
        return self.tokens_per_trip is None

    @torch.inference_mode()
    def score(self, rollouts: Sequence[Rollout], temperature: float) -> list[Tensor]:
        """Logprob of every sampled token, float32 [L] on the CPU, one per rollout."""
        lengths = [len(r.prompt.token_ids) + len(r.token_ids) - 1 for r in rollouts]
        groups = split_by_tokens(lengths, self.tokens_per_forward)
        out: dict[int, Tensor] = {}
        sizes = [sum(lengths[i] for i in group) for group in groups]
        trips = [range(len(groups))] if self.tokens_per_trip is None else split_by_tokens(sizes, self.tokens_per_trip)
        for trip in trips:
            chosen = [groups[g] for g in trip]
            packed = [
                pack([rollouts[i].prompt.token_ids for i in group], [rollouts[i].token_ids for i in group]).to(
                    self.device
                )
                for group in chosen
            ]
            for group, logprob_N in zip(chosen, self.forward(packed, temperature), strict=True):
                parts = logprob_N.cpu().split([len(rollouts[i].token_ids) for i in group])
                out.update((i, part.clone()) for i, part in zip(group, parts, strict=True))
        return [out[i] for i in range(len(rollouts))]


@dataclass(frozen=True)
class ServedModel:
    """Scores rollouts by asking the servers that hold the weights."""

    choice: Choice
    client: TeacherClient
    collective = False
    served = True

    @property
    def tokens_per_trip(self) -> int:
        """Tokens of one request."""
        return self.client.server.max_tokens_per_request

    def score(self, rollouts: Sequence[Rollout], temperature: float) -> list[Tensor]:
        """As `FrozenModel.score`, at temperature 1."""
        return self.client.score(rollouts, temperature)


class Placer:
    """Puts models where the configuration says, or where they fit."""

    def __init__(
        self, config: Config, models: ModelSet, world: World, student_base: WeightSource | None = None
    ) -> None:
        """student_base: the weights that the student started from, where the learner keeps them whole and frozen."""
        self.config, self.models, self.world, self.device = config, models, world, world.device
        # The same numbers on every rank, so that all choose alike.
        free, host = free_memory(world.device, world.ranks_here), free_host_memory(world.ranks_here)
        least = world.max({"free": -float(free), "host": -float(host)})
        self.budget = int(-least["free"] * config.scoring.resident_share)
        self.host_budget = int(-least["host"])
        self.held: list[Held] = []
        if student_base is not None:
            choice = Choice("student", "the frozen base of the learner's LoRA student; no second copy")
            self.held.append(Held(config.model.path, config.model.dtype, choice, student_base))
        self.digests: dict[str, str] = {}

    def place(self, spec: FrozenModelConfig, dtype: str) -> FrozenModel | ServedModel:
        """Load one model. Raises UserError when its placement is impossible."""
        if spec.placement == "server":
            return self._served(spec)
        if is_adapter(spec.path):
            choice, forward = self._adapter(spec, dtype)
        elif (held := self._held(spec.path, dtype)) is not None and held.choice.placement == "student":
            choice, forward = held.choice, self._stream(held.path, held.weights, dtype)
        else:
            choice = self.choose(spec, dtype)
            forward = self._load(spec, dtype, choice)
        tokens = self.config.scoring.max_tokens_per_forward
        trip = {"resident": tokens, "sharded": None}.get(choice.placement, self.config.scoring.max_tokens_per_trip)
        return FrozenModel(choice, forward, tokens, trip, self.device)

    def choose(self, spec: FrozenModelConfig, dtype: str, shardable: bool = True) -> Choice:
        """The configured placement, or for `auto` the first that fits of resident, sharded (with ranks), offload.

        What is not shardable is offloaded instead.
        """
        placement = spec.placement or self.config.scoring.placement
        if is_delta(spec.path):
            if placement not in ("auto", "delta"):
                raise UserError(f"{spec.path}: a delta folder needs placement delta or auto, not {placement}")
            return Choice("delta", "it is a difference to a base")
        if placement == "delta":
            raise UserError(
                f"{spec.path}: placement delta needs a folder made by `tcopd delta make BASE {spec.path} OUT`; "
                "give OUT as its path"
            )
        size = CheckpointFolder(local_folder(spec.path)).weights() * DTYPES[dtype].itemsize
        left = f"{gib(max(0, self.budget))} left for frozen models"
        if placement == "sharded" and not shardable:
            choice = Choice("offload", "adapters need their base whole")
        elif placement != "auto":
            choice = Choice(placement, "configured")
        elif size <= self.budget:
            choice = Choice("resident", f"{gib(size)} fit the {left}")
        elif shardable and self.world.size > 1 and size // self.world.size <= self.budget:
            choice = Choice("sharded", f"{gib(size)} do not fit the {left}, 1/{self.world.size} of it does")
        else:
            choice = Choice("offload", f"{gib(size)} do not fit the {left}")
        self.budget -= {"resident": size, "sharded": size // self.world.size}.get(choice.placement, 0)
        return self._pin(spec, dtype, choice) if choice.placement == "offload" else choice

    def _pin(self, spec: FrozenModelConfig, dtype: str, choice: Choice) -> Choice:
        """`choice` with what it takes of host memory; refused when that is not there. On a CPU it takes none."""
        if self.device.type != "cuda":
            return choice
        size = pinned_bytes(CheckpointFolder(local_folder(spec.path)), DTYPES[dtype])
        if size > self.host_budget:
            raise UserError(
                f"{spec.path}: placement offload pins {gib(size)} of host memory for every rank, and "
                f"{gib(self.host_budget)} is left for each of the {self.world.ranks_here} on this machine; use "
                "placement sharded with scoring.shards_on_host=true, or fewer ranks"
            )
        self.host_budget -= size
        return replace(choice, reason=f"{choice.reason}; {gib(size)} of pinned host memory for every rank")

    def _load(self, spec: FrozenModelConfig, dtype: str, choice: Choice) -> Forward:
        if choice.placement != "resident" and self.device.type == "cpu":
            return_large_blocks()
        if choice.placement == "sharded":
            return ShardedLM(spec.path, self.world, host=self.config.scoring.shards_on_host, **self._options(dtype))
        if choice.placement != "resident":
            source = self._source(spec, DTYPES[dtype])
            self.held.append(Held(spec.path, dtype, choice, source))
            return self._stream(spec.path, source, dtype)
        lm = load_causal_lm(spec.path, **self._options(dtype)).to(self.device).eval().requires_grad_(False)
        self.held.append(Held(spec.path, dtype, choice, ResidentWeights(lm.model.state_dict())))
        return lambda groups, temperature: [lm.logprobs(tokens, temperature=temperature).logprob for tokens in groups]

    def _stream(self, path: str, source: WeightSource, dtype: str) -> Forward:
        lm = StreamedCausalLM(path, source, device=self.device, **self._options(dtype))
        return lambda groups, temperature: [out.logprob for out in lm.logprobs(groups, temperature=temperature)]

    def _options(self, dtype: str) -> dict[str, Any]:
        """How every model is loaded."""
        model = self.config.model
        return {
            "dtype": dtype,
            "attention": model.attention,
            "vocab_size": self.models.vocab_size,
            "trust_remote_code": model.trust_remote_code,
            "liger": model.liger,
        }

    def _adapter(self, spec: FrozenModelConfig, dtype: str) -> tuple[Choice, Forward]:
        """A LoRA adapter on the weights of its base, which are loaded if they are not there."""
        if self.device.type == "cpu":
            return_large_blocks()
        base, model = base_path(self.config, spec), self.config.model
        shapes = linear_shapes(empty_model(base, dtype, model.attention, model.trust_remote_code))
        factors = {
            name: LowRank(*(t.to(self.device, DTYPES[dtype]) for t in (terms.a, terms.b)))
            for name, terms in read_adapter(spec.path, shapes).items()
        }
        size = sum(t.nbytes for terms in factors.values() for t in (terms.a, terms.b))
        self.budget -= size
        held = self._base_of_adapters(base, dtype)
        named = other_base(spec.path, base)
        trained = f", though {ADAPTER_CONFIG} names {named}" if named else ""
        reason = f"{size / 2**20:.2f} MiB of factors on {base}{trained}; that is {held.choice.placement}: "
        forward = self._stream(base, LowRankWeights(held.weights, factors), dtype)
        return Choice("lora", reason + held.choice.reason), forward

    def _held(self, path: str, dtype: str) -> Held | None:
        """A model with these weights that is there and not sharded."""
        return next((h for h in self.held if h.dtype == dtype and same_checkpoint(h.path, path)), None)

    def _base_of_adapters(self, path: str, dtype: str) -> Held:
        """A model with these weights that is there and not sharded, else a new one, loaded for adapters alone."""
        if (held := self._held(path, dtype)) is not None:
            return held
        spec = FrozenModelConfig(path=path)
        self._load(spec, dtype, self.choose(spec, dtype, shardable=False))
        return self.held[-1]

    def _served(self, spec: FrozenModelConfig) -> ServedModel:
        assert spec.server is not None, "checked by Config"
        described = load_model_config(described_by(self.config, spec), self.config.model.trust_remote_code)
        client = TeacherClient(
            spec.path,
            spec.server,
            self.models,
            head_rows=text_config(described).vocab_size,
            longest=longest_sequence(self.config),
            tolerance=self.config.scoring.self_check_tolerance,
        )
        return ServedModel(Choice("server", client.description), client)

    def _source(self, spec: FrozenModelConfig, dtype: torch.dtype) -> WeightSource:
        if is_delta(spec.path):
            base = base_path(self.config, spec)
            delta = DeltaFolder(spec.path)
            if base not in self.digests:
                self.digests[base] = checkpoint_digest(base)
            delta.require_base(base, self.digests[base])
            return DeltaWeights(delta, self._base(base, dtype), dtype)
        source = PinnedWeights if self.device.type == "cuda" else MappedWeights
        return source(local_folder(spec.path), dtype, self.device)

    def _base(self, path: str, dtype: torch.dtype) -> WeightSource:
        """The base's tensors bit for bit: those of a model that is there, if it was not converted, else the files."""
        files = CheckpointFolder(local_folder(path))
        for held in self.held:
            if files.dtypes() == {dtype} == {DTYPES[held.dtype]} and same_checkpoint(held.path, path):
                return held.weights
        return MappedWeights(local_folder(path), None, self.device)


def free_memory(device: torch.device, ranks_here: int = 1) -> int:
    """Bytes that a new model may take on the scoring device: of a GPU, or this rank's part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory(ranks_here)


def free_host_memory(ranks_here: int) -> int:
    """Bytes of this machine's free memory that fall to one of its ranks."""
    return int(psutil.virtual_memory().available) // ranks_here


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
