"""Being asked to stop: signals become an attribute that the loop reads where it can act on it."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""A person, the system or a scheduler wants the run to end; SIGUSR1 is the usual early warning of a batch system."""

SAME_REQUEST_S = 1.0
"""Signals closer together than this are one request: terminals, `timeout` and schedulers deliver the same one several times."""


class StopRequest:
    """Between `with` and its end, stop signals do not end the process but set `requested`.

    requested: name of the first signal, such as "SIGTERM"; None until then.
    insisted: True if a signal came again more than a second later. A rank ignores it, as its peers need it until the step's
        end and launchers repeat themselves; a launcher takes it as the order to end its ranks at once.

    Inside another StopRequest that was already asked, it is asked from the beginning: a run that was told to stop while it
    started up stops at its first chance.

    The handler only sets attributes. Signals that were ignored before (nohup, background jobs of a shell script) stay ignored,
    and outside of the main thread, where Python cannot handle signals, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.insisted = False
        self._first = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self._first = time.monotonic()
            self.requested = signal.Signals(number).name
        elif time.monotonic() - self._first > SAME_REQUEST_S:
            self.insisted = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
            for handler in self._previous.values():
                outer = getattr(handler, "__self__", None)
                if isinstance(outer, StopRequest) and outer.requested and self.requested is None:
                    self.requested, self._first = outer.requested, outer._first
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
        self._previous.clear()


class Stopped(BaseException):
    """A stop signal came where there is nothing to save; its text is the signal's name."""


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """Until the ranks run: a stop signal raises Stopped in the main thread, so that what is half-made is cleaned up.

    Only the first does; a terminal or a scheduler that repeats itself must not interrupt the cleaning up.
    """
    stopped = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise Stopped(signal.Signals(number).name)

    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Stop signals wait until the end of the block: around a fork, whose child would else lose them to its parent's handler."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def default_signals() -> None:
    """Undo in a forked child what its parent does on signals: a stop signal now ends it, also inside a blocked C call."""
    signal.set_wakeup_fd(-1)
    for number in (*STOP_SIGNALS, signal.SIGCHLD):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class Alarm:
    """Wakes a waiting main thread when a signal arrives."""

    def __init__(self, receiver: socket.socket) -> None:
        self._receiver = receiver

    def wait(self, timeout_s: float) -> None:
        """Return at the next signal, or one that came since the last call, or after `timeout_s`."""
        if select.select([self._receiver], [], [], max(0.0, timeout_s))[0]:
            with contextlib.suppress(BlockingIOError):
                self._receiver.recv(4096)


@contextlib.contextmanager
def alarm_on_signals() -> Iterator[Alarm]:
    """An Alarm for every handled signal and for the end of a child process (main thread only)."""
    receiver, sender = socket.socketpair()
    receiver.setblocking(False)
    sender.setblocking(False)
    previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    previous_handler = signal.signal(signal.SIGCHLD, lambda number, frame: None)  # the default would not wake anybody
    try:
        yield Alarm(receiver)
    finally:
        signal.set_wakeup_fd(previous_fd)
        signal.signal(signal.SIGCHLD, previous_handler)
        receiver.close()
        sender.close()
