"""Every placement scores like `resident`, bit for bit, and holds only what it says it holds."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from running import lines, run, write_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_models import CPU, WORLD, config_for, rollouts
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen2Config, Qwen3MoeConfig

from tcopd_fast.cli import main
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.metrics import routing_metrics
from tcopd_fast.models import check_models, load_causal_lm
from tcopd_fast.packing import pack
from tcopd_fast.run import reverse_kl
from tcopd_fast.scoring import Scorer, delta, placement
from tcopd_fast.scoring.streamed import StreamedCausalLM
from tcopd_fast.scoring.weights import CheckpointFolder, MappedWeights
from tcopd_fast.types import RewardedRollout

LAMBDAS = [{"expert": 1.5, "anti": -0.5}] * 3
SHAPE = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
)  # fmt: skip


def scores(config):
    scorer = Scorer(config, check_models(config), WORLD)
    items = scorer.score(rollouts(), LAMBDAS)
    return scorer, [t for item in items for t in (item.ref_logprob, *item.teacher_logprobs.values())]


@pytest.fixture(scope="module")
def rl_delta(tiny, tmp_path_factory):
    """A bfloat16 teacher a small learning rate away from its bfloat16 base, as checkpoint and as delta folder."""
    root = tmp_path_factory.mktemp("rl")
    model = AutoModelForCausalLM.from_pretrained(tiny.student, dtype=torch.bfloat16)
    for name in ("base", "teacher"):
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 3e-5
            parameter.data.copy_((parameter.float() + noise).bfloat16())
    delta.make(str(root / "base"), str(root / "teacher"), root / "delta")
    return root


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offload_scores_equal_resident_scores_bit_for_bit(tiny, tmp_path, dtype):
    def config(place):
        scoring = {"placement": place, "max_tokens_per_forward": 20, "max_tokens_per_trip": 40}
        return config_for(tiny, tmp_path, model={"path": str(tiny.student), "dtype": dtype}, scoring=scoring)

    (resident, expected), (offload, got) = scores(config("resident")), scores(config("offload"))
    assert {m.choice.placement for m in resident.models.values()} == {"resident"}
    assert {m.choice.placement for m in offload.models.values()} == {"offload"}
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(expected) == 9 and not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config, Gemma3TextConfig, Phi3Config])
@pytest.mark.parametrize("tied", [False, True])
def test_streaming_follows_other_architectures(tmp_path, family, tied):
    """Scaled embeddings, two kinds of attention, fused projections, tied and untied heads."""
    torch.manual_seed(0)
    settings = family(**SHAPE, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    options = {"dtype": "float32", "attention": "sdpa", "vocab_size": 37}
    whole = load_causal_lm(str(tmp_path), **options).eval()
    streamed = StreamedCausalLM(str(tmp_path), MappedWeights(tmp_path, torch.float32, CPU), device=CPU, **options)
    batches = [pack([[3, 4, 5], [6]], [[7, 8], [9, 10, 11]]), pack([[20, 20, 20, 20]], [[30]])]
    with torch.inference_mode():
        expected = [whole.logprobs(tokens, temperature=0.7).logprob for tokens in batches]
    got = [out.logprob for out in streamed.logprobs(batches, temperature=0.7)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_trip_loads_every_layer_once_for_all_micro_batches(tiny):
    class Counting(MappedWeights):
        loads = 0

        def load(self, names):
            Counting.loads += any(".layers." in name for name in names)
            return super().load(names)

    source = Counting(tiny.expert, torch.float32, CPU)
    lm = StreamedCausalLM(str(tiny.expert), source, dtype="float32", attention="sdpa", vocab_size=None, device=CPU)
    lm.logprobs([pack([[3, 4]], [[5, 6]])] * 5, temperature=1.0)
    assert Counting.loads == len(lm.layers) == 2


def test_a_checkpoint_under_other_names_cannot_be_streamed(tmp_path):
    """transformers fuses the experts of a mixture while loading; their tensors are stored one by one."""
    settings = Qwen3MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=16)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no tensor 'model.layers.0.mlp.experts.*use placement resident"):
        StreamedCausalLM(
            str(tmp_path), MappedWeights(tmp_path, torch.float32, CPU), dtype="float32", attention="sdpa",
            vocab_size=None, device=CPU,
        )  # fmt: skip


def test_auto_keeps_models_resident_while_they_fit_and_says_why(tiny, tmp_path, monkeypatch):
    size = CheckpointFolder(tiny.student).weights() * 4
    monkeypatch.setattr(placement, "free_memory", lambda device, ranks: int(2.5 * size))
    config = config_for(tiny, tmp_path, scoring={"resident_share": 1.0})
    scorer = Scorer(config, check_models(config), WORLD)
    assert [m.choice.placement for m in scorer.models.values()] == ["resident", "resident", "offload"]
    assert re.search(r"^anti: offload \(.* do not fit the .* left for frozen models\)$", scorer.placements()[2])
    assert scorer.placements()[0].startswith("reference: resident (")


def test_a_placement_per_teacher_overrides_that_of_all(tiny, tmp_path):
    teachers = {"expert": {"path": str(tiny.expert)}, "anti": {"path": str(tiny.anti), "placement": "resident"}}
    config = config_for(tiny, tmp_path, teachers=teachers, scoring={"placement": "offload"})
    scorer = Scorer(config, check_models(config), WORLD)
    found = {role: scorer.models[key].choice.placement for role, key in scorer.roles.items()}
    assert found == {"reference": "offload", "expert": "offload", "anti": "resident"}


def test_a_delta_teacher_scores_like_its_checkpoint_bit_for_bit(tiny, tmp_path, rl_delta, monkeypatch):
    def config(teacher, everyone="auto", **options):
        return config_for(
            tiny,
            tmp_path,
            scoring={"placement": everyone},
            model={"path": str(rl_delta / "base"), "dtype": "bfloat16"},
            teachers={"expert": {"path": str(rl_delta / teacher), **options}, "anti": {"path": str(tiny.anti)}},
        )

    opened = []
    monkeypatch.setattr(MappedWeights, "load", lambda self, names: opened.append(names))
    # With the reference resident and stored in the compute dtype, the base is not read a second time.
    (_, expected), (scorer, got) = scores(config("teacher")), scores(config("delta"))
    assert not opened
    assert scorer.models[scorer.roles["expert"]].choice.placement == "delta"
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not torch.equal(expected[0], expected[1]), "base and teacher must differ"
    monkeypatch.undo()
    _, on_offloaded = scores(config("delta", "offload", placement="delta"))
    assert all(torch.equal(a, b) for a, b in zip(on_offloaded, expected, strict=True))
    _, from_files = scores(config("delta", delta_base=str(rl_delta / "base"), dtype="float32"))
    _, converted = scores(config("teacher", dtype="float32"))
    assert all(torch.equal(a, b) for a, b in zip(from_files, converted, strict=True))
    with pytest.raises(UserError, match=r"delta folder needs placement delta"):
        scores(config("delta", placement="resident"))
    with pytest.raises(UserError, match=r"tcopd delta make"):
        scores(config("teacher", placement="delta"))


def test_small_learning_rates_make_small_deltas(rl_delta):
    whole = sum(t.nbytes for t in load_file(rl_delta / "teacher" / "model.safetensors").values())
    stored = sum(t.nbytes for t in load_file(rl_delta / "delta" / delta.DELTA_FILE).values())
    assert stored < 0.4 * whole


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_every_form_is_lossless(share, dtype):
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(37, 53, generator=generator).to(dtype)
    change = torch.rand(old.shape, generator=generator) < share
    new = torch.where(change, old + 1, old)
    if dtype.is_floating_point and share == 1.0:
        new[0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    form, parts, count = delta._smallest(old, new)
    rebuilt = delta.Rebuilder({f"w:{k}": v for k, v in parts.items()}, {"w": form}).tensor("w", old)
    assert torch.equal(rebuilt.view(torch.uint8), new.view(torch.uint8))
    assert count >= int(change.sum()) and (form == "same") == (share == 0.0)
    assert sum(t.nbytes for t in parts.values()) <= new.nbytes


def test_a_wrong_base_and_a_damaged_delta_are_refused(tiny, tmp_path, rl_delta):
    with pytest.raises(UserError, match=r"made from a base with SHA-256 .* but .*teacher has"):
        delta.check(str(rl_delta / "delta"), str(rl_delta / "teacher"))
    delta.check(str(rl_delta / "delta"), str(rl_delta / "base"))
    file = rl_delta / "delta" / delta.DELTA_FILE
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(":values"))
    tensors[name] = tensors[name] + 1
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / delta.DELTA_FILE, metadata=metadata)
    with pytest.raises(UserError, match=r"rebuilds to SHA-256 .* damaged"):
        delta.check(str(tmp_path / "bad"), str(rl_delta / "base"))


def test_the_command_line_makes_and_checks(tiny, tmp_path, rl_delta, capsys):
    out = tmp_path / "d"
    assert main(["delta", "make", str(rl_delta / "base"), str(rl_delta / "teacher"), str(out)]) == 0
    assert re.search(r"% of the base's .* weights differ; tensors: ", capsys.readouterr().out)
    assert main(["delta", "check", str(out), str(rl_delta / "base")]) == 0
    assert main(["delta", "make", str(rl_delta / "base"), str(rl_delta / "teacher"), str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_what_routing_saved_is_counted_in_tokens_and_distinct_models(tiny, tmp_path):
    """The expert twice: one model. It scores 2 of 3 samples, the anti-expert 1, the reference all."""
    teachers = {
        name: {"path": str(tiny.anti if name == "anti" else tiny.expert)} for name in ("expert", "again", "anti")
    }
    lambdas = {"x": {"expert": 1.0, "again": 0.5}, "y": {"again": 1.0}, "z": {"anti": -0.5}}
    config = config_for(tiny, tmp_path, teachers=teachers, objective={"lambdas": lambdas})
    scorer = Scorer(config, check_models(config), WORLD)
    tables = [config.lambdas_for(domain) for domain in "xyz"]
    items = scorer.score(rollouts((3, 5, 2)), tables)
    rewarded = [
        RewardedRollout(item, torch.zeros(1), torch.zeros(1), table, None)
        for item, table in zip(items, tables, strict=True)
    ]
    found = routing_metrics(config, WORLD, scorer.needs(tables), rewarded)
    # Prompts of 4 tokens and responses of 3, 5 and 2: 22 tokens for each of 3 models, 22 + (7 + 9) + 6 of them scored.
    assert found == {
        "scoring/expert/sample_share": pytest.approx(1 / 3),
        "scoring/again/sample_share": pytest.approx(2 / 3),
        "scoring/anti/sample_share": pytest.approx(1 / 3),
        "scoring/routed_away_share": pytest.approx(1 - 44 / 66),
        "scoring/tokens": 44.0,
        "learner/tokens": 22.0,
    }
    assert scorer.routing(["x", "y", "z"]) == "expert scores x; anti scores z; again scores x, y"
    assert scorer.routing(["x", "y"]) == "expert scores x; anti scores none; again scores every domain"


def test_routing_is_not_told_where_every_teacher_scores_everything(tiny, tmp_path):
    config = config_for(tiny, tmp_path)
    assert Scorer(config, check_models(config), WORLD).routing(["even", "odd"]) is None


@pytest.mark.slow
def test_routing_is_told_and_logged_alike_on_one_and_two_ranks(tiny, tmp_path):
    rows = []
    for size in (1, 2):
        tree = tiny.tree(
            tmp_path / str(size),
            steps=1,
            objective={"lambdas": {"even": {"expert": 1.5}, "odd": {"expert": 1.0, "anti": -0.5}}},
            rollout={"prompts_per_step": 5},
        )
        output = run(["--config", str(write_config(tmp_path / "c.yaml", tree))], size=size)
        assert "routing by λ: anti scores odd; expert scores every domain" in output
        rows.append(lines(tmp_path / str(size) / "metrics.jsonl")[0])
    one, two = ({key: row[key] for key in row if key.endswith(("sample_share", "routed_away_share"))} for row in rows)
    assert one == pytest.approx(two) and len(one) == 3
    assert one["scoring/expert/sample_share"] == 1.0
    assert one["scoring/anti/sample_share"] in (0.2, 0.4, 0.6, 0.8)
    assert 0.0 < one["scoring/routed_away_share"] < 1 / 3


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_offload_says_what_it_pins_on_every_rank_and_whether_there_is_room(tiny, tmp_path, monkeypatch, room):
    """Three models on a GPU machine whose GPU and host have so much free; nothing is loaded."""
    monkeypatch.setattr(placement, "free_memory", lambda device, ranks: 0)
    monkeypatch.setattr(placement, "free_host_memory", lambda ranks: room)
    config = config_for(tiny, tmp_path)
    placer = placement.Placer(config, check_models(config), World(0, 1, torch.device("cuda")))
    spec = config.teachers["expert"]
    if not room:
        with pytest.raises(UserError, match=r"pins 0.00 GiB of host memory for every rank, and 0.00 GiB is left"):
            placer.choose(spec, "float32")
        return
    choice = placer.choose(spec, "float32")
    stored = sum(1 << (t.nbytes - 1).bit_length() for t in load_file(tiny.expert / "model.safetensors").values())
    assert placer.host_budget == room - stored
    assert choice.placement == "offload" and choice.reason.endswith("GiB of pinned host memory for every rank")


def test_a_shared_checkpoint_is_scored_once_in_evaluation(tiny, tmp_path, monkeypatch):
    """Reference and teacher are one checkpoint: two names, one pass."""
    teachers = {"expert": {"path": str(tiny.student)}, "anti": {"path": str(tiny.anti), "base": str(tiny.expert)}}
    config = config_for(tiny, tmp_path, teachers=teachers)
    scorer = Scorer(config, check_models(config), WORLD)
    passes = []
    whole = Scorer.logprobs
    monkeypatch.setattr(Scorer, "logprobs", lambda self, key, *rest: passes.append(key) or whole(self, key, *rest))
    found = reverse_kl(config, SimpleNamespace(scorer=scorer, world=WORLD), rollouts())
    assert list(found) == ["reference", "expert", "anti"] and found["reference"] == found["expert"] != found["anti"]
    assert passes == [scorer.roles["reference"], scorer.roles["anti"]]


PEAK = """
import sys, torch
from tcopd_fast.scoring.streamed import StreamedCausalLM
from tcopd_fast.scoring.weights import MappedWeights
from tcopd_fast.packing import pack
torch.set_num_threads(1)
cpu = torch.device("cpu")
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10
lms = [StreamedCausalLM(p, MappedWeights(p, torch.float32, cpu), dtype="float32", attention="sdpa", vocab_size=None,
                        device=cpu) for p in sys.argv[2:]]
open("/proc/self/clear_refs", "w").write("5")
before = peak()
for lm in lms[: int(sys.argv[1])]:
    lm.logprobs([pack([[3, 4, 5]], [[6, 7]])], temperature=1.0)
print(peak() - before)
"""


def test_offloaded_teachers_take_the_memory_of_a_layer_each_in_turn(tmp_path):
    """Four models of 12 layers cost no more than one, and one far less than its weights."""
    torch.manual_seed(0)
    shape = SHAPE | dict(vocab_size=64, hidden_size=256, intermediate_size=2048, num_hidden_layers=12)
    folders = [tmp_path / str(i) for i in range(4)]
    for folder in folders:
        AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(folder)
    weights = (folders[0] / "model.safetensors").stat().st_size

    def peak(count):
        command = [sys.executable, "-c", PEAK, str(count), *map(str, folders)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    one, four = peak(1), peak(4)
    assert weights > 70 << 20
    assert one < 0.4 * weights
    assert four < one + 0.1 * weights
