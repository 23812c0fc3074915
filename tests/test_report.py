"""The report: right numbers, hostile text made harmless, nothing loaded from elsewhere, incomplete runs served."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tcopd_fast.clock import STAGES
from tcopd_fast.config import Config
from tcopd_fast.config_io import dump_config
from tcopd_fast.config_sections import LoggingConfig
from tcopd_fast.errors import UserError
from tcopd_fast.monitor import MetricsLog
from tcopd_fast.report import format_table, summary_table, write_report

LOG_ONLY = LoggingConfig(tensorboard=False)
STAGE_SECONDS = (0.004, 0.62, 0.31, 0.002, 0.006, 0.48, 0.21, 0.03)
HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x>'


def fake_run(
    path: Path,
    *,
    lambdas: dict[str, float] | None = None,
    final_accuracy: float = 0.68,
    steps: int = 40,
    done: int | None = None,
    seed: int = 0,
    hostile: bool = False,
) -> Path:
    """A run directory as training leaves it: a saturating accuracy curve with noise, five evaluations, samples."""
    lambdas = {"expert": 1.5} if lambdas is None else lambdas
    rng = np.random.default_rng(seed)
    done = steps if done is None else done
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(_config(path, lambdas, steps, seed), encoding="utf-8")
    environment = {
        "git_sha": "4f1c2d9a",
        "versions": {"tcopd-fast": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"},
        "device": "NVIDIA H100 80GB HBM3",
        "seed": seed,
        "command": "tcopd train configs/miniature.yaml",
        "started": "2025-11-22T04:31:00+00:00",
    }
    (path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    log = MetricsLog(path, LOG_ONLY, None)
    for step in range(done + 1):
        progress = 1 - math.exp(-4 * step / steps)
        if step:
            metrics = _metrics(rng, list(lambdas), progress, final_accuracy)
            startup = 3 if step == 1 else 1
            log.log(step, metrics | {"time_s/step": startup * metrics["time_s/step"]})
            log.log_tokens(_token_records(rng, step, lambdas, hostile))
        if step % 10 == 0:
            for name, shift in (("chains", 0.0), ("digits", 0.12)):
                log.log_eval(_eval_record(step, name, list(lambdas), progress, final_accuracy + shift))
    log.close()
    return path


def _config(path: Path, lambdas: dict[str, float], steps: int, seed: int) -> str:
    # Names that the configuration refuses can still stand in a file that somebody edited.
    safe = {name: f"t{i}" for i, name in enumerate(lambdas)}
    tree = {
        "run_dir": str(path),
        "steps": steps,
        "seed": seed,
        "model": {"path": "miniature:student", "dtype": "float32"},
        "teachers": {safe[name]: {"path": f"miniature:{name}"} for name in lambdas},
        "data": {"train": [{"path": "miniature:train"}]},
        "objective": {"lambdas": {safe[k]: v for k, v in lambdas.items()}, "normalizer": "none"},
    }
    resolved = yaml.safe_load(dump_config(Config.model_validate(tree)))
    resolved["teachers"] = {name: resolved["teachers"][safe[name]] for name in lambdas}
    resolved["objective"]["lambdas"] = dict(lambdas)
    return yaml.safe_dump(resolved, sort_keys=False)


def _metrics(rng: np.random.Generator, teachers: list[str], progress: float, final: float) -> dict[str, float]:
    noise = rng.normal(size=8)
    metrics = {
        "rollout/accuracy": 0.42 + (final - 0.42) * progress + 0.03 * noise[0],
        "rollout/response_length_mean": 9 + 6 * progress + 0.3 * noise[1],
        "rollout/truncated_share": 0.04 * (1 - progress),
        "reward/mean": 0.05 * progress + 0.01 * noise[2],
        "reward/advantage_mean": 0.1 - 0.1 * progress + 0.01 * noise[3],
        "reward/advantage_std": 0.9 - 0.5 * progress,
        "loss/entropy": 0.9 - 0.5 * progress + 0.01 * noise[4],
        "loss/effective_sample_size": 1 - 0.05 * abs(noise[5]),
        "learner/grad_norm": 2.5 * (1 - 0.7 * progress) + 0.2 * abs(noise[6]),
    }
    for index, teacher in enumerate(teachers):
        trend = 1 - 0.8 * progress if index == 0 else 0.6 + progress
        metrics[f"scoring/{teacher}/reverse_kl/math"] = 0.4 * trend + 0.01 * noise[7]
    jitter = 1 + 0.1 * rng.random(len(STAGES))
    metrics |= {f"time_s/{s}": t * j for s, t, j in zip(STAGES, STAGE_SECONDS, jitter, strict=True)}
    metrics |= {f"peak_memory_bytes/{s}": (300 + 90 * i) * 2**20 for i, s in enumerate(STAGES)}
    return metrics | {"time_s/step": sum(STAGE_SECONDS) * 1.15}


def _eval_record(step: int, name: str, teachers: list[str], progress: float, final: float) -> dict[str, Any]:
    mean = 0.42 + (final - 0.42) * progress
    return {
        "step": step,
        "set": name,
        "domain": "math",
        "temperature": 1.0,
        "k": 8,
        "problems": 512,
        "mean_at_k": mean,
        "standard_error": 0.007,
        "ci_low": mean - 0.014,
        "ci_high": mean + 0.014,
        "pass_at_k": min(0.99, mean + 0.2),
        "response_length_mean": 9 + 6 * progress,
        "truncation_rate": 0.01,
        "reverse_kl": {teacher: 0.1 + 0.4 * (1 - progress) for teacher in teachers},
    }


def _token_records(
    rng: np.random.Generator, step: int, lambdas: dict[str, float], hostile: bool
) -> list[dict[str, Any]]:
    records = []
    for index in range(2):
        tokens = [*"85;66;78;#78", " ", "\n", "\t", "\u202e", "<|im_end|>"]
        if hostile:
            tokens[3] = HOSTILE
        logratio = {name: rng.normal(scale=0.8, size=len(tokens)) for name in lambdas}
        reward = sum(weight * logratio[name] for name, weight in lambdas.items())
        records.append(
            {
                "step": step,
                "prompt_id": f"train-{100 * step + index}",
                "domain": "math",
                "problem": HOSTILE if hostile else "M:47+38-19+12=",
                "correct": index == 0,
                "tokens": tokens,
                "old_logprob": -rng.exponential(0.4, size=len(tokens)),
                "advantage": reward - rng.normal(scale=0.2, size=len(tokens)),
                "reward": reward,
                "teachers": {
                    name: {"lambda": weight, "logratio": logratio[name], "contribution": weight * logratio[name]}
                    for name, weight in lambdas.items()
                },
            }
        )
    return records


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_page_holds_the_numbers_of_every_run(tmp_path: Path) -> None:
    first = fake_run(tmp_path / "opd", lambdas={"expert": 1.0}, final_accuracy=0.63)
    second = fake_run(tmp_path / "tc", lambdas={"expert": 1.5, "anti": -0.5}, final_accuracy=0.74, seed=1)
    page = Page(write_report([first, second], tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    rows = {(row["run"], row["set"]): row for row in summary_table([first, second])}
    assert len(rows) == 4
    for row in rows.values():
        assert f"{100 * row['mean_at_k']:.1f} ± 0.7" in page.text
        assert f"{100 * row['pass_at_k']:.1f}" in page.text
    assert rows["tc", "chains"]["mean_at_k"] == pytest.approx(0.42 + 0.32 * (1 - math.exp(-4)))
    assert rows["opd", "chains"]["start"] == pytest.approx(0.42)
    assert rows["opd", "chains"]["time_s_per_step"] == pytest.approx(sum(STAGE_SECONDS) * 1.15)
    for expected in ("λ expert", "λ anti", "−0.5", "4f1c2d9a", "NVIDIA H100 80GB HBM3", "miniature:student", *STAGES):
        assert expected in page.text
    assert "930 MiB" in page.text
    charts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    for wanted in (
        "chains",
        "digits",
        "Rollout accuracy",
        "Response length",
        "KL to expert",
        "KL to anti",
        "Entropy",
        "Reward",
        "Advantage",
        "Effective sample size",
        "Gradient norm",
    ):
        assert any(wanted in chart for chart in charts), wanted


def test_stage_rows_keep_the_order_of_the_loop(tmp_path: Path) -> None:
    html = write_report([fake_run(tmp_path / "a")], tmp_path / "r.html").read_text(encoding="utf-8")
    table = html[html.index("<h3>Peak memory</h3>") :]
    assert re.findall(r'<th class="text">(\w+)</th>', table)[1:9] == list(STAGES)


def test_hostile_text_is_shown_and_harmless(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "<script>alert(2)<\\script>", lambdas={"<b>t": 1.0}, hostile=True)
    html = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and "b>t" not in page.tags
    assert HOSTILE.replace(" ", "␣") in page.text
    assert not [item for item in page.attributes if item[1].startswith("on")]
    assert all(value.startswith("data:image/svg+xml;base64,") for _, name, value in page.attributes if name == "src")
    assert "\u202e" not in html and "⟨U+202E⟩" in page.text
    assert all(mark in page.text for mark in ("␣", "↵", "⇥", "<|im_end|>"))


def test_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    html = write_report([fake_run(tmp_path / "a"), fake_run(tmp_path / "b")], tmp_path / "r.html").read_text("utf-8")
    page = Page(html)
    assert not re.search(r"https?://|@import|url\(", html)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not [item for item in page.attributes if item[1] in ("href", "srcset", "action")]


def test_token_colour_follows_sign_and_size(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    values = [-2.0, -0.01, 0.0, 2.0, None]
    record = {"step": 1, "tokens": list("abcde"), "advantage": values, "teachers": {}}
    (run / "token_samples.jsonl").write_text(json.dumps(record) + "\n")
    html = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    classes = re.findall(r'<span class="(\w+)" title="token', html)
    assert classes == ["n10", "zero", "zero", "p10", "none"]
    assert "advantage −2.000" in html


def test_long_responses_are_cut_in_the_middle(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    record = {"step": 1, "tokens": [f"t{i}" for i in range(5000)], "advantage": [0.1] * 5000, "teachers": {}}
    (run / "token_samples.jsonl").write_text(json.dumps(record) + "\n")
    page = Page(write_report([run], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "t0" in page.words and "t4999" in page.words and "t2500" not in page.words
    assert "… 4300 tokens not shown …" in page.words


def test_runs_that_lack_a_file_still_report(tmp_path: Path) -> None:
    names = ("eval.jsonl", "token_samples.jsonl", "metrics.jsonl", "config.yaml", "environment.json")
    runs = [fake_run(tmp_path / f"without-{name}") for name in names]
    for run, name in zip(runs, names, strict=True):
        (run / name).unlink()
    page = Page(write_report([fake_run(tmp_path / "whole"), *runs], tmp_path / "r.html").read_text(encoding="utf-8"))
    table = format_table(summary_table(runs))
    for name in names:
        assert re.search(rf"without-{name}\W+{name} is missing", page.text), name
        assert f"without-{name}" in table


def test_a_model_that_was_only_evaluated_stands_beside_the_runs(tmp_path: Path) -> None:
    run, expert = fake_run(tmp_path / "run"), tmp_path / "expert"
    expert.mkdir()
    (expert / "config.yaml").write_text("model: {path: miniature:expert}\nseed: 0\n")
    record = _eval_record(0, "chains", [], 0.0, 0.0) | {"mean_at_k": 0.617}
    (expert / "eval.jsonl").write_text(json.dumps(record) + "\n")
    html = write_report([run, expert], tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "evaluated only" in page.text and "61.7 ± 0.7" in page.text and "metrics.jsonl is missing" not in page.text
    stages = html[html.index("<h2>Time and memory") :]
    assert ">expert</" not in stages
    learning_rate = re.search(r"<dt>learning rate</dt><dd>([^<]+)</dd>", html)
    assert learning_rate and learning_rate[1] == "1e-05"
    assert "No run was trained." in write_report([expert], tmp_path / "e.html").read_text(encoding="utf-8")


def test_a_run_that_has_only_its_config_still_reports(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    for name in ("eval.jsonl", "token_samples.jsonl", "metrics.jsonl", "environment.json"):
        (run / name).unlink()
    page = Page(write_report([run], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "stopped at step 0 of 40" in page.text and "No metrics yet." in page.text


def test_a_crashed_run_reports_what_it_has(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a", done=17)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "rollout/acc')
    (run / "eval.jsonl").unlink()
    page = Page(write_report([run], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "stopped at step 17 of 40" in page.text and "metrics.jsonl: 1 unreadable line left out" in page.text
    (row,) = summary_table([run])
    whole_lines = (run / "metrics.jsonl").read_text().splitlines()[7:17]
    expected = sum(json.loads(line)["rollout/accuracy"] for line in whole_lines) / 10
    assert row["step"] == 17 and row["mean_at_k"] == pytest.approx(expected)
    assert row["set"].startswith("training rollouts") and row["standard_error"] is None


def test_values_of_the_wrong_kind_are_left_out(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a", done=1)
    lines = [
        {"step": 2, "rollout/accuracy": None, "loss/entropy": "high", "time_s/step": [1]},
        {"step": 3, "rollout/accuracy": 0.5, "scoring/x/reverse_kl/": 1.0},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnull\n[1]\n")
    (run / "eval.jsonl").write_text('{"step": 1, "reverse_kl": 3, "mean_at_k": null}\n')
    (run / "token_samples.jsonl").write_text('{"step": 1, "tokens": ["a", 3], "advantage": 7, "teachers": [1]}\n')
    page = Page(write_report([run], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "2 unreadable lines left out" in page.text


def test_folders_that_are_no_runs_are_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is not a run .*run_dir"):
        write_report([run, tmp_path / "empty"], tmp_path / "r.html")
    with pytest.raises(UserError, match="gone is not a folder"):
        summary_table([tmp_path / "gone"])
    with pytest.raises(UserError, match="given twice"):
        summary_table([run, tmp_path / "empty" / ".." / "run"])
    with pytest.raises(UserError, match="at least one"):
        summary_table([])
    assert not (tmp_path / "r.html").exists()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "seed0" / "tc"), fake_run(tmp_path / "seed1" / "tc", seed=1)]
    assert {row["run"] for row in summary_table(runs)} == {"seed0/tc", "seed1/tc"}


def test_table_is_aligned_plain_text(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name) for name in ("a", "a-much-longer-run-name[red]")]
    lines = format_table(summary_table(runs)).splitlines()
    assert len(lines) == 2 + 4 and all(line.isprintable() for line in lines)
    assert any("a-much-longer-run-name[red]" in line for line in lines)
    assert len({line.index("chains") for line in lines if "chains" in line}) == 1


def test_a_long_run_is_rendered_in_bounded_size(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "long", steps=400)
    assert write_report([run], tmp_path / "r.html").stat().st_size < 1_000_000
