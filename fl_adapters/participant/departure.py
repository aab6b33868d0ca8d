"""How a training ends for a site: after its last round, early, or because another session goes on with it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fl_adapters.participant.gate import Gate
from fl_adapters.participant.policy_gate import LeaveReason
from fl_runtime.client import SiteClient


class Departure:
    """Tells the server how this site's part in a training ends.

    After that the script may go on and train again. The connection therefore stays open until the script's next
    training has begun or the script has ended, so that the server knows that the site is still there.

    Attributes:
        closed: Whether the session has ended.
        left: Whether the training is over for the site: it has had the final model, or has told the server that it
            leaves early. Otherwise another session of the site goes on with it.
    """

    def __init__(
        self,
        client: SiteClient,
        gate: Gate,
        *,
        trains_again: bool,
        registered: Callable[[], bool],
        on_close: Callable[[], None],
    ) -> None:
        """Prepare for the end.

        Args:
            client: The connection to the server.
            gate: The site's gate, which knows what may be said.
            trains_again: Whether the job takes another training of the script after this one.
            registered: Whether the handshake is done. A site that leaves before has not trained, and may try again.
            on_close: Called when the session ends.
        """
        self.closed = self.left = False
        self._client, self._gate, self._trains_again = client, gate, trains_again
        self._registered, self._on_close = registered, on_close
        self._resting = False

    def leave(self, reason: LeaveReason, *, early: bool) -> None:
        """Leave the training. Does nothing if the session has ended.

        Args:
            reason: Why.
            early: Whether it is before the last round.
        """
        if self.closed:
            return
        stays = self._trains_again and self._registered()
        heard = self._client.leave(self._gate.leave(reason, early=early), early=early, stays=stays)
        self.closed, self._resting = True, heard and stays
        self.left = self._registered() and (heard or not early)
        self._on_close()
        if not self._resting:
            self._client.close()

    def detach(self) -> None:
        """End the session without a word, because the next attempt or training of this site replaces it."""
        self.closed, self._resting = True, False
        self._on_close()
        self._client.close()

    def end_script(self, *, early: bool) -> None:
        """Tell the server that the script trains no more, if the server waits for that.

        Args:
            early: Whether the script has ended with an error.
        """
        if self._resting:
            self._client.leave("its script has ended", early=early)
            self.detach()


def trains_after(training: int, most: int | None) -> bool:
    """Return whether the server should wait for another training, or for the end of the script.

    An interactive session, such as a notebook, may stay open for days after its training. Unless the job says how many
    trainings it holds, the server does not wait for those.

    Args:
        training: Number of the training that ends.
        most: Largest number of trainings in the job; None for any number.
    """
    return training < most if most is not None else not hasattr(sys, "ps1")
