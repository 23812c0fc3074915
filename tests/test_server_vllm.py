"""Placement `server` against a real vLLM server on a CPU, started by `tcopd serve-teacher`, killed and restarted."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch
from running import ROOT
from test_models import WORLD, config_for, rollouts

from tcopd_fast.dist import free_port
from tcopd_fast.errors import UserError
from tcopd_fast.models import check_models
from tcopd_fast.scoring import Scorer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the package vllm"),
]

TOLERANCE = 1e-4
STARTS_WITHIN_S = 240


class RealServer:
    """One `tcopd serve-teacher` process and its children."""

    def __init__(self, model: Path, port: int, log: Path) -> None:
        self.port, self.log = port, log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        )
        words = ["serve-teacher", str(model), "--port", str(port), "--max-model-len", "46"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tcopd_fast.cli", *words, f"--vllm=--kv-cache-memory-bytes {32 << 20}"],
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> None:
        end = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=1).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"no server within {STARTS_WITHIN_S} s: {self.log.read_text()[-4000:]}")

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL for the server and every process it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def servers(tiny, tmp_path_factory) -> Iterator[list[RealServer]]:
    """A running server of the expert; tests may append its successors, which are killed in the end."""
    folder, port = tmp_path_factory.mktemp("servers"), free_port()
    started = [RealServer(tiny.expert, port, folder / "first.log")]
    try:
        started[0].wait()
        yield started
    finally:
        for each in started:
            each.kill()


def scorer_of(tiny, tmp_path, server=None, **sections) -> Scorer:
    expert = {"path": str(tiny.expert)}
    if server is not None:
        expert |= {"placement": "server", "server": server}
    teachers = {"expert": expert, "anti": {"path": str(tiny.anti)}}
    config = config_for(tiny, tmp_path, teachers=teachers, **sections)
    return Scorer(config, check_models(config), WORLD)


def expert_scores(scorer: Scorer, items) -> torch.Tensor:
    scored = scorer.score(items, [{"expert": 1.5, "anti": -0.5}] * len(items))
    return torch.cat([item.teacher_logprobs["expert"] for item in scored])


def test_a_served_teacher_scores_like_a_resident_one(tiny, tmp_path, servers):
    (server,) = servers
    (url,) = re.findall(r'urls: \["(.*?)"\]', server.log.read_text())
    items = rollouts(tuple(range(1, 41)))
    resident = expert_scores(scorer_of(tiny, tmp_path), items)
    served = expert_scores(scorer_of(tiny, tmp_path, {"urls": [url], "max_tokens_per_request": 128}), items)
    error = float((served - resident).abs().max())
    print(f"largest difference: {error:.1e} nats")
    assert len(served) == sum(range(1, 41)) and error <= TOLERANCE
    assert float(resident.std()) > 0.5

    with pytest.raises(UserError, match=r"holds 46 tokens and sequences can have 46 .* --max-model-len 47"):
        scorer_of(tiny, tmp_path, {"urls": [url]}, rollout={"max_new_tokens": 14})
    with pytest.raises(UserError, match=r"serves teacher; set server\.model"):
        scorer_of(tiny, tmp_path, {"urls": [url], "model": "other"})
    # A prompt as long as vLLM can hold, and one token more than it can.
    longest = rollouts((41,))
    torch.testing.assert_close(
        expert_scores(scorer_of(tiny, tmp_path, {"urls": [url]}), longest),
        expert_scores(scorer_of(tiny, tmp_path), longest), atol=TOLERANCE, rtol=0,
    )  # fmt: skip
    with pytest.raises(UserError, match="HTTP 400"):
        expert_scores(scorer_of(tiny, tmp_path, {"urls": [url]}), rollouts((42,)))


def test_a_call_goes_on_when_its_server_is_killed_and_started_again(tiny, tmp_path, servers, caplog):
    first = servers[0]
    settings = {"urls": [f"http://127.0.0.1:{first.port}"], "max_tokens_per_request": 64, "max_concurrent_requests": 4}
    scorer = scorer_of(tiny, tmp_path, settings | {"request_timeout_s": 20, "deadline_s": 400})
    client = scorer.models[scorer.roles["expert"]].client
    items = rollouts((20,) * 1500)
    resident = expert_scores(scorer_of(tiny, tmp_path), items)
    answered = []
    real = client._logprobs

    async def counted(*arguments):
        answered.append(await real(*arguments))
        return answered[-1]

    client._logprobs = counted
    out = []
    call = threading.Thread(target=lambda: out.append(expert_scores(scorer, items)))
    call.start()
    while len(answered) < 100:
        time.sleep(0.01)
    first.kill()
    before = len(answered)
    second = RealServer(tiny.expert, first.port, first.log.with_name("second.log"))
    servers.append(second)
    second.wait()
    call.join(120)
    assert not call.is_alive() and out, "the call has ended, without an error"
    assert before < 700 < len(answered), "the server died early in the call"
    assert float((out[0] - resident).abs().max()) <= TOLERANCE
    assert "asking again" in caplog.text and "answers again" in caplog.text


def test_signals_end_the_server_and_all_its_processes(servers):
    last = servers[-1]
    group = last.process.pid
    last.send(signal.SIGTERM)
    assert last.process.wait(60) in (0, -signal.SIGTERM)
    end = time.monotonic() + 20
    while time.monotonic() < end and group_exists(group):
        time.sleep(0.1)
    assert not group_exists(group)


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
