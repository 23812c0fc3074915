"""Teachers of placement `server` in a configuration and beside other placements, and `tcopd serve-teacher`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from fake_teacher import assert_right, client, served, serving
from test_models import WORLD, config_for, exact, rollouts
from transformers import AutoModelForCausalLM

from tcopd_fast import serve_teacher
from tcopd_fast.cli import main
from tcopd_fast.errors import UserError
from tcopd_fast.models import check_models
from tcopd_fast.scoring import Scorer

fakes = pytest.fixture(serving)


def test_a_served_teacher_stands_beside_resident_models(tiny, tmp_path, fakes):
    fake = fakes()
    # The path only names the tokenizer: whatever is served there scores, even if the path is the student's.
    config = served(tiny, tmp_path, fake, anti={"path": str(tiny.student), "base": str(tiny.expert)})
    scorer = Scorer(config, check_models(config), WORLD)
    assert {role: scorer.models[key].choice.placement for role, key in scorer.roles.items()} == {
        "reference": "resident", "expert": "resident", "anti": "server", "anti.base": "resident",
    }  # fmt: skip
    assert f"anti: server (teacher at {fake.url})" in scorer.placements()
    fake.requests.clear()
    items = rollouts()
    scored = scorer.score(items, [{"expert": 1.5, "anti": -0.5}, {"expert": 1.5, "anti": 0.0}, {"anti": 1.0}])
    assert_right([scored[0].teacher_logprobs["anti"], scored[2].teacher_logprobs["anti"]], [items[0], items[2]])
    assert "anti" not in scored[1].teacher_logprobs
    sent = [ids for body in fake.asked() for ids in body["prompt"]]
    assert sorted(sent) == sorted([*r.prompt.token_ids, *r.token_ids] for r in (items[0], items[2]))
    expert = AutoModelForCausalLM.from_pretrained(tiny.expert).eval()
    torch.testing.assert_close(
        scored[2].teacher_ref_logprobs["anti"].double(), exact(expert, items[2]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"temperature": 0.7}}, r"rollout\.temperature=0\.7: a server's prompt logprobs .* teachers\.anti"),
        ({"eval": {"data": [{"path": "x.jsonl"}], "temperature": 0.6}}, r"eval\.temperature=0\.6"),
        ({"anti": {"placement": "resident"}}, r"teachers\.anti: placement: server and a section `server`"),
        ({"anti": {"server": None}}, r"teachers\.anti: placement: server and a section `server`"),
        ({"anti": {"dtype": "bfloat16"}}, r"teachers\.anti\.dtype=bfloat16: the server decides"),
        ({"server": {"urls": []}}, r"teachers\.anti\.server\.urls"),
        ({"server": {"urls": ["127.0.0.1:8000"]}}, r"'127.0.0.1:8000'; give base URLs"),
        ({"server": {"urls": ["http://me:pw@host/v1"]}}, r"holds a password; use teachers\.anti\.server\.api_key_env"),
        ({"server": {"urls": ["http://h/v1"], "dedline_s": 3}}, r"server\.dedline_s: unknown key.*deadline_s"),
        ({"server": {"urls": ["http://h/v1"], "deadline_s": 3600}}, r"server\.deadline_s: .* equal to 1500"),
        ({"scoring": {"placement": "server"}}, r"scoring\.placement"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_configuration(tiny, tmp_path, fakes, sections, message):
    fake = fakes()
    with pytest.raises(UserError, match=message) as caught:
        served(tiny, tmp_path, fake, **sections)
    assert "me:pw" not in str(caught.value)
    assert not fake.requests


def test_another_temperature_never_reaches_the_server(fakes):
    with pytest.raises(UserError, match=r"temperature 0\.7: .* at temperature 1 only"):
        client(fakes()).score(rollouts(), 0.7)


def test_serve_teacher_becomes_vllm_with_these_flags(tiny, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(serve_teacher.os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(serve_teacher.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(serve_teacher.torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    words = ["serve-teacher", str(tiny.expert), "--port", "8123", "--max-model-len", "129"]
    assert not main([*words, "--vllm=--max-num-seqs 4 --max-logprobs 2"])
    ((program, command, environment),) = calls
    assert command[:3] == [program, "-m", "vllm.entrypoints.openai.api_server"]
    options = command[3:]
    pairs = dict(pairwise(options))
    assert pairs["--model"] == str(tiny.expert) and pairs["--host"] == "127.0.0.1" and pairs["--port"] == "8123"
    assert pairs["--generation-config"] == "vllm" and pairs["--max-num-batched-tokens"] == "2048"
    assert pairs["--dtype"] == "float32" and pairs["--max-model-len"] == "129"
    assert options[-4:] == ["--max-num-seqs", "4", "--max-logprobs", "2"]
    assert environment["TORCHDYNAMO_DISABLE"] == "1" and environment["VLLM_LOGGING_LEVEL"] == "INFO"
    out = capsys.readouterr().out
    assert 'server: {urls: ["http://127.0.0.1:8123/v1"]}' in out and "only processes of this machine" in out

    monkeypatch.setenv("VLLM_API_KEY", "k3y")
    main([*words, "--host", "0.0.0.0"])
    out = capsys.readouterr().out
    assert "whoever reaches port 8123" in out and "api_key_env: VLLM_API_KEY" in out and "k3y" not in out
    assert "k3y" not in " ".join(calls[1][1])


def test_the_printed_line_is_valid_configuration(tiny, tmp_path):
    import yaml

    service = serve_teacher.Service(str(tiny.anti), "::1", 8000, "teacher", None, None, 2048, False, "")
    (teacher,) = yaml.safe_load(serve_teacher.config_line(service, keyed=True)).values()
    config = config_for(tiny, tmp_path, teachers={"expert": {"path": str(tiny.expert)}, "anti": teacher})
    assert config.teachers["anti"].server.urls == ["http://[::1]:8000/v1"]


def test_serve_teacher_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve_teacher.importlib.util, "find_spec", lambda name: object())
    assert main(["serve-teacher", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
