"""Training through the deepspeed launcher, on this machine or on several."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tcopd_fast.errors import UserError

# What `tcopd train` says itself.
_OURS = ("--module", "--no_python", "--no_local_rank", "--autotuning")


@dataclass(frozen=True)
class Launcher:
    """How ranks are started. ranks: as far as it is known here, in all. words: options of the deepspeed launcher.

    first_machine: whether rank 0 will run here or is started from here.
    """

    ranks: int
    words: Sequence[str]
    first_machine: bool


def read_options(options: str, ranks: int | None) -> Launcher:
    """The launcher that `tcopd train --launcher OPTIONS --ranks N` asks for. Raises UserError.

    Without a hostfile all ranks run on this machine: one per GPU unless `ranks` says otherwise.
    """
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--launcher: cannot be split into words ({error}); check its quotes") from error
    for word in words:
        if word.split("=")[0] in _OURS:
            raise UserError(f"--launcher: {word} is refused: `tcopd train` gives it itself; leave it out")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-H", "--hostfile")
    parser.add_argument("--node_rank", type=int, default=0)
    known, _ = parser.parse_known_args(words)
    if known.hostfile is None:
        here = ranks or default_ranks()
        return Launcher(here, [*_on_this_machine(here), *words], True)
    # The launcher itself would go on with this machine alone.
    if not Path(known.hostfile).is_file():
        raise UserError(
            f"--launcher: hostfile {known.hostfile}: not found; give one line `NAME slots=GPUS` per machine"
        )
    if ranks is not None:
        raise UserError("--ranks: the hostfile says how many ranks each machine has (slots=N); leave --ranks out")
    # Names, counts and what is wrong with a line are the launcher's business.
    slots = re.findall(r"^[^#\n]*\sslots=(\d+)", Path(known.hostfile).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return Launcher(sum(map(int, slots)) or 1, words, known.node_rank == 0)


def default_ranks() -> int:
    """One process per GPU, one without GPUs."""
    import torch

    return max(1, torch.cuda.device_count())


def _on_this_machine(ranks: int) -> list[str]:
    import torch

    from tcopd_fast.dist import free_port

    device_flag = "--num_gpus" if torch.cuda.is_available() else "--num_accelerators"
    return [device_flag, str(ranks), "--master_addr", "127.0.0.1", "--master_port", str(free_port())]


def launch(launcher: Launcher, words: Sequence[str]) -> int:
    """Run `tcopd_fast.train WORDS` under the deepspeed launcher; returns its exit status."""
    import torch

    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
        # Ranks on one CPU share its cores.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launcher.ranks)))
    # tcopd_fast may be a source tree that only the launching process has on its path.
    root = Path(__file__).resolve().parent.parent
    if (root / "kernels" / "tcopd_kernels").is_dir():
        paths = [str(root), str(root / "kernels"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", *launcher.words]
    command += ["--no_local_rank", "--module", "tcopd_fast.train", *words]
    # In a session of their own: the launchers answer a signal by killing the ranks, so it must not reach them.
    return _wait_passing_signals(subprocess.Popen(command, env=environment, start_new_session=True))


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
