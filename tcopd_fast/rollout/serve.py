"""`tcopd serve-rollout`: one rollout engine for a trainer that runs elsewhere, started again when it ends by itself."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from contextlib import suppress

import torch

from tcopd_fast.config import LOOPBACK
from tcopd_fast.errors import UserError
from tcopd_fast.models import load_model_config
from tcopd_fast.rollout.fleet import spawn
from tcopd_fast.rollout.server_command import EngineSpec, command, environment

PAUSE_S = 1.0
# An engine that lives shorter than this has not got as far as to serve.
SHORT_S = 60.0
SHORT_LIVES = 3


def serve(spec: EngineSpec, host: str, port: int) -> int:
    """Run the engine until SIGTERM or SIGINT; its exit status is then 0.

    It is started again whenever it ends by itself. Raises UserError when vLLM is not installed, the model has no
    readable config.json, or the engine ends early several times in a row.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("serve-rollout: needs the package vllm, which is not installed (see the README, Extras)")
    load_model_config(spec.model_path, spec.trust_remote_code)
    print(introduction(spec, host, port), flush=True)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: asked.append(received))
    short = 0
    while not asked:
        began = time.monotonic()
        process = spawn(command(spec, host, port), environment(None), None)
        while process.poll() is None and not asked:
            time.sleep(0.1)
        _end(process)
        short = short + 1 if time.monotonic() - began < SHORT_S else 0
        if asked:
            break
        if short >= SHORT_LIVES:
            raise UserError(
                f"serve-rollout: the engine has ended {short} times within {SHORT_S:g} s of its start, the last time "
                f"with status {process.returncode}; read what it printed"
            )
        print(f"the engine has ended with status {process.returncode}; starting it again", flush=True)
        time.sleep(PAUSE_S)
    return 0


def introduction(spec: EngineSpec, host: str, port: int) -> str:
    """What to write into the trainer's configuration, and who can reach the port."""
    name = {"0.0.0.0": "THIS_MACHINE", "::": "THIS_MACHINE", "::1": "[::1]"}.get(host, host)
    lines = [
        "for the trainer's configuration:",
        f"  rollout.engine=vllm rollout.vllm.mode=server 'rollout.vllm.server.urls=[http://{name}:{port}]'",
    ]
    if spec.tensor_parallel_size > 1:
        lines.append(f"  rollout.vllm.server.tensor_parallel_size={spec.tensor_parallel_size}")
    if host in LOOPBACK:
        lines.append(f"listening on {host}: only processes of this machine reach it (--host changes that)")
    else:
        lines.append(
            f"WARNING: listening on {host}, without a key and without encryption: whoever reaches port {port} can "
            "replace the weights, stop the engine and read every prompt; keep it behind a firewall"
        )
    return "\n".join(lines)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The engine's whole process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def default_dtype() -> str:
    """bfloat16 on a GPU, else float32."""
    return "bfloat16" if torch.cuda.is_available() else "float32"
