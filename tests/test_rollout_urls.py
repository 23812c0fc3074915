"""Engines that run already, at URLs: refusals, checks against a fake server, and a real one killed in mid-run."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from fake_engine import FakeEngine
from running import ROOT, lines, start
from test_config import tree

from tcopd_fast.cli import main
from tcopd_fast.config import ELSEWHERE, Config
from tcopd_fast.config_io import dump_config, validate
from tcopd_fast.config_sections import RolloutConfig
from tcopd_fast.dist import free_port
from tcopd_fast.errors import UserError
from tcopd_fast.models import load_model_config
from tcopd_fast.rollout.remote import RemoteFleet
from tcopd_fast.rollout.requests import PATH, Dispatcher, Request, Ticket
from tcopd_fast.rollout.serve import introduction
from tcopd_fast.rollout.server_command import EngineSpec, command
from tcopd_fast.rollout.vllm_plugin import shape_of
from tcopd_fast.types import Prompt

URL = "http://10.0.0.2:8100"


def rollout(**server) -> dict:
    return {"engine": "vllm", "vllm": {"mode": "server", "server": {"urls": [URL], "address": "10.0.0.1", **server}}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (rollout(engines=2), "rollout.vllm.server.engines: is for engines that the trainer starts"),
        (rollout(gpus=[[7]]), "rollout.vllm.server.gpus: is for engines that the trainer starts"),
        (rollout(options="--x"), "rollout.vllm.server.options: is for engines that the trainer starts"),
        (rollout(urls=["10.0.0.2:8100"]), "rollout.vllm.server.urls: '10.0.0.2:8100'; give base URLs like"),
        (rollout(urls=["https://h:1"]), "rollout.vllm.server.urls: 'https://h:1'; give base URLs like"),
        (rollout(urls=[URL + "/v1"]), f"rollout.vllm.server.urls: '{URL}/v1'; give base URLs like"),
        (rollout(urls=[URL, URL + "/"]), "names an engine twice"),
        (rollout(address="127.0.0.1"), "the engine on 10.0.0.2 gets its weights from the first rank's machine"),
        ({"engine": "hf", "vllm": {"server": {"urls": [URL]}}}, "set rollout.engine=vllm rollout.vllm.mode=server"),
    ],
)
def test_urls_that_cannot_work_are_refused(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        validate(tree(rollout=given), Config, ELSEWHERE)


def test_a_resolved_configuration_with_urls_loads_again():
    import yaml

    for given in (rollout(), rollout(urls=["http://localhost:1", "http://127.0.0.1:2"], address="127.0.0.1")):
        config = validate(tree(rollout=given), Config, ELSEWHERE)
        assert validate(yaml.safe_load(dump_config(config)), Config, ELSEWHERE) == config


def test_the_trainers_engines_and_served_ones_run_the_same_command(monkeypatch):
    config = RolloutConfig()
    own = EngineSpec.of_run(config, "miniature:base", "float32", 64, 0, False)
    words = ["serve-rollout", "miniature:base", "--dtype", "float32", "--max-model-len", "64", "--port", "1234"]
    served: list = []
    monkeypatch.setattr("tcopd_fast.rollout.serve.serve", lambda *given: served.append(given) or 0)
    assert main([*words, "--gpu-memory-utilization", str(config.vllm.gpu_memory_utilization)]) == 0
    assert served == [(own, "127.0.0.1", 1234)]
    assert "--weight-transfer-config" in command(*served[0])


def test_what_serve_rollout_says(capsys):
    spec = EngineSpec.of_run(RolloutConfig(), "m", "float32", 64, 0, False)
    here, out = introduction(spec, "127.0.0.1", 8100), introduction(spec, "0.0.0.0", 8100)
    assert "'rollout.vllm.server.urls=[http://127.0.0.1:8100]'" in here and "WARNING" not in here
    assert "http://THIS_MACHINE:8100" in out
    assert "WARNING: listening on 0.0.0.0, without a key" in out and "can replace the weights" in out
    assert main(["serve-rollout", "miniature:base", "--vllm=--generation-config auto"]) == 2
    assert "--vllm: --generation-config is refused" in capsys.readouterr().err


def fleet_of(tiny, *urls: str, **server) -> RemoteFleet:
    config = validate({"engine": "vllm", "vllm": {"mode": "server", "server": {"urls": urls, **server}}}, RolloutConfig)
    return RemoteFleet(config, str(tiny.student), "float32", 64)


def shape(tiny, dtype: str = "float32") -> dict:
    return shape_of(load_model_config(str(tiny.student), False), dtype)


def test_an_engine_that_fits_is_met(tiny):
    engine = FakeEngine([shape(tiny)])
    fleet = fleet_of(tiny, engine.url + "/")
    fleet.start()
    assert fleet.urls == [engine.url]
    engine.version = "7"
    assert fleet.restart([0]) == [], "it still has the weights that were sent"
    engine.version = "default"
    assert fleet.restart([0]) == [0]


@pytest.mark.parametrize(
    ("engine", "server", "message"),
    [
        ({"model": "gpt"}, {}, "serves gpt and is no rollout engine; start it with `tcopd serve-rollout`"),
        ({"room": 63}, {}, "holds sequences of 63 tokens, .* need 64; .* --max-model-len 64"),
        ({}, {"tensor_parallel_size": 2}, r"has 1 worker\(s\), rollout.vllm.server.tensor_parallel_size=2"),
        ({"hidden_size": 48}, {}, "runs another model than the student, .*: hidden_size 48 instead of 32"),
        ({"dtype": "bfloat16"}, {}, "dtype bfloat16 instead of float32; .* --dtype float32"),
        ({}, {"address": "203.0.113.1"}, "rollout.vllm.server.address=203.0.113.1: the first rank's machine cannot"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(tiny, engine, server, message):
    workers = [shape(tiny) | {key: engine.pop(key) for key in ("hidden_size", "dtype") if key in engine}]
    with pytest.raises(UserError, match=message):
        fleet_of(tiny, FakeEngine(workers, **engine).url, **server).start()


def test_an_engine_that_stays_away_ends_the_run_with_its_url(tiny):
    here, gone = FakeEngine([shape(tiny)]), f"http://127.0.0.1:{free_port()}"
    for call in (lambda fleet: fleet.start(), lambda fleet: fleet.restart([1])):
        with pytest.raises(UserError, match=rf"urls: {gone} did not answer as a rollout engine within 1 s .*refused"):
            call(fleet_of(tiny, here.url, gone, start_timeout_s=1))
    fleet = fleet_of(tiny, here.url, max_restarts=1)
    fleet.restart([0])
    with pytest.raises(UserError, match=rf"failed more than 1 times .*last {here.url}"):
        fleet.restart([0])


def test_what_a_restarted_engine_samples_before_it_gets_weights_is_asked_again(tiny):
    """Its disk's weights have no number: the answer is not taken and the engine counts as down."""
    engine = FakeEngine([])
    choice = {"token_ids": [5], "logprobs": {"content": [{"token_id": 5, "logprob": -1.0}]}, "finish_reason": "stop"}
    engine.answers[PATH] = lambda: {"choices": [choice | {"weight_versions": [{"version": engine.version}]}]}
    dispatcher, ticket = Dispatcher(10.0), Ticket()
    prompt = Prompt("p", "math", (4,), "", None, "")
    dispatcher.use([engine.url])
    try:
        dispatcher.submit(ticket, [Request((0, 0), prompt, 0, {})])
        ticket.wait()
        assert [request.prompt for request in ticket.lost] == [prompt] and not ticket.ready(0)
        assert "which are not the learner's" in dispatcher.down[0]
        engine.version = "3"
        dispatcher.use([engine.url])
        dispatcher.submit(ticket, ticket.lost)
        ticket.wait()
        [answer] = ticket.ready(0)
        assert (answer.token_ids, answer.version) == ((5,), 3)
    finally:
        dispatcher.close()


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[psutil.Process, str, Path]]:
    """`tcopd serve-rollout` as a person starts it: its process, its URL, its output."""
    port, log = free_port(), tmp_path / "engine.log"
    words = ["serve-rollout", "miniature:base", "--port", str(port), "--max-model-len", "128"]
    words += ["--kv-cache-memory-bytes", str(32 << 20), "--max-num-seqs", "32"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tcopd_fast.cli", *words], stdout=file, stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )  # fmt: skip
    try:
        yield psutil.Process(process.pid), f"http://127.0.0.1:{port}", log
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(30)
    assert status == 0, log.read_text()


def vllm_of(supervisor: psutil.Process) -> psutil.Process:
    return next(p for p in supervisor.children(recursive=True) if "vllm.entrypoints.openai.api_server" in p.cmdline()
                and "tcopd_fast.rollout.leash" not in p.cmdline())  # fmt: skip


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the package vllm")
def test_a_run_goes_on_when_its_engine_is_killed_and_started_again(served, tmp_path):
    """The trainer starts before the engine answers; the engine's vLLM is killed after the second step."""
    supervisor, url, log = served
    words = ["--config", str(ROOT / "configs" / "miniature.yaml"), f"run_dir={tmp_path / 'run'}", "steps=5"]
    words += ["rollout.engine=vllm", "rollout.vllm.mode=server", f"rollout.vllm.server.urls=[{url}]", "eval.data=[]"]
    words += ["rollout.prompts_per_step=24", "checkpoint.every=0", "logging.tensorboard=false"]
    [trainer] = start(words)
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 400
    while not (metrics.exists() and len(lines(metrics)) >= 2):
        assert time.monotonic() < end and trainer.poll() is None, trainer.communicate()[0] + log.read_text()
        time.sleep(0.05)
    old = vllm_of(supervisor)
    old.kill()
    output = trainer.communicate(timeout=400)[0]
    assert trainer.returncode == 0, output + log.read_text()
    rows = lines(metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["rollout/version"] for row in rows] == [0, 1, 2, 3, 4], "never from weights that were not sent"
    assert all(abs(row["loss/mismatch_weight_mean"] - 1) < 1e-3 for row in rows)
    assert rows[-1]["rollout/engine_restarts"] == 1
    assert "the engine has ended with status 137; starting it again" in log.read_text()
    assert supervisor.is_running() and vllm_of(supervisor).pid != old.pid, "it outlives the trainer"
    assert httpx.get(f"{url}/weight_info").json() == {"weight_version": "5"}
