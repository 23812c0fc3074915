"""The vLLM processes of mode `server`: started, watched, killed and started again by the first rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar

import httpx

from tcopd_fast.config_sections import RolloutConfig
from tcopd_fast.dist import free_port
from tcopd_fast.errors import UserError
from tcopd_fast.rollout.server_command import EngineSpec, command, environment

HOST = "127.0.0.1"
# An engine that is told to end has this long before it is killed.
GRACE_S = 10.0


@dataclass
class Engine:
    """One vLLM server process with its children, in a process group of its own."""

    number: int
    log: Path
    process: subprocess.Popen[bytes] | None = None
    url: str = ""


@dataclass
class Fleet:
    """Every engine of a run.

    model_path, dtype, max_model_len, seed, trust_remote_code: as the in-process engine takes them. folder: where logs
    go. restarts counts how often engines were started again, several at once as one time.
    """

    config: RolloutConfig
    model_path: str
    dtype: str
    max_model_len: int
    seed: int
    folder: Path
    trust_remote_code: bool = False
    engines: list[Engine] = field(default_factory=list)
    restarts: int = 0
    remedy: ClassVar[str] = "replaced"
    """What `restart` does about an engine that failed."""

    @property
    def urls(self) -> list[str]:
        """Base URL of every engine."""
        return [engine.url for engine in self.engines]

    @property
    def spec(self) -> EngineSpec:
        """What every engine runs."""
        return EngineSpec.of_run(
            self.config, self.model_path, self.dtype, self.max_model_len, self.seed, self.trust_remote_code
        )

    def start(self) -> None:
        """Start all engines and wait until they answer. Raises UserError when one does not."""
        count = self.config.vllm.server.engines
        self.engines = [Engine(n, self.folder / f"rollout_engine_{n}.log") for n in range(count)]
        self._launch(self.engines)

    def restart(self, suspects: Sequence[int]) -> list[int]:
        """Start again those that have ended or are suspected to hang; returns their numbers. Raises UserError."""
        gone = [e for e in self.engines if e.number in suspects or e.process is None or e.process.poll() is not None]
        limit = self.config.vllm.server.max_restarts
        self.restarts += bool(gone)
        if self.restarts > limit:
            raise UserError(
                f"rollout engines had to be started again more than {limit} times "
                f"(rollout.vllm.server.max_restarts); the last words are in {gone[0].log}"
            )
        for engine in gone:
            stop(engine, grace_s=0.0)
        self._launch(gone)
        return [engine.number for engine in gone]

    def close(self) -> None:
        """End every engine and its children."""
        for engine in self.engines:
            if engine.process is not None:
                with suppress(ProcessLookupError):
                    os.killpg(engine.process.pid, signal.SIGTERM)
        for engine in self.engines:
            stop(engine, GRACE_S)

    def _launch(self, engines: Sequence[Engine]) -> None:
        for engine in engines:
            port = free_port()
            engine.url = f"http://{HOST}:{port}"
            with engine.log.open("ab") as log:
                engine.process = spawn(command(self.spec, HOST, port), self.environment(engine.number), log)
        end = time.monotonic() + self.config.vllm.server.start_timeout_s
        try:
            for engine in engines:
                wait_until_up(engine, end)
        except UserError:
            self.close()
            raise

    def environment(self, number: int) -> dict[str, str]:
        """Of one engine."""
        gpus = self.config.vllm.server.gpus
        return environment(gpus[number] if gpus else None)


def spawn(words: Sequence[str], variables: dict[str, str], log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Start a process group that ends with this process, however this one ends. log: None for this one's output."""
    return subprocess.Popen(
        [sys.executable, "-m", "tcopd_fast.rollout.leash", str(os.getpid()), *words],
        env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def wait_until_up(engine: Engine, end: float) -> None:
    """Until the engine answers, or `end` on the monotonic clock. Raises UserError naming its log."""
    assert engine.process is not None
    while time.monotonic() < end:
        if engine.process.poll() is not None:
            raise UserError(
                f"rollout engine {engine.number} ended with status {engine.process.returncode} while starting; "
                f"see {engine.log}{last_words(engine.log)}"
            )
        with suppress(httpx.TransportError):
            if httpx.get(f"{engine.url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise UserError(
        f"rollout engine {engine.number} did not answer in time (rollout.vllm.server.start_timeout_s); see {engine.log}"
    )


def last_words(log: Path) -> str:
    """The last line of a log that names an error, if there is one."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line]
    return f": {errors[-1].strip()}" if errors else ""


def stop(engine: Engine, grace_s: float) -> None:
    """End an engine's whole process group, by force after `grace_s`."""
    if engine.process is None:
        return
    with suppress(subprocess.TimeoutExpired):
        engine.process.wait(grace_s)
    # The group can outlive its first process.
    with suppress(ProcessLookupError):
        os.killpg(engine.process.pid, signal.SIGKILL)
    engine.process.wait()
    engine.process = None
