"""The one command line and environment of a vLLM server that a trainer can send weights to."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tcopd_fast.config_sections import RolloutConfig
from tcopd_fast.models import resolve_path
from tcopd_fast.rollout.vllm_plugin import ON_CPU

MODEL = "student"
"""Name of the model in requests."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine runs. max_model_len: None for all the model holds. options: more words for vLLM; they win."""

    model_path: str
    dtype: str
    max_model_len: int | None
    seed: int
    trust_remote_code: bool
    tensor_parallel_size: int
    max_num_seqs: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int
    enforce_eager: bool
    options: str

    @classmethod
    def of_run(
        cls,
        config: RolloutConfig,
        model_path: str,
        dtype: str,
        max_model_len: int,
        seed: int,
        trust_remote_code: bool,
    ) -> EngineSpec:
        """What a run's configuration says about its engines."""
        vllm = config.vllm
        return cls(
            model_path,
            dtype,
            max_model_len,
            seed,
            trust_remote_code,
            vllm.server.tensor_parallel_size,
            vllm.max_num_seqs,
            vllm.gpu_memory_utilization,
            vllm.kv_cache_memory_bytes,
            vllm.enforce_eager,
            vllm.server.options,
        )


def command(spec: EngineSpec, host: str, port: int) -> list[str]:
    """vLLM's server with what the trainer needs of it."""
    on_cpu = not torch.cuda.is_available()
    words = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", resolve_path(spec.model_path), "--served-model-name", MODEL,
        "--host", host, "--port", str(port), "--disable-uvicorn-access-log",
        "--load-format", "safetensors", "--skip-tokenizer-init", "--dtype", spec.dtype,
        "--seed", str(spec.seed), "--max-num-seqs", str(spec.max_num_seqs),
        "--tensor-parallel-size", str(spec.tensor_parallel_size),
        # A checkpoint's generation config would set top-k, penalties and a token limit.
        "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs",
        # As the learner's head: bfloat16 logits would shift every logprob.
        "--hf-overrides", '{"head_dtype": "float32"}',
        # Token ids in, token ids out.
        "--enable-scale-out",
        "--weight-transfer-config", f'{{"backend": "{"tcopd_gloo" if on_cpu else "nccl"}"}}',
        "--worker-extension-cls", "tcopd_fast.rollout.vllm_plugin.RolloutWorker",
    ]  # fmt: skip
    if spec.max_model_len is not None:
        words += ["--max-model-len", str(spec.max_model_len)]
    if on_cpu:
        # vLLM rewinds the generator of a seeded request whose prompt it took in parts; a CPU's cannot be rewound.
        words += ["--enforce-eager", "--no-enable-chunked-prefill"]
        words += ["--kv-cache-memory-bytes", str(spec.kv_cache_memory_bytes)]
    else:
        words += ["--gpu-memory-utilization", str(spec.gpu_memory_utilization)]
        words += ["--enforce-eager"] if spec.enforce_eager else []
    words += ["--trust-remote-code"] if spec.trust_remote_code else []
    return words + shlex.split(spec.options)


def environment(gpus: Sequence[int] | None) -> dict[str, str]:
    """This process's environment without its process group, and what vLLM reads from there. gpus: None for those that
    are visible here."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LD_PRELOAD")
    out = {key: value for key, value in os.environ.items() if key not in launcher}
    out.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    # The routes for weights and pauses.
    out["VLLM_SERVER_DEV_MODE"] = "1"
    out.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    out.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        return out | {ON_CPU: "1", "TORCHDYNAMO_DISABLE": "1"}
    return out if gpus is None else out | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
