"""Stopping a run from outside: the first SIGTERM or SIGINT asks for a checkpoint and an end, a second ends at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_S = 3.0
"""One request may arrive several times: Ctrl-C reaches the whole process group, and launchers pass signals on."""


class StopRequested(Exception):
    """Raised inside a rollout to abandon it; the step has not trained on anything yet."""


class Stop:
    """What this process has been asked by signals.

    requested: name of the first signal, or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._since = 0.0

    def listen(self) -> None:
        """Handle SIGTERM and SIGINT from now on. Main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def check(self) -> None:
        """Raise StopRequested when a signal has come."""
        if self.requested is not None:
            raise StopRequested

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = signal.Signals(number).name, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                # Not print: a handler may have interrupted one.
                os.write(2, f"{self.requested}: saving a checkpoint, then ending; again to end at once\n".encode())
        elif time.monotonic() - self._since > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
