"""`tcopd serve-teacher`: vLLM's OpenAI-compatible server with the settings that placement `server` needs."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch

from tcopd_fast.errors import UserError
from tcopd_fast.models import load_model_config, load_tokenizer, resolve_path

# A CPU's KV cache; vLLM's own default there is most of the machine's memory.
CPU_KV_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Service:
    """What to serve and where, as the command line says it. name: of the model in requests."""

    model: str
    host: str
    port: int
    name: str
    dtype: str | None
    max_model_len: int | None
    max_batched_tokens: int
    trust_remote_code: bool
    vllm: str


def serve(service: Service) -> NoReturn:
    """Print the line to paste into a configuration and become the server: signals and exit status are vLLM's.

    Raises UserError when vLLM is not installed or the model has no readable config.json and tokenizer.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("serve-teacher: needs the package vllm, which is not installed (see the README, Extras)")
    load_model_config(service.model, service.trust_remote_code)
    load_tokenizer(service.model, service.trust_remote_code)
    on_cpu = not torch.cuda.is_available()
    print(f"for the configuration, under teachers:\n  {config_line(service, keyed='VLLM_API_KEY' in os.environ)}")
    if service.host in ("127.0.0.1", "localhost", "::1"):
        print(f"listening on {service.host}: only processes of this machine reach it (--host changes that)", flush=True)
    else:
        print(
            f"listening on {service.host}: whoever reaches port {service.port} can use the model; with VLLM_API_KEY "
            "set it asks for that key",
            flush=True,
        )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags(service, on_cpu)]
    os.execve(command[0], command, environment(os.environ, on_cpu))


def flags(service: Service, on_cpu: bool) -> list[str]:
    """Arguments of vLLM's server; those of `service.vllm` come last and win."""
    out = [
        "--model", resolve_path(service.model), "--served-model-name", service.name,
        "--host", service.host, "--port", str(service.port),
        "--dtype", service.dtype or ("float32" if on_cpu else "bfloat16"),
        # A checkpoint's generation config would set top-k, penalties and a token limit.
        "--generation-config", "vllm",
        # As the learner's head: bfloat16 logits would shift every logprob.
        "--hf-overrides", '{"head_dtype": "float32"}',
        "--max-logprobs", "1",
        # For prompt logprobs vLLM makes float32 logits and logprobs [tokens of one forward, V], unseen by its own
        # memory planning: 2 × 1.2 GB for 2048 tokens and 152k ids. So forwards are small and some memory stays free.
        "--max-num-batched-tokens", str(service.max_batched_tokens), "--gpu-memory-utilization", "0.8",
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if service.max_model_len is not None:
        out += ["--max-model-len", str(service.max_model_len)]
    if service.trust_remote_code:
        out += ["--trust-remote-code"]
    if on_cpu:
        out += ["--enforce-eager", "--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES)]
    return out + shlex.split(service.vllm)


def environment(current: Mapping[str, str], on_cpu: bool) -> dict[str, str]:
    """`current` and, where it is silent: few messages, no usage reports, on a CPU nothing that needs a compiler."""
    ours = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if on_cpu:
        ours["TORCHDYNAMO_DISABLE"] = "1"
    return {**ours, **current}


def config_line(service: Service, keyed: bool) -> str:
    """The teacher as one line of YAML."""
    host = {"0.0.0.0": "THIS_MACHINE", "::": "THIS_MACHINE", "::1": "[::1]"}.get(service.host, service.host)
    key = ", api_key_env: VLLM_API_KEY" if keyed else ""
    server = f'{{urls: ["http://{host}:{service.port}/v1"]{key}}}'
    return f"NAME: {{path: {service.model}, placement: server, server: {server}}}"
