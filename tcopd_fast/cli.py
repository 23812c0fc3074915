"""The `tcopd` console script."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import signal
import subprocess
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

    export = command("export", _export, "Write a run's student as a Hugging Face folder.")
    export.add_argument("run_dir", metavar="RUN")
    export.add_argument("--out", default=None, metavar="DIR", help="default: RUN/export")
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

    miniature = command("miniature", _miniature, "Re-create the miniature's checkpoints from nothing.")
    miniature.add_argument("action", choices=["build"])
    miniature.add_argument("--out", default="runs/miniature", metavar="DIR")
    miniature.add_argument("--seed", type=int, default=0)
    return parser


def _add_plan(command: Callable[..., argparse.ArgumentParser]) -> None:
    from tcopd_fast.plan.command import add_arguments, run

    add_arguments(command("plan", run, "Predict memory and time of a run on given GPUs, and recommend placements."))


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

    rundir.check_free(config.run_dir)
    if not arguments.resume:
        rundir.check_new(config)
    ranks = arguments.ranks or default_ranks()
    # Everything that can be refused is refused here, once, before any process is started.
    read_inputs(config, ranks)
    words = ["--resume", arguments.resume] if arguments.resume else ["--config", arguments.config]
    return launch(ranks, [*words, *arguments.overrides])


def default_ranks() -> int:
    """One process per GPU, one without GPUs."""
    import torch

    return max(1, torch.cuda.device_count())


def launch(ranks: int, words: Sequence[str]) -> int:
    """Run `tcopd_fast.train` under the deepspeed launcher on this machine; returns its exit status."""
    import torch

    from tcopd_fast.dist import free_port

    environment = dict(os.environ)
    device_flag = "--num_gpus"
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
        device_flag = "--num_accelerators"
        # Ranks on one CPU share its cores.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", device_flag, str(ranks)]
    launcher += [
        "--log_level",
        "error",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
        "--no_local_rank",
    ]
    # tcopd_fast may be a source tree that only the launching process has on its path.
    root = Path(__file__).resolve().parent.parent
    if (root / "kernels" / "tcopd_kernels").is_dir():
        paths = [str(root), str(root / "kernels"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # In a session of their own: the launchers answer a signal by killing the ranks, so it must not reach them.
    runner = subprocess.Popen(
        [*launcher, "--module", "tcopd_fast.train", *words], env=environment, start_new_session=True
    )
    return _wait_passing_signals(runner)


def _wait_passing_signals(runner: subprocess.Popen) -> int:
    """The launcher's exit status; signals that come meanwhile go to the ranks, which save a checkpoint and end."""
    import psutil

    def pass_on(number: int, frame: object) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may just have ended
            outer = psutil.Process(runner.pid)
            ranks = [rank for inner in outer.children() for rank in inner.children()]
            for process in ranks or [*outer.children(), outer]:
                process.send_signal(signal.SIGTERM)

    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        signals.append(signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in signals}
    try:
        status = runner.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


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


def _export(arguments: argparse.Namespace) -> int:
    from tcopd_fast.commands import run_export

    out = Path(arguments.out) if arguments.out else None
    return run_export(Path(arguments.run_dir), out, arguments.step, arguments.best)


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


def _miniature(arguments: argparse.Namespace) -> int:
    from tcopd_fast.miniature.build import build

    try:
        build(Path(arguments.out), seed=arguments.seed)
    except OSError as error:
        raise UserError(f"--out {arguments.out}: cannot be written ({error.strerror}); give another folder") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
