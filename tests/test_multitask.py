"""Two domains in one run: shares, metrics per domain, forgetting, and the bench table (from made-up results)."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from running import ROOT, learning, lines, run, write_config

sys.path.insert(0, str(ROOT / "bench"))

import multitask
import multitask_plan
import multitask_report
from multitask_plan import FINAL, ROWS, SETS, plan
from table1_plan import open_recipe
from table1_report import check_markers

from tcopd_fast import metrics
from tcopd_fast.cli import main
from tcopd_fast.config import Config
from tcopd_fast.config_io import load_config, validate
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.evaluate import accuracy_change
from tcopd_fast.inputs import read_inputs
from tcopd_fast.learner import UpdateResult
from tcopd_fast.monitor import format_eval
from tcopd_fast.order import domain_counts
from tcopd_fast.report import format_table, summary_table, write_report
from tcopd_fast.types import Prompt, RewardedRollout, Rollout, ScoredRollout

WEIGHTS = {"even": 3, "odd": 1}
PER_STEP = 6
STEPS = 4


# --- whole runs ---


def tree(tiny, run_dir: Path, steps: int = STEPS) -> dict:
    """A two-domain run that keeps every response's tokens and evaluates both domains after every step."""
    for domain in WEIGHTS:
        rows = [row for row in tiny.prompts.read_text().splitlines(True) if json.loads(row)["domain"] == domain]
        (run_dir.parent / f"{domain}.jsonl").write_text("".join(rows[:6]))
    return tiny.tree(
        run_dir,
        steps=steps,
        data={"domain_weights": WEIGHTS},
        rollout={"prompts_per_step": PER_STEP},
        objective={"lambdas": {"even": {"expert": 1.5, "anti": -0.5}, "odd": {"anti": 1.0}}},
        eval={"data": [{"path": str(run_dir.parent / f"{d}.jsonl")} for d in WEIGHTS], "samples": 2, "every": 1},
        checkpoint={"every": 1},
        logging={"tensorboard": False, "token_samples": PER_STEP},
    )


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> tuple[Path, str]:
    """Folder and output of an uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("multitask") / "run"
    config = write_config(run_dir.parent / "c.yaml", tree(tiny, run_dir))
    return run_dir, run(["--config", str(config)])


def test_every_step_samples_the_exact_shares(finished):
    for row in lines(finished[0] / "metrics.jsonl"):
        before, after = (domain_counts(WEIGHTS, PER_STEP * step) for step in (row["step"] - 1, row["step"]))
        for domain in WEIGHTS:
            assert row[f"data/share/{domain}"] * PER_STEP == pytest.approx(after[domain] - before[domain])


def test_metrics_per_domain_are_those_of_its_own_responses(finished):
    """Against the token samples, which hold every response of the run."""
    records = lines(finished[0] / "token_samples.jsonl")
    for row in lines(finished[0] / "metrics.jsonl"):
        of_step = [record for record in records if record["step"] == row["step"]]
        all_tokens = sum(len(record["tokens"]) for record in of_step)
        for domain in WEIGHTS:
            own = [record for record in of_step if record["domain"] == domain]
            lengths = np.array([len(record["tokens"]) for record in own])
            advantage, reward, logprob = (
                np.concatenate([record[name] for record in own]) for name in ("advantage", "reward", "old_logprob")
            )
            expected = {
                "rollout/accuracy": np.mean([record["correct"] for record in own]),
                "rollout/response_length_mean": lengths.mean(),
                "reward/mean": reward.mean(),
                "reward/advantage_mean": advantage.mean(),
                "reward/advantage_std": advantage.std(),
                "batch/token_share": lengths.sum() / all_tokens,
                "loss/entropy_estimate": -logprob.mean(),
            }
            for name, value in expected.items():
                assert row[f"{name}/{domain}"] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, domain)
            assert 0 <= row[f"rollout/truncated_share/{domain}"] <= 1
        assert "rollout/version/even" not in row


def test_forgetting_follows_from_the_recorded_accuracies(finished):
    records = lines(finished[0] / "eval.jsonl")
    assert len(records) == 2 * (STEPS + 1)
    for domain in WEIGHTS:
        own = [record for record in records if record["domain"] == domain]
        means = [record["mean_at_k"] for record in own]
        assert [record["change"] for record in own] == [mean - means[0] for mean in means]
        assert [record["forgetting"] for record in own] == [max(means[: i + 1]) - means[i] for i in range(len(means))]
    assert "change +" in finished[1] or "change -" in finished[1]
    assert "forgotten 0." in finished[1]


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_prompts_metrics_and_forgetting(finished, tiny, tmp_path):
    run_dir = tmp_path / "run"
    run(["--config", str(write_config(tmp_path / "c.yaml", tree(tiny, run_dir, steps=2)))])
    # Records after the checkpoint must not count: they are done again.
    with (run_dir / "eval.jsonl").open("a") as file:
        file.write(json.dumps({**lines(run_dir / "eval.jsonl")[-1], "step": 3, "mean_at_k": 1.0}) + "\n")
    run(["--resume", str(run_dir), f"steps={STEPS}"])
    for name in ("metrics.jsonl", "eval.jsonl", "token_samples.jsonl"):
        whole = [learning(row) for row in lines(finished[0] / name)]
        assert [learning(row) for row in lines(run_dir / name)] == whole, name


@pytest.mark.slow
def test_two_ranks_take_the_same_prompts_and_report_the_same_numbers(finished, tiny, tmp_path):
    run_dir = tmp_path / "run"
    run(["--config", str(write_config(tmp_path / "c.yaml", tree(tiny, run_dir, steps=1)))], size=2)
    [row] = lines(run_dir / "metrics.jsonl")
    whole = lines(finished[0] / "metrics.jsonl")[0]
    names = [name for name in whole if name.endswith(("/even", "/odd"))]
    assert len(names) == 2 * 10 + 3
    for name in names:
        assert row[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name


def rewarded(domain: str, tokens: int, correct: bool) -> RewardedRollout:
    """A response whose every token has reward 1 and logprob −1 under every model."""
    prompt = Prompt(domain, domain, (1, 2), "", "1", "")
    minus_one = torch.full((tokens,), -1.0)
    rollout = Rollout(prompt, 0, (3,) * tokens, minus_one, "stop", 0, "")
    scored = ScoredRollout(rollout, minus_one, {"expert": minus_one}, {}, None)
    return RewardedRollout(scored, torch.ones(tokens), minus_one, {"expert": 1.0, "anti": 0.0}, correct)


@pytest.mark.parametrize(
    ("domains", "present", "named"),
    [(("a",), "aa", set()), (("a", "b"), "ab", {"a", "b"}), (("a", "b", "c"), "ab", {"a", "b"})],
)
def test_domains_are_told_apart_only_where_there_are_several_and_they_have_samples(
    tiny, tmp_path, monkeypatch, domains, present, named
):
    monkeypatch.setattr(metrics, "_loss_metrics", lambda *_: {})
    items = [rewarded(domain, tokens, tokens == 1) for domain, tokens in zip(present, (1, 3), strict=True)]
    old = [item.ref_logprob for item in items]
    update = UpdateResult({}, {}, old, grad_norm=0.0, lr=0.0, skipped=0, skipped_in_a_row=0, weights_finite=True)
    config = validate(tiny.tree(tmp_path), Config)
    row = metrics.step_metrics(config, World(0, 1, torch.device("cpu")), domains, items, [], update)
    assert {name.rpartition("/")[2] for name in row if name.startswith("rollout/accuracy/")} == named
    assert row["rollout/accuracy"] == 0.5 and row["reward/advantage_mean"] == 1.0
    if named:
        assert [row[f"batch/token_share/{name}"] for name in "ab"] == [0.25, 0.75]
        assert [row[f"rollout/accuracy/{name}"] for name in "ab"] == [1.0, 0.0]
        assert all(math.isfinite(value) for name, value in row.items() if name.endswith(("/a", "/b", "/c")))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"even": 1, "od": 1},
            "domain_weights.od: no training prompt has this domain; domains are even, odd; did you",
        ),
        ({"even": 1}, "the domain 'odd', which has no weight; add one (0 leaves the domain out)"),
        ({"even": 0, "odd": 0}, "data.domain_weights: every weight is 0"),
        ({"even": -1, "odd": 1}, "data.domain_weights.even: Input should be greater than or equal to 0"),
        ({}, "data.domain_weights: Dictionary should have at least 1 item"),
    ],
)
def test_weights_that_cannot_work_are_refused_before_anything_starts(tiny, tmp_path, capsys, weights, message):
    config = write_config(tmp_path / "c.yaml", tiny.tree(tmp_path / "run", data={"domain_weights": weights}))
    assert main(["train", "--config", str(config)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


# --- forgetting ---


def record(step: int, mean: float, **other) -> dict:
    return {"step": step, "set": "s", "temperature": 1.0, "k": 4, "mean_at_k": mean, **other}


def test_change_and_forgetting_by_hand():
    past = [record(0, 0.5), record(10, 0.75), record(20, 0.625)]
    assert accuracy_change(record(30, 0.25), past) == {"change": -0.25, "forgetting": 0.5}
    assert accuracy_change(record(30, 1.0), past) == {"change": 0.5, "forgetting": 0.0}
    assert accuracy_change(record(0, 0.5), []) == {"change": 0.0, "forgetting": 0.0}
    assert accuracy_change(record(30, 0.25), past[1:]) == {"change": None, "forgetting": 0.5}


def test_only_evaluations_of_one_kind_are_compared():
    others = [record(0, 0.9, set="t"), record(0, 0.9, temperature=0.7), record(0, 0.9, k=8)]
    assert accuracy_change(record(10, 0.5), others) == {"change": None, "forgetting": 0.0}


def test_the_progress_line_says_what_was_gained_and_lost():
    past = [record(0, 0.5), record(10, 0.75)]
    after, before = (record(step, 0.25) for step in (20, 0))
    assert format_eval(after | accuracy_change(after, past)) == (
        "eval at step 20  s  mean@4 0.250  change -0.250  forgotten 0.500"
    )
    assert format_eval(before | accuracy_change(before, [])) == "eval at step 0  s  mean@4 0.250"
    assert format_eval(after | accuracy_change(after, [])) == "eval at step 20  s  mean@4 0.250  forgotten 0.000"


def test_the_report_shows_both_domains(finished):
    run_dir = finished[0]
    rows = {row["set"]: row for row in summary_table([run_dir])}
    for domain, row in rows.items():
        last = [record for record in lines(run_dir / "eval.jsonl") if record["set"] == domain][-1]
        assert (row["change"], row["forgetting"]) == (last["change"], last["forgetting"])
    table = format_table(list(rows.values()))
    assert "change, points" in table and "forgotten, points" in table
    assert f"{100 * rows['even']['change']:+.1f}".replace("-", "−") in table
    page = write_report([run_dir], run_dir / "report.html").read_text()
    for title in ("Rollout accuracy, domain even", "Reward r, domain odd", "Evaluation: odd", "even 3.0, odd 1.0"):
        assert title in page, title
    assert "Rollout version" not in page


# --- the miniature's configuration ---


def test_the_miniature_trains_both_domains_on_their_experts():
    inputs = read_inputs(load_config(multitask_plan.CONFIG))
    assert inputs.domains == ("largest", "math") and len(inputs.prompts) == 2 * 4096
    assert {name: prompts[0].domain for name, prompts in inputs.eval_sets.items()} == {
        "heldout": "math",
        "heldout_largest": "largest",
    }


def test_rows_resolve_to_the_stated_objectives():
    """own on a domain's own expert, other on the other's; equal shares of the trained domains."""
    assert len({row.key for row in ROWS}) == len(ROWS) == 8
    for row in ROWS:
        config = load_config(multitask_plan.CONFIG, [*multitask_plan.shared_overrides(20, 32), *row.overrides()])
        assert config.lambdas_for("math") == {"math_expert": row.own, "largest_expert": row.other}
        assert config.lambdas_for("largest") == {"largest_expert": row.own, "math_expert": row.other}
        assert config.data.domain_weights == {domain: float(domain in row.domains) for domain in SETS}
        # A row without its own normalizer must be the same objective under either.
        assert (row.normalizer is None) == (row.other == 0)
        assert row.normalizer in (None, config.objective.normalizer)
        assert [(source.path, source.limit) for source in config.eval.data] == [(path, 32) for path in SETS.values()]
    assert (
        load_config(multitask_plan.CONFIG).lambda_tables()
        == load_config(multitask_plan.CONFIG, ROWS[0].overrides()).lambda_tables()
    ), "the file as it is written is MOPD"


# --- the bench table, from made-up results ---

BENCH_STEPS = 20
ENVIRONMENT = {
    "git_sha": "a" * 40,
    "device": "CPU: test",
    "threads": 1,
    "versions": {"python": "3.11", "torch": "2.13"},
}


def made_up_final(rng: np.random.Generator) -> dict:
    return {
        domain: {
            name: {
                "mean_at_k": float(rng.uniform(0.4, 0.8)),
                "standard_error": 0.01,
                "problems": 512,
                "response_length_mean": float(rng.uniform(8, 12)),
            }
            for name in FINAL
        }
        for domain in SETS
    }


def finish(job, rng: np.random.Generator, final: bool = True) -> None:
    """Leave what a finished run leaves, with made-up numbers."""
    checkpoint = job.folder / "checkpoints" / f"step_{BENCH_STEPS:06d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").write_text("{}")
    (job.folder / "config.yaml").write_text(f"steps: {BENCH_STEPS}\n")
    (job.folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (job.folder / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "time_s/step": 0.5}}\n' for i in (1, 2)))
    records: list[dict] = []
    for step in (0, 10, BENCH_STEPS):
        for domain in SETS:
            new = record(step, float(rng.uniform(0.4, 0.8)), set=domain, domain=domain)
            new |= {"standard_error": 0.01, "response_length_mean": 9.0, "reverse_kl": {}}
            records.append(new | accuracy_change(new, records))
    (job.folder / "eval.jsonl").write_text("".join(json.dumps(item) + "\n" for item in records))
    if final:
        job.final.write_text(json.dumps({"environment": ENVIRONMENT, "results": made_up_final(rng)}))


def finish_all(out: Path, seeds: int) -> list:
    rng = np.random.default_rng(0)
    runs = plan(out, seeds)
    for job in runs:
        finish(job, rng)
    for name in multitask_plan.BASELINES:
        file = multitask_plan.baseline_file(out, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"environment": ENVIRONMENT, "results": made_up_final(rng)}))
    open_recipe(out, multitask_plan.make_recipe(BENCH_STEPS, None))
    return runs


def test_aggregation_against_numpy(tmp_path):
    records = [multitask.read_run(job) for job in finish_all(tmp_path, 3)]
    rows = {row["row"]: row for row in multitask_report.aggregate(records[::-1], "exopd")}
    assert set(rows) == {row.key for row in ROWS}

    def mean_t1(key: str) -> np.ndarray:
        own = sorted((item for item in records if item["row"] == key), key=lambda item: item["seed"])
        return np.array([np.mean([item["final"][d]["t1"]["mean_at_k"] for d in SETS]) for item in own])

    for key, row in rows.items():
        values = mean_t1(key)
        assert row["metrics"]["mean_t1"]["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert row["metrics"]["mean_t1"]["standard_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(3))
        for name in ("change", "forgetting"):
            last = [item["curve"]["largest"][-1][name] for item in records if item["row"] == key]
            assert row["metrics"][f"largest_{name}"]["mean"] == pytest.approx(np.mean(last))
        if key == "exopd":
            assert row["difference"] == {}
        else:
            paired = values - mean_t1("exopd")
            assert row["difference"]["mean_t1"]["mean"] == pytest.approx(paired.mean())
            assert row["difference"]["mean_t1"]["standard_error"] == pytest.approx(paired.std(ddof=1) / math.sqrt(3))


@pytest.fixture
def doc(tmp_path) -> Path:
    file = tmp_path / "multitask.md"
    file.write_text(f"before\n{multitask_report.BEGIN}\nold\n{multitask_report.END}\nafter\n")
    return file


def words(tmp_path: Path, doc: Path, *more: str) -> list[str]:
    parts = ["--out", str(tmp_path / "out"), "--steps", str(BENCH_STEPS), "--jobs", "2", "--doc", str(doc)]
    return [*parts, "--json", str(tmp_path / "r" / "t.json"), "--figure", str(tmp_path / "r" / "t.svg"), *more]


def test_only_report_writes_json_figure_and_document(tmp_path, doc, capsys):
    finish_all(tmp_path / "out", 2)
    command = words(tmp_path, doc, "--seeds", "2", "--only-report")
    assert multitask.main(command) == 0, capsys.readouterr().err
    first, figure = doc.read_text(), (tmp_path / "r" / "t.svg").read_bytes()
    assert multitask.main(command) == 0
    assert doc.read_text() == first and (tmp_path / "r" / "t.svg").read_bytes() == figure
    assert first.startswith("before\n") and first.endswith("after\n") and "old" not in first

    table = json.loads((tmp_path / "r" / "t.json").read_text())
    assert table["seeds"] == [0, 1] and len(table["runs"]) == 2 * len(ROWS) and table["commits"] == ["a" * 40]
    assert table["command"].startswith("python bench/multitask.py --out ") and "--only-report" not in table["command"]
    assert {"train_largest", "heldout_largest", "largest_expert"} <= set(table["recipe"]["sha256"])
    shown = [line for line in first.splitlines() if line.startswith("|")]
    assert len(shown) == 4 + len(multitask_plan.BASELINES) + 2 * len(ROWS)
    row = next(row for row in table["rows"] if row["row"] == "contrast_0.5_active")
    for name in ("math_t1", "largest_greedy", "mean_t1", "math_forgetting"):
        entry = row["metrics"][name]
        assert f"{100 * entry['mean']:.1f} ± {100 * entry['standard_error']:.1f}" in first, name
    assert "| contrast | 1.5 | −0.5 | yes |" in first and "](r/t.svg)" in first and "(r/t.json)" in first


def test_missing_results_and_markers_are_named(tmp_path, doc, capsys):
    runs = finish_all(tmp_path / "out", 1)
    runs[-1].final.unlink()
    assert multitask.main(words(tmp_path, doc, "--seeds", "1", "--only-report")) == 1
    assert f"missing: {runs[-1].name}" in capsys.readouterr().err and "old" in doc.read_text()
    doc.write_text("nothing")
    assert multitask.main(words(tmp_path, doc, "--seeds", "1", "--only-report")) == 2
    assert "multitask:begin" in capsys.readouterr().err


def test_only_unfinished_runs_are_started(tmp_path, monkeypatch):
    runs = finish_all(tmp_path, 1)
    fresh = runs[2]
    for name in ("config.yaml", "final.json"):
        (fresh.folder / name).unlink()
    started: list[list[str]] = []

    class Launcher:
        def __call__(self, command, log):
            started.append(list(command))
            finish(fresh, np.random.default_rng(1), final=False)
            return 0

        def stop(self):
            pass

    evaluated: list[str] = []
    monkeypatch.setattr(multitask, "Launcher", Launcher)
    monkeypatch.setattr(multitask, "run_evaluations", lambda jobs, *_: evaluated.extend(j.name for j in jobs) or {})
    assert multitask.make_all(tmp_path, runs, BENCH_STEPS, None, 1) == {}
    [command] = started
    assert command[command.index("--config") + 1] == str(multitask_plan.CONFIG)
    assert f"run_dir={fresh.folder}" in command and "objective.lambdas.math.largest_expert=-0.5" in command
    assert evaluated == [*multitask_plan.BASELINES, *(job.name for job in runs)]


def test_the_document_shows_a_valid_configuration_and_has_a_place_for_the_table(tiny, tmp_path):
    example = yaml.safe_load(multitask.DOC.read_text().split("```yaml\n")[1].split("```")[0])
    teachers = {f"{domain}_teacher": {"path": "x"} for domain in ("math", "code")}
    config = validate({**tiny.tree(tmp_path), "teachers": teachers, **example}, Config)
    assert config.lambdas_for("code") == {"math_teacher": 0.0, "code_teacher": 1.25}
    assert check_markers(multitask.DOC, multitask_report.BEGIN, multitask_report.END)
    with pytest.raises(UserError, match="multitask:begin"):
        check_markers(ROOT / "docs" / "metrics.md", multitask_report.BEGIN, multitask_report.END)
