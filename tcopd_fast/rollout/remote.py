"""Engines that somebody else keeps running (`rollout.vllm.server.urls`, `tcopd serve-rollout`): checked, waited for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx

from tcopd_fast.config_sections import RolloutConfig
from tcopd_fast.dist import free_port
from tcopd_fast.errors import UserError
from tcopd_fast.models import load_model_config
from tcopd_fast.rollout.server_command import MODEL
from tcopd_fast.rollout.vllm_plugin import shape_of

CHECK_S = 1.0
ANSWER_S = 10.0
SILENT = f"it takes connections and does not answer within {ANSWER_S:g} s"
BY_HAND = "end it there by hand (this run ends no engine that it did not start) and start `tcopd serve-rollout` again"


@dataclass
class RemoteFleet:
    """The engines at `rollout.vllm.server.urls`, to a `ServerEngine` what `Fleet` is. Nothing is started or ended here.

    model_path, dtype, max_model_len, trust_remote_code: of the student, which the engines have to fit.
    """

    config: RolloutConfig
    model_path: str
    dtype: str
    max_model_len: int
    trust_remote_code: bool = False
    meetings: int = 0
    remedy: ClassVar[str] = "waited for"
    urls: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.urls = [url.rstrip("/") for url in self.config.vllm.server.urls]

    def start(self) -> None:
        """Wait until all engines answer and check that they fit. Raises UserError naming the one that does not."""
        address = self.config.vllm.server.address
        try:
            free_port(address)
        except OSError as error:
            raise UserError(
                f"rollout.vllm.server.address={address}: the first rank's machine cannot listen there "
                f"({error.strerror}); give the address under which the engines reach it"
            ) from error
        self._wait(self.urls)
        for url in self.urls:
            self._check(url)

    def restart(self, suspects: Sequence[int]) -> list[int]:
        """Wait until all engines are up again, after trouble with some; returns those that had been started again.

        Raises UserError naming one that stays away, and after `max_restarts` such meetings in one run.
        """
        self.meetings += 1
        limit = self.config.vllm.server.max_restarts
        if self.meetings > limit:
            named = ", ".join(self.urls[n] for n in suspects)
            raise UserError(
                f"rollout engines failed more than {limit} times (rollout.vllm.server.max_restarts), last {named}; "
                f"read their output; if one hangs, {BY_HAND}"
            )
        # One that has just been killed may answer for a moment.
        time.sleep(CHECK_S)
        self._wait(self.urls)
        # A number is what this trainer has stamped; an engine that has just started has none.
        return [n for n, url in enumerate(self.urls) if not str(_get(url, "weight_info")["weight_version"]).isdecimal()]

    def close(self) -> None:
        """They stay up."""

    def _wait(self, urls: Sequence[str]) -> None:
        """Until every engine's core answers; says so when one takes connections and does not."""
        limit = self.config.vllm.server.start_timeout_s
        end = time.monotonic() + limit
        for url in urls:
            silent = False
            while (word := _last_word(url)) is not None:
                if word == SILENT and not silent:
                    silent = True
                    print(f"rollout engine {url}: {SILENT}; if it hangs, {BY_HAND}", flush=True)
                if time.monotonic() > end:
                    remedy = BY_HAND if word == SILENT else "start it there with `tcopd serve-rollout`"
                    raise UserError(
                        f"rollout.vllm.server.urls: {url} did not answer as a rollout engine within {limit:g} s "
                        f"(start_timeout_s; {word}); {remedy}; then continue with --resume"
                    )
                time.sleep(CHECK_S)

    def _check(self, url: str) -> None:
        """Refuse an engine that does not fit the student."""
        served = {model["id"]: model for model in _get(url, "v1/models")["data"]}
        where = f"rollout.vllm.server.urls: {url}"
        start_it = "start it with `tcopd serve-rollout`"
        if MODEL not in served:
            raise UserError(f"{where} serves {', '.join(served) or 'nothing'} and is no rollout engine; {start_it}")
        room = served[MODEL]["max_model_len"]
        if room < self.max_model_len:
            raise UserError(
                f"{where} holds sequences of {room} tokens, data.max_prompt_tokens and the longest response need "
                f"{self.max_model_len}; {start_it} --max-model-len {self.max_model_len}"
            )
        workers = _post(url, "collective_rpc", {"method": "describe"})["results"]
        wanted = self.config.vllm.server.tensor_parallel_size
        if len(workers) != wanted:
            raise UserError(
                f"{where} has {len(workers)} worker(s), rollout.vllm.server.tensor_parallel_size={wanted}; make them "
                "equal"
            )
        mine = shape_of(load_model_config(self.model_path, self.trust_remote_code), self.dtype)
        theirs = workers[0]
        differing = [f"{key} {theirs[key]} instead of {mine[key]}" for key in mine if theirs[key] != mine[key]]
        if differing:
            raise UserError(
                f"{where} runs another model than the student, {self.model_path}: {'; '.join(differing)}; {start_it} "
                f"{self.model_path} --dtype {self.dtype}"
            )


def _get(url: str, path: str) -> dict[str, Any]:
    """Raises httpx.TransportError, httpx.HTTPStatusError, or ValueError for what is no JSON."""
    return httpx.get(f"{url}/{path}", timeout=ANSWER_S, trust_env=False).raise_for_status().json()


def _post(url: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return httpx.post(f"{url}/{path}", json=body, timeout=ANSWER_S, trust_env=False).raise_for_status().json()


def _last_word(url: str) -> str | None:
    """What the engine's address says instead of its weights' version; None when it says that."""
    try:
        _get(url, "weight_info")
    except httpx.ReadTimeout:
        return SILENT
    except httpx.HTTPStatusError as error:
        return f"weight_info gives HTTP {error.response.status_code}"
    except (httpx.TransportError, ValueError) as error:
        return repr(error)
    return None
