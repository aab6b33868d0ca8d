"""Threads that work beside a training script, in its process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


def start_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread.

    An error that ends it is logged, as servers and daemons log those of their threads. So it reaches the log of a
    script that sends `logging` somewhere else than to stderr.

    Args:
        work: What the thread does.
        name: Its name, which the log has.

    Returns:
        The thread.
    """

    def logged() -> None:
        try:
            work()
        except Exception:
            log.exception("the thread %s has ended with an error", name)

    thread = threading.Thread(target=logged, name=name, daemon=True)
    thread.start()
    return thread
