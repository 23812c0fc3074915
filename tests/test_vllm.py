"""The vLLM engine against a float32 Hugging Face forward, on a CPU, with two ranks.

The engines run in two processes of vllm_ranks.py, which record what they saw; the tests judge it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_ranks
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm_ranks import MAX_MODEL_LEN, MAX_POSITIONS, PADDING, RANKS, SECOND_EOS, UNTIED_VOCABULARY, prompts_of

from tcopd_fast.errors import UserError
from tcopd_fast.miniature.tokenizer import make_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the package vllm"),
]

TOLERANCE = 1e-4


def make_model(seed: int, tied: bool) -> Qwen3ForCausalLM:
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer) + PADDING,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=tied,
            initializer_range=0.15,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return model.eval()


def save_student(model: Qwen3ForCausalLM, folder: Path) -> None:
    """A checkpoint whose generation config, if obeyed, would visibly change the distribution."""
    tokenizer = make_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    traps: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.3,
        "top_k": 2,
        "top_p": 0.5,
        "repetition_penalty": 1.5,
    }
    traps["eos_token_id"] = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(SECOND_EOS)]
    (folder / "generation_config.json").write_text(json.dumps(traps))


def named_weights(model: Qwen3ForCausalLM) -> dict[str, torch.Tensor]:
    """What a learner with tied embeddings sends: every parameter once, lm_head only when it is its own."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def models() -> dict[str, Qwen3ForCausalLM]:
    return {
        "tied": make_model(0, tied=True),
        "perturbed": make_model(1, tied=True),
        "untied": make_model(2, tied=False),
        "untied_perturbed": make_model(3, tied=False),
    }


@pytest.fixture(scope="module")
def seen(models: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank's worker recorded."""
    folder = tmp_path_factory.mktemp("vllm")
    save_student(models["tied"], folder / "tied")
    save_student(models["untied"], folder / "untied")
    for name in ("perturbed", "untied_perturbed"):
        save_file(named_weights(models[name]), folder / f"{name}.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    workers = [
        subprocess.Popen(
            [sys.executable, vllm_ranks.__file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in workers]
    finally:
        for process in workers:
            process.kill()
    for process, output in zip(workers, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(RANKS)]


def largest_error(
    model: Qwen3ForCausalLM, rank: int, records: list[Any], temperature: float, vocab_size: int | None = None
) -> float:
    """Largest difference of the engine's logprob from log softmax(logits / temperature), over all tokens."""
    prompts = {prompt.id: prompt for prompt in prompts_of(rank)}
    worst = 0.0
    for record in records:
        prompt_ids = prompts[record["prompt_id"]].token_ids
        ids = torch.tensor([[*prompt_ids, *record["token_ids"]]])
        with torch.no_grad():
            logits_LV = model(ids).logits[0, len(prompt_ids) - 1 : -1, :vocab_size]
        expected = (logits_LV / temperature).log_softmax(-1).gather(1, ids[0, len(prompt_ids) :, None])[:, 0]
        assert len(record["logprobs"]) == len(record["token_ids"]) > 0
        worst = max(worst, float((expected - torch.tensor(record["logprobs"])).abs().max()))
    return worst


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize(("name", "temperature"), [("t1", 1.0), ("t07", 0.7), ("greedy", 1.0)])
def test_logprobs_are_those_of_the_model(seen: Any, models: Any, rank: int, name: str, temperature: float) -> None:
    records = seen[rank][name]
    assert largest_error(models["tied"], rank, records, temperature) < TOLERANCE
    assert {record["dtype"] for record in records} == {"torch.float32"}
    assert {record["version"] for record in records} == {0}


def test_logprobs_at_another_temperature_differ(seen: Any, models: Any) -> None:
    assert largest_error(models["tied"], 0, seen[0]["t07"], 1.0) > 0.1


def test_greedy_takes_the_most_likely_token(seen: Any, models: Any) -> None:
    for record, prompt in zip(seen[0]["greedy"], [p for p in prompts_of(0) for _ in range(2)], strict=True):
        ids = torch.tensor([[*prompt.token_ids, *record["token_ids"]]])
        with torch.no_grad():
            best = models["tied"](ids).logits[0, len(prompt.token_ids) - 1 : -1].argmax(-1)
        assert best.tolist() == record["token_ids"]


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize(
    ("name", "old", "new", "version", "vocab_size"),
    [
        ("synced", "tied", "perturbed", 3, None),
        ("synced_with_head", "tied", "perturbed", 4, None),
        ("untied_synced", "untied", "untied_perturbed", 1, UNTIED_VOCABULARY),
    ],
)
def test_weight_sync_reaches_every_layer(
    seen: Any, models: Any, rank: int, name: str, old: str, new: str, version: int, vocab_size: int | None
) -> None:
    records = seen[rank][name]
    assert largest_error(models[new], rank, records, 1.0, vocab_size) < TOLERANCE
    assert largest_error(models[old], rank, records, 1.0, vocab_size) > 0.1
    assert {record["version"] for record in records} == {version}


@pytest.mark.parametrize("rank", range(RANKS))
def test_second_engine_in_the_same_process(seen: Any, models: Any, rank: int) -> None:
    assert largest_error(models["untied"], rank, seen[rank]["untied"], 1.0, UNTIED_VOCABULARY) < TOLERANCE
    assert seen[rank]["group_sum"] == RANKS * (RANKS + 1) // 2


@pytest.mark.parametrize("rank", range(RANKS))
def test_vocabulary_is_cut_only_on_request(seen: Any, models: Any, rank: int) -> None:
    cut = [token for name in ("untied", "untied_synced") for r in seen[rank][name] for token in r["token_ids"]]
    assert max(cut) < UNTIED_VOCABULARY
    assert max(token for record in seen[rank]["t1"] for token in record["token_ids"]) >= UNTIED_VOCABULARY
    assert largest_error(models["untied"], rank, seen[rank]["untied"], 1.0) > 0.1


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells expecting fewer than 5 are merged into one."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def test_sampling_follows_the_distribution(seen: Any, models: Any) -> None:
    """Bound: mean + 5 standard deviations of a χ² with that many degrees of freedom. The same counts break it
    against the distribution at temperature 0.8, so it is sharp enough to see a wrong one."""
    for prompt in prompts_of(0):
        tokens = [r["token_ids"][0] for r in seen[0]["first_token"] if r["prompt_id"] == prompt.id]
        with torch.no_grad():
            logits_V = models["tied"](torch.tensor([prompt.token_ids])).logits[0, -1].double()
        counts = torch.bincount(torch.tensor(tokens), minlength=len(logits_V)).double()
        assert counts.sum() == 2000
        statistic, freedom = chi_square(counts, logits_V.softmax(-1))
        assert freedom >= 5
        bound = freedom + 5 * (2 * freedom) ** 0.5
        assert statistic < bound
        assert chi_square(counts, (logits_V / 0.8).softmax(-1))[0] > bound


@pytest.mark.parametrize("rank", range(RANKS))
def test_finish_reasons_and_end_tokens(seen: Any, rank: int) -> None:
    tokenizer = make_tokenizer()
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(SECOND_EOS)}
    ended_by: set[int] = set()
    for record in seen[rank]["t1"] + seen[rank]["synced"] + seen[rank]["untied"]:
        ids = record["token_ids"]
        assert not ends & set(ids[:-1])
        assert (record["finish_reason"] == "stop") == (ids[-1] in ends)
        if record["finish_reason"] == "stop":
            ended_by.add(ids[-1])
        else:
            assert len(ids) == 20
        assert record["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert ended_by == ends


@pytest.mark.parametrize("rank", range(RANKS))
def test_prompt_major_order(seen: Any, rank: int) -> None:
    expected = [[prompt.id, sample] for prompt in prompts_of(rank) for sample in range(8)]
    assert [[record["prompt_id"], record["sample"]] for record in seen[rank]["t1"]] == expected
    assert sorted(seen[rank]["order"]) == expected
    # Responses that stop early are reported before ones that run to the limit.
    finish = {(r["prompt_id"], r["sample"]): r["finish_reason"] for r in seen[rank]["t1"]}
    reported = [finish[prompt_id, sample] for prompt_id, sample in seen[rank]["order"]]
    assert reported == sorted(reported, key=lambda reason: reason == "length")


@pytest.mark.parametrize("rank", range(RANKS))
def test_seeds(seen: Any, rank: int) -> None:
    def ids(name: str) -> list[list[int]]:
        return [record["token_ids"] for record in seen[rank][name]]

    assert seen[rank]["t1"] == seen[rank]["repeat"]
    different = sum(a != b for a, b in zip(ids("t1"), ids("other_seed"), strict=True))
    assert different > 0.9 * len(ids("t1"))
    by_prompt = [ids("t1")[i : i + 8] for i in range(0, len(ids("t1")), 8)]
    assert all(len({tuple(sample) for sample in samples}) > 4 for samples in by_prompt)


@pytest.mark.parametrize("rank", range(RANKS))
def test_errors_are_clear(seen: Any, rank: int) -> None:
    kind, message = seen[rank]["no_group"]
    assert kind == "RuntimeError" and "deepspeed.init_distributed()" in message
    kind, message = seen[rank]["too_wide"]
    assert kind == UserError.__name__ and "max_model_len (1000)" in message and str(MAX_POSITIONS) in message
    kind, message = seen[rank]["too_little_cache"]
    assert kind == UserError.__name__ and "cache" in message
    kind, message = seen[rank]["partial"]
    assert kind == "RuntimeError" and "model.norm.weight" in message
    kind, message = seen[rank]["unknown"]
    assert kind == "ValueError" and "nonsense" in message
    assert seen[rank]["version_after_errors"] == 4


def test_requests_that_vllm_would_alter_are_refused(seen: Any) -> None:
    kind, message = seen[0]["too_long"]
    assert kind == UserError.__name__
    assert "'0-0'" in message and "problems.jsonl" in message and str(MAX_MODEL_LEN) in message
    kind, message = seen[0]["too_cold"]
    assert kind == UserError.__name__ and "temperature=0.001" in message


@pytest.mark.parametrize("rank", range(RANKS))
def test_an_interrupted_call_leaves_nothing_behind(seen: Any, rank: int) -> None:
    assert seen[rank]["interrupted"][0] == "KeyError"
    assert seen[rank]["after_interrupt"] == seen[rank]["synced_with_head"]


@pytest.mark.parametrize("rank", range(RANKS))
def test_the_caller_is_left_as_it_was(seen: Any, rank: int) -> None:
    assert seen[rank]["random_state_kept"]
    assert seen[rank]["environment_kept"]
