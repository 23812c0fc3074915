from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import kernel_bench  # noqa: E402
import kernel_report  # noqa: E402
from kernel_suite import memory, providers, real_inputs, report  # noqa: E402
from kernel_suite.cases import CASES, Case  # noqa: E402
from kernel_suite.inputs import Problem, mixture, peaked_inputs, random_inputs  # noqa: E402
from kernel_suite.measure import GemmFlops, errors_of, exact_provider, first_call, measure_case  # noqa: E402
from tcopd_kernels import linear_logprob  # noqa: E402

CPU = torch.device("cpu")
TINY = Problem("random", 40, 300, 16)
COMPILED = ("compile", "cce_torch_compile")


@pytest.fixture(scope="module")
def inputs():
    return random_inputs(TINY, CPU, teachers=8)


@pytest.fixture(scope="module", autouse=True)
def light_fork_server():
    """The providers whose memory is measured here import nothing that takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "PRELOADED", {})
        yield


@pytest.fixture(scope="module", autouse=True)
def only_here_without_verls_init():
    """Other tests import the real package."""
    before = set(sys.modules)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "verl" and name not in before]:
        del sys.modules[name]


def runnable(name: str) -> providers.Provider:
    reason = providers.reason_not_here(name)
    if reason:
        pytest.skip(reason)
    return providers.PROVIDERS[name]()


@pytest.mark.parametrize("name", providers.PROVIDERS)
def test_every_provider_computes_the_same(name, inputs):
    """Each case that a provider offers here agrees with float64; one that is wrong is not a competitor."""
    provider = runnable(name)
    cases = [case for case in CASES.values() if not isinstance(provider.offer(case), str)]
    if name in COMPILED:
        cases = [case for case in cases if case.name == "logprob_forward_backward"]
    if not cases:
        pytest.skip(provider.offer(CASES["logprob_forward"]))
    for case in cases:
        errors = errors_of(case.run(provider, inputs), case.run(exact_provider(), inputs.double(8)), inputs.targets)
        assert max(errors.values()) < 1e-4, (case.name, errors)


def test_exact_provider_is_the_definition(inputs):
    x = inputs.double(8)
    z = x.hidden @ x.weight.T
    logprob = torch.log_softmax(z, 1).gather(1, x.targets.unsqueeze(1)).squeeze(1)
    assert torch.allclose(CASES["logprob_forward"].run(exact_provider(), x)["logprob"], logprob)
    log_p = torch.log_softmax(z, 1)
    logs = [torch.log_softmax(h @ w.T, 1) for h, w in zip(x.teacher_hiddens, x.teacher_weights)]
    target = sum(a * log for a, log in zip(mixture(2)[1], logs))
    loss = (x.weights * (log_p.exp() * (log_p - target)).sum(1)).sum()
    assert torch.allclose(CASES["full_vocab_2"].run(exact_provider(), x)["loss"], loss)


def test_upstream_gradient_is_per_token(inputs):
    """A backward that took one upstream gradient for all tokens would be told apart."""
    case = CASES["logprob_forward_backward"]
    eager = providers.PROVIDERS["eager"]()
    assert inputs.upstream.std() > 0.5
    right = case.run(eager, inputs)["grad_hidden"]
    leaf = inputs.hidden.clone().requires_grad_()
    (wrong,) = torch.autograd.grad(eager.logprob(leaf, inputs.weight, inputs.targets).sum(), leaf)
    assert (right - wrong).norm() > 0.5 * right.norm()


@pytest.mark.parametrize(
    ("call", "flop"),
    [
        (lambda a, b: a @ b, 2 * 3 * 4 * 5),
        (lambda a, b: torch.mm(a, b, out=torch.empty(3, 5)), 2 * 3 * 4 * 5),
        (lambda a, b: torch.zeros(3, 5).addmm_(a, b), 2 * 3 * 4 * 5),
        (lambda a, b: torch.bmm(a.expand(7, 3, 4), b.expand(7, 4, 5)), 7 * 2 * 3 * 4 * 5),
        (lambda a, b: torch.nn.functional.linear(a, b.T), 2 * 3 * 4 * 5),
        (lambda a, b: a.exp() + b.sum(), 0),
    ],
)
def test_executed_flop_are_counted(call, flop):
    with GemmFlops() as count:
        call(torch.randn(3, 4), torch.randn(4, 5))
    assert count.flop == flop


def test_work_of_a_recomputing_backward(inputs):
    one = 2 * TINY.N * TINY.V * TINY.D
    case = CASES["logprob_forward_backward"]
    exact = case.run(exact_provider(), inputs.double(0))
    work = {
        name: first_call(providers.PROVIDERS[name](), case, inputs, exact, CPU)["executed_flop"] / one
        for name in ("eager", "ours_torch")
    }
    assert work == {"eager": 3, "ours_torch": 4}
    assert [case.gemms for case in CASES.values()] == [1, 3, 3, 1, 3, 1, 2, 4, 8, 4, 6]


def test_rows_of_a_case(inputs):
    def broken(hidden, weight, targets):
        raise RuntimeError("no such shape\nand more")

    made = {
        "eager": providers.PROVIDERS["eager"](),
        "broken": providers.Provider("broken", broken),
        "without": providers.Provider("without"),
    }
    rows = dict(measure_case(CASES["logprob_forward"], made, inputs, rounds=3, device=CPU))
    assert rows["broken"] == {"error": "RuntimeError: no such shape"}
    assert "without" not in rows
    assert rows["gemm"]["ratio"] == 1 and len(rows["eager"]["rounds_s"]) == 3
    assert rows["eager"]["logprob_max_error"] < 1e-5


def test_providers_say_what_they_cannot(monkeypatch):
    monkeypatch.setitem(providers.PROVIDERS, "trl", lambda: 1 / 0)
    monkeypatch.setattr(providers, "installed", lambda name: name != "quack")
    made, offers = providers.make_providers(["eager", "quack", "trl"])
    assert list(made) == ["eager"]
    assert set(offers["eager"]["offers"].values()) == {"runs"}
    assert offers["quack"]["offers"]["mean_forward_backward"] == "the package quack-kernels is not installed"
    assert offers["trl"]["offers"]["logprob_forward"] == "ZeroDivisionError: division by zero"
    monkeypatch.setitem(providers.PROVIDERS, "ours_torch", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        providers.make_providers(["ours_torch"])


def test_peak_memory_is_that_of_the_algorithm(tmp_path):
    """Materialised logits are seen in full, and ours take less; the figure does not depend on earlier calls."""
    problem = Problem("random", 128, 40000, 16)
    case = "logprob_forward"
    work = [("eager", (problem, case)), ("ours_torch", (problem, case))]
    eager, ours = memory.in_fresh_processes(work, tmp_path, CPU)
    assert eager["problem"] == problem and eager["result_bytes"] == 4 * problem.N
    assert 0.9 < eager["extra_bytes"] / eager["theory_extra_bytes"] < 1.2
    assert eager["theory_extra_bytes"] == 8 * problem.N * problem.V
    assert ours["extra_bytes"] < 0.3 * eager["extra_bytes"]


def test_memory_of_a_failing_case_is_reported(tmp_path):
    job = (Problem("real_low", 8, 10, 4), "logprob_forward")
    (row,) = memory.in_fresh_processes([("eager", job)], tmp_path, CPU)
    assert row["memory_error"].startswith("FileNotFoundError") and row["case"] == "logprob_forward"
    (row,) = memory.in_fresh_processes([("eager", job)], tmp_path, CPU, deadline=0.0)
    assert row["memory_skipped"] == "time budget spent"


@pytest.mark.parametrize(("source", "entropy"), [("peaked_low", 0.5), ("peaked_high", 3.0)])
def test_peaked_problems_have_their_entropy(source, entropy):
    x = peaked_inputs(Problem(source, 64, 2000, 32), CPU)
    found = linear_logprob(x.hidden, x.weight, x.targets, entropy=True)
    assert found.entropy.mean().item() == pytest.approx(entropy, abs=0.05)
    assert torch.allclose(found.logprob, x.old_logprob, atol=1e-4)


def test_real_problems_from_a_model(tmp_path, monkeypatch):
    """Hidden states, samples and head of one model belong together."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    seen = []

    def tokenizer(text, add_special_tokens):
        seen.append(add_special_tokens)
        return SimpleNamespace(input_ids=[5, 6, 7])

    monkeypatch.setattr(real_inputs, "_model", lambda folder: (model, tokenizer, {"file": "m", "package": "p"}))
    monkeypatch.setattr(real_inputs, "SEQUENCE_TOKENS", 4)
    monkeypatch.setattr(real_inputs, "SKIPPED", 2)
    assert real_inputs.problems(tmp_path) == []
    about = real_inputs.build(tmp_path, tokens=20)
    assert about["shape"] == [20, 50, 16] and set(about["problems"]) == {"real_low", "real_high"}
    assert seen and not any(seen)  # the BOS token is put first by hand
    for problem in real_inputs.problems(tmp_path):
        x = real_inputs.load(tmp_path, problem, CPU)
        assert x.hidden.shape == (20, 16) and x.weight.shape == (50, 16)
        logprob = torch.log_softmax((x.hidden @ x.weight.T).double(), 1)[torch.arange(20), x.targets]
        assert torch.allclose(logprob.float(), x.old_logprob, atol=1e-5)
        p = about["problems"][problem.source]
        assert p["mean_logprob"] == pytest.approx(logprob.mean().item(), abs=1e-5)
        assert 0 < p["mean_entropy"] <= torch.tensor(50.0).log() + 1e-5


def run_main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["kernel_bench.py", *arguments])
    return kernel_bench.main()


def test_command_line_end_to_end(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "out.json"
    options = "--shapes", "tiny", "--inputs", "random,peaked", "--rounds", "1"
    monkeypatch.setattr(kernel_bench, "MEMORY_CASES", ("logprob_forward_backward",))
    chosen = "--providers", "eager,ours_torch,ours_torch_tol"
    assert run_main(monkeypatch, *options, *chosen, "--json", str(out)) == 0
    data = json.loads(out.read_text())
    assert str(tmp_path) not in data["command"] and data["command"].endswith("--json out.json")
    rows = {(row["source"], row["case"], row["provider"]): row for row in data["rows"]}
    row = rows["random", "logprob_forward_backward", "ours_torch_tol"]
    assert {"ratio", "effective_tflop_per_s", "executed_flop", "extra_bytes", "theory_extra_bytes"} <= set(row)
    assert {"logprob_max_error", "grad_hidden_relative_error", "kept_column_sum"} <= set(row)
    assert ("peaked_low", "loss_forward_backward", "gemm") in rows
    assert "extra_bytes" not in rows["random", "teachers_8", "eager"]
    block = report.kernels_block(report.Run(data), "out.json", ["a.svg", "b.svg"])
    assert "ours, 2⁻⁸" in block and "a.svg" in block


def test_spent_budget_is_said(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    options = "--shapes", "tiny", "--providers", "eager", "--budget-s", "0", "--json", str(out)
    assert run_main(monkeypatch, *options) == 1
    assert {row["skipped"] for row in json.loads(out.read_text())["rows"]} == {"time budget spent"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--providers", "eager,nothing"], "--providers: unknown 'nothing'"),
        (["--providers", "ours_triton"], "--providers: ours_triton cannot run here"),
        (["--inputs", "unreal"], "--inputs: unknown 'unreal'"),
        (["--inputs", "real", "--real", "nowhere"], "nowhere has none; make them: python"),
        (["--rounds", "0"], "--rounds 0: at least 1 is needed"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    if torch.cuda.is_available() and "ours_triton" in arguments:
        pytest.skip("runs here")
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def made_up_run(device="CPU", **changes) -> report.Run:
    """One problem of low entropy; every target is met unless `changes` (provider, case: ratio) says otherwise."""
    ratios = {"gemm": 1.0, "eager": 3.2, "trl": 4.5, "ours_torch": 3.0, "ours_torch_tol": 1.5}
    rows = [
        {
            "source": "peaked_low", "N": 8, "V": 1024, "D": 4, "case": case.name, "provider": provider,
            "dtype": "float32", "fp32_logits_bytes": 2**20, "median_s": 0.2, "effective_tflop_per_s": 0.1,
            "ratio": changes.get(f"{provider}_{case.name}", ratio if case.backward else 1.1), "extra_bytes": 2**15,
        }
        for case in (Case("logprob"), Case("logprob", backward=True), Case("loss", backward=True))
        for provider, ratio in ratios.items()
    ]  # fmt: skip
    rows = [row for row in rows if row["ratio"] is not None]
    return report.Run({"rows": rows, "device": device})


def test_targets_are_judged_by_the_worst():
    met = report.targets_table(made_up_run())
    assert met.count("| yes |") == 5 and "2.13, 2.13 (torch, torch)" in met
    assert "3.1 – 3.1 %" in met
    missed = report.targets_table(made_up_run(ours_torch_tol_loss_forward_backward=1.8, ours_torch_logprob_forward=1.3))
    assert missed.count("**no**") == 3  # forward, grad_tol, and 3.2 / 1.8 < 2
    assert "| 1.50, 1.80 G | **no** |" in missed


def test_a_gpu_has_targets_of_its_own():
    found = report.targets_table(made_up_run("NVIDIA H100", ours_torch_logprob_forward=1.2))
    assert "| ≤ 1.15 G | 1.20 G | **no** |" in found and "| ≤ 3.3 G | 3.00, 3.00 G | yes |" in found
    assert "| ≤ 1% | 3.1 – 3.1 % | **no** |" in found


def test_a_target_that_time_did_not_allow_for_is_not_judged():
    late = {f"{name}_{case}": None for name in ("ours_torch", "ours_torch_tol") for case in report.BACKWARD_CASES}
    found = report.targets_table(made_up_run(**late))
    assert found.count("| not measured | – |") == 3 and found.count("| yes |") == 2


def test_tables_show_what_is_missing():
    run = made_up_run()
    line = next(line for line in report.time_table(run).splitlines() if "policy loss" in line)
    assert line.endswith("| 3.20 | 4.50 | 3.00 | **1.50** |")
    assert report.memory_table(run).count("0.0 |") and "(" not in report.memory_table(run).splitlines()[-1]
    detail = report.detail_table(run, "loss_forward_backward").splitlines()[-1]
    assert detail.startswith("| **ours, 2⁻⁸** | 200 | 1.50 | – |") and "| 3.1 |" in detail


def test_block_is_put_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.insert(readme, r"new \1")
    assert readme.read_text() == f"before\n{report.BEGIN}\nnew \\1\n{report.END}\nafter\n"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="exactly one"):
        report.insert(readme, "new")


def test_committed_tables_are_those_of_the_committed_numbers():
    files = kernel_report.measured_files()
    assert files
    for readme, block in kernel_report.blocks(files).items():
        assert f"{report.BEGIN}\n{block}\n{report.END}" in readme.read_text(encoding="utf-8"), readme
    for file in files:
        words = json.loads(file.read_text())["command"].split()
        assert not any(word.startswith("/") for word in words), words


def test_plots_are_written_and_repeatable(tmp_path):
    pytest.importorskip("matplotlib")
    from kernel_suite.plots import draw_memory, draw_time

    for draw in (draw_time, draw_memory):
        for name in ("a.svg", "b.svg"):
            draw(made_up_run(), tmp_path / name)
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
        assert b"<svg" in (tmp_path / "a.svg").read_bytes()


def test_what_keeps_the_logits_of_a_large_problem_is_measured_alone():
    large, small = Problem("random", 32768, 151936, 1024), Problem("random", 2048, 4096, 64)
    heavy = {name for name in providers.PROVIDERS if memory.is_heavy((name, [(large, "logprob_forward_backward")]))}
    assert {"eager", "compile"} <= heavy and not heavy & {"cce", "trl", "liger", *providers.OURS}
    assert not memory.is_heavy(("eager", [(small, "logprob_forward_backward")]))


def test_several_models_come_after_one_model_on_every_input():
    problems = [TINY, Problem("peaked_low", 40, 300, 16), Problem("random", 50, 300, 16)]
    work = kernel_bench.work_of(problems)
    assert [problem for problem, _ in work] == [*problems, TINY]
    assert not any(case.models for _, cases in work[:-1] for case in cases)
    assert {case.name for _, cases in work for case in cases} == set(CASES)
