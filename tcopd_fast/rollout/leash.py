"""`python -m tcopd_fast.rollout.leash PID COMMAND…`: run COMMAND until it ends or process PID is gone.

A trainer that is killed cannot end its engines; this does. PID gone or SIGTERM: the whole process group is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

CHECK_S = 0.5


def main(parent: int, command: list[str]) -> int:
    """Returns the command's exit status as a shell does: 128 + n for signal n."""
    child = subprocess.Popen(command)

    def end(*_: object) -> None:
        os.killpg(0, signal.SIGKILL)

    # The trainer is the direct parent; once it is gone this process belongs to another.
    signal.signal(signal.SIGTERM, end)
    while child.poll() is None:
        if os.getppid() != parent:
            end()
        time.sleep(CHECK_S)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
