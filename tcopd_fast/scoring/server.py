"""Placement `server`: frozen models scored by vLLM's OpenAI-compatible completions endpoint.

A request carries whole sequences as token ids and asks for an echo instead of new tokens; the answer holds every
token's logprob at temperature 1. Endpoints take requests in turn. One that fails is set aside for a time that doubles
with every failure. Before its first use in a scoring call, and after a failure, one request asks an endpoint what it
serves while the others go elsewhere or wait. So a call survives a server that is killed and started again, and stops at
one that comes back as another model.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tcopd_fast.config_sections import ServerConfig
from tcopd_fast.errors import UserError
from tcopd_fast.models import PROBE_TEXT, ModelSet, first_line
from tcopd_fast.packing import split_by_tokens
from tcopd_fast.types import Rollout

CONNECT_TIMEOUT_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
POLL_S = 0.05
# vLLM cannot write -inf in JSON and puts this in its place.
VLLM_MINUS_INFINITY = -9999.0
# Largest probability that head rows beyond the shared vocabulary may hold.
PADDING_MASS = 1e-3
PROBE_PIECES = 64
TOKEN_ID = "token_id:"

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """No usable answer this time; asking again may help."""


class Refused(UserError):
    """The endpoint understood the request and said no. status: of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Endpoint:
    """One URL and what is known about it.

    model: name to ask for. max_tokens: 0, or 1 for servers that generate at least one token. trusted: found to serve
    the teacher, and nothing failed since. checking: one request is finding that out. failures: in a row; it is not
    asked before retry_at (time.monotonic).
    """

    url: str
    model: str = ""
    max_tokens: int = 0
    trusted: bool = False
    checking: bool = False
    failures: int = 0
    retry_at: float = 0.0
    last_error: str = ""


class TeacherClient:
    """Logprobs of sampled tokens from one frozen model behind one or more URLs.

    path: the model's configured path, for messages. head_rows: rows of its head, from config.json. longest: most
    tokens a sequence can have. tolerance: mean |Δ logprob| of the probe text by which endpoints may differ.

    The constructor asks every endpoint once. Raises UserError naming the URL when one does not answer, serves
    several models or one with another tokenizer, holds too few positions, or scores unlike the first; or when its
    head rows beyond the shared vocabulary hold probability (its logprobs are normalised over all rows).
    """

    def __init__(
        self, path: str, server: ServerConfig, models: ModelSet, *, head_rows: int, longest: int, tolerance: float
    ) -> None:
        self.path, self.server, self.longest, self.tolerance = path, server, longest, tolerance
        self.endpoints = [Endpoint(base_url(url)) for url in server.urls]
        self._turns = itertools.cycle(self.endpoints)
        self._headers = authorization(server)
        # The system's certificates, as SSL_CERT_FILE and the like say.
        self._tls = ssl.create_default_context()
        # Every endpoint must split this text as the student does, and score it as the first one asked.
        self._text = probe_text(models.tokenizer, longest)
        self._ids: list[int] = models.tokenizer(self._text)["input_ids"]
        self._expected: list[float] = []
        padding = range(head_rows if models.vocab_size is None else models.vocab_size, head_rows)
        mass = asyncio.run(self._start(padding))
        self.description = ", ".join(f"{e.model} at {e.url}" for e in self.endpoints)
        if padding:
            self.description += f"; {len(padding)} padding rows of its head hold a probability of {mass:.1e}"

    def score(self, rollouts: Sequence[Rollout], temperature: float) -> list[Tensor]:
        """Logprob of every sampled token, float32 [L], one per rollout.

        Raises UserError after `deadline_s`, for any temperature but 1, and for an answer that no retry can mend.
        """
        if temperature != 1:
            raise UserError(
                f"temperature {temperature}: a server's prompt logprobs are at temperature 1 only; "
                f"give {self.path} another placement"
            )
        return asyncio.run(self._score(rollouts))

    async def _score(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        if not all(r.prompt.token_ids for r in rollouts):
            raise ValueError("empty prompt; give at least one token (for example BOS) before the response")
        sequences = [[*r.prompt.token_ids, *r.token_ids] for r in rollouts]
        groups = split_by_tokens([len(ids) for ids in sequences], self.server.max_tokens_per_request)
        out: dict[int, Tensor] = {}
        waiting = iter(groups)
        for endpoint in self.endpoints:
            endpoint.trusted = False

        async def work(client: httpx.AsyncClient) -> None:
            for group in waiting:
                rows = await self._until_answered(client, [sequences[i] for i in group])
                for i, row in zip(group, rows, strict=True):
                    out[i] = torch.tensor(row[len(rollouts[i].prompt.token_ids) :], dtype=torch.float32)

        async with self._client() as client:
            count = min(self.server.max_concurrent_requests, len(groups))
            workers = [asyncio.ensure_future(work(client)) for _ in range(count)]
            try:
                await asyncio.wait_for(asyncio.gather(*workers), self.server.deadline_s)
            except asyncio.TimeoutError as error:
                raise UserError(self._late(len(out), len(rollouts))) from error
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return [out[i] for i in range(len(rollouts))]

    def _late(self, done: int, wanted: int) -> str:
        errors = "; ".join(f"{e.url}: {e.last_error or 'no error, only slow'}" for e in self.endpoints)
        return (
            f"teacher server of {self.path}: {done} of {wanted} sequences scored in server.deadline_s="
            f"{self.server.deadline_s:g} s ({errors}); start the server again and resume the run, add URLs, or raise "
            "deadline_s"
        )

    async def _until_answered(self, client: httpx.AsyncClient, sequences: list[list[int]]) -> list[list[float]]:
        """Logprobs of every token of every sequence, from whichever endpoint answers first."""
        while True:
            endpoint = await self._next_endpoint()
            checking = endpoint.checking
            try:
                if checking:
                    await self._check(client, endpoint)
                    if endpoint.failures:
                        log.warning("teacher server %s answers again", endpoint.url)
                    endpoint.failures, endpoint.trusted, endpoint.checking, checking = 0, True, False, False
                return await self._logprobs(client, endpoint, sequences)
            except Unavailable as error:
                endpoint.last_error = str(error)
                # Requests that were under way when it failed fail with it; they count as one failure.
                if checking or endpoint.trusted:
                    self._set_aside(endpoint)
            finally:
                if checking:
                    endpoint.checking = False

    async def _next_endpoint(self) -> Endpoint:
        while True:
            for endpoint in itertools.islice(self._turns, len(self.endpoints)):
                if not endpoint.checking and time.monotonic() >= endpoint.retry_at:
                    endpoint.checking = not endpoint.trusted
                    return endpoint
            await asyncio.sleep(POLL_S)

    def _set_aside(self, endpoint: Endpoint) -> None:
        endpoint.failures, endpoint.trusted = endpoint.failures + 1, False
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (endpoint.failures - 1))
        endpoint.retry_at = time.monotonic() + pause
        log.warning("teacher server %s: %s; asking again in %.1f s", endpoint.url, endpoint.last_error, pause)

    async def _start(self, padding: range) -> float:
        """Check every endpoint; returns the probability that the first puts on `padding` ids after the probe."""
        async with self._client() as client:
            try:
                for endpoint in self.endpoints:
                    await self._check(client, endpoint)
                endpoint = self.endpoints[0]
                return await self._padding_mass(client, endpoint, padding) if padding else 0.0
            except Unavailable as error:
                raise UserError(
                    f"teacher server {endpoint.url} of {self.path}: {error}; start it (`tcopd serve-teacher "
                    f"{self.path}`), or correct server.urls"
                ) from error

    async def _padding_mass(self, client: httpx.AsyncClient, endpoint: Endpoint, padding: range) -> float:
        context = self._ids[: self.longest - 1]
        rows: list[list[float]] = []
        for group in split_by_tokens([len(context) + 1] * len(padding), self.server.max_tokens_per_request):
            rows += await self._logprobs(client, endpoint, [[*context, padding[i]] for i in group])
        mass = sum(math.exp(row[-1]) for row in rows)
        if mass > PADDING_MASS:
            raise UserError(
                f"teacher server {endpoint.url}: the {len(padding)} rows of its head beyond the "
                f"{padding.start} that all models share hold a probability of {mass:.2g}, and its logprobs count them; "
                f"give {self.path} another placement"
            )
        return mass

    async def _check(self, client: httpx.AsyncClient, endpoint: Endpoint) -> None:
        """Find the served model and compare its limits, tokenizer and scores. Raises Unavailable or UserError."""
        where = f"teacher server {endpoint.url}"
        served = await self._ask(client, endpoint, "models", None)
        try:
            limits: dict[str, int | None] = {entry["id"]: entry.get("max_model_len") for entry in served["data"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise Unavailable(f"/models answers {str(served)[:200]!r}") from error
        wanted = self.server.model or (next(iter(limits)) if len(limits) == 1 else "")
        if wanted not in limits:
            raise UserError(f"{where}: serves {', '.join(limits) or 'no model'}; set server.model to one of them")
        endpoint.model = wanted
        limit = limits[wanted]
        # One position is taken by the token that vLLM generates and drops.
        if limit is not None and self.longest >= limit:
            raise UserError(
                f"{where}: holds {limit} tokens and sequences can have {self.longest} (data.max_prompt_tokens + "
                f"rollout.max_new_tokens); start it with --max-model-len {self.longest + 1} or more, or lower these"
            )
        ids = await self._split_probe(client, endpoint)
        if ids != self._ids:
            raise UserError(
                f"{where}: splits a text into other tokens than the student's tokenizer (first difference "
                f"{first_difference(ids, self._ids)}); serve a model that shares the student's tokenizer"
            )
        (logprobs,) = await self._logprobs(client, endpoint, [self._ids])
        self._expected = self._expected or logprobs
        mean = sum(abs(a - b) for a, b in zip(logprobs[1:], self._expected[1:])) / max(1, len(logprobs) - 1)
        if mean > self.tolerance:
            raise UserError(
                f"{where}: scores a text {mean:.2g} nats per token away from what {self.endpoints[0].url} said at the "
                f"start (scoring.self_check_tolerance={self.tolerance}); every URL must serve the same weights, and "
                "keep serving them"
            )

    async def _split_probe(self, client: httpx.AsyncClient, endpoint: Endpoint) -> list[int]:
        """Ids the endpoint makes of the probe text; finds out, too, whether it insists on generating a token."""
        try:
            ((ids, _),) = await self._complete(client, endpoint, self._text, 1)
        except Refused as refused:
            if refused.status not in (400, 422) or endpoint.max_tokens:
                raise
            endpoint.max_tokens = 1
            ((ids, _),) = await self._complete(client, endpoint, self._text, 1)
        return ids

    async def _logprobs(
        self, client: httpx.AsyncClient, endpoint: Endpoint, sequences: list[list[int]]
    ) -> list[list[float]]:
        """Logprob of every token (NaN for the first) of every sequence. Raises Unavailable or UserError."""
        answers = await self._complete(client, endpoint, sequences, len(sequences))
        for sent, (token_ids, logprobs) in zip(sequences, answers, strict=True):
            if token_ids != sent:
                raise UserError(
                    f"teacher server {endpoint.url}: returned other tokens than it was sent (first difference "
                    f"{first_difference(token_ids, sent)}); it needs to honour prompts of token ids, as vLLM does"
                )
            wrong = [x for x in logprobs[1:] if not (isinstance(x, float | int) and VLLM_MINUS_INFINITY < x < 1e-3)]
            if wrong:
                raise UserError(
                    f"teacher server {endpoint.url}: gives a sampled token the logprob {wrong[0]}; the model's weights "
                    "or its server are broken, or its logprobs are processed (vLLM: --logprobs-mode raw_logprobs)"
                )
        return [[math.nan, *logprobs[1:]] for _, logprobs in answers]

    async def _complete(
        self, client: httpx.AsyncClient, endpoint: Endpoint, prompt: str | list[list[int]], count: int
    ) -> list[tuple[list[int], list[Any]]]:
        """Token ids and what stands as their logprobs, in order of the `count` prompts."""
        body = {
            "model": endpoint.model,
            "prompt": prompt,
            "echo": True,
            "max_tokens": endpoint.max_tokens,
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
        }
        answer = await self._ask(client, endpoint, "completions", body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            rows = [(choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]) for choice in choices]
            generated = -endpoint.max_tokens or None
            parsed = [
                ([int(token.removeprefix(TOKEN_ID)) for token in tokens[:generated]], logprobs[:generated])
                for tokens, logprobs in rows
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unavailable(f"answer without token ids and logprobs: {str(answer)[:200]!r}") from error
        if len(parsed) != count or any(len(ids) != len(logprobs) for ids, logprobs in parsed):
            raise Unavailable(f"{len(parsed)} answers to {count} prompts, or tokens without logprobs")
        return parsed

    async def _ask(self, client: httpx.AsyncClient, endpoint: Endpoint, what: str, body: Any) -> Any:
        """The JSON of one answer. Raises Unavailable when it may come later, Refused when not."""
        limit = self.server.request_timeout_s
        request = client.request("GET" if body is None else "POST", f"{endpoint.url}/{what}", json=body)
        try:
            response = await asyncio.wait_for(request, limit)
        except asyncio.TimeoutError as error:
            raise Unavailable(f"no answer within {limit:g} s") from error
        except httpx.RequestError as error:
            raise Unavailable(f"{type(error).__name__} ({first_line(error)})") from error
        status = response.status_code
        if status >= 500 or status in (408, 425, 429):
            raise Unavailable(f"HTTP {status}: {said(response)}")
        if status != 200:
            raise Refused(
                f"teacher server {endpoint.url}/{what}: HTTP {status}: {said(response)}; correct the section `server` "
                f"of {self.path}, or how the server was started",
                status,
            )
        try:
            return response.json()
        except ValueError as error:
            raise Unavailable(f"answer of {len(response.content)} bytes is not JSON ({first_line(error)})") from error

    def _client(self) -> httpx.AsyncClient:
        # Requests go to the listed URLs alone: no proxies or credentials from the environment, no redirects.
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=self.server.max_concurrent_requests),
            verify=self._tls,
            trust_env=False,
            follow_redirects=False,
        )


def base_url(url: str) -> str:
    """The URL below which `models` and `completions` are; /v1 is added to a bare host."""
    url = url.rstrip("/")
    return url if "/" in url.partition("://")[2] else f"{url}/v1"


def authorization(server: ServerConfig) -> dict[str, str]:
    """The header with the API key, if there is one. Raises UserError when its variable is not set."""
    if server.api_key_env is None:
        return {}
    key = os.environ.get(server.api_key_env)
    if not key:
        raise UserError(f"server.api_key_env={server.api_key_env}: this environment variable is not set; export it")
    return {"Authorization": f"Bearer {key}"}


def probe_text(tokenizer: PreTrainedTokenizerBase, longest: int) -> str:
    """A text with tokens from all over the vocabulary, at most `longest` tokens long."""
    spread = range(0, len(tokenizer), max(1, len(tokenizer) // PROBE_PIECES))
    pieces = (tokenizer.decode([i]) for i in spread if i not in tokenizer.all_special_ids)
    text = PROBE_TEXT + "".join(piece for piece in pieces if piece.isascii())
    while len(tokenizer(text)["input_ids"]) > longest:
        text = text[: len(text) // 2]
    return text


def first_difference(there: Sequence[int], here: Sequence[int]) -> str:
    """`id X there, Y here`, at the first place where they differ."""
    at = next((i for i, (a, b) in enumerate(zip(there, here)) if a != b), min(len(there), len(here)))
    return f"at {at}: {there[at : at + 1] or 'nothing'} there, {here[at : at + 1] or 'nothing'} here"


def said(response: httpx.Response) -> str:
    """What a server's error says, in one short line."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text
    return " ".join(str(message).split())[:300]
