"""Settings that other trainers have and this one refuses, with the reason, before anything starts."""

from __future__ import annotations

import re

import pytest
from test_config import tree

from tcopd_fast.config import ELSEWHERE, Config, EvalRunConfig
from tcopd_fast.config_io import validate
from tcopd_fast.errors import UserError
from tcopd_fast.refusals import SERVER_OPTIONS, check_server_options

KEYS = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("section", ["rollout", "rollout.vllm", "rollout.vllm.server", "eval"])
def test_what_bends_the_distribution_is_refused_with_the_reason(section, key):
    inner: dict = {key: 0.9}
    for part in reversed(section.split(".")):
        inner = {part: inner}
    with pytest.raises(UserError) as caught:
        validate(tree(**inner), Config)
    assert f"{section}.{key}: not offered: sampling with it follows another distribution" in str(caught.value)


def test_the_same_keys_elsewhere_and_typing_errors_are_unknown_keys():
    with pytest.raises(UserError, match=r"learner\.top_p: unknown key"):
        validate(tree(learner={"top_p": 0.9}), Config)
    with pytest.raises(UserError, match=r"rollout\.temprature: unknown key; did you mean temperature\?"):
        validate(tree(rollout={"temprature": 0.9}), Config)
    with pytest.raises(UserError, match=r"rollout\.top_p: not offered"):
        validate({"model": {"path": "m"}, "data": {"train": [{"path": "x"}]}, "rollout": {"top_p": 0.9}}, EvalRunConfig)


@pytest.mark.parametrize("form", ["--{}", "--{}=x", "--{}.key x", "--no-{}", "--max-num-seqs 4 --{} x"])
def test_every_refused_option_is_found_in_every_form(form):
    for name in SERVER_OPTIONS:
        for spelling in (name, name.replace("-", "_")):
            with pytest.raises(ValueError, match=r"rollout\.vllm\.server\.options: --.* is refused: "):
                check_server_options(form.format(spelling))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--gener auto", "the sampler would differ from the policy"),
        ("--logprobs-mode=raw_logprobs", "those of the distribution that was sampled from"),
        ("-q fp8", "weights arrive from the learner as they are"),
        ("-qfp8", "weights arrive from the learner as they are"),
        ("-tp=2", "set rollout.vllm.server.tensor_parallel_size"),
        ('--speculative_config \'{"method": "ngram"}\'', "speculative decoding has not been checked here"),
        ("--host 0.0.0.0", "the trainer talks to its engines over plain HTTP"),
        ("--config more.yaml", "a file could set any other refused option"),
        ("--dtype float16", "set model.dtype"),
        ("--max-num-batched-tokens 512 --enable-prefix-caching --watermark 0.1 -O1 -cc.mode=0", None),
        ("--kv-cache-dtype fp8 --attention-backend FLASH_ATTN --no-async-scheduling", None),
    ],
)
def test_options_of_vllms_server(options, reason):
    given = tree(rollout={"vllm": {"server": {"options": options}}})
    if reason is None:
        assert validate(given, Config).rollout.vllm.server.options == options
        return
    with pytest.raises(UserError) as caught:
        validate(given, Config)
    assert reason in str(caught.value) and options.split()[0].split("=")[0] in str(caught.value)


def test_options_that_are_no_words_are_refused():
    with pytest.raises(ValueError, match=r"cannot be split into words \(No closing quotation\)"):
        check_server_options("--x 'y")


SERVED = {"path": "a", "placement": "server", "server": {"urls": ["http://h/v1"], "deadline_s": 100}}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"teachers": {"expert": SERVED, "anti": {"path": "b"}}}, "teachers.expert.server.deadline_s=100"),
        ({"reference": SERVED}, "reference.server.deadline_s=100"),
        (
            {"rollout": {"engine": "vllm", "vllm": {"mode": "server", "server": {"start_timeout_s": 1}}}},
            "rollout.vllm.server.request_timeout_s=1800",
        ),
        (
            {"rollout": {"engine": "vllm", "vllm": {"mode": "server", "server": {"request_timeout_s": 1}}}},
            "rollout.vllm.server.start_timeout_s=900",
        ),
    ],
)
def test_a_wait_that_the_other_ranks_would_not_sit_out_is_refused(change, key):
    with pytest.raises(
        UserError, match=re.escape(f"learner.rank_timeout_s=99.5 is below {key}: the other ranks would")
    ):
        validate(tree(learner={"rank_timeout_s": 99.5}, **change), Config, ELSEWHERE)
    validate(tree(learner={"rank_timeout_s": 1800}, **change), Config, ELSEWHERE)
    validate(tree(learner={"rank_timeout_s": 99.5}), Config, ELSEWHERE)
