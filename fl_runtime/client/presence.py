"""The presence stream of a site, by which the server notices at once when the site's process is gone."""

from __future__ import annotations

import logging
import threading

from fl_runtime.client.calls import FIRST_PAUSE_S, LONGEST_PAUSE_S, PatientCalls
from fl_runtime.errors import ConnectionLostError, FederationError, StoreError
from fl_runtime.transport.threads import start_thread
from fl_runtime.transport.watchdog import WatchedCall
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)


class Presence:
    """Holds an Attend call open in a thread of its own, until it is closed."""

    def __init__(self, calls: PatientCalls, session: pb.Session) -> None:
        self._calls, self._message = calls, pb.SessionRequest(session=session).SerializeToString()
        self._closed = threading.Event()
        self._call: WatchedCall | None = None
        self._thread = start_thread(self._hold, "fl-presence")

    def _hold(self) -> None:
        """Open the call again after every break. The calls of the site's own thread decide when to give up."""
        pause_s = FIRST_PAUSE_S
        while not self._closed.is_set():
            try:
                with self._calls.begin("Attend", self._message) as self._call:
                    if self._closed.is_set():
                        self._call.cancel()
                    for _ in self._call:
                        pause_s = FIRST_PAUSE_S
            except (ConnectionLostError, StoreError):  # a server that halts or is being stopped may be back soon
                log.debug("presence lost; opening it again")
            except FederationError as error:  # another process took over, or the run failed: the next call reports it
                log.debug("presence ended: %s", error)
                return
            if self._closed.wait(pause_s):
                return
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def close(self) -> None:
        """End the call; the server then waits `rejoin_s` seconds for the site to come back."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()
