"""The configuration tree: typed, frozen, every key documented; unknown keys are refused.

`tcopd_fast.config_io.load_config` is the way in.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16"]
JUDGES = ("math", "exact", "code")
Placement = Literal["auto", "resident", "offload", "sharded", "delta"]


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, docstrings below fields become help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelConfig(Section):
    """The student (and how every model is run unless it says otherwise)."""

    path: str
    """Hugging Face id, local folder, or miniature:NAME. The student starts from these weights."""
    dtype: Dtype = "bfloat16"
    """Compute dtype. bfloat16 keeps float32 master weights in the optimizer."""
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """Attention over packed sequences: torch SDPA, or flash-attn's varlen kernels when that package is installed."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    trust_remote_code: bool = False
    """Run Python code shipped with a checkpoint. Off unless you set it."""


class ServerConfig(Section):
    """OpenAI-compatible endpoints that score for one frozen model (`tcopd serve-teacher` starts one)."""

    urls: list[str] = Field(min_length=1)
    """Base URLs, for example http://127.0.0.1:8000/v1; requests go to them in turn, and nowhere else."""
    model: str | None = None
    """Name of the model there; needed when an endpoint serves several."""
    api_key_env: str | None = None
    """Environment variable that holds the API key."""
    max_concurrent_requests: PositiveInt = 8
    """Requests of one rank under way at once, over all URLs."""
    max_tokens_per_request: PositiveInt = 16384
    """Tokens of the sequences that share a request (one longer sequence still goes alone)."""
    request_timeout_s: PositiveFloat = 300.0
    """A request without an answer for this long is sent again, elsewhere if there is elsewhere."""
    deadline_s: Annotated[float, Field(gt=0, le=1500)] = 1200.0
    """Longest time this model may take to score one step, failures and retries included; the run stops then. Other
    ranks wait at most 1800 s for one that scores."""


class FrozenModelConfig(Section):
    """A frozen model that scores sampled tokens: a teacher, or the reference."""

    path: str
    """Hugging Face id, local folder, or miniature:NAME. With placement server only its config.json and tokenizer are
    read, to compare them with the student's."""
    dtype: Dtype | None = None
    """Compute dtype; the student's when unset."""
    base: str | None = None
    """The teacher's own pre-RL base, used in place of the reference in its log-ratio (reward correction)."""
    placement: Placement | Literal["server"] | None = None
    """Where its weights live; scoring.placement when unset. server: in other processes, listed under `server`. The
    base of a server teacher is placed by scoring.placement."""
    server: ServerConfig | None = None
    """For placement server."""
    delta_base: str | None = None
    """For a folder made by `tcopd delta make`: the checkpoint it was made from; the reference when unset."""


class PromptSourceConfig(Section):
    """One set of prompts: a dataset id, a folder, a JSONL file or a parquet file."""

    path: str
    """Hugging Face dataset id, local folder, .jsonl or .parquet file, or miniature:NAME."""
    name: str | None = None
    """Configuration name of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset or of a local dataset folder."""
    domain: str | None = None
    """Domain of every row; when unset it is read from the row."""
    prompt_column: str | None = None
    """Column with the problem text or chat messages; found by name when unset."""
    answer_column: str | None = None
    """Column with the reference answer; found by name when unset."""
    domain_column: str | None = None
    """Column with the domain; found by name when unset."""
    limit: PositiveInt | None = None
    """Use only the first rows."""


class DataConfig(Section):
    """Stage 1: prompts."""

    train: list[PromptSourceConfig] = Field(min_length=1)
    """Sources of training prompts, concatenated."""
    shuffle: bool = True
    """Shuffle once per epoch with the run's seed; the order does not depend on the number of ranks."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt after the chat template."""
    overlong: Literal["drop", "refuse"] = "drop"
    """What to do with longer prompts: drop and count them, or stop."""
    system_prompt: str | None = None
    """System message put before every prompt that has none."""
    prompt_suffix: str = ""
    """Text appended to the last user message, for example an instruction to put the answer in \\boxed{}."""
    chat_template: bool = True
    """Apply the student tokenizer's chat template; off tokenizes the problem text as it is."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra arguments of apply_chat_template, for example {enable_thinking: false}."""


class VllmConfig(Section):
    """Settings of the in-process vLLM engine."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of GPU memory for weights and KV cache (ignored on a CPU)."""
    kv_cache_memory_bytes: PositiveInt = 256 << 20
    """KV cache on a CPU, in bytes (ignored on a GPU)."""
    max_num_seqs: PositiveInt = 256
    """Sequences decoded at once."""
    enforce_eager: bool = False
    """No CUDA graphs (always on a CPU)."""


class RolloutConfig(Section):
    """Stage 2: the student samples its own answers. Temperature is the only distribution setting; top-p,
    top-k and penalties would make the sampler differ from the policy and are not offered."""

    engine: Literal["hf", "vllm"] = "hf"
    """hf: batched sampling with a KV cache, embedded. vllm: the vLLM engine in the same process."""
    prompts_per_step: PositiveInt = 128
    """Prompts per step, over all ranks."""
    samples_per_prompt: PositiveInt = 1
    """Responses sampled per prompt."""
    max_new_tokens: PositiveInt = 16384
    """Longest response."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; logprobs, scoring and loss use the same."""
    max_batch_size: PositiveInt = 256
    """hf: sequences decoded at once on one rank."""
    vllm: VllmConfig = Field(default_factory=VllmConfig)
    """vllm: engine settings."""


class ScoringConfig(Section):
    """Stage 3: frozen models score every sampled token."""

    max_tokens_per_forward: PositiveInt = 16384
    """Packed tokens of one scoring forward (one longer sequence still goes alone)."""
    max_tokens_per_trip: PositiveInt = 262144
    """Packed tokens that share one trip of an offloaded or delta model's layers through memory."""
    placement: Placement = "auto"
    """resident: whole on the device. offload: layers stream from disk (on a GPU from pinned host memory). sharded:
    DeepSpeed ZeRO-3 over the ranks. delta: a difference to a base, rebuilt layer by layer. auto: delta for a delta
    folder, else the first of resident, sharded (with several ranks) and offload that fits."""
    shards_on_host: bool = False
    """sharded: the shards wait in host memory."""
    resident_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """auto: share of the free memory that resident models may take; the rest is for activations."""
    skip_unused_reference: bool = False
    """Do not run the reference when the signed weights make it cancel (Σλ/K = 1); its metrics vanish then."""
    self_check_tolerance: PositiveFloat = 0.05
    """Largest mean |Δ logprob| per token between the learner and the same weights as a frozen model, in nats."""


class ObjectiveConfig(Section):
    """Stages 4 and 6: contrastive reward, clipped policy loss. The defaults are the paper's."""

    lambdas: dict[str, float] | dict[str, dict[str, float]]
    """Signed coefficient per teacher, or per domain and teacher: {math: {expert: 1.5, anti: -0.5}}."""
    normalizer: Literal["active", "count", "none"] = "active"
    """K in (1/K) Σ λ_k(...): teachers with λ ≠ 0, all teachers, or 1."""
    lambda_warmup_steps: NonNegativeInt = 0
    """Negative coefficients grow linearly to their full size over this many steps."""
    logratio_clamp: PositiveFloat | None = None
    """Clamp of every log π_k − log π_ref, in nats."""
    advantage_clamp: PositiveFloat | None = None
    """Clamp of the advantage, in nats."""
    ref_kl_coef: NonNegativeFloat = 0.0
    """Coefficient of a KL(student ‖ reference) penalty (k3 estimator)."""
    judge_coef: NonNegativeFloat = 0.0
    """Coefficient of the judge's verdict, centred over the batch, added to every token's reward."""
    clip_low: Annotated[float, Field(ge=0, lt=1)] | None = 0.2
    """PPO clip of the ratio below 1."""
    clip_high: NonNegativeFloat | None = 0.2
    """PPO clip of the ratio above 1."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Bound of the ratio's effect on tokens of negative advantage."""
    is_cap: PositiveFloat | None = 5.0
    """Cap of the token weight exp(log π_old − log π_rollout) that corrects engine mismatch; null turns it off."""
    aggregation: Literal["token_mean", "gopd_compat"] = "token_mean"
    """Global mean over tokens, or mean over sequences of token means as G-OPD's scripts compute."""


class LossConfig(Section):
    """Stage 6: how the loss of the student's head is computed."""

    grad_tol: NonNegativeFloat = 0.0
    """Probability mass per token that the head's backward may leave out; 0 is exact. It saves time where the student
    is sure (entropy well under 1 nat); what was left out is logged as loss/dropped_mass_mean and its neighbours."""


class LearnerConfig(Section):
    """Stage 7: DeepSpeed."""

    zero_stage: Annotated[int, Field(ge=1, le=3)] = 2
    """ZeRO stage: 1 shards the optimizer, 2 gradients too, 3 weights too."""
    lr: NonNegativeFloat = 1e-5
    """AdamW learning rate, constant after the warm-up."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW betas."""
    eps: PositiveFloat = 1e-8
    """AdamW epsilon."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm is clipped to this."""
    minibatches: PositiveInt = 1
    """Optimizer steps per rollout batch, each on its share of the batch; above 1 the ratio is exact per token."""
    epochs: PositiveInt = 1
    """Passes over each rollout batch."""
    max_tokens_per_microbatch: PositiveInt = 16384
    """Packed tokens of one forward and backward (one longer sequence still goes alone)."""


class EvalConfig(Section):
    """Evaluation with the rollout engine during and after training."""

    data: list[PromptSourceConfig] = Field(default_factory=list)
    """Held-out problems; nothing is evaluated when empty."""
    every: NonNegativeInt = 0
    """Steps between evaluations; 0 means only before the first and after the last step."""
    at_start: bool = True
    """Evaluate the student before the first step."""
    samples: PositiveInt = 1
    """Samples per problem (k of mean@k)."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""
    max_new_tokens: PositiveInt | None = None
    """Longest response; the rollout's when unset."""


class JudgeConfig(Section):
    """The judge of final answers, per domain: math (math-verify in worker processes), exact (equal text), code (tests
    in a sandbox), or module:function of your own, (response, answer) -> bool."""

    default: str = "math"
    """Judge of every domain that `domains` does not name."""
    domains: dict[str, str] = Field(default_factory=dict)
    """Judge per domain, for example {math: math, code: code, facts: exact, mine: mypackage.judges:grade}."""
    code_timeout_s: PositiveFloat = 10.0
    """code: seconds one test may take, of the clock and of the processor."""
    code_memory_bytes: PositiveInt = 1 << 30
    """code: address space of one test's process."""
    timeout_s: PositiveFloat = 5.0
    """Seconds one verdict may take before it counts as wrong."""
    workers: PositiveInt = 1
    """Worker processes per rank."""


class CheckpointConfig(Section):
    """Checkpoints: model, optimizer, position in the data."""

    every: NonNegativeInt = 0
    """Steps between checkpoints; 0 keeps only the one after the last step."""
    keep_last: PositiveInt = 2
    """Older checkpoints are deleted."""


class LoggingConfig(Section):
    """What a person sees. metrics.jsonl is always written."""

    tensorboard: bool = True
    """Write TensorBoard event files under RUN/tensorboard."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project (needs the wandb package)."""
    token_samples: NonNegativeInt = 4
    """Responses per step whose per-token advantages are kept for the report."""


class Config(Section):
    """A whole run."""

    run_dir: str
    """Folder of the run; refused when it already holds another one."""
    steps: PositiveInt
    """Rollout batches to train on."""
    seed: int = 0
    """Seed of data order, sampling and everything else."""
    model: ModelConfig
    """The student."""
    teachers: dict[str, FrozenModelConfig] = Field(min_length=1)
    """Named teachers."""
    reference: FrozenModelConfig | None = None
    """The reference; the student's starting weights when unset."""
    data: DataConfig
    """Stage 1, data."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """Stage 2, rollout."""
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    """Stage 3, scoring."""
    objective: ObjectiveConfig
    """Stages 4 to 6, reward and loss."""
    loss: LossConfig = Field(default_factory=LossConfig)
    """Stage 6, numerics of the loss."""
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    """Stage 7, learner."""
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    """Judge of final answers."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Evaluation."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """Logs."""

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        for name in self.teachers:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "reference":
                raise ValueError(f"teachers.{name}: name a teacher with letters, digits, _ and -, and not `reference`")
        for domain, table in self.lambda_tables().items():
            where = f"objective.lambdas.{domain}" if domain else "objective.lambdas"
            for teacher in table:
                if teacher not in self.teachers:
                    raise ValueError(
                        f"{where}.{teacher}: no such teacher; teachers are {', '.join(sorted(self.teachers))}"
                        f"{nearest(teacher, self.teachers)}"
                    )
        if not any(value for table in self.lambda_tables().values() for value in table.values()):
            raise ValueError("objective.lambdas: every coefficient is 0; give at least one teacher a non-zero λ")
        if self.learner.minibatches > self.rollout.prompts_per_step:
            raise ValueError(
                f"learner.minibatches={self.learner.minibatches} exceeds rollout.prompts_per_step="
                f"{self.rollout.prompts_per_step}; every optimizer step needs a prompt"
            )
        _check_sampling(self.rollout, self.eval)
        _check_servers(self)
        _need("vllm", self.rollout.engine == "vllm", "rollout.engine=vllm")
        _need("flash_attn", self.model.attention == "flash_attention_2", "model.attention=flash_attention_2")
        _need("wandb", self.logging.wandb_project is not None, "logging.wandb_project")
        return self

    def lambda_tables(self) -> dict[str | None, dict[str, float]]:
        """λ per teacher, by domain; the key None stands for every domain."""
        tables: dict[str | None, dict[str, float]] = {}
        flat: dict[str, float] = {}
        for key, value in self.objective.lambdas.items():
            if isinstance(value, dict):
                tables[key] = value
            else:
                flat[key] = value
        return tables or {None: flat}

    def lambdas_for(self, domain: str) -> dict[str, float]:
        """λ of every configured teacher for a sample of `domain` (0 where the table is silent)."""
        tables = self.lambda_tables()
        table = tables[None] if None in tables else tables[domain]
        return {name: table.get(name, 0.0) for name in self.teachers}


class EvalRunConfig(Section):
    """What `tcopd eval` takes."""

    seed: int = 0
    """Seed of sampling and of the bootstrap."""
    model: ModelConfig
    """The model to evaluate."""
    data: DataConfig
    """Problems (train lists them) and how they become prompts."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """Engine, and the longest response."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Samples per problem and temperature."""
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    """Judge of final answers."""

    @model_validator(mode="after")
    def _combinations(self) -> EvalRunConfig:
        _check_sampling(self.rollout, self.eval)
        _check_judges(self.judge)
        _need("vllm", self.rollout.engine == "vllm", "rollout.engine=vllm")
        return self


def longest_sequence(config: Config) -> int:
    """Most tokens that prompt and response can have together."""
    return config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)


def _check_judges(judge: JudgeConfig) -> None:
    for where, kind in (
        ("judge.default", judge.default),
        *((f"judge.domains.{d}", k) for d, k in judge.domains.items()),
    ):
        if kind not in JUDGES and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", kind):
            raise ValueError(f"{where}: {kind!r} is no judge; give {', '.join(JUDGES)} or module:function")


def nearest(word: str, valid: Iterable[str]) -> str:
    """`; did you mean X?`, or the list of valid words when none is near."""
    words = list(valid)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else (f"; valid: {', '.join(words)}" if words else "")


def _check_sampling(rollout: RolloutConfig, evaluation: EvalConfig) -> None:
    """vLLM samples at 0.01 when asked for less and refuses more than 2."""
    if rollout.engine != "vllm":
        return
    for key, value in (("rollout.temperature", rollout.temperature), ("eval.temperature", evaluation.temperature)):
        if value and not 0.01 <= value <= 2.0:
            raise ValueError(f"{key}={value}: the vllm engine samples between 0.01 and 2; use rollout.engine=hf")


def _check_servers(config: Config) -> None:
    """Everything about server placements that needs no server to be seen."""
    frozen = {f"teachers.{name}": teacher for name, teacher in config.teachers.items()}
    if config.reference is not None:
        frozen["reference"] = config.reference
    for key, model in frozen.items():
        if (model.placement == "server") != (model.server is not None):
            raise ValueError(f"{key}: placement: server and a section `server` with its urls go together; give both")
        if model.server is None:
            continue
        if model.dtype is not None:
            raise ValueError(f"{key}.dtype={model.dtype}: the server decides its dtype; leave this out")
        for url in model.server.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"{key}.server.urls: {url!r}; give base URLs like http://127.0.0.1:8000/v1")
            if parts.username or parts.password:
                raise ValueError(f"{key}.server.urls: a URL holds a password; use {key}.server.api_key_env")
        temperatures = {"rollout.temperature": config.rollout.temperature}
        if config.eval.data and config.eval.temperature:
            temperatures["eval.temperature"] = config.eval.temperature
        for setting, value in temperatures.items():
            if value != 1:
                raise ValueError(
                    f"{setting}={value}: a server's prompt logprobs are at temperature 1 only; set it to 1, or give "
                    f"{key} another placement"
                )


def _need(module: str, wanted: bool, key: str) -> None:
    if wanted and importlib.util.find_spec(module) is None:
        raise ValueError(f"{key}: needs the package {module}, which is not installed (see the README, Extras)")
