"""The sections of the configuration: every key with its type, default and meaning, in the order of the stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

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


class LoraConfig(Section):
    """The student as a frozen base and a trained LoRA adapter (docs/learner.md)."""

    rank: PositiveInt = 16
    """Rank of the factors."""
    alpha: PositiveFloat = 32.0
    """Scale: every layer computes W + (alpha / rank) · B A."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Layers with an adapter: every linear layer but the head, or names such as [q_proj, v_proj]."""
    dropout: NonNegativeFloat = 0.0
    """Only 0: an update with dropout would not be that of the policy that sampled."""

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value:
            raise ValueError(
                f"model.lora.dropout={value}: with dropout the learner's logprobs are those of another policy than the "
                "one that sampled, so the ratio is not 1 on policy; set 0"
            )
        return value

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("model.lora.target_modules=[]: names no layer; give all-linear or names like [q_proj]")
        return value


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
    lora: LoraConfig | None = None
    """Train a LoRA adapter on the frozen weights of `path` instead of all weights; needs the package peft."""
    liger: bool = False
    """Liger's Triton kernels for RMSNorm, RoPE and SwiGLU in every model of the run; needs liger-kernel and a GPU."""


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
    ranks wait at most learner.rank_timeout_s for one that scores."""


class FrozenModelConfig(Section):
    """A frozen model that scores sampled tokens: a teacher, or the reference."""

    path: str
    """Hugging Face id, local folder (a delta or a peft LoRA adapter, too), or miniature:NAME. With placement server
    only its config.json and tokenizer are read, to compare them with the student's."""
    dtype: Dtype | None = None
    """Compute dtype; the student's when unset."""
    base: str | None = None
    """The teacher's own pre-RL base, used in place of the reference in its log-ratio (reward correction)."""
    placement: Placement | Literal["server"] | None = None
    """Where its weights live; scoring.placement when unset. server: in other processes, listed under `server`. The
    base of a server teacher is placed by scoring.placement, and a LoRA adapter is where its base is."""
    server: ServerConfig | None = None
    """For placement server."""
    delta_base: str | None = None
    """For a folder made by `tcopd delta make` or a LoRA adapter: the checkpoint it builds on; the reference when
    unset."""

    def own_base(self) -> FrozenModelConfig | None:
        """The model of `base`, if there is one; it lives where this one does, unless that is a server."""
        if self.base is None:
            return None
        placement = None if self.placement == "server" else self.placement
        return FrozenModelConfig(path=self.base, dtype=self.dtype, placement=placement)


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
    domain_weights: dict[str, NonNegativeFloat] | None = Field(default=None, min_length=1)
    """Domain -> relative share of every step's prompts: {math: 3, code: 1}; 0 leaves a domain out. Unset: prompts come
    as often as they occur in the sources."""
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


class VllmServerConfig(Section):
    """vLLM engines in processes of their own, which the first rank starts on its machine, or which run already."""

    engines: PositiveInt = 1
    """Engines to start; prompts are spread over them."""
    urls: list[str] = Field(default_factory=list)
    """Engines that run already, on any machine, each started there by `tcopd serve-rollout`: [http://10.0.0.2:8100];
    none is started then. An engine serves one run at a time."""
    address: str = "127.0.0.1"
    """The first rank's machine, as the engines of `urls` reach it to get weights: its address in your network."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs of one engine."""
    gpus: list[list[NonNegativeInt]] = Field(default_factory=list)
    """GPU numbers of each engine, for example [[6], [7]]; needed on a machine with GPUs, and not the learner's."""
    start_timeout_s: PositiveFloat = 900.0
    """An engine that does not answer for this long after its start, or at a URL since it went down, is given up."""
    request_timeout_s: PositiveFloat = 1800.0
    """A response that takes longer means that its engine hangs: it is killed and started again."""
    bucket_bytes: PositiveInt = 256 << 20
    """Weights travel to the engines in pieces of this size."""
    max_restarts: NonNegativeInt = 5
    """Times that engines are started again (with `urls`: waited for) in one run before it stops; several at once are
    one time."""
    options: str = ""
    """More options for vLLM's server, as on its command line; they win."""


class VllmConfig(Section):
    """Settings of the vLLM engine."""

    mode: Literal["colocate", "server"] = "colocate"
    """colocate: in every rank's process, on its device. server: in processes of their own, see `server`."""
    server: VllmServerConfig = Field(default_factory=VllmServerConfig)
    """mode server: the processes."""
    sleep: bool = True
    """colocate on a GPU: weights and KV cache leave it while the teachers score and the learner works."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of GPU memory for weights and KV cache (ignored on a CPU)."""
    kv_cache_memory_bytes: PositiveInt = 256 << 20
    """KV cache on a CPU, in bytes (ignored on a GPU)."""
    max_num_seqs: PositiveInt = 256
    """Sequences decoded at once."""
    enforce_eager: bool = False
    """No CUDA graphs (always on a CPU)."""


class LengthBucket(Section):
    """Prompts up to some length, and how long their responses may be."""

    max_prompt_tokens: PositiveInt
    """Prompts of at most so many tokens (and more than the bucket before)."""
    max_new_tokens: PositiveInt
    """Longest response to them."""


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
    length_buckets: list[LengthBucket] = Field(default_factory=list)
    """Shorter limits for responses to short prompts: [{max_prompt_tokens: 128, max_new_tokens: 2048}]; prompts longer
    than the last bucket's have max_new_tokens."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; logprobs, scoring and loss use the same."""
    staleness: NonNegativeInt = 0
    """Batches that are generated ahead while the learner works, so the weight syncs that may lie between a sample and
    its update; 0 is strictly on-policy. Above 0 needs engine vllm in mode server."""
    partial_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a step's responses that need not be finished: they go on and join a later step's batch, with the tokens
    and logprobs they have; those that get older than `staleness` are dropped. One step of the bound is left for them,
    so staleness − 1 batches are generated ahead."""
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
    alarm_negative_share: Annotated[float, Field(gt=0, lt=1)] | None = 0.9
    """Warn when more than this share of what the teachers add to the advantage comes from negative λ (docs/safety.md);
    null never does."""
    alarm_entropy_share: Annotated[float, Field(gt=0, lt=1)] | None = 0.1
    """Warn when the entropy falls below this share of the first step's; null never does."""
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
    max_skipped_steps: PositiveInt = 5
    """So many optimizer steps in a row skipped for a gradient that is not finite end the run with a diagnosis.json."""
    offload: Literal["none", "optimizer", "optimizer_and_weights"] = "none"
    """What lives in host memory: the optimizer with its float32 weights, and under ZeRO 3 the weights too."""
    rank_timeout_s: PositiveFloat = 1800.0
    """Longest wait of a rank for another: for its start, its rollouts, its scoring."""


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
    """Judge per domain, for example {math: math, code: code, facts: exact, mine: mypackage.judges:grade}. A function of
    your own runs in worker processes, too."""
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
    """The newest so many are kept, older ones deleted; the disk must hold one more while it is written."""
    keep_best: NonNegativeInt = 0
    """Those of the best so many evaluations are kept as well, and saved where `every` would not."""
    best_of: str | None = None
    """Evaluation set whose mean@k says what is best; the mean over all sets when unset."""


class LoggingConfig(Section):
    """What a person sees. metrics.jsonl is always written."""

    tensorboard: bool = True
    """Write TensorBoard event files under RUN/tensorboard."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project (needs the wandb package)."""
    token_samples: NonNegativeInt = 4
    """Responses per step whose per-token advantages are kept for the report."""
    timeline: bool = True
    """Write RUN/timeline.jsonl: when every rank and engine did what, for `tcopd trace` and the report."""
