"""When engines in processes of their own were generating, as the sender of their requests sees it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from tcopd_fast.timeline import GENERATE, Span, epoch_seconds, merged


@dataclass
class _Engine:
    """under_way: its requests. since: start of the present span. tokens: of responses that no span has yet."""

    under_way: int = 0
    since: float | None = None
    tokens: int = 0
    spans: list[Span] = field(default_factory=list)

    def open(self, now: float) -> None:
        self.since = now if self.under_way else None

    def add(self, tokens: int) -> None:
        if self.since is None and self.spans:
            last = self.spans[-1]
            self.spans[-1] = replace(last, tokens=last.tokens + tokens)
        else:
            self.tokens += tokens

    def close(self, now: float) -> None:
        if self.since is not None and now > self.since:
            self.spans.append(Span(GENERATE, self.since, now, self.tokens))
            self.tokens = 0
        self.since = None


class Meter:
    """Per engine the union of its requests' intervals, and the tokens that it returned. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[int, _Engine] = {}
        self._held = False

    def expect(self, engines: int) -> None:
        """Engines 0 to `engines` − 1 have a track from here on, requests or not."""
        with self._lock:
            for number in range(engines):
                self._engines.setdefault(number, _Engine())

    @contextmanager
    def request(self, engine: int) -> Iterator[None]:
        """A request to an engine is under way inside the block."""
        with self._lock:
            own = self._engines.setdefault(engine, _Engine())
            own.under_way += 1
            if own.under_way == 1 and not self._held:
                own.open(epoch_seconds())
        try:
            yield
        finally:
            with self._lock:
                own.under_way -= 1
                if not own.under_way:
                    own.close(epoch_seconds())

    def returned(self, engine: int, tokens: int) -> None:
        """A response of so many tokens came; to be called inside its `request`.

        One that comes during an exchange of weights was generated before it, and counts there.
        """
        with self._lock:
            self._engines[engine].add(tokens)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No engine generates inside the block, whatever is under way: they wait for weights."""
        self._switch(held=True)
        try:
            yield
        finally:
            self._switch(held=False)

    def drain(self, until: float) -> dict[str, list[Span]]:
        """Track ("engine N") -> its spans up to `until`, seconds since the epoch, not handed out yet, ascending.

        A span that goes on is cut there, its tokens so far go with the first part.
        """
        with self._lock:
            return {f"engine {number}": self._take(own, until) for number, own in sorted(self._engines.items())}

    def _take(self, own: _Engine, until: float) -> list[Span]:
        now = epoch_seconds()
        if own.since is not None:
            own.close(now)
            own.open(now)
        before = [span for span in own.spans if span.end <= until]
        after = [span for span in own.spans if span.end > until]
        if after and after[0].start < until:
            first = after[0]
            before.append(Span(GENERATE, first.start, until, first.tokens))
            after[0] = Span(GENERATE, until, first.end)
        own.spans = after
        return merged([before])

    def _switch(self, held: bool) -> None:
        with self._lock:
            self._held = held
            now = epoch_seconds()
            for own in self._engines.values():
                if held:
                    own.close(now)
                else:
                    own.open(now)
