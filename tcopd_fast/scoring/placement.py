"""Where a frozen model's weights live, and the models that score from there.

resident   on the scoring device, whole
offload    on disk or in pinned host memory; one layer at a time passes through the device
sharded    spread over the ranks, one layer at a time gathered from all of them
delta      as a lossless difference to a base; one layer at a time is rebuilt
server     in other processes that answer over HTTP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from tcopd_fast.config import Config, longest_sequence
from tcopd_fast.config_sections import FrozenModelConfig
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.models import DTYPES, ModelSet, load_causal_lm, load_model_config, local_folder, text_config
from tcopd_fast.packing import pack, split_by_tokens
from tcopd_fast.scoring.delta import DeltaFolder, DeltaWeights, is_delta
from tcopd_fast.scoring.server import TeacherClient
from tcopd_fast.scoring.sharded import ShardedLM
from tcopd_fast.scoring.streamed import StreamedCausalLM
from tcopd_fast.scoring.weights import (
    CheckpointFolder,
    MappedWeights,
    PinnedWeights,
    ResidentWeights,
    RingSlots,
    WeightSource,
)
from tcopd_fast.types import PackedTokens, Rollout


@dataclass(frozen=True)
class Choice:
    """Placement of one model and why, in words for the run's output."""

    placement: str
    reason: str


class FrozenModel:
    """Scores rollouts: packs them, and runs groups of packed tokens through `forward`.

    forward: groups -> float32 logprobs [N] of each. It is given as many groups at once as `tokens_per_trip` allows;
    with tokens_per_trip None all of them, in exactly one call, which all ranks make together.
    """

    def __init__(
        self,
        choice: Choice,
        forward: Callable[[Sequence[PackedTokens], float], list[Tensor]],
        *,
        tokens_per_forward: int,
        tokens_per_trip: int | None,
        device: torch.device,
    ) -> None:
        self.choice, self._forward, self._device = choice, forward, device
        self._tokens_per_forward, self._tokens_per_trip = tokens_per_forward, tokens_per_trip
        self.collective = tokens_per_trip is None

    @torch.inference_mode()
    def score(self, rollouts: Sequence[Rollout], temperature: float) -> list[Tensor]:
        """Logprob of every sampled token, float32 [L] on the CPU, one per rollout."""
        lengths = [len(r.prompt.token_ids) + len(r.token_ids) - 1 for r in rollouts]
        groups = split_by_tokens(lengths, self._tokens_per_forward)
        out: dict[int, Tensor] = {}
        sizes = [sum(lengths[i] for i in group) for group in groups]
        trips = [range(len(groups))] if self._tokens_per_trip is None else split_by_tokens(sizes, self._tokens_per_trip)
        for trip in trips:
            chosen = [groups[g] for g in trip]
            packed = [
                pack([rollouts[i].prompt.token_ids for i in group], [rollouts[i].token_ids for i in group]).to(
                    self._device
                )
                for group in chosen
            ]
            for group, logprob_N in zip(chosen, self._forward(packed, temperature), strict=True):
                parts = logprob_N.cpu().split([len(rollouts[i].token_ids) for i in group])
                out.update((i, part.clone()) for i, part in zip(group, parts, strict=True))
        return [out[i] for i in range(len(rollouts))]


@dataclass(frozen=True)
class ServedModel:
    """Scores rollouts by asking the servers that hold the weights."""

    choice: Choice
    client: TeacherClient
    collective = False

    def score(self, rollouts: Sequence[Rollout], temperature: float) -> list[Tensor]:
        """As `FrozenModel.score`, at temperature 1."""
        return self.client.score(rollouts, temperature)


class Placer:
    """Puts models where the configuration says, or where they fit."""

    def __init__(self, config: Config, models: ModelSet, world: World) -> None:
        self.config, self.models, self.world, self.device = config, models, world, world.device
        # The same number on every rank, so that all choose alike.
        free = -world.max({"free": -float(free_memory(world.device, world.ranks_here))})["free"]
        self.budget = int(free * config.scoring.resident_share)
        self.slots: RingSlots | None = None
        self.resident: dict[tuple[str, torch.dtype], ResidentWeights] = {}

    def place(self, spec: FrozenModelConfig, dtype: str) -> FrozenModel | ServedModel:
        """Load one model. Raises UserError when its placement is impossible."""
        if spec.placement == "server":
            return self._served(spec)
        choice = self.choose(spec, dtype)
        load = {"resident": self._resident, "sharded": self._sharded}.get(choice.placement, self._streamed)
        tokens = self.config.scoring.max_tokens_per_forward
        trip = {"resident": tokens, "sharded": None}.get(choice.placement, self.config.scoring.max_tokens_per_trip)
        return FrozenModel(
            choice, load(spec, dtype), tokens_per_forward=tokens, tokens_per_trip=trip, device=self.device
        )

    def choose(self, spec: FrozenModelConfig, dtype: str) -> Choice:
        """The configured placement, or for `auto` the first that fits of resident, sharded (with ranks), offload."""
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
        left = f"{gib(self.budget)} left for frozen models"
        if placement != "auto":
            choice = Choice(placement, "configured")
        elif size <= self.budget:
            choice = Choice("resident", f"{gib(size)} fit the {left}")
        elif self.world.size > 1 and size // self.world.size <= self.budget:
            choice = Choice("sharded", f"{gib(size)} do not fit the {left}, a {self.world.size}th of it does")
        else:
            choice = Choice("offload", f"{gib(size)} do not fit the {left}")
        self.budget -= {"resident": size, "sharded": size // self.world.size}.get(choice.placement, 0)
        return choice

    def _sharded(self, spec: FrozenModelConfig, dtype: str) -> Callable[[Sequence[PackedTokens], float], list[Tensor]]:
        model = self.config.model
        return ShardedLM(
            spec.path,
            self.world,
            dtype=dtype,
            host=self.config.scoring.shards_on_host,
            attention=model.attention,
            vocab_size=self.models.vocab_size,
            trust_remote_code=model.trust_remote_code,
        )

    def _served(self, spec: FrozenModelConfig) -> ServedModel:
        assert spec.server is not None, "checked by Config"
        client = TeacherClient(
            spec.path,
            spec.server,
            self.models,
            head_rows=text_config(load_model_config(spec.path, self.config.model.trust_remote_code)).vocab_size,
            longest=longest_sequence(self.config),
            tolerance=self.config.scoring.self_check_tolerance,
        )
        return ServedModel(Choice("server", client.description), client)

    def _resident(self, spec: FrozenModelConfig, dtype: str) -> Callable[[Sequence[PackedTokens], float], list[Tensor]]:
        model = self.config.model
        lm = load_causal_lm(
            spec.path,
            dtype=dtype,
            attention=model.attention,
            vocab_size=self.models.vocab_size,
            trust_remote_code=model.trust_remote_code,
        )
        lm.to(self.device).eval().requires_grad_(False)
        self.resident[local_folder(spec.path), DTYPES[dtype]] = ResidentWeights(lm.model)
        return lambda groups, temperature: [lm.logprobs(tokens, temperature=temperature).logprob for tokens in groups]

    def _streamed(self, spec: FrozenModelConfig, dtype: str) -> Callable[[Sequence[PackedTokens], float], list[Tensor]]:
        lm = StreamedCausalLM(
            spec.path,
            self._source(spec, DTYPES[dtype]),
            dtype=dtype,
            attention=self.config.model.attention,
            vocab_size=self.models.vocab_size,
            device=self.device,
            trust_remote_code=self.config.model.trust_remote_code,
        )
        return lambda groups, temperature: [out.logprob for out in lm.logprobs(groups, temperature=temperature)]

    def _source(self, spec: FrozenModelConfig, dtype: torch.dtype) -> WeightSource:
        if is_delta(spec.path):
            base = spec.delta_base or (self.config.reference or self.config.model).path
            delta = DeltaFolder(spec.path)
            delta.require_base(base)
            return DeltaWeights(delta, self._base(local_folder(base), dtype), dtype)
        if self.device.type == "cuda":
            self.slots = self.slots or RingSlots(self.device)
            return PinnedWeights(local_folder(spec.path), dtype, self.slots)
        return MappedWeights(local_folder(spec.path), dtype, self.device)

    def _base(self, folder: str, dtype: torch.dtype) -> WeightSource:
        """The base's tensors bit for bit: those of a resident copy, if it was not converted, else the files."""
        resident = self.resident.get((folder, dtype))
        if resident is not None and CheckpointFolder(folder).dtypes() == {dtype}:
            return resident
        return MappedWeights(folder, None, self.device)


def free_memory(device: torch.device, ranks_here: int = 1) -> int:
    """Bytes that a new model may take on the scoring device: of a GPU, or this rank's part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // ranks_here


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
