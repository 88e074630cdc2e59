"""Ctrl-C, SIGTERM and SIGHUP as one KeyboardInterrupt, after which the end is not disturbed by more of them."""

import signal
from types import FrameType, TracebackType
from typing import NoReturn, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Context in which the first of the signals raises KeyboardInterrupt and later ones are ignored."""

    def __enter__(self) -> Self:
        self._before = {s: signal.getsignal(s) for s in SIGNALS}
        self._seen = False
        self.install()
        return self

    def install(self) -> None:
        """Take the signals. To be repeated after `ray.init`, which puts a handler of its own, in C, before SIGTERM."""
        if not self._seen:
            self._handle(self._interrupt)

    def ignore(self) -> None:
        """From now on: the end has begun."""
        self._seen = True
        self._handle(signal.SIG_IGN)

    def __exit__(self, *_: "type[BaseException] | BaseException | TracebackType | None") -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _interrupt(self, _: int, __: FrameType | None) -> NoReturn:
        self.ignore()
        raise KeyboardInterrupt

    def _handle(self, handler: "signal.Handlers | signal._HANDLER") -> None:
        for s in SIGNALS:
            signal.signal(s, handler)
