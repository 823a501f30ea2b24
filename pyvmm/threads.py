"""Starting threads that no signal reaches."""

from __future__ import annotations

import signal
import threading

# Left deliverable: a fault in our own process must still kill it.
_SYNCHRONOUS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
_OTHERS = signal.valid_signals() - _SYNCHRONOUS


def start(thread: threading.Thread) -> None:
    """Start `thread` with all signals blocked, from its first instruction on.

    Signals are for the main thread: Python runs handlers there, and one that lands in another
    thread does not wake it from a wait.  A new thread inherits its creator's mask; to block them
    from inside would leave a moment in which one can land.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OTHERS)
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
