"""An error that ends a thread beside a script is in the script's log."""

from __future__ import annotations

import logging

import pytest
from study import until

from fl_runtime.client.presence import Presence
from fl_runtime.transport.threads import start_thread
from fl_runtime.wire.fl.v1 import federation_pb2 as pb


def test_an_error_that_ends_a_thread_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        raise KeyError("no such tensor")

    thread = start_thread(work, "fl-steps")
    thread.join(10)
    (line,) = caplog.records
    assert (line.levelno, line.getMessage()) == (logging.ERROR, "the thread fl-steps has ended with an error")
    assert line.exc_info is not None and isinstance(line.exc_info[1], KeyError)


def test_an_error_in_the_thread_that_shows_a_site_as_present_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    presence = Presence(None, pb.Session(attempt=1))  # type: ignore[arg-type]
    until(lambda: caplog.records, "the line")
    presence.close()
    assert [line.getMessage() for line in caplog.records] == ["the thread fl-presence has ended with an error"]
