"""Signals of the server's parent: what they are called, and how the caller's settings come back."""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterable
from typing import Any

__all__ = ("MANAGEMENT_SIGNALS", "SavedSignals", "default_stop_signal", "name_of", "signal_of")

#: Signals that carry the verbs of a managed server, where the platform has them.
MANAGEMENT_SIGNALS: dict[str, int] = {
    verb: getattr(signal, name)
    for verb, name in (
        ("restart", "SIGHUP"),
        ("reload", "SIGUSR1"),
        ("status", "SIGUSR2"),
        ("more", "SIGTTIN"),
        ("less", "SIGTTOU"),
    )
    if hasattr(signal, name)
}


def signal_of(signum: int) -> Any:
    """The member of :class:`signal.Signals`, or the bare number of a signal without a name."""
    try:
        return signal.Signals(signum)
    except ValueError:
        return signum


def name_of(signum: int) -> str:
    """``"SIGTERM"``; ``"signal 40"`` for one without a name."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def default_stop_signal(stop_signals: Collection[int]) -> Any:
    """SIGTERM if it is among *stop_signals*, else the one with the smallest number."""
    if signal.SIGTERM in stop_signals:
        return signal.SIGTERM
    return signal_of(min(int(s) for s in stop_signals))


class SavedSignals:
    """Mask, handlers and wake-up descriptor of the main thread: taken at first, put back at last.

    Runners leave traces: asyncio's resets SIGINT to ``default_int_handler`` whatever was there
    before, others never remove their handlers, and a loop that is not closed leaves its wake-up
    descriptor.  So everything is put back from here.

    A stop signal that came too late to be acted on belongs to the server that is just ending: it
    is taken off the queue instead of hitting the caller when the mask is put back.
    """

    def __init__(self, signums: Iterable[int]) -> None:
        self._signums = frozenset(int(s) for s in signums)
        self._handlers = {s: signal.getsignal(s) for s in signal.valid_signals()}
        self._wakeup = signal.set_wakeup_fd(-1)
        if self._wakeup != -1:
            signal.set_wakeup_fd(self._wakeup)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def restore(self) -> None:
        mine = self._signums - self._mask
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signums)
        if hasattr(signal, "sigtimedwait"):
            while mine & signal.sigpending():
                signal.sigtimedwait(mine, 0)
        signal.set_wakeup_fd(self._wakeup)
        for signum, handler in self._handlers.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            if handler is not None and signal.getsignal(signum) is not handler:
                try:
                    signal.signal(signum, handler)
                except (OSError, ValueError):
                    pass
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
