"""Loading checkpoints, checking that they fit together, and running them on packed sequences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from tcopd_kernels import TokenLogprobs, linear_logprob
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from tcopd_fast import miniature
from tcopd_fast.config import Config
from tcopd_fast.config_sections import FrozenModelConfig
from tcopd_fast.errors import UserError
from tcopd_fast.liger import apply_liger, check_liger
from tcopd_fast.packing import PACKED_SDPA
from tcopd_fast.types import PackedTokens

disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The file that makes a folder a peft adapter.
ADAPTER_CONFIG = "adapter_config.json"
PROBE_TEXT = "$x_1=-3.5$; \\boxed{12}\n\n def f(n): return n # π"


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: weight [V, D], bias [V] or None, softcap or None."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None


class PackedCausalLM(nn.Module):
    """A causal LM whose logits are never materialised: packed tokens in, response logprobs out.

    vocab_size: only this many leading rows of the head count (None: all), so that models whose vocabularies
    are padded differently share one event space.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.softcap = getattr(text_config(model.config), "final_logit_softcapping", None)

    def head(self) -> Head:
        """The output head. Read it inside a forward: under ZeRO-3 the weight is whole only there."""
        linear = self.model.get_output_embeddings()
        return Head(linear.weight, getattr(linear, "bias", None), self.softcap)

    def hidden(self, tokens: PackedTokens) -> Tensor:
        """Final hidden states at the predicting positions, [N, D]."""
        hidden_1TD = self.model.get_decoder()(
            input_ids=tokens.input_ids[None],
            position_ids=tokens.position_ids[None],
            use_cache=False,
            cu_seq_lens_q=tokens.cu_seqlens,
            cu_seq_lens_k=tokens.cu_seqlens,
            max_length_q=tokens.max_seqlen,
            max_length_k=tokens.max_seqlen,
        ).last_hidden_state
        return hidden_1TD[0].index_select(0, tokens.predict_at)

    def logprobs(self, tokens: PackedTokens, *, temperature: float, entropy: bool = False) -> TokenLogprobs:
        """Logprob (and entropy, in nats) of every response token at `temperature`, float32 [N]."""
        hidden_ND = self.hidden(tokens)
        head = self.head()
        return linear_logprob(
            hidden_ND,
            head.weight,
            tokens.targets,
            bias=head.bias,
            temperature=temperature,
            softcap=head.softcap,
            entropy=entropy,
            vocab_size=self.vocab_size,
        )

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `function(self, …)` as this module's forward, so that DeepSpeed's hooks see head and trunk alike."""
        return function(self, *args, **kwargs)


def resolve_path(path: str) -> str:
    """A model path as transformers takes it; `miniature:NAME` becomes the shipped folder."""
    if path.startswith("miniature:"):
        return str(miniature.asset(path.removeprefix("miniature:")))
    if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().is_dir():
        raise UserError(
            f"model path {path}: no such folder; give a folder with config.json and safetensors, or a hub id"
        )
    return str(Path(path).expanduser()) if path.startswith("~") else path


def local_folder(path: str) -> str:
    """A folder on this machine with the checkpoint's files; of a hub id its downloaded snapshot."""
    folder = resolve_path(path)
    if Path(folder).is_dir():
        return folder
    try:
        return snapshot_download(folder, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {path}: no such folder, and not to be had from the hub ({first_line(error)}); check the path"
        ) from error


def is_adapter(path: str) -> bool:
    """Whether a model path is a folder with a peft adapter; asks no hub."""
    return (Path(resolve_path(path)) / ADAPTER_CONFIG).is_file()


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; UserError naming the path when it has none or cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(resolve_path(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer of {path}: cannot be loaded ({first_line(error)}); check the path or download it first"
        ) from error


def load_model_config(path: str, trust_remote_code: bool = False) -> Any:
    """The checkpoint's config.json; refuses adapters, and heads whose logits are more than softcap(linear)."""
    if is_adapter(path):
        raise UserError(
            f"model {path}: is a LoRA adapter, which can only be a teacher or the reference of a training run; "
            "merge it into a checkpoint (peft: merge_and_unload)"
        )
    try:
        config = AutoConfig.from_pretrained(resolve_path(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {path}: cannot be loaded ({first_line(error)}); check the path or download it first"
        ) from error
    text = text_config(config)
    for key in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        if getattr(text, key, 1.0) not in (1.0, None):
            raise UserError(
                f"model {path}: config.{key}={getattr(text, key)} scales the logits, which is not supported"
            )
    return config


def load_causal_lm(
    path: str,
    *,
    dtype: str,
    attention: str,
    vocab_size: int | None,
    trust_remote_code: bool = False,
    liger: bool = False,
) -> PackedCausalLM:
    """Load a checkpoint (safetensors only) ready for packed sequences."""
    load_model_config(path, trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_path(path),
            dtype=DTYPES[dtype],
            attn_implementation=PACKED_SDPA if attention == "sdpa" else attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"model {path}: its weights cannot be loaded ({first_line(error)}); download or export it again"
        ) from error
    if type(model.get_output_embeddings()) is not nn.Linear:
        raise UserError(
            f"model {path}: the output head is {type(model.get_output_embeddings()).__name__}; "
            "only a plain nn.Linear is supported (merge adapters first)"
        )
    if liger:
        apply_liger(model)
    return PackedCausalLM(model, vocab_size)


class HfZero3:
    """While open, transformers loads checkpoints straight into the shards of these ZeRO-3 settings."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def __enter__(self) -> None:
        from transformers.integrations import HfDeepSpeedConfig

        self.handle = HfDeepSpeedConfig(self.settings)

    def __exit__(self, *error: object) -> None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


@dataclass(frozen=True)
class ModelSet:
    """What was learnt from the configs and tokenizers before any weight was loaded.

    vocab_size: rows of the head that every model has, or None when all have the same number.
    max_position_embeddings: positions that every model holds.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int | None
    max_position_embeddings: int


def check_models(config: Config) -> ModelSet:
    """Load every tokenizer and config.json and refuse models that cannot score the student's tokens.

    Raises UserError naming the model and the first difference: token ids, encoding of a probe text, or EOS.
    Differently padded vocabularies are fine as long as every tokenizer id has a row.
    """
    trust = config.model.trust_remote_code
    student = load_model_config(config.model.path, trust)
    tokenizer = load_tokenizer(config.model.path, trust)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path {config.model.path}: its tokenizer has no eos_token, so a response could never end"
        )
    if config.model.liger:
        check_liger(config.model.path, student.model_type)
    rows = {"model.path": text_config(student).vocab_size}
    positions = [max_positions(student)]
    for field, spec in frozen_models(config):
        other = load_model_config(described_by(config, spec), trust)
        if config.model.liger and spec.server is None:
            check_liger(spec.path, other.model_type)
        rows[field] = text_config(other).vocab_size
        positions.append(max_positions(other))
        source = tokenizer_source(config, spec)
        check_tokenizer(field, source, tokenizer, load_tokenizer(source, trust))
    for field, size in rows.items():
        if size < len(tokenizer):
            raise UserError(
                f"{field}: vocabulary has {size} rows but the student's tokenizer uses {len(tokenizer)} ids"
            )
    smallest = min(rows.values())
    vocab_size = None if smallest == max(rows.values()) else smallest
    return ModelSet(tokenizer, vocab_size, min(positions))


def max_positions(config: Any) -> int:
    """Positions a checkpoint's config.json says it holds (no limit when it says nothing)."""
    return getattr(text_config(config), "max_position_embeddings", None) or 1 << 30


def frozen_models(config: Config) -> Iterable[tuple[str, FrozenModelConfig]]:
    """(config key of its path, model) of the reference, every teacher and every teacher's own base."""
    if config.reference is not None:
        yield "reference.path", config.reference
    for name, teacher in config.teachers.items():
        yield f"teachers.{name}.path", teacher
        if own_base := teacher.own_base():
            yield f"teachers.{name}.base", own_base


def base_path(config: Config, spec: FrozenModelConfig) -> str:
    """The checkpoint that a delta or an adapter builds on: its delta_base, else the reference's (or the student's)."""
    if spec.delta_base is not None or config.reference is None or spec is config.reference:
        return spec.delta_base or config.model.path
    return config.reference.path


def described_by(config: Config, spec: FrozenModelConfig) -> str:
    """The path whose config.json describes a frozen model: an adapter has its base's."""
    return base_path(config, spec) if is_adapter(spec.path) else spec.path


def tokenizer_source(config: Config, spec: FrozenModelConfig) -> str:
    """The path with a frozen model's tokenizer: an adapter's own if it has one, else its base's."""
    own = (Path(resolve_path(spec.path)) / "tokenizer_config.json").is_file()
    return spec.path if own else described_by(config, spec)


def check_tokenizer(field: str, path: str, student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Refuse a model whose tokens are not the student's. Raises UserError naming `field` and the first difference."""
    remedy = "use a teacher that shares the student's tokenizer"
    mine, theirs = student.get_vocab(), other.get_vocab()
    if mine != theirs:
        token = next(t for t in sorted({*mine, *theirs}) if mine.get(t) != theirs.get(t))
        raise UserError(
            f"{field} {path}: token {token!r} has id {theirs.get(token)} there and {mine.get(token)} in the student; "
            f"{remedy}"
        )
    if student(PROBE_TEXT)["input_ids"] != other(PROBE_TEXT)["input_ids"]:
        raise UserError(f"{field} {path}: its tokenizer splits text differently from the student's; {remedy}")
    if student.eos_token_id != other.eos_token_id:
        raise UserError(
            f"{field} {path}: eos is {other.eos_token!r} there and {student.eos_token!r} in the student; "
            "set the same eos_token in both tokenizers"
        )


def text_config(config: Any) -> Any:
    """The part of a config.json that describes the text decoder."""
    return config.get_text_config(decoder=True)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
