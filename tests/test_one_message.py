"""What several ranks meet alike is said once; what one rank alone meets is said by it, and ends the others at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from forked import end_all, run_forked, start_forked
from running import write_config

from tcopd_fast import dist
from tcopd_fast.errors import PeerError, UserError


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


def words(tiny, tmp_path: Path, **sections) -> list[str]:
    return ["--config", str(write_config(tmp_path / "c.yaml", tiny.tree(tmp_path / "run", **sections)))]


def test_a_refused_configuration_is_said_once_per_machine(tiny, tmp_path):
    text = run_forked(words(tiny, tmp_path, learner={"zero_stge": 2}), tmp_path / "log", size=2, status=2)
    assert text.count("learner.zero_stge: unknown key") == 1 and text.startswith("error: config refused")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": [{"path": "nowhere.jsonl"}]}}, "nowhere.jsonl"),
        ({"data": {"max_prompt_tokens": 1000}}, "the models hold 128 positions"),
        ({"scoring": {"placement": "delta"}}, "placement delta needs a folder made by `tcopd delta make"),
    ],
    ids=["reading prompts", "checking lengths", "placing models"],
)
def test_what_every_rank_meets_is_said_once(tiny, tmp_path, sections, message):
    text = run_forked(words(tiny, tmp_path, **sections), tmp_path / "log", size=2, status=2)
    assert text.count("error") == 1 and text.count(message) == 1, text


def test_what_one_rank_alone_meets_is_said_by_it_and_ends_all(tiny, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "prompts.jsonl").write_text(tiny.prompts.read_text())
    begin = time.monotonic()
    text = run_forked(
        words(tiny, tmp_path, data={"train": [{"path": "prompts.jsonl"}]}),
        tmp_path / "log", size=2, status=2, folders=folders,
    )  # fmt: skip
    assert text.startswith("error (rank 1): ") and "prompts.jsonl" in text and text.count("error") == 1
    assert time.monotonic() - begin < 60, "rank 0 must not wait for learner.rank_timeout_s"


def test_a_lost_rank_is_named_once(tiny, tmp_path):
    log, metrics = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"
    long = words(tiny, tmp_path, steps=500, learner={"rank_timeout_s": 6.0})
    processes = start_forked(long, log, size=3)
    while not metrics.exists() or not metrics.stat().st_size:
        assert processes[0].is_alive(), log.read_text()
        time.sleep(0.05)
    processes[2].kill()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes][:2] == [2, 2]
    text = log.read_text()
    assert text.count("rank 2 of 3 ended or hung") == 1 and "Traceback" not in text, text


def test_ranks_that_are_told_of_a_loss_in_other_words_name_it_once(monkeypatch):
    """The collective names its own port on every rank."""
    monkeypatch.setattr(dist, "_roll_call", lambda *_: [2])
    monkeypatch.setattr(dist, "LINGER_S", 0.0)
    store = torch.distributed.HashStore()
    met = []
    for rank in (1, 0):
        world = dist.World(rank, 3, torch.device("cpu"), store=store)
        with pytest.raises(UserError, match="rank 2 of 3 ended or hung") as raised, world.watching_ranks():
            raise RuntimeError(f"[/pytorch/third_party/gloo/pair.cc] Read error [127.0.0.1]:{1000 + rank}")
        met.append(raised.type)
    assert met == [dist.LostRankError, PeerError]
