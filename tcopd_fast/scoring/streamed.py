"""A frozen causal LM whose layers pass through memory one at a time, for all micro-batches together.

A transformers decoder is one forward over all layers. To run each layer for every micro-batch before the next layer
is fetched, the decoder is called twice per micro-batch with stand-ins for its layers, which cost nothing: the first
call records what every layer is called with (masks, rotary tables, sequence borders), the second puts the real last
hidden state in and returns what the decoder makes of it (the final norm). In between, the true layers run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from tcopd_kernels import TokenLogprobs, linear_logprob
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from tcopd_fast.errors import UserError
from tcopd_fast.liger import apply_liger
from tcopd_fast.models import DTYPES, load_model_config, resolve_path, text_config
from tcopd_fast.packing import PACKED_SDPA
from tcopd_fast.scoring.weights import WeightSource
from tcopd_fast.types import PackedTokens


@dataclass
class Replay:
    """What one micro-batch's stand-ins saw: per layer its arguments; `hidden` [1, T, D] is the state in between."""

    hidden: Tensor | None = None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    done: bool = False


class StandIn(nn.Module):
    """Takes a decoder layer's place: records the call, or at the last layer returns the computed hidden state."""

    def __init__(self, index: int, layer: nn.Module) -> None:
        super().__init__()
        self.index = index
        self.replay = Replay()
        # Some decoders read attributes of their layers, such as the kind of attention.
        self.__dict__["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        replay = self.replay
        if replay.done:
            assert replay.hidden is not None
            return replay.hidden
        if self.index == 0:
            replay.hidden = hidden
        replay.calls.append((args, kwargs))
        return hidden


class StreamedCausalLM:
    """Same results as `PackedCausalLM`, bit for bit in one dtype, with the weights of one group in memory.

    source: where the weights come from. Tensors are asked for by the names they have in the checkpoint.
    """

    def __init__(
        self,
        path: str,
        source: WeightSource,
        *,
        dtype: str,
        attention: str,
        vocab_size: int | None,
        device: torch.device,
        trust_remote_code: bool = False,
        liger: bool = False,
    ) -> None:
        model = empty_model(path, dtype, attention, trust_remote_code)
        if liger:
            apply_liger(model)
        self.vocab_size = vocab_size
        self.softcap = getattr(text_config(model.config), "final_logit_softcapping", None)
        model.eval().requires_grad_(False)
        stored = source.names()
        for name, buffer in list(model.named_buffers()):
            value = source.load([name])[name].to(buffer.dtype) if name in stored else buffer
            _set(model, name, value.to(device, copy=True))
        self.source = source
        self._plan(model, resolve_path(path))

    def _plan(self, model: Any, path: str) -> None:
        """Split the model into embedding, layers, rest of the decoder and head; map their names to the checkpoint's."""
        self.decoder = model.get_decoder()
        names = {id(module): name for name, module in model.named_modules()}
        prefix = names[id(self.decoder)]
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if not isinstance(getattr(self.decoder, "layers", None), nn.ModuleList) or type(head) is not nn.Linear:
            raise UserError(
                f"model {path}: {type(model).__name__} has no plain list of decoder layers and linear head, which "
                "streaming needs; use placement resident"
            )
        self.embedding = f"{names[id(embedding)]}.weight"
        tied = head.weight is embedding.weight or bool(getattr(text_config(model.config), "tie_word_embeddings", False))
        known = self.source.names()
        self.head_weight = f"{names[id(head)]}.weight"
        if tied and self.head_weight not in known:
            self.head_weight = self.embedding
        self.head_bias = f"{names[id(head)]}.bias" if head.bias is not None else None
        self.layers = list(self.decoder.layers)
        self.layer_names = [
            {key: f"{prefix}.layers.{i}.{key}" for key, _ in layer.named_parameters()}
            for i, layer in enumerate(self.layers)
        ]
        self.stand_ins = [StandIn(i, layer) for i, layer in enumerate(self.layers)]
        self.decoder.layers = nn.ModuleList(self.stand_ins)
        # A pass looks up only the rows of its own tokens, among which a padding row has no place of its own.
        embedding.padding_idx = None
        self.embed = embedding
        rest = {
            key: f"{prefix}.{key}" for key, _ in self.decoder.named_parameters() if f"{prefix}.{key}" != self.embedding
        }
        wanted = {self.embedding, self.head_weight, *rest.values()}
        wanted |= {name for layer in self.layer_names for name in layer.values()}
        wanted |= {self.head_bias} if self.head_bias else set()
        if missing := sorted(wanted - known):
            raise UserError(
                f"model {path}: its files have no tensor {missing[0]!r} ({len(missing)} of {len(wanted)} are missing), "
                "so they are not stored under the model's own names; use placement resident"
            )
        # The final norm and the like: too small to stream.
        self.rest = {key: self.source.load([name])[name].clone() for key, name in rest.items()}

    @torch.inference_mode()
    def logprobs(self, batches: Sequence[PackedTokens], *, temperature: float) -> list[TokenLogprobs]:
        """Logprob of every response token of every micro-batch, float32 [N] each; one trip through the weights."""
        replays = self._record(batches)
        for i, (layer, names) in enumerate(zip(self.layers, self.layer_names, strict=True)):
            weights = self._load(names)
            self.source.prefetch(list(self._after(i)))
            for replay in replays:
                args, kwargs = replay.calls[i]
                out = functional_call(layer, weights, (replay.hidden, *args), kwargs)
                if not isinstance(out, Tensor):
                    raise UserError(
                        f"{type(layer).__name__} returns more than a hidden state, so it cannot be streamed; "
                        "use placement resident"
                    )
                replay.hidden = out
            del weights
        hiddens = [self._finish(tokens, replay) for tokens, replay in zip(batches, replays, strict=True)]
        # Else the last micro-batch's hidden states would stay until the next pass.
        self._attend(Replay())
        head = self.source.load([name for name in (self.head_weight, self.head_bias) if name])
        return [
            linear_logprob(
                hidden_ND,
                head[self.head_weight],
                tokens.targets,
                bias=head[self.head_bias] if self.head_bias else None,
                temperature=temperature,
                softcap=self.softcap,
                vocab_size=self.vocab_size,
            )
            for hidden_ND, tokens in zip(hiddens, batches, strict=True)
        ]

    def _after(self, i: int) -> Sequence[str]:
        """Checkpoint names of the group that follows layer i."""
        if i + 1 < len(self.layers):
            return list(self.layer_names[i + 1].values())
        return [name for name in (self.head_weight, self.head_bias) if name]

    def _load(self, names: dict[str, str]) -> dict[str, Tensor]:
        loaded = self.source.load(list(names.values()))
        return {key: loaded[name] for key, name in names.items()}

    def _record(self, batches: Sequence[PackedTokens]) -> list[Replay]:
        """The decoder's calls of its layers for every micro-batch; the table's rows are fetched once for all."""
        ids, places = torch.cat([tokens.input_ids for tokens in batches]).unique(return_inverse=True)
        rows = {"weight": self.source.rows(self.embedding, ids)}
        replays = []
        for tokens, own in zip(batches, places.split([len(t.input_ids) for t in batches]), strict=True):
            replays.append(Replay())
            self._decode(tokens, replays[-1], functional_call(self.embed, rows, (own[None],)))
        return replays

    def _finish(self, tokens: PackedTokens, replay: Replay) -> Tensor:
        """Hidden states [N, D] at the predicting positions, after whatever follows the layers."""
        replay.done = True
        assert replay.hidden is not None
        return self._decode(tokens, replay, replay.hidden)[0].index_select(0, tokens.predict_at)

    def _attend(self, replay: Replay) -> None:
        for stand_in in self.stand_ins:
            stand_in.replay = replay

    def _decode(self, tokens: PackedTokens, replay: Replay, inputs_1TD: Tensor) -> Tensor:
        self._attend(replay)
        arguments = {
            "inputs_embeds": inputs_1TD,
            "position_ids": tokens.position_ids[None],
            "use_cache": False,
            "cu_seq_lens_q": tokens.cu_seqlens,
            "cu_seq_lens_k": tokens.cu_seqlens,
            "max_length_q": tokens.max_seqlen,
            "max_length_k": tokens.max_seqlen,
        }
        return functional_call(self.decoder, self.rest, (), arguments).last_hidden_state


def empty_model(path: str, dtype: str, attention: str, trust_remote_code: bool = False) -> Any:
    """The checkpoint's transformers model with parameters that have shapes and no values; its buffers are real."""
    config = load_model_config(path, trust_remote_code)
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(
            config,
            dtype=DTYPES[dtype],
            attn_implementation=PACKED_SDPA if attention == "sdpa" else attention,
            trust_remote_code=trust_remote_code,
        )


def _set(model: nn.Module, name: str, buffer: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, buffer)
