"""Rollouts from vLLM servers in processes of their own: they generate while the learner works.

The first rank starts the servers (`fleet`), every rank sends its requests to all of them (`requests`), and weights go
from the first rank to all workers in buckets (vLLM's NCCL transfer, or gloo on a CPU). An engine that dies or hangs is
started again with the learner's weights, and what it had not answered is asked for once more.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tcopd_fast.config_sections import RolloutConfig
from tcopd_fast.dist import World, free_port
from tcopd_fast.rollout import Weights, response_limit
from tcopd_fast.rollout.fleet import Fleet
from tcopd_fast.rollout.remote import RemoteFleet
from tcopd_fast.rollout.requests import Answer, Dispatcher, Request, Ticket
from tcopd_fast.rollout.server_command import MODEL
from tcopd_fast.rollout.vllm_engine import check_request, stream_seed
from tcopd_fast.timeline import Span
from tcopd_fast.types import Prompt, Rollout


class Control:
    """vLLM's weight-sync routes of several servers, driven as one.

    workers: GPUs (or processes) of one server, so that server n's first rank in the transfer group is 1 + n·workers.
    timeout_s: a server that does not answer for this long hangs.
    """

    def __init__(self, urls: Sequence[str], workers: int, timeout_s: float) -> None:
        self.urls, self.workers, self.timeout_s = list(urls), workers, timeout_s
        self.version = 0

    def post(self, path: str, bodies: Sequence[dict[str, Any] | None], **query: Any) -> None:
        """One request per server, at the same time. Raises RuntimeError when one refuses or does not answer."""

        def one(url: str, body: dict[str, Any] | None) -> None:
            try:
                answer = httpx.post(f"{url}/{path}", json=body, params=query, timeout=self.timeout_s, trust_env=False)
            except httpx.TransportError as error:
                raise RuntimeError(f"rollout engine {url}: {path} failed ({error!r})") from error
            if answer.status_code != 200:
                raise RuntimeError(f"rollout engine {url}: {path} gave HTTP {answer.status_code}: {answer.text[:300]}")

        with ThreadPoolExecutor(len(self.urls)) as pool:
            list(pool.map(one, self.urls, bodies))

    def everywhere(self, path: str, body: dict[str, Any] | None = None, **query: Any) -> None:
        """The same request to every server."""
        self.post(path, [body] * len(self.urls), **query)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every server joins the transfer group at ranks of its own."""
        self.post(
            "init_weight_transfer_engine",
            [{"init_info": {**init_info, "rank_offset": 1 + n * self.workers}} for n in range(len(self.urls))],
        )

    def start_weight_update(self) -> None:
        """As vLLM's protocol has it."""
        self.everywhere("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's protocol has it."""
        self.everywhere("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Stamps `version`."""
        self.everywhere("finish_weight_update", {"weight_version": str(self.version)})


class ServerEngine:
    """A `RolloutEngine` on vLLM servers. `generate` and `load_weights` are collectives.

    weights: the learner's, read again whenever an engine has to get them. Samples carry the version of the oldest
    weights that any of their tokens came from. The constructor sends version 0.
    """

    def __init__(
        self,
        fleet: Fleet | RemoteFleet,
        tokenizer: PreTrainedTokenizerBase,
        *,
        world: World,
        weights: Weights,
        config: RolloutConfig,
        vocab_size: int | None = None,
    ) -> None:
        self.version = 0
        self.apart = True
        self.restarted = 0
        self._fleet, self._tokenizer, self._world, self._source = fleet, tokenizer, world, LearnerSource(weights)
        self._config, self._vocab_size = config, vocab_size
        self._dispatcher = Dispatcher(config.vllm.server.request_timeout_s)
        world.on_main(fleet.start)
        problem = self._connect()
        if problem is not None:
            urls, address = config.vllm.server.urls, config.vllm.server.address
            hint = f"; do they reach this machine at rollout.vllm.server.address={address}?" if urls else ""
            raise world.agreed(f"the rollout engines cannot be given weights: {problem}{hint}")
        self.load_weights(weights, 0)

    def submit(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        ticket: Ticket | None = None,
        batch: int = 0,
    ) -> Ticket:
        """Begin sampling `batch`, beside what the ticket holds already; returns at once.

        Raises UserError as `VllmEngine.generate`.
        """
        check_request(prompts, max_new_tokens, temperature, self._fleet.max_model_len)
        eos = self._tokenizer.eos_token_id
        requests = []
        for index, (prompt, sample) in enumerate(itertools.product(prompts, range(samples))):
            sampling = {
                "temperature": temperature, "top_p": 1.0, "top_k": 0,
                "max_tokens": response_limit(prompt, max_new_tokens),
                "seed": stream_seed(seed, prompt.id, sample), "stop_token_ids": [] if eos is None else [eos],
                "logprobs": 0, "detokenize": False,
            }  # fmt: skip
            body = {"model": MODEL, "token_ids": list(prompt.token_ids), "sampling_params": sampling}
            requests.append(Request((batch, index), prompt, sample, body))
        ticket = Ticket() if ticket is None else ticket
        self._dispatcher.submit(ticket, requests)
        return ticket

    def collect(
        self,
        ticket: Ticket,
        on_finished: Callable[[Rollout], None] | None = None,
        *,
        batch: int = 0,
        unfinished: int = 0,
        oldest: int = 0,
    ) -> list[Rollout]:
        """Wait until at most `unfinished` responses of this and earlier batches are under way; those that have come.

        In the order they were asked for. One with a token of weights before version `oldest` is dropped, and counted by
        the ticket. A collective; engines that failed are started again and asked again. When
        `on_finished` raises on some rank, waiting ends on all of them: that rank raises, others return what they have.
        """
        rollouts: dict[tuple[int, int], Rollout] = {}
        while True:
            error = self._gather(ticket, rollouts, on_finished, batch, unfinished, oldest)
            state = self._world.max({"lost": float(len(ticket.lost)), "error": float(error is not None)})
            if error is not None:
                raise error
            if state["error"] or not state["lost"]:
                return [rollouts[order] for order in sorted(rollouts)]
            self._recover()
            again, ticket.lost = ticket.lost, []
            self._dispatcher.submit(ticket, again)

    def _gather(
        self,
        ticket: Ticket,
        rollouts: dict[tuple[int, int], Rollout],
        on_finished: Callable[[Rollout], None] | None,
        batch: int,
        unfinished: int,
        oldest: int,
    ) -> Exception | None:
        """Put answers into `rollouts` as they come; returns what went wrong here, for all ranks to know."""
        try:
            while True:
                for answer in ticket.ready(batch):
                    if answer.version < oldest:
                        ticket.dropped += 1
                        continue
                    rollout = self._rollout(answer)
                    rollouts[answer.request.order] = rollout
                    if on_finished is not None:
                        on_finished(rollout)
                if ticket.under_way(batch) <= unfinished and ticket.arrivals.empty():
                    return None
                ticket.wait()
        except Exception as error:
            return error

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        on_finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """As `RolloutEngine.generate`; a collective."""
        ticket = self.submit(
            prompts, samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        return self.collect(ticket, on_finished)

    def load_weights(self, weights: Weights, version: int) -> None:
        """Send weights to every engine, drop the KV cache of the old ones, and stamp `version`. A collective.

        Responses under way wait meanwhile and go on with the new weights.
        """
        self._source.weights = weights
        if self._any_down():
            self._restart()
        self._deliver(version)
        self.version = version

    def metrics(self) -> dict[str, float]:
        """Engines started again so far."""
        return {"rollout/engine_restarts": float(self.restarted)}

    def spans(self, until: float) -> dict[str, list[Span]]:
        """When this rank had requests at which engine, and the tokens that came back."""
        return self._dispatcher.meter.drain(until)

    def sleep(self) -> None:
        """Nothing to give back: the engines have devices of their own."""

    def close(self) -> None:
        """End the engines."""
        self._dispatcher.close()
        if self._world.is_main:
            self._fleet.close()

    def _rollout(self, answer: Answer) -> Rollout:
        return Rollout(
            prompt=answer.request.prompt,
            sample=answer.request.sample,
            token_ids=answer.token_ids,
            logprobs=answer.logprobs,
            finish_reason="stop" if answer.finish_reason == "stop" else "length",
            version=answer.version,
            text=self._tokenizer.decode(list(answer.token_ids), skip_special_tokens=True),
        )

    def _send(self, version: int) -> None:
        """The learner's weights into every engine, which all have to be up. Raises RuntimeError on every rank."""
        with self._dispatcher.meter.held():
            self._transfer_weights(version)
        self._dispatcher.use(self._control.urls)

    def _transfer_weights(self, version: int) -> None:
        control, main = self._control, self._world.is_main
        control.version = version
        problem = None
        self._source.expect()
        try:
            if main:
                # Requests under way keep their place; their KV cache is made again with the new weights.
                control.everywhere("pause", mode="keep")
            self._transfer.send_weights()
            if main:
                control.everywhere("reset_prefix_cache", reset_running_requests=True)
                control.everywhere("resume")
        except RuntimeError as error:
            problem = str(error)
            # The other ranks gather parameter by parameter and expect this one to take part.
            self._source.drain()
        problems = [p for p in self._world.gather(problem) if p]
        if problems:
            raise RuntimeError(f"weight sync {version}: {problems[0]}")

    def _connect(self) -> str | None:
        """Join a transfer group with the engines as they are now; what went wrong on some rank, if anything did."""
        problem = None
        try:
            self._join()
        except RuntimeError as error:
            problem = str(error)
        return next((p for p in self._world.gather(problem) if p), None)

    def _join(self) -> None:
        # Before the first import of vllm in this process, which reads it.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        from tcopd_fast.rollout import vllm_plugin

        vllm_plugin.register()
        settings = self._config.vllm.server
        urls = self._world.on_main(lambda: self._fleet.urls)
        self._control = Control(urls, settings.tensor_parallel_size, settings.request_timeout_s)
        if self._world.is_main and self._vocab_size is not None:
            self._control.everywhere("collective_rpc", {"method": "cut_vocabulary", "args": [str(self._vocab_size)]})
        info = transfer_settings(
            cuda=self._world.device.type == "cuda",
            rank=self._world.rank,
            workers=len(urls) * settings.tensor_parallel_size,
            bucket_bytes=settings.bucket_bytes,
            timeout_s=settings.request_timeout_s,
            address=settings.address,
        )
        self._transfer = WeightTransferTrainerFactory.trainer_init(info, client=self._control, source=self._source)

    def _recover(self) -> None:
        self._restart()
        self._deliver(self.version)

    def _deliver(self, version: int) -> None:
        """`_send`, and again with new engines when one fails meanwhile. Raises UserError after `max_restarts`."""
        while True:
            try:
                self._send(version)
                return
            except RuntimeError as error:
                if self._world.is_main:
                    print(f"{error}; all engines are {self._fleet.remedy}", flush=True)
                # The others may wait for good for the one that failed, and hold a mixture of weights.
                self._restart(everyone=True)

    def _any_down(self) -> bool:
        return bool(self._world.max({"down": float(len(self._dispatcher.down))})["down"])

    def _restart(self, everyone: bool = False) -> None:
        """Start again what any rank found down, and meet all engines anew. Raises UserError on every rank."""
        found = self._world.gather(dict(self._dispatcher.down))
        reasons = {number: why for down in found for number, why in down.items()}
        if self._world.is_main:
            for number, why in sorted(reasons.items()):
                print(
                    f"rollout engine {number} ({self._control.urls[number]}) failed: {why}; it is {self._fleet.remedy}",
                    flush=True,
                )
        suspects = set(reasons)
        if everyone:
            suspects = set(range(len(self._control.urls)))
        self._replace(suspects)
        while self._connect() is not None:
            self._replace(set(range(len(self._control.urls))))

    def _replace(self, suspects: set[int]) -> None:
        self.restarted += len(self._world.on_main(lambda: self._fleet.restart(sorted(suspects))))


def transfer_settings(cuda: bool, rank: int, workers: int, bucket_bytes: int, timeout_s: float, address: str) -> Any:
    """How this rank takes part in weight transfers: over NCCL, or gloo on a CPU, where timeout_s bounds every wait.

    address: of the first rank's machine, as the engines reach it.
    """
    # Only the first rank listens.
    port = free_port(address if rank == 0 else "127.0.0.1")
    if cuda:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(address, port, workers + 1, packed_buffer_size_bytes=bucket_bytes, rank=rank)
    from tcopd_fast.rollout.vllm_gloo import GlooTrainerInitInfo

    return GlooTrainerInitInfo(address, port, workers + 1, bucket_bytes, timeout_s, rank=rank)


class LearnerSource:
    """The learner's weights as vLLM's transfers take them (its `WeightSource`, by structure).

    One pass is under way at a time. The ranks of a gathering learner make every pass together, so one that is expected
    and comes to nothing here is made by `drain` all the same.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._pass: Iterator[tuple[str, Tensor]] = iter(())

    def metadata(self) -> list[Any]:
        """Name, dtype and shape of every parameter; nothing is gathered."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(*item) for item in self.weights.shapes()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._pass = iter(self.weights)
        return self._pass

    def expect(self) -> None:
        """All ranks are about to make a pass; nothing is gathered yet."""
        self._pass = iter(self.weights)

    def drain(self) -> None:
        """Finish the pass under way, or make the expected one."""
        for _ in self._pass:
            pass


def log_folder(run_dir: str | Path) -> Path:
    """Where the engines' logs go."""
    folder = Path(run_dir) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
