"""Giving engines their weights while some of them fail: at URLs, over HTTP, with a transfer that only stamps."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from fake_engine import FakeEngine
from tiny import make_tokenizer

from tcopd_fast.config_io import validate
from tcopd_fast.config_sections import RolloutConfig
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.models import load_model_config
from tcopd_fast.rollout import remote
from tcopd_fast.rollout.remote import RemoteFleet
from tcopd_fast.rollout.vllm_plugin import shape_of
from tcopd_fast.rollout.vllm_server import Control, LearnerSource, ServerEngine
from tcopd_fast.types import Prompt

WORLD = World(0, 1, torch.device("cpu"))
PROMPT = Prompt("p", "math", (4,), "", None, "")


class Stamps:
    """A transfer group that has met these engines: gives them a version and no weights."""

    def __init__(self, engines: list[FakeEngine], control: Control, source: LearnerSource) -> None:
        self.engines, self.control, self.source = engines, control, source

    def send_weights(self) -> None:
        assert [name for name, _ in self.source] == ["w"]
        for engine in self.engines:
            engine.version = str(self.control.version)


class Weights:
    """Of a learner. passes: whole ones so far."""

    passes = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.zeros(1)
        self.passes += 1

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [("w", torch.float32, (1,))]


@pytest.fixture
def engines(tiny) -> list[FakeEngine]:
    return [FakeEngine([shape_of(load_model_config(str(tiny.student), False), "float32")]) for _ in range(2)]


@pytest.fixture
def trainer(tiny, engines, monkeypatch) -> Iterator[ServerEngine]:
    def join(self: ServerEngine) -> None:
        self._control = Control(self._fleet.urls, 1, 5.0)
        self._transfer = Stamps(engines, self._control, self._source)

    monkeypatch.setattr(ServerEngine, "_join", join)
    monkeypatch.setattr(remote, "CHECK_S", 0.01)
    server = {"urls": [engine.url for engine in engines], "max_restarts": 3}
    config = validate({"engine": "vllm", "vllm": {"mode": "server", "server": server}}, RolloutConfig)
    fleet = RemoteFleet(config, str(tiny.student), "float32", 64)
    engine = ServerEngine(fleet, make_tokenizer(), world=WORLD, weights=Weights(), config=config)
    yield engine
    engine.close()


def start_again(*engines: FakeEngine) -> None:
    """They have their disks' weights then, whose answers count as lost."""
    for engine in engines:
        engine.version = "default"


def fails(engine: FakeEngine, path: str, times: int) -> None:
    """The next so many requests of this path meet an engine that dies over them and is started again."""
    fine, left = engine.answers[path], [times]

    def answer() -> dict:
        if not left[0]:
            return fine()
        left[0] -= 1
        start_again(engine)
        raise RuntimeError("the worker died")

    engine.answers[path] = answer


def sample(trainer: ServerEngine) -> list:
    return trainer.generate([PROMPT], samples=4, max_new_tokens=4, temperature=1.0, seed=0)


@pytest.mark.parametrize("path", ["/pause", "/reset_prefix_cache", "/resume"])
def test_a_send_that_fails_while_engines_recover_is_made_again(trainer, engines, capsys, path):
    """Both engines start again in mid-generation; while they get the present weights, one of them fails, twice."""
    trainer.load_weights(Weights(), 7)
    start_again(*engines)
    fails(engines[1], path, times=2)
    rollouts = sample(trainer)
    assert [(r.sample, r.version, r.token_ids) for r in rollouts] == [(n, 7, (5,)) for n in range(4)]
    assert [engine.version for engine in engines] == ["7", "7"]
    said = capsys.readouterr().out
    for number, engine in enumerate(engines):
        assert f"rollout engine {number} ({engine.url}) failed: ForeignWeights" in said
    again = f"weight sync 7: rollout engine {engines[1].url}: {path[1:]} gave HTTP 500: the worker died"
    assert said.count(f"{again}; all engines are waited for") == 2
    assert trainer._fleet.meetings == 3


@pytest.mark.parametrize("path", ["/pause", "/reset_prefix_cache", "/resume"])
def test_a_weight_sync_that_fails_is_made_again(trainer, engines, path):
    """Ranks that send nothing make one pass per attempt under ZeRO-3, so this one does, whenever the attempt fails."""
    fails(engines[0], path, times=1)
    weights = Weights()
    trainer.load_weights(weights, 1)
    assert weights.passes == 2
    assert {r.version for r in sample(trainer)} == {1} and trainer.version == 1


def test_engines_that_go_on_failing_end_the_run(trainer, engines):
    start_again(*engines)
    fails(engines[1], "/pause", times=100)
    expected = (
        rf"failed more than 3 times .*last {engines[0].url}, {engines[1].url}; .*if one hangs, end it there by hand"
    )
    with pytest.raises(UserError, match=expected):
        sample(trainer)


def test_an_engine_that_hangs_at_its_url_is_named_and_left_to_its_owner(trainer, engines, capsys, monkeypatch):
    """It takes connections and answers nothing; the run says so at once, and again when it gives up."""
    monkeypatch.setattr(remote, "ANSWER_S", 0.2)
    object.__setattr__(trainer._config.vllm.server, "start_timeout_s", 0.5)
    start_again(*engines)
    engines[1].answers["/weight_info"] = threading.Event().wait
    with pytest.raises(UserError) as refusal:
        sample(trainer)
    said = capsys.readouterr().out
    assert said.count(f"rollout engine {engines[1].url}: {remote.SILENT}; if it hangs, {remote.BY_HAND}") == 1
    assert str(refusal.value) == (
        f"rollout.vllm.server.urls: {engines[1].url} did not answer as a rollout engine within 0.5 s "
        f"(start_timeout_s; {remote.SILENT}); {remote.BY_HAND}; then continue with --resume"
    )
