"""`tcopd plan`: arguments and the command itself."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tcopd_fast.config_io import load_config
from tcopd_fast.errors import UserError
from tcopd_fast.plan.devices import GPUS, Cluster, parse_bytes, speed_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tcopd plan`."""
    parser.add_argument("config", metavar="CONFIG", help="YAML configuration of the run")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="GPUs, one rank each")
    parser.add_argument("--gpu-memory", required=True, metavar="SIZE", help="memory of one GPU: 80GB, 80GiB")
    parser.add_argument("--host-memory", metavar="SIZE", help="memory of one machine, to check what offload pins")
    parser.add_argument("--gpus-per-machine", type=int, default=8, metavar="N", help="default %(default)s")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(GPUS)} (default %(default)s)")
    parser.add_argument("--tflops", type=float, help="peak bfloat16 10¹² FLOP/s of one GPU, in place of the preset's")
    for name, text in (
        ("hbm", "its memory"),
        ("pcie", "host memory to GPU, one way"),
        ("interconnect", "to the other GPUs, one way"),
    ):
        parser.add_argument(f"--{name}", type=float, metavar="GB/S", help=f"10⁹ bytes/s: {text}")
    parser.add_argument("--mfu", type=float, metavar="SHARE", help="share of --tflops that is reached (default 0.4)")
    parser.add_argument("--mean-prompt-tokens", type=float, metavar="N", help="default: data.max_prompt_tokens")
    parser.add_argument("--mean-response-tokens", type=float, metavar="N", help="default: rollout.max_new_tokens")
    parser.add_argument("--teachers", type=int, metavar="K", help="plan for K teachers, repeating the configured ones")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="read config.json from FOLDER for the model NAME (student, reference, a teacher), or for all models",
    )
    parser.add_argument("--json", metavar="FILE", help="also write every number there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key of the configuration")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 when it fits, 1 when it does not. Raises UserError."""
    for option, value in (
        ("--gpus", arguments.gpus),
        ("--gpus-per-machine", arguments.gpus_per_machine),
        ("--teachers", arguments.teachers),
    ):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: must be at least 1")
    for option in ("tflops", "hbm", "pcie", "interconnect", "mfu"):
        value = getattr(arguments, option)
        most = 1.0 if option == "mfu" else 1e9
        if value is not None and not 0 < value <= most:
            raise UserError(f"--{option} {value:g}: must be above 0 and at most {most:g}")
    cluster = Cluster(
        ranks=arguments.gpus,
        memory=parse_bytes(arguments.gpu_memory, "--gpu-memory"),
        per_machine=arguments.gpus_per_machine,
        host_memory=parse_bytes(arguments.host_memory, "--host-memory") if arguments.host_memory else None,
    )
    speed = speed_of(
        arguments.gpu,
        tflops=arguments.tflops,
        hbm=arguments.hbm,
        pcie=arguments.pcie,
        interconnect=arguments.interconnect,
        compute_share=arguments.mfu,
    )
    folders = dict(_named(word) if "=" in word else ("", word) for word in arguments.shape)
    config = load_config(arguments.config, arguments.overrides, installed=False)
    from tcopd_fast.plan.build import make_plan
    from tcopd_fast.plan.report import plan_json, plan_text

    plan = make_plan(
        config,
        cluster,
        speed,
        folders=folders,
        teachers=arguments.teachers,
        prompt=arguments.mean_prompt_tokens,
        response=arguments.mean_response_tokens,
    )
    print(plan_text(plan, arguments.config, arguments.gpu))
    if arguments.json:
        path = Path(arguments.json)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(plan_json(plan, arguments.config, arguments.gpu), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {path}: cannot be written ({error.strerror}); give another path") from error
    return 0 if plan.placed.fits else 1


def _named(word: str) -> tuple[str, str]:
    name, _, folder = word.partition("=")
    return name, folder
