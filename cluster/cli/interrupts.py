"""Ctrl-C, SIGTERM and SIGHUP as one KeyboardInterrupt, after which the end is not disturbed by more of them.

    signal --wakeup fd--> a thread: tells of it at once, whatever the main thread waits for
           --handler----> main thread: KeyboardInterrupt; in what is `held`, not before the next `raising`

`ray.init` takes SIGTERM for itself twice: in Python, where it exits, and in C, where the process dies on the spot.
While it runs the thread puts Python's own C handler back, and what Ray raises then is taken for the KeyboardInterrupt.
"""

import ctypes
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Self

from pomarium.cluster.cli.progress import Terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GUARD_S = 0.01
"""How often it is looked whether Python's handler is in place while it is guarded."""

NOTED_S = 1.0


class Interrupts:
    """Context in which the first of the signals raises KeyboardInterrupt and later ones are ignored.

    `say`: called once at the first of them, in a thread of its own.
    """

    def __init__(self, say: Callable[[], None] | None = None) -> None:
        self._say = say
        self._seen = threading.Event()
        self._told = False
        self._raises = True
        self._guarded = False

    def __enter__(self) -> Self:
        self._before = {s: signal.getsignal(s) for s in SIGNALS}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self.install()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_: "type[BaseException] | BaseException | TracebackType | None") -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._write)
        self._listener.join()
        os.close(self._read)

    def install(self) -> None:
        """Take the signals, also back from `ray.init`."""
        if not self._seen.is_set():
            self._handle(self._interrupt)

    def ignore(self) -> None:
        """From now on: the end has begun."""
        self._seen.set()
        self._handle(signal.SIG_IGN)

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come."""
        if self._seen.is_set():
            self.ignore()
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """What runs here is not torn: KeyboardInterrupt waits for `raising` or `check`."""
        with self._raising(False):
            yield

    @contextmanager
    def raising(self) -> Iterator[None]:
        """KeyboardInterrupt is raised here at once; also the one that was held, and one that was lost on its way, as in
        a destructor."""
        self.check()
        with self._raising(True):
            yield
        self.check()

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """What runs here takes SIGTERM for itself: that is undone, and what it raises is the signal's."""
        handler = ctypes.pythonapi.PyOS_getsig
        handler.restype = ctypes.c_void_p
        self._handler = handler(signal.SIGTERM)
        self._guarded = True
        self._wake()
        try:
            yield
        except SystemExit:
            self._seen.wait(NOTED_S)  # the thread may be a moment behind
            self.check()
            raise
        finally:
            self._guarded = False
            if self._seen.is_set():
                self.ignore()
            self.install()

    @contextmanager
    def _raising(self, raises: bool) -> Iterator[None]:
        before, self._raises = self._raises, raises
        try:
            yield
        finally:
            self._raises = before

    def _interrupt(self, _: int, __: FrameType | None) -> None:
        self._seen.set()
        if self._raises:
            self.check()

    def _handle(self, handler: "signal.Handlers | signal._HANDLER") -> None:
        for s in SIGNALS:
            signal.signal(s, handler)

    def _wake(self) -> None:
        os.write(self._write, b"\0")

    def _listen(self) -> None:
        """Until the pipe is closed: the numbers of signals come through it, and 0 when there is something to guard."""
        while True:
            ready, _, _ = select.select([self._read], [], [], GUARD_S if self._guarded else None)
            if self._guarded:
                self._restore()
            if not ready:
                continue
            numbers = os.read(self._read, 512)
            if not numbers:
                return
            if any(number in SIGNALS for number in numbers):
                self._seen.set()
                if self._say is not None and not self._told:
                    self._told = True
                    self._say()

    def _restore(self) -> None:
        current = ctypes.pythonapi.PyOS_getsig
        current.restype = ctypes.c_void_p
        if current(signal.SIGTERM) != self._handler:
            put = ctypes.pythonapi.PyOS_setsig
            put.argtypes, put.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
            put(signal.SIGTERM, self._handler)


def phases(terminal: Terminal, interrupts: Interrupts, own_ray: bool) -> Callable[[str], AbstractContextManager[None]]:
    """The phases of a start that can be interrupted. A Ray of our own is not torn while it starts: what it has started
    by then could not be told."""

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        interrupts.check()
        with terminal.phase(name):
            if name != "ray":
                with interrupts.raising():
                    yield
            elif own_ray:
                with interrupts.held(), interrupts.guarding():
                    yield
            else:
                with interrupts.raising(), interrupts.guarding():
                    yield

    return phase
