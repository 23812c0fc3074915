from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tcopd_fast.config import Config
from tcopd_fast.config_io import config_help, dump_config, load_config, validate
from tcopd_fast.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def tree(**sections) -> dict:
    base = {
        "run_dir": "r",
        "steps": 3,
        "model": {"path": "m", "dtype": "float32"},
        "teachers": {"expert": {"path": "a"}, "anti": {"path": "b"}},
        "data": {"train": [{"path": "x.jsonl"}]},
        "objective": {"lambdas": {"expert": 1.5, "anti": -0.5}},
    }
    return {**base, **sections}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lerner": {}}, "lerner: unknown key; did you mean learner?"),
        ({"learner": {"zero_stge": 2}}, "learner.zero_stge: unknown key; did you mean zero_stage?"),
        (
            {"teachers": {"expert": {"path": "a", "dtpe": "x"}}},
            "teachers.expert.dtpe: unknown key; did you mean dtype?",
        ),
        ({"data": {"train": [{"path": "x", "splt": "t"}]}}, "data.train.0.splt: unknown key; did you mean split?"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
        ({"steps": 0}, "steps: Input should be greater than 0"),
        ({"learner": {"zero_stage": 4}}, "learner.zero_stage: Input should be less than or equal to 3"),
        ({"rollout": {"engine": "vlm"}}, "rollout.engine: Input should be 'hf' or 'vllm'"),
        (
            {"objective": {"lambdas": {"exprt": 1.5}}},
            "objective.lambdas.exprt: no such teacher; teachers are anti, expert; did you mean expert?",
        ),
        ({"objective": {"lambdas": {"expert": 0}}}, "every coefficient is 0"),
        (
            {"objective": {"lambdas": {"expert": 1, "math": {"anti": 1}}}},
            "objective.lambdas: give a number per teacher",
        ),
        ({"learner": {"minibatches": 200}}, "learner.minibatches=200 exceeds rollout.prompts_per_step=128"),
        ({"model": {"dtype": "float32"}}, "model.path: required, not set"),
        ({"objective": {"lambdas": {"expert": float("nan")}}}, "objective.lambdas"),
        ({"learner": {"lr": float("inf")}}, "learner.lr: Input should be a finite number"),
        ({"learner": {"betas": [0.9, 1.5]}}, "learner.betas.1: Input should be less than 1"),
        ({"objective": {"lambdas": {"expert": 1}, "clip_low": 1.0}}, "objective.clip_low: Input should be less than 1"),
        ({"rollout": {"engine": "vllm", "temperature": 3}}, "the vllm engine samples between 0.01 and 2"),
        ({"teachers": {"reference": {"path": "a"}, "expert": {"path": "a"}, "anti": {"path": "b"}}}, "not `reference`"),
        ({"teachers": {"a/b": {"path": "a"}, "expert": {"path": "a"}, "anti": {"path": "b"}}}, "teachers.a/b: name"),
    ],
)
def test_bad_keys_and_combinations_are_named(change, expected):
    with pytest.raises(UserError) as caught:
        validate(tree(**change), Config)
    assert expected in str(caught.value)


def test_every_problem_is_reported_at_once():
    with pytest.raises(UserError) as caught:
        validate(tree(steps="x", seed="y", sed=1), Config)
    assert len(str(caught.value).splitlines()) == 4


def test_overrides_reach_lambdas_and_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree()))
    config = load_config(file, ["objective.lambdas.anti=-1.5", "learner.lr=3e-4"])
    assert config.lambdas_for("any") == {"expert": 1.5, "anti": -1.5}
    assert config.learner.lr == 3e-4


def test_per_domain_lambdas_are_zero_where_the_table_is_silent():
    config = validate(
        tree(objective={"lambdas": {"math": {"expert": 1.5, "anti": -0.5}, "code": {"anti": 1.0}}}), Config
    )
    assert config.lambdas_for("code") == {"expert": 0.0, "anti": 1.0}


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "run_dir: ${nothing}"])
def test_a_broken_file_is_one_message(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError):
        load_config(file)


def test_a_missing_file_and_a_bad_override_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: not found"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match=r"write key\.path=value"):
        load_config(None, ["learner.lr"])


def test_the_dumped_configuration_loads_to_the_same(tmp_path):
    config = validate(tree(), Config)
    file = tmp_path / "c.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_help_documents_every_key():
    text = config_help()
    for key in ("learner.zero_stage", "objective.lambdas", "rollout.vllm.enforce_eager", "data.prompt_suffix"):
        assert f"  {key}  (" in text
    for block in re.split(r"\n  (?=\S)", text)[1:]:
        assert len(block.split("\n", 1)[1].strip()) > 5, block


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_are_valid(path):
    overrides = ["rollout.engine=hf"]  # vLLM is an extra that need not be installed here
    assert load_config(path, overrides).steps > 0


def test_engines_of_their_own_need_gpus_of_their_own(monkeypatch):
    from tcopd_fast.inputs import read_inputs

    words = ["rollout.engine=vllm", "rollout.vllm.mode=server"]
    config = load_config(ROOT / "configs" / "miniature.yaml", words)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match=r"rollout\.vllm\.server\.gpus: not set; name the GPUs"):
        read_inputs(config)
