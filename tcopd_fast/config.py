"""The configuration tree: typed, frozen, every key documented; unknown keys are refused.

`tcopd_fast.config_io.load_config` is the way in; the sections are in `config_sections`.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, model_validator

from tcopd_fast.config_sections import (
    JUDGES,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    FrozenModelConfig,
    JudgeConfig,
    LearnerConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    ObjectiveConfig,
    PositiveInt,
    RolloutConfig,
    ScoringConfig,
    Section,
    VllmServerConfig,
)
from tcopd_fast.refusals import check_server_options

# Validation context of a run that is to happen on another machine, so that no optional package is needed here.
ELSEWHERE = "elsewhere"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
    def _combinations(self, info: ValidationInfo) -> Config:
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
        _check_offload(self.learner)
        _check_sampling(self.rollout, self.eval)
        _check_lengths(self.rollout)
        _check_engines(self.rollout, self.objective)
        _check_servers(self)
        _check_waits(self)
        if info.context != ELSEWHERE:
            _need("vllm", self.rollout.engine == "vllm", "rollout.engine=vllm")
            _need("flash_attn", self.model.attention == "flash_attention_2", "model.attention=flash_attention_2")
            _need("peft", self.model.lora is not None, "model.lora")
            _need("liger_kernel", self.model.liger, "model.liger=true")
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
        if self.model.lora is not None:
            raise ValueError("model.lora: is for training; evaluate the merged model that `tcopd export RUN` writes")
        if self.model.liger:
            raise ValueError("model.liger=true: is for training; the rollout engines have kernels of their own")
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


def _check_lengths(rollout: RolloutConfig) -> None:
    before = 0
    for number, bucket in enumerate(rollout.length_buckets):
        where = f"rollout.length_buckets[{number}]"
        if bucket.max_prompt_tokens <= before:
            raise ValueError(
                f"{where}.max_prompt_tokens={bucket.max_prompt_tokens}: not above the bucket before; sort them"
            )
        if bucket.max_new_tokens > rollout.max_new_tokens:
            raise ValueError(
                f"{where}.max_new_tokens={bucket.max_new_tokens} exceeds rollout.max_new_tokens="
                f"{rollout.max_new_tokens}; raise that, which holds for every response"
            )
        before = bucket.max_prompt_tokens


def _check_engines(rollout: RolloutConfig, objective: ObjectiveConfig) -> None:
    """Engines in processes of their own, as far as it can be seen before any is started."""
    apart = rollout.engine == "vllm" and rollout.vllm.mode == "server"
    if rollout.staleness and not apart:
        raise ValueError(
            f"rollout.staleness={rollout.staleness}: only an engine in a process of its own generates while the "
            "learner works; set rollout.engine=vllm rollout.vllm.mode=server"
        )
    if rollout.staleness and objective.is_cap is None:
        raise ValueError(
            f"rollout.staleness={rollout.staleness} with objective.is_cap=null: samples of older weights would count "
            "as the present policy's; set a cap"
        )
    if rollout.partial_share and not rollout.staleness:
        raise ValueError(
            f"rollout.partial_share={rollout.partial_share}: a response that goes on into the next step has tokens of "
            "older weights; set rollout.staleness to 1 or more"
        )
    settings = rollout.vllm.server
    check_server_options(settings.options)
    if settings.urls:
        _check_engine_urls(settings, apart)
    elif apart and settings.gpus:
        if len(settings.gpus) != settings.engines:
            raise ValueError(
                f"rollout.vllm.server.gpus names GPUs for {len(settings.gpus)} engines, "
                f"rollout.vllm.server.engines={settings.engines}; give one list per engine"
            )
        flat = [gpu for gpus in settings.gpus for gpu in gpus]
        if len(set(flat)) != len(flat) or {len(gpus) for gpus in settings.gpus} != {settings.tensor_parallel_size}:
            raise ValueError(
                f"rollout.vllm.server.gpus={settings.gpus}: give each engine {settings.tensor_parallel_size} GPUs of "
                "its own (rollout.vllm.server.tensor_parallel_size)"
            )


def _check_engine_urls(settings: VllmServerConfig, apart: bool) -> None:
    key = "rollout.vllm.server.urls"
    if not apart:
        raise ValueError(f"{key}: engines in processes of their own; set rollout.engine=vllm rollout.vllm.mode=server")
    started = {"engines": settings.engines not in (1, len(settings.urls)), "gpus": settings.gpus,
               "options": settings.options}  # fmt: skip
    for name, given in started.items():
        if given:
            raise ValueError(
                f"rollout.vllm.server.{name}: is for engines that the trainer starts, and those of {key} run already; "
                "leave it out, and tell `tcopd serve-rollout`"
            )
    hosts = []
    for url in settings.urls:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
            raise ValueError(f"{key}: {url!r}; give base URLs like http://10.0.0.2:8100")
        hosts.append(parts.hostname)
    if len({url.rstrip("/") for url in settings.urls}) != len(settings.urls):
        raise ValueError(f"{key}: {', '.join(settings.urls)} names an engine twice; give each once")
    far = next((host for host in hosts if host not in LOOPBACK), None)
    if settings.address in LOOPBACK and far is not None:
        raise ValueError(
            f"rollout.vllm.server.address={settings.address}: the engine on {far} gets its weights from the first "
            "rank's machine and cannot reach it there; give that machine's name or address in your network"
        )


def _check_offload(learner: LearnerConfig) -> None:
    if learner.offload == "optimizer_and_weights" and learner.zero_stage < 3:
        raise ValueError(
            f"learner.offload=optimizer_and_weights with learner.zero_stage={learner.zero_stage}: only ZeRO 3 fetches "
            "weights layer by layer; set learner.zero_stage=3 or learner.offload=optimizer"
        )


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


def _check_waits(config: Config) -> None:
    """What one rank may wait for must fit into what the others wait for it."""
    waits = {
        f"teachers.{name}.server.deadline_s": (teacher.server.deadline_s, "for a step's scores")
        for name, teacher in config.teachers.items()
        if teacher.server is not None
    }
    if config.reference is not None and config.reference.server is not None:
        waits["reference.server.deadline_s"] = config.reference.server.deadline_s, "for a step's scores"
    if config.rollout.engine == "vllm" and config.rollout.vllm.mode == "server":
        server = config.rollout.vllm.server
        waits["rollout.vllm.server.request_timeout_s"] = server.request_timeout_s, "for a response"
        waits["rollout.vllm.server.start_timeout_s"] = server.start_timeout_s, "for an engine to start"
    limit = config.learner.rank_timeout_s
    for key, (seconds, what) in waits.items():
        if limit < seconds:
            raise ValueError(
                f"learner.rank_timeout_s={limit:g} is below {key}={seconds:g}: the other ranks would take a rank that "
                f"waits so long {what} for lost; raise the one or lower the other"
            )


def _need(module: str, wanted: bool, key: str) -> None:
    if wanted and importlib.util.find_spec(module) is None:
        raise ValueError(f"{key}: needs the package {module}, which is not installed (see the README, Extras)")
