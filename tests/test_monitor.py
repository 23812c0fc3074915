"""Stage clock, metric files and progress lines."""

from __future__ import annotations

import io
import json
import mmap
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcopd_fast import clock as clock_module
from tcopd_fast.clock import STAGES, StageClock
from tcopd_fast.config_sections import LoggingConfig
from tcopd_fast.errors import UserError
from tcopd_fast.monitor import MetricsLog, Progress, format_eval, format_step, truncate_jsonl

MIB = 2**20
FILES_ONLY = LoggingConfig(tensorboard=False)


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_clock_sums_reentered_stages_and_resets() -> None:
    clock = StageClock("cpu")
    for _ in range(2):
        with clock.stage("rollout"):
            time.sleep(0.02)
    with clock.stage("loss"):
        pass
    metrics = clock.collect().metrics
    assert metrics["time_s/rollout"] >= 0.04
    assert metrics["time_s/loss"] < metrics["time_s/rollout"]
    assert metrics["time_s/step"] >= metrics["time_s/rollout"] + metrics["time_s/loss"]
    assert "time_s/data" not in metrics
    assert clock.collect().metrics == {"time_s/step": 0.0}


def test_clock_charges_nested_time_to_the_inner_stage_only() -> None:
    clock = StageClock("cpu")
    with clock.stage("loss"):
        with clock.stage("learner"):
            time.sleep(0.05)
        time.sleep(0.01)
    metrics = clock.collect().metrics
    assert metrics["time_s/learner"] >= 0.05
    assert metrics["time_s/loss"] >= 0.01
    stages = sum(metrics.get(f"time_s/{stage}", 0.0) for stage in STAGES)
    assert stages <= metrics["time_s/step"] < stages + 0.02


def test_clock_does_not_count_what_lies_between_steps() -> None:
    clock = StageClock("cpu")
    with clock.stage("data"):
        pass
    clock.collect()
    time.sleep(0.05)
    with clock.stage("data"):
        pass
    assert clock.collect().metrics["time_s/step"] < 0.05


def test_clock_refuses_unknown_stages_and_early_collection() -> None:
    clock = StageClock("cpu")
    with pytest.raises(ValueError, match=r"unknown stage 'rolout'.*rollout"), clock.stage("rolout"):
        pass
    with clock.stage("data"), pytest.raises(RuntimeError, match="open stage 'data'"):
        clock.collect()


def test_clock_closes_a_stage_that_raised() -> None:
    clock = StageClock("cpu")
    with pytest.raises(ZeroDivisionError), clock.stage("reward"):
        _ = 1 / 0
    assert "time_s/reward" in clock.collect().metrics


def touch_new_pages(size: int) -> None:
    """Make `size` bytes resident and give them back; an allocator could serve a tensor from pages it still holds."""
    with mmap.mmap(-1, size) as block:
        for offset in range(0, size, mmap.PAGESIZE):
            block[offset] = 1


def test_clock_sees_an_allocation_in_the_stage_that_made_it() -> None:
    clock = StageClock("cpu")
    if not clock.resets_peak:
        pytest.skip("this kernel does not let a process reset its resident-set peak")
    with clock.stage("data"):
        pass
    with clock.stage("rollout"):
        touch_new_pages(64 * MIB)
    with clock.stage("loss"):
        pass
    peak = _peaks(clock.collect().metrics)
    for quiet in ("data", "loss"):
        assert 56 * MIB < peak["rollout"] - peak[quiet] < 96 * MIB


def test_clock_keeps_the_outer_peak_when_a_stage_nests() -> None:
    clock = StageClock("cpu")
    if not clock.resets_peak:
        pytest.skip("this kernel does not let a process reset its resident-set peak")
    with clock.stage("scoring"):
        touch_new_pages(64 * MIB)
        with clock.stage("reward"):
            pass
    peak = _peaks(clock.collect().metrics)
    assert peak["scoring"] - peak["reward"] > 56 * MIB


def test_clock_falls_back_to_the_process_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> None:
        raise PermissionError("clear_refs")

    monkeypatch.setattr(clock_module, "_reset_resident_peak", forbidden)
    clock = StageClock("cpu")
    assert not clock.resets_peak
    with clock.stage("data"):
        pass
    assert _peaks(clock.collect().metrics)["data"] > 10 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clock_on_cuda_reads_the_allocator_and_waits() -> None:
    clock = StageClock("cuda")
    with clock.stage("data"):
        pass
    with clock.stage("loss"):
        x = torch.ones(4096, 4096, device="cuda")
        for _ in range(20):
            y = x @ x
    metrics = clock.collect().metrics
    assert metrics["peak_memory_bytes/loss"] >= metrics["peak_memory_bytes/data"] + 2 * 64 * MIB
    assert metrics["time_s/loss"] > metrics["time_s/data"]
    assert torch.isfinite(y).all()


def _peaks(metrics: dict[str, float]) -> dict[str, float]:
    prefix = "peak_memory_bytes/"
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


def test_lines_are_strict_json_and_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, FILES_ONLY, None)
    log.log(1, {"loss/value": float("nan"), "loss/ratio_max": float("inf"), "reward/mean": torch.tensor(0.5)})
    log.log_tokens([{"step": 1, "tokens": ["a\n", "\ud800"], "advantage": torch.tensor([1.0, float("-inf")])}])
    log.log_eval({"step": 1, "set": "x", "mean_at_k": np.float32(0.25), "reverse_kl": {"expert": float("nan")}})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss/value": None, "loss/ratio_max": None, "reward/mean": 0.5}
    ]
    assert lines(tmp_path / "token_samples.jsonl") == [
        {"step": 1, "tokens": ["a\n", "\ud800"], "advantage": [1.0, None]}
    ]
    assert lines(tmp_path / "eval.jsonl") == [
        {"step": 1, "set": "x", "mean_at_k": 0.25, "reverse_kl": {"expert": None}}
    ]
    log.close()
    log.close()


def test_resume_cuts_every_file_and_goes_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, FILES_ONLY, None)
    for step in range(1, 6):
        log.log(step, {"loss/value": step})
        log.log_eval({"step": step, "set": "x"})
        log.log_tokens([{"step": step, "tokens": []}] * 2)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss/va')
    log = MetricsLog(tmp_path, FILES_ONLY, 3)
    log.log(4, {"loss/value": 40})
    log.close()
    assert [(row["step"], row["loss/value"]) for row in lines(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    assert [row["step"] for row in lines(tmp_path / "eval.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in lines(tmp_path / "token_samples.jsonl")] == [1, 1, 2, 2, 3, 3]


def test_a_new_run_refuses_to_append_to_another(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"already holds metrics.jsonl; resume"):
        MetricsLog(tmp_path, FILES_ONLY, None)


def test_disabled_log_writes_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run", LoggingConfig(), None, enabled=False)
    log.log(1, {"loss/value": 1.0})
    log.log_eval({"step": 1, "set": "x"})
    log.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (b'{"step": 2}', [1, 2]),
        (b'{"step": 2}\n', [1, 2]),
        (b'{"step": 2', [1]),
        (b'{"st', [1]),
        (b'{"step": 2, "a": "\xe2\x82', [1]),
        (b"\x00\x00\x00", [1]),
        (b'{"step": 9}\n{"step": 2}\n\n', [1, 2]),
    ],
)
def test_truncation_drops_later_and_half_written_lines(tmp_path: Path, tail: bytes, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    truncate_jsonl(path, 5)
    assert [row["step"] for row in lines(path)] == kept
    assert path.read_bytes().endswith(b"}\n")
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncation_names_a_broken_line_and_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = '{"step": 1}\nbroken\n{"step": 2}\n'
    path.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: .*repair or delete"):
        truncate_jsonl(path, 5)
    assert path.read_text() == content
    truncate_jsonl(tmp_path / "missing.jsonl", 5)
    assert not (tmp_path / "missing.jsonl").exists()


def test_tensorboard_holds_the_scalars_and_forgets_purged_steps(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path, LoggingConfig(), None)
    for step in (1, 2, 3):
        log.log(step, {"loss/value": float(step), "learner/grad_norm": float("nan")})
    log.close()
    log = MetricsLog(tmp_path, LoggingConfig(), 1)
    log.log(2, {"loss/value": 20.0})
    log.log_eval({"step": 2, "set": "held", "domain": "math", "mean_at_k": 0.5, "reverse_kl": {"expert": 0.1}})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/value")] == [(1, 1.0), (2, 20.0)]
    tags = events.Tags()["scalars"]
    assert {"eval/held/mean_at_k", "eval/held/reverse_kl/expert"} <= set(tags)
    assert "learner/grad_norm" not in tags


def test_wandb_gets_the_numbers_and_one_id_over_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []
    run = types.SimpleNamespace(
        define_metric=lambda *args, **kwargs: None, log=logged.append, finish=lambda: logged.append({"finished": True})
    )

    def init(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return run

    fake = types.SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = FILES_ONLY.model_copy(update={"wandb_project": "distill"})
    for resume in (None, 1):
        log = MetricsLog(tmp_path, config, resume, run_config={"seed": 3})
        log.log(1, {"loss/value": 2.0, "learner/grad_norm": float("nan")})
        log.close()
    assert logged == [{"step": 1, "loss/value": 2.0}, {"finished": True}] * 2
    assert calls[0]["id"] == calls[1]["id"] and calls[0]["project"] == "distill" and calls[0]["config"] == {"seed": 3}


METRICS = {
    "rollout/accuracy": 0.5234,
    "reward/mean": 0.031,
    "rollout/response_length_mean": 14.2,
    "scoring/expert/reverse_kl/math": 0.113,
    "loss/entropy": 0.41,
    "learner/grad_norm": 0.83,
    "time_s/step": 1.9,
}


def test_step_line() -> None:
    assert format_step(7, 40, METRICS) == (
        "step  7/40  accuracy 0.523  reward +0.031  length 14.2  kl(expert) 0.113  entropy 0.410  grad 0.83  1.9 s"
    )
    two = {"scoring/a/reverse_kl/math": 0.1, "scoring/a/reverse_kl/code": float("nan")}
    assert format_step(1, 1, two) == "step 1/1  kl(a/math) 0.100  kl(a/code) n/a"


def test_eval_line() -> None:
    record = {
        "step": 40,
        "set": "held",
        "k": 8,
        "mean_at_k": 0.5,
        "standard_error": 0.01,
        "pass_at_k": 0.8,
        "response_length_mean": 14.0,
        "truncation_rate": 0.0,
        "reverse_kl": {"expert": 0.1},
    }
    assert format_eval(record) == (
        "eval at step 40  held  mean@8 0.500 ± 0.010  pass@8 0.800  length 14.0  truncated 0.000  kl(expert) 0.100"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_writes_plain_lines_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Progress(2, stream=stream) as progress:
        for step in (1, 2):
            progress.phase("rollout", 3, 4)
            progress.step(step, METRICS)
    assert stream.getvalue().splitlines() == [format_step(1, 2, METRICS), format_step(2, 2, METRICS)]


def test_progress_bar_shows_running_accuracy_and_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with Progress(4, stream=stream) as progress:
        progress.step(1, METRICS | {"rollout/accuracy": 0.25})
        progress.step(2, METRICS | {"rollout/accuracy": 0.75})
        progress.phase("rollout", 87, 128)
        time.sleep(0.3)
        progress.message("note [red]kept[/red]")
    text = stream.getvalue()
    assert format_step(2, 4, METRICS | {"rollout/accuracy": 0.75}) in text
    assert "step 2/4" in text and "accuracy 0.500" in text and "rollout 87/128" in text
    assert "note [red]kept[/red]" in text


def test_progress_of_other_ranks_is_silent() -> None:
    stream = Terminal()
    with Progress(2, enabled=False, stream=stream) as progress:
        progress.step(1, METRICS)
        progress.phase("rollout", 1, 2)
        progress.message("x")
    assert stream.getvalue() == ""
