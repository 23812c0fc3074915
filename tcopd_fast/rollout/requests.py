"""Generation requests to vLLM servers: many at once, spread over the engines, moved on when one fails."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
from torch import Tensor

CONNECTIONS = 512
"""Requests of one rank under way at once; more wait here."""
PATH = "/inference/v1/generate"


@dataclass(frozen=True)
class Request:
    """One response to be sampled. body: what vLLM's token-in-token-out route takes."""

    index: int
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """One sampled response. logprobs: float32 [L]. version: the oldest weights that any of its tokens came from."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: Tensor
    finish_reason: str
    version: int


@dataclass
class Ticket:
    """Requests under way. answers: as they come, then None when nothing more will; lost: those without an engine."""

    requests: Sequence[Request]
    answers: queue.SimpleQueue[Answer | None] = field(default_factory=queue.SimpleQueue)
    lost: list[Request] = field(default_factory=list)
    error: Exception | None = None


class Dispatcher:
    """Sends requests from a thread of its own, so that the caller can do other things meanwhile."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.urls: list[str] = []
        self.down: dict[int, str] = {}
        """Engine number -> what its last request met."""
        self._load: list[int] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout requests", daemon=True)
        self._thread.start()
        self._client: httpx.AsyncClient | None = None

    def use(self, urls: Sequence[str]) -> None:
        """Send to these engines from here on; all of them count as up."""
        # Requests under way keep their place in the count.
        self.urls, self.down, self._load = list(urls), {}, self._load or [0] * len(urls)

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Start sending; returns at once."""
        ticket = Ticket(requests)
        asyncio.run_coroutine_threadsafe(self._serve(ticket), self._loop)
        return ticket

    def close(self) -> None:
        """Drop whatever is under way."""
        if self._client is not None:
            asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, ticket: Ticket) -> None:
        if self._client is None:
            limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
            timeout = httpx.Timeout(self.timeout_s, connect=10.0, pool=None)
            # The environment may name a proxy, which has no business between a trainer and its engines.
            self._client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)
        room = asyncio.Semaphore(CONNECTIONS)

        async def one(request: Request) -> None:
            async with room:
                answer = await self._answer(request)
            if answer is None:
                ticket.lost.append(request)
            else:
                ticket.answers.put(answer)

        try:
            await asyncio.gather(*(one(request) for request in ticket.requests))
        except Exception as error:
            ticket.error = error
        finally:
            ticket.answers.put(None)

    async def _answer(self, request: Request) -> Answer | None:
        """From the least loaded engine that is up; None when none is."""
        assert self._client is not None
        while True:
            up = [n for n in range(len(self.urls)) if n not in self.down]
            if not up:
                return None
            engine = min(up, key=lambda n: self._load[n])
            self._load[engine] += 1
            try:
                response = await self._client.post(self.urls[engine] + PATH, json=request.body)
                if response.status_code == 200:
                    return parse(request.index, response.json())
                if response.status_code < 500:
                    raise RuntimeError(f"rollout engine {engine} refuses a request: {response.text[:500]}")
                self.down[engine] = f"HTTP {response.status_code}: {response.text[:200]}"
            except httpx.TransportError as error:
                self.down[engine] = repr(error)
            finally:
                self._load[engine] -= 1


def parse(index: int, body: Mapping[str, Any]) -> Answer:
    """vLLM's answer. Raises RuntimeError when tokens and logprobs do not belong together, or the weights have no number
    of ours."""
    choice = body["choices"][0]
    token_ids = tuple(choice["token_ids"])
    content = choice["logprobs"]["content"]
    reason = choice["finish_reason"]
    if reason not in ("stop", "length") or tuple(item["token_id"] for item in content) != token_ids:
        raise RuntimeError(
            f"a rollout engine ended a response as {reason!r}, {len(token_ids)} tokens, {len(content)} logprobs"
        )
    versions = [span["version"] for span in choice["weight_versions"]]
    if not versions or not all(version.isdecimal() for version in versions):
        raise RuntimeError(f"a rollout engine sampled with weights {versions}, which are not the learner's")
    return Answer(
        index, token_ids, torch.tensor([item["logprob"] for item in content], dtype=torch.float32), reason,
        min(map(int, versions)),
    )  # fmt: skip
