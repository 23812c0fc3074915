"""The soak: its schedule, what counts as flat memory, its checks, its judge and watch, and documents equal the JSON."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import soak  # noqa: E402
import soak_judge  # noqa: E402
import soak_plan  # noqa: E402
import soak_run  # noqa: E402
import soak_watch  # noqa: E402
from soak_figure import draw  # noqa: E402
from soak_plan import ENDING, MIN_LIFE_STEPS, STEPS, TERMINATED, Sample, flatness, schedule, theil_sen  # noqa: E402
from soak_report import BEGIN, END, assess, markdown  # noqa: E402
from table1_report import link_from  # noqa: E402

from tcopd_fast.config_io import load_config  # noqa: E402

DOC = ROOT / "docs" / "faults.md"
RESULTS = ROOT / "bench" / "results" / "soak.json"
MB = 1_000_000


@pytest.mark.parametrize("seed", range(30))
def test_every_life_between_two_ends_is_long_enough_to_be_judged(seed):
    """For every process: the rank's life, and the last engine of it, with steps done again counted."""
    faults = schedule(seed)
    assert faults == schedule(seed) and faults != schedule(seed + 1)
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)
    ends = [fault.step for fault in faults if fault.kind in ENDING]
    begins = [0, *ends]
    for begin, end in zip(begins, [*ends, STEPS], strict=True):
        engine_faults = [f.step for f in faults if f.kind.startswith("engine") and begin <= f.step < end]
        # A new engine is there one or two steps after its fault.
        assert end - max([begin, *engine_faults]) >= MIN_LIFE_STEPS + 2, (begin, end, engine_faults)


def test_a_shorter_run_has_the_same_faults():
    short = schedule(0, soak_plan.MIN_STEPS)
    assert [fault.kind for fault in short] == [fault.kind for fault in schedule(0)]
    assert all(0 < fault.step < soak_plan.MIN_STEPS for fault in short)


def test_the_overrides_are_a_configuration(tmp_path):
    words = [*soak_plan.overrides(STEPS, tmp_path, 3), *soak_plan.soak_overrides()]
    config = load_config(soak_plan.CONFIG, words)
    assert config.rollout.staleness == soak_plan.STALENESS and config.rollout.vllm.mode == "server"
    assert config.seed == 3 and config.checkpoint.every == soak_plan.CHECKPOINT_EVERY


def life(size, steps: int = 60, first: int = 0, noise: float = 0.01) -> list[Sample]:
    """Two samples per step; size(step of the life) in MB, with noise."""
    chance = random.Random(1)
    sizes = [int(size(i / 2) * MB * (1 + chance.uniform(-noise, noise))) for i in range(2 * steps + 1)]
    return [Sample(i / 2, first + i // 2, size, size // 2) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("name", "size", "flat"),
    [
        ("constant", lambda step: 700, True),
        ("grows until it is warm", lambda step: 700 * min(1.0, 0.4 + step / 20), True),
        ("1 MB per step", lambda step: 700 + step, True),
        ("3 MB per step", lambda step: 700 + 3 * step, False),
        ("a jump in the middle", lambda step: 700 if step < 35 else 760, False),
        ("shrinks", lambda step: 700 - 3 * step, False),
        ("a peak for three seconds", lambda step: 1500 if 50 <= step < 52 else 700, True),
    ],
)
def test_flat_and_leaking_series(name, size, flat):
    found = flatness(life(size, first=45))
    assert found.flat is flat and found.steps == 60
    # The quarters' middles are 15 + 7.5 and 52.5 steps into the life.
    if name == "3 MB per step":
        assert found.change == pytest.approx((700 + 157.5) / (700 + 67.5) - 1, abs=0.01)
        assert found.per_100_steps == pytest.approx(150 * MB, rel=0.05)


def test_a_short_life_is_not_judged():
    found = flatness(life(lambda step: 700 + 50 * step, steps=MIN_LIFE_STEPS - 1))
    assert found.flat is None
    assert flatness(life(lambda step: 700, steps=MIN_LIFE_STEPS)).flat is True
    with pytest.raises(ValueError, match="no samples"):
        flatness([])


def test_what_follows_the_last_step_does_not_count():
    """Of a long evaluation after it most samples are taken."""
    trained = life(lambda step: 700)
    evaluating = [Sample(30 + i, 60, 900 * MB, 450 * MB) for i in range(40)]
    assert flatness(trained + evaluating).change == pytest.approx(0.0, abs=0.01)


def test_theil_sen_ignores_outliers():
    points = [(float(x), 2.0 * x + 1) for x in range(20)]
    points[3] = (3.0, 1e6)
    assert theil_sen(points) == pytest.approx(2.0)
    assert theil_sen([(1.0, 5.0), (1.0, 6.0)]) == 0.0


@pytest.fixture
def data() -> dict:
    """A soak of 200 steps in which everything held."""
    faults = []
    for fault in schedule(0):
        ending = fault.kind in ENDING
        faults.append(
            {
                "fault": {"kind": fault.kind, "step": fault.step, "delay_s": fault.delay_s, "rank": fault.rank},
                "at": 2.0 * fault.step, "logged": fault.step, "recovered_s": 12.5,
                "exit_status": (0 if fault.kind == TERMINATED else 1) if ending else None,
                "resumed_from": fault.step - 3 if ending else None,
                "repeated": (0 if fault.kind == TERMINATED else 3) if ending else None,
                "said": "checkpoint step_000150 is damaged" if "damaged" in fault.kind else "",
            }
        )  # fmt: skip
    rows = [
        {"step": step, "loss/value": -0.1, "learner/grad_norm": 1.0, "rollout/version": max(0, step - 2),
         "rollout/accuracy": 0.5, "time_s/step": 1.0}
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    samples = [[s.t, s.step, s.resident, s.anonymous] for s in life(lambda step: 700)]
    return {
        "command": "python bench/soak.py --out runs/soak",
        "environment": {"git_sha": "a" * 40, "device": "CPU: test", "versions": {"python": "3.11"},
                        "started": "2026-01-02T03:04:05Z"},
        "steps": STEPS, "ranks": 2, "seconds": 500.0, "planned": len(faults), "faults": faults, "rows": rows,
        "starts": [{"at": 0.0, "from": 0, "status": 0, "ended": 9.0, "left": [],
                    "engine_restarts": 4, "engine_faults": 4}],
        "memory": [{"name": name, "samples": samples} for name in ("rank 0", "rank 1", "engine 0")],
        "accuracy": {"soak": {"0": [0.40, 0.02], "200": [0.72, 0.01]},
                     "unbroken": {"0": [0.41, 0.02], "200": [0.73, 0.01]}},
    }  # fmt: skip


def harm(data: dict, *path, value) -> dict:
    out = copy.deepcopy(data)
    target = out
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return out


def index_of(kind: str) -> int:
    return [fault.kind for fault in schedule(0)].index(kind)


BROKEN = {
    "every step once, in order": (("rows", 7, "step"), 7),
    "every fault came and was survived": (("planned",), 11),
    "samples within the staleness bound": (("rows", 9, "rollout/version"), 7),
    "losses and gradient norms finite": (("rows", 9, "loss/value"), float("nan")),
    "exit status": (("faults", index_of(TERMINATED), "exit_status"), 1),
    "damaged checkpoint named, the one before used": (("faults", index_of(ENDING[1]), "said"), ""),
    "engines replaced for faults only": (("starts", 0, "engine_restarts"), 5),
    "no process left": (("starts", 0, "left"), ["python"]),
    "learned as the unbroken run": (("accuracy", "soak", "200"), [0.5, 0.01]),
    "memory flat": (("memory", 2, "samples"), [[s.t, s.step, s.resident, 0] for s in life(lambda t: 500 + 5 * t)]),
}


def test_when_everything_held_every_check_does(data):
    found = assess(data)["checks"]
    assert {one["name"] for one in found} == set(BROKEN)
    assert all(one["holds"] for one in found), found


@pytest.mark.parametrize("name", BROKEN)
def test_each_check_fails_for_its_own_reason(data, name):
    path, value = BROKEN[name]
    found = assess(harm(data, *path, value=value))["checks"]
    assert [one["name"] for one in found if not one["holds"]] == [name]
    assert f"**Did not hold: {name}.**" in markdown(assess(harm(data, *path, value=value)), "f.svg", "r.json")


def test_a_soak_without_a_long_life_shows_nothing_about_memory(data):
    short = [[s.t, s.step, s.resident, 0] for s in life(lambda step: 700, steps=20)]
    found = assess({**data, "memory": [{"name": "rank 0", "samples": short}]})["checks"]
    assert [one["name"] for one in found if not one["holds"]] == ["memory flat"]


def test_the_block_tells_every_fault_and_life(data, tmp_path):
    table = assess(data)
    block = markdown(table, "soak.svg", "../bench/results/soak.json")
    assert block.count("| 12.5 s |") == len(data["faults"]) and "Everything below held." in block
    assert "exit 1; resumed after step" in block and "3 steps done again; the damaged one was named" in block
    assert block.count("% | yes |") == 3 and "`python bench/soak.py --out runs/soak`" in block
    [file] = draw(table, tmp_path / "soak.svg")
    assert file.read_text().count("<path") > 20


def test_the_document_is_what_the_json_says():
    text = DOC.read_text()
    block = text.split(BEGIN)[1].split(END)[0].strip()
    if not RESULTS.exists():
        assert block == "", "a table without its JSON"
        return
    table = json.loads(RESULTS.read_text())
    assert table["steps"] == STEPS and "/work" not in json.dumps(table)
    assert table["checks"] == assess(table)["checks"]
    assert block == markdown(table, link_from(DOC, RESULTS.with_suffix(".svg")), link_from(DOC, RESULTS))


def test_refusals(tmp_path, capsys):
    assert soak.main(["--out", str(tmp_path / "new"), "--steps", "10"]) == 2
    assert "--steps 10: the faults need at least 60" in capsys.readouterr().err
    assert soak.main(["--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: exists; give a new folder" in capsys.readouterr().err
    assert soak.main(["--out", str(tmp_path), "--only-report"]) == 2
    assert "has no soak.json" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_judge_grades_and_misbehaves_once(tmp_path, monkeypatch):
    order = tmp_path / "order"
    monkeypatch.setenv(soak_judge.FILE, str(order))
    assert soak_judge.verdict("85;\\boxed{12} \\boxed{78}", "78") and not soak_judge.verdict("78", "78")
    order.write_text("exit")
    code = "import soak_judge; soak_judge.verdict('\\\\boxed{1}', '1'); print('alive')"
    words = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    first = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    again = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert (first.returncode, first.stdout) == (1, "") and again.stdout == "alive\n"
    order.write_text("hang")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(words, env=env, capture_output=True, timeout=2)


HOLD = """
import os, subprocess, sys, time
size, *rest = os.environ["CHAIN"].split()
held = b"x" * (int(size) << 20)
if rest:
    name = rest[0].split("=")[0]
    chain = " ".join([rest[0].split("=")[1], *rest[1:]])
    subprocess.Popen([sys.executable, __file__, name], env={**os.environ, "CHAIN": chain})
time.sleep(600)
"""


def test_ranks_and_engines_are_found_with_their_memory_and_nobody_is_overlooked(tmp_path):
    """A rank of 60 MB starts an engine whose child holds 90 MB: each is charged with its own."""
    (tmp_path / "hold.py").write_text(HOLD)
    chain = "0 tcopd_fast.train=60 tcopd_fast.rollout.leash=0 worker=90"
    env = {**os.environ, soak_watch.MARK: "test-token", "RANK": "1", "CHAIN": chain}
    top = subprocess.Popen([sys.executable, str(tmp_path / "hold.py")], env=env)
    try:
        end, sizes = time.monotonic() + 30, {}
        while sizes.get("engine 0", (0, 0))[1] < 90 * 2**20 and time.monotonic() < end:
            time.sleep(0.1)
            below = soak_watch.tree(top.pid)
            sizes = {member.name: soak_watch.memory(member, below) for member in soak_watch.members(below)}
        assert set(sizes) == {"rank 1", "engine 0"}
        assert 60 < sizes["rank 1"][1] / 2**20 < 85 and 90 < sizes["engine 0"][1] / 2**20 < 130
        assert len(soak_watch.marked("test-token")) == 4 and not soak_watch.marked("another")
    finally:
        for process in soak_watch.marked("test-token"):
            process.kill()
        top.wait()
    assert not soak_run.left_after("test-token", 10.0)
