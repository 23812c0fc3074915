"""Numbers that are not finite, from a model, a gradient or an update."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from forked import end_all, run_forked
from interrupted import config_of
from running import lines

from tcopd_fast.checkpoints import checkpoint_dir, checkpoint_steps
from tcopd_fast.diagnosis import in_words, keys_to_look_at, non_finite
from tcopd_fast.types import Prompt, RewardedRollout, Rollout, ScoredRollout


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    end_all()


def test_nan_from_a_teacher_skips_steps_and_ends_with_a_diagnosis(tiny, tmp_path):
    """Every ZeRO stage in both dtypes: no weight moves, and the message names the teacher."""
    broken = tmp_path / "broken"
    damage(tiny.expert, broken)
    for dtype, stage in product(("float32", "bfloat16"), (1, 2, 3)):
        run_dir = tmp_path / f"{dtype}-{stage}"
        words = config_of(
            tiny,
            run_dir,
            steps=9,
            model={"dtype": dtype},
            teachers={"expert": {"path": str(broken)}, "anti": {"path": str(tiny.anti)}},
            learner={"zero_stage": stage, "max_skipped_steps": 3},
            eval={"data": []},
        )
        text = run_forked(words, tmp_path / f"log-{dtype}-{stage}", status=2)
        assert "3 optimizer steps in a row had a gradient that is not finite: teacher expert gave numbers" in text
        assert [row["learner/skipped_steps"] for row in lines(run_dir / "metrics.jsonl")] == [1, 1, 1]
        assert checkpoint_steps(run_dir) == [1, 2], "the step that ended the run must not be saved"
        record = json.loads((run_dir / "diagnosis.json").read_text())
        assert {r["source"] for r in record["responses"]} == {"teacher expert"} and len(record["responses"]) == 4
        assert record["responses"][0]["tokens"][0] | {"token_id": 0} == {"position": 0, "token_id": 0, "value": "nan"}
        assert record["look_at"]["teachers.expert.path"] == str(broken)
        weights = weights_of(run_dir, stage)
        for name, start in start_weights(tiny).items():
            expected = start.detach().to(getattr(torch, dtype)).to(weights[name].dtype)
            torch.testing.assert_close(weights[name], expected, atol=0, rtol=0)


def rewarded(**broken) -> tuple[RewardedRollout, torch.Tensor]:
    """One response of three tokens; each keyword puts a number into the third token of that source."""

    def values(source: str) -> torch.Tensor:
        return torch.tensor([-1.0, -2.0, broken.get(source, -3.0)])

    prompt = Prompt("p7", "math", (1,), "", "1", "")
    rollout = Rollout(prompt, 0, (4, 5, 6), values("rollout"), "stop", 0, "")
    teachers, bases = {"expert": values("teacher"), "anti": values("fine")}, {"expert": values("base")}
    scored = ScoredRollout(rollout, values("reference"), teachers, bases, None)
    return RewardedRollout(scored, values("reward"), values("reference"), {}, None), values("learner")


@pytest.mark.parametrize(
    ("source", "name", "key"),
    [
        ("rollout", "rollout", "rollout.engine"),
        ("learner", "learner", "learner.lr"),
        ("reference", "reference", "reference"),
        ("teacher", "teacher expert", "teachers.expert.path"),
        ("base", "base of expert", "teachers.expert.base"),
        ("reward", "reward", "objective.logratio_clamp"),
    ],
)
def test_every_source_of_a_number_that_is_not_finite_is_named(source, name, key):
    fine, broken = rewarded(), rewarded(**{source: float("-inf")})
    findings = non_finite(*zip(fine, broken, strict=True))
    token = {"position": 2, "token_id": 6, "value": "-inf"}
    common = {"prompt_id": "p7", "domain": "math", "sample": 0, "count": 1, "tokens": [token]}
    assert findings == [{"source": name, **common}] and key in keys_to_look_at(findings)
    assert in_words(findings) == f"{name} gave numbers that are not finite (1 response, first prompt p7)"


def test_weights_that_overflow_end_the_run_before_they_are_saved(tiny, tmp_path):
    huge = {"lr": 3e38, "weight_decay": 1.0, "betas": [0.0, 0.999], "warmup_steps": 0}
    words = config_of(tiny, tmp_path / "run", learner=huge, eval={"data": []})
    text = run_forked(words, tmp_path / "log", status=2)
    assert "step 1: the optimizer step left weights that are not finite" in text
    assert checkpoint_steps(tmp_path / "run") == []
    assert "learner.lr" in json.loads((tmp_path / "run" / "diagnosis.json").read_text())["look_at"]


def test_a_student_with_weights_that_are_not_finite_is_refused(tiny, tmp_path):
    damage(tiny.student, tmp_path / "broken")
    model = {"path": str(tmp_path / "broken"), "dtype": "float32"}
    text = run_forked(config_of(tiny, tmp_path / "run", model=model), tmp_path / "log", status=2)
    assert "holds weights that are not finite" in text


def damage(source: Path, target: Path) -> None:
    from tiny import make_tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(target)
    make_tokenizer().save_pretrained(target)


def weights_of(run_dir: Path, stage: int) -> dict[str, torch.Tensor]:
    from tcopd_fast.export import checkpoint_weights

    return checkpoint_weights(checkpoint_dir(run_dir, checkpoint_steps(run_dir)[-1]), stage)


def start_weights(tiny) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(tiny.student).named_parameters())
