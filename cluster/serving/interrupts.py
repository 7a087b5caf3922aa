"""Make SIGINT and SIGTERM end a program in order, through ``KeyboardInterrupt``."""

from __future__ import annotations

import signal


def interruptible() -> None:
    """Have both signals raise ``KeyboardInterrupt`` in the main thread from now on.

    A shell starts background jobs with SIGINT ignored and Python leaves it so; Ray, when it starts, takes SIGTERM for
    a crash. Call it at the start and again after Ray has started.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def uninterruptible() -> None:
    """Ignore both signals: what is being taken down must not be left half down."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
