"""The `tcopd` console script."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tcopd_fast import __version__
from tcopd_fast.arguments import parse
from tcopd_fast.errors import UserError

TRAINER_NEEDS = ("transformers", "deepspeed", "omegaconf", "pydantic", "yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; a UserError prints its message alone and gives status 2."""
    if any(importlib.util.find_spec(name) is None for name in TRAINER_NEEDS):
        print('error: the trainer is not installed; in a clone run: pip install -e ".[train]"', file=sys.stderr)
        return 2
    arguments = parse(_parser(), argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from tcopd_fast.config_io import config_help
    from tcopd_fast.train import add_arguments

    parser = argparse.ArgumentParser(prog="tcopd", description="Teacher-contrastive on-policy distillation.")
    parser.add_argument("--version", action="version", version=f"tcopd-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str, **options) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, **options)
        sub.set_defaults(run=run)
        return sub

    raw = argparse.RawDescriptionHelpFormatter
    demo = command("demo", _demo, "Train G-OPD and TC-OPD on the miniature and write a report.")
    demo.add_argument("--out", default="runs/demo", help="folder of the runs and the report (default %(default)s)")
    demo.add_argument(
        "--steps", type=positive_int, default=None, help="training steps per run (default: as configured)"
    )

    train = command(
        "train", _train, "Train, starting the deepspeed launcher.", epilog=config_help(), formatter_class=raw
    )
    add_arguments(train)
    train.add_argument(
        "--ranks", type=positive_int, default=None, help="processes on this machine (default: GPUs, else 1)"
    )
    train.add_argument(
        "--launcher", default="", metavar="OPTIONS", help="as they are to the deepspeed launcher (docs/multinode.md): "
        '--launcher="--hostfile hosts --no_ssh --node_rank 1 --master_addr 10.0.0.1"'
    )  # fmt: skip

    evaluate = command("eval", _eval, "Sample answers and judge them: mean@k, pass@k, lengths, intervals.")
    evaluate.add_argument("model", help="checkpoint: hub id, folder, miniature:NAME")
    evaluate.add_argument("--data", required=True, action="append", metavar="PATH", help="problems (may be repeated)")
    evaluate.add_argument("--out", required=True, metavar="DIR", help="folder for eval.jsonl and samples")
    evaluate.add_argument("--name", metavar="NAME", help="configuration of a Hugging Face dataset")
    evaluate.add_argument("--split", metavar="SPLIT", help="split of a Hugging Face dataset (default: train)")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="keys of data, rollout, eval, judge, model")

    score = command("score", _score, "Per-token logprobs of any text under any models, to parquet.")
    score.add_argument("--model", required=True, action="append", metavar="NAME=PATH", help="a model (may be repeated)")
    score.add_argument("--text", required=True, metavar="FILE", help="JSONL with `text`, or `prompt` and `response`")
    score.add_argument("--out", required=True, metavar="FILE.parquet")
    score.add_argument("--temperature", type=positive_float, default=1.0)
    score.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    score.add_argument("--max-tokens", type=positive_int, default=16384, help="packed tokens of one forward")

    report = command("report", _report, "Write one HTML page comparing runs.")
    report.add_argument("runs", nargs="+", metavar="RUN")
    report.add_argument("--out", default=None, metavar="FILE.html", help="default: RUN/report.html of the first run")

    trace = command("trace", _trace, "Write a run's timeline as a Chrome trace (chrome://tracing, Perfetto).")
    trace.add_argument("run_dir", metavar="RUN")
    trace.add_argument("--out", default=None, metavar="FILE.json", help="default: RUN/trace.json")

    export = command("export", _export, "Write a run's student as a Hugging Face folder.")
    export.add_argument("run_dir", metavar="RUN")
    export.add_argument("--out", default=None, metavar="DIR", help="default: RUN/export, with --adapter RUN/adapter")
    export.add_argument("--adapter", action="store_true", help="a LoRA student's adapter alone, as a peft folder")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, default=None, help="checkpoint step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the best evaluation")

    delta = command("delta", _delta, "Store a teacher as a lossless difference to a base, or verify one.")
    actions = delta.add_subparsers(dest="action", required=True, metavar="make|check")
    make = actions.add_parser("make", help="write the difference of TEACHER to BASE into the folder OUT")
    make.add_argument(
        "base", metavar="BASE", help="checkpoint that will be there anyway: folder, hub id, miniature:NAME"
    )
    make.add_argument("teacher", metavar="TEACHER", help="checkpoint of the same shapes")
    make.add_argument("out", metavar="OUT", help="new folder; it stands wherever a teacher's path does")
    verify = actions.add_parser("check", help="rebuild every tensor and compare it with what was recorded")
    verify.add_argument("path", metavar="DELTA")
    verify.add_argument("base", metavar="BASE")

    _add_plan(command)

    serve = command(
        "serve-teacher", _serve_teacher, "Serve a frozen model with vLLM, for teachers of placement server."
    )
    serve.add_argument("model", metavar="MODEL", help="checkpoint: hub id, folder, miniature:NAME")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine)")
    serve.add_argument("--port", type=positive_int, default=8000, help="default %(default)s")
    serve.add_argument("--name", default="teacher", help="the model's name in requests (default %(default)s)")
    serve.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    serve.add_argument("--max-model-len", type=positive_int, metavar="N", help="longest sequence, plus one token")
    serve.add_argument(
        "--max-batched-tokens", type=positive_int, default=2048, metavar="N", help="tokens of one forward (default "
        "%(default)s); vLLM takes 8 bytes for each of them and each id of the vocabulary"
    )  # fmt: skip
    serve.add_argument("--trust-remote-code", action="store_true", help="run Python code shipped with the checkpoint")
    serve.add_argument(
        "--vllm", default="", metavar="OPTIONS", help='as they are to vLLM: --vllm="--tensor-parallel-size 2"'
    )

    _add_serve_rollout(command)

    miniature = command("miniature", _miniature, "Re-create the miniature's checkpoints from nothing.")
    miniature.add_argument("action", choices=["build"])
    miniature.add_argument("--out", default="runs/miniature", metavar="DIR")
    miniature.add_argument("--seed", type=int, default=0)
    return parser


def _add_plan(command: Callable[..., argparse.ArgumentParser]) -> None:
    from tcopd_fast.plan.command import add_arguments, run

    add_arguments(command("plan", run, "Predict memory and time of a run on given GPUs, and recommend placements."))


def _add_serve_rollout(command: Callable[..., argparse.ArgumentParser]) -> None:
    from tcopd_fast.config_sections import VllmConfig

    default = VllmConfig()
    serve = command("serve-rollout", _serve_rollout, "Run a rollout engine for a trainer elsewhere (docs/rollout.md).")
    serve.add_argument("model", metavar="MODEL", help="checkpoint of the student's shape: hub id, folder, …")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine)")
    serve.add_argument("--port", type=positive_int, default=8100, help="default %(default)s")
    serve.add_argument("--tensor-parallel-size", type=positive_int, default=1, metavar="N", help="GPUs of the engine")
    serve.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    serve.add_argument("--max-model-len", type=positive_int, metavar="N", help="longest prompt and response together")
    serve.add_argument("--max-num-seqs", type=positive_int, default=default.max_num_seqs, metavar="N")
    serve.add_argument("--gpu-memory-utilization", type=positive_float, default=0.9, help="default %(default)s")
    serve.add_argument(
        "--kv-cache-memory-bytes", type=positive_int, default=default.kv_cache_memory_bytes, help="on a CPU"
    )
    serve.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    serve.add_argument("--seed", type=int, default=0)
    serve.add_argument("--trust-remote-code", action="store_true", help="run Python code shipped with the checkpoint")
    serve.add_argument("--vllm", default="", metavar="OPTIONS", help="more options for vLLM's server")


def positive_int(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return value


def positive_float(text: str) -> float:
    """An argparse type."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def _train(arguments: argparse.Namespace) -> int:
    from tcopd_fast.config_io import dump_config
    from tcopd_fast.train import resolve

    config = resolve(arguments)
    if arguments.print_config:
        print(dump_config(config), end="")
        return 0
    from tcopd_fast import rundir
    from tcopd_fast.inputs import read_inputs
    from tcopd_fast.launcher import launch, read_options

    launcher = read_options(arguments.launcher, arguments.ranks)
    if launcher.first_machine:
        rundir.check_free(config.run_dir)
        if not arguments.resume:
            rundir.check_new(config)
    # Everything that can be refused is refused here, once, before any process is started.
    read_inputs(config, launcher.ranks)
    words = ["--resume", arguments.resume] if arguments.resume else ["--config", arguments.config]
    return launch(launcher, [*words, *arguments.overrides])


def _demo(arguments: argparse.Namespace) -> int:
    from tcopd_fast.demo import run_demo

    return run_demo(Path(arguments.out), arguments.steps)


def _eval(arguments: argparse.Namespace) -> int:
    from tcopd_fast.commands import run_eval

    return run_eval(
        arguments.model, arguments.data, Path(arguments.out), arguments.overrides, arguments.name, arguments.split
    )


def _score(arguments: argparse.Namespace) -> int:
    from tcopd_fast.commands import run_score

    return run_score(
        arguments.model,
        Path(arguments.text),
        Path(arguments.out),
        arguments.temperature,
        arguments.dtype,
        arguments.max_tokens,
    )


def _report(arguments: argparse.Namespace) -> int:
    from tcopd_fast.report import format_table, summary_table, write_report

    runs = [Path(run) for run in arguments.runs]
    out = write_report(runs, Path(arguments.out) if arguments.out else runs[0] / "report.html")
    print(format_table(summary_table(runs)))
    print(f"report: {out}")
    return 0


def _trace(arguments: argparse.Namespace) -> int:
    from tcopd_fast.trace import write_trace

    run_dir = Path(arguments.run_dir)
    out = write_trace(run_dir, Path(arguments.out) if arguments.out else run_dir / "trace.json")
    print(f"trace: {out} (open it in chrome://tracing or https://ui.perfetto.dev)")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from tcopd_fast.export import run_export

    out = Path(arguments.out) if arguments.out else None
    return run_export(Path(arguments.run_dir), out, arguments.step, arguments.best, arguments.adapter)


def _delta(arguments: argparse.Namespace) -> int:
    from tcopd_fast.scoring import delta

    if arguments.action == "check":
        delta.check(arguments.path, arguments.base)
        print(f"{arguments.path}: rebuilds exactly from {arguments.base}")
        return 0
    report = delta.make(arguments.base, arguments.teacher, arguments.out)
    forms = ", ".join(f"{count} {form}" for form, count in report.forms.items())
    print(
        f"{arguments.out}: {report.delta_bytes} bytes, {report.delta_bytes / report.base_bytes:.1%} of the base's "
        f"{report.base_bytes}; {report.changed / report.weights:.1%} of {report.weights} weights differ; "
        f"tensors: {forms}"
    )
    return 0


def _serve_teacher(arguments: argparse.Namespace) -> int:
    from tcopd_fast.serve_teacher import Service, serve

    names = [field.name for field in dataclasses.fields(Service)]
    serve(Service(**{name: getattr(arguments, name) for name in names}))


def _serve_rollout(arguments: argparse.Namespace) -> int:
    from tcopd_fast.refusals import check_server_options
    from tcopd_fast.rollout.serve import default_dtype, serve
    from tcopd_fast.rollout.server_command import EngineSpec

    try:
        check_server_options(arguments.vllm, "--vllm")
    except ValueError as error:
        raise UserError(str(error)) from error
    spec = EngineSpec(
        model_path=arguments.model,
        dtype=arguments.dtype or default_dtype(),
        options=arguments.vllm,
        **{
            field.name: getattr(arguments, field.name)
            for field in dataclasses.fields(EngineSpec)
            if field.name not in ("model_path", "dtype", "options")
        },
    )
    return serve(spec, arguments.host, arguments.port)


def _miniature(arguments: argparse.Namespace) -> int:
    from tcopd_fast.miniature.build import build

    try:
        build(Path(arguments.out), seed=arguments.seed)
    except OSError as error:
        raise UserError(f"--out {arguments.out}: cannot be written ({error.strerror}); give another folder") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
