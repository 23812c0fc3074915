"""Limits of responses by the length of their prompt."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from running import learning, lines, run, write_config

from tcopd_fast.config import Config
from tcopd_fast.config_sections import LengthBucket, RolloutConfig
from tcopd_fast.inputs import bucket_limit, prompts_of_step, read_inputs
from tcopd_fast.models import load_tokenizer
from tcopd_fast.rollout.hf import HfEngine
from tcopd_fast.types import Prompt

BUCKETS = [LengthBucket(max_prompt_tokens=4, max_new_tokens=3), LengthBucket(max_prompt_tokens=8, max_new_tokens=6)]


@pytest.mark.parametrize(("tokens", "limit"), [(1, 3), (4, 3), (5, 6), (8, 6), (9, None)])
def test_the_first_bucket_that_holds_a_prompt_limits_its_responses(tokens, limit):
    assert bucket_limit(tokens, BUCKETS) == limit


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([(8, 4), (8, 6)], "rollout.length_buckets[1].max_prompt_tokens=8: not above the bucket before; sort them"),
        ([(8, 40)], "rollout.length_buckets[0].max_new_tokens=40 exceeds rollout.max_new_tokens=12; raise that"),
    ],
)
def test_buckets_that_make_no_sense_are_refused(tiny, tmp_path, buckets, message):
    rows = [{"max_prompt_tokens": p, "max_new_tokens": n} for p, n in buckets]
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**tiny.tree(tmp_path, rollout={"length_buckets": rows}))


def test_the_hf_engine_keeps_to_each_prompts_limit(tiny):
    engine = HfEngine(
        str(tiny.student), load_tokenizer(str(tiny.student)),
        dtype="float32", max_batch_size=64, vocab_size=None, device=torch.device("cpu"),
    )  # fmt: skip
    prompts = [Prompt(str(i), "d", (3 + i % 9, 13), "", None, "test") for i in range(12)]
    limits = [1, 2, 3, 4, None, 40]
    limited = [replace(p, max_new_tokens=limits[i % 6]) for i, p in enumerate(prompts)]
    finished = []
    options = {"samples": 4, "max_new_tokens": 12, "temperature": 1.0, "seed": 5}
    got = engine.generate(limited, on_finished=finished.append, **options)
    free = engine.generate(prompts, **options)
    assert len(finished) == len(got) == 48
    for short, long in zip(got, free, strict=True):
        most = min(12, short.prompt.max_new_tokens or 12)
        assert short.token_ids == long.token_ids[:most]
        cut = len(long.token_ids) > most or long.finish_reason == "length"
        assert short.finish_reason == ("length" if cut else "stop")
        torch.testing.assert_close(short.logprobs, long.logprobs[:most], rtol=0, atol=1e-5)
    assert {len(r.token_ids) for r in free} - {1, 2, 3, 4}


def test_a_run_limits_responses_but_not_its_evaluation(tiny, tmp_path):
    buckets = [{"max_prompt_tokens": 4, "max_new_tokens": 2}]
    tree = tiny.tree(
        tmp_path / "run", rollout={"length_buckets": buckets}, eval={"data": [{"path": str(tiny.prompts)}]}
    )
    config = Config(**tree)
    inputs = read_inputs(config)
    prompts = prompts_of_step(config, inputs, 0)
    assert {p.max_new_tokens for p in prompts} == {2, None}
    assert all((p.max_new_tokens == 2) == (len(p.token_ids) <= 4) for p in prompts)
    assert all(p.max_new_tokens is None for group in inputs.eval_sets.values() for p in group)
    run(["--config", str(write_config(tmp_path / "c.yaml", tree))])
    rows = [learning(row) for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert rows[0]["rollout/response_length_mean"] <= 2 + 10 * sum(p.max_new_tokens is None for p in prompts) / 8
    assert lines(tmp_path / "run" / "eval.jsonl")[0]["response_length_mean"] > 2


def test_a_partial_batch_needs_room_in_the_bound():
    with pytest.raises(ValueError, match="less than 1"):
        RolloutConfig(partial_share=1.0)
