"""What a journal holds about failed tries at a model, and about the sites that were to blame for them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fl_runtime.store.database import Database


class FailureRecord:
    """The part of a run's journal about failures. It is not thread-safe: callers hold the run's lock.

    Every method raises StoreError if the database fails.

    Args:
        database: Where the journal's entries are.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def tries(self, round: int) -> int:
        """Return how many times a round has failed since the last one was committed."""
        return self._repeats(round)[0]

    def blamed(self, round: int) -> int:
        """Return for how many of these failures sites were to blame."""
        return self._repeats(round)[1]

    def suspects(self) -> dict[str, list[int]]:
        """Return the sites that were to blame for failures, each with the rounds, in order."""
        suspects: dict[str, list[int]] = json.loads(self._db.get("suspected") or "{}")
        return suspects

    def round_failed(self, round: int, tries: int, suspects: Sequence[str]) -> None:
        """Record that a round failed. Called within a transaction.

        Args:
            round: Its number.
            tries: How many times it has failed; 0 if it will not be opened again.
            suspects: Sites that were to blame.
        """
        self._db.put("repeats", json.dumps([round, tries, self.blamed(round) + bool(suspects)]))
        self._suspect(suspects, round)

    def buffer_failed(self, version: int, suspects: Sequence[str]) -> None:
        """Record that the updates in the buffer made no model, and take those of the sites out that were to blame.

        Args:
            version: Version of the model.
            suspects: The sites.
        """
        left = [(site, number) for site, number in json.loads(self._db.get("buffer") or "[]") if site not in suspects]
        with self._db.transaction():
            self._db.put("buffer", json.dumps(left))
            self._suspect(suspects, version)

    def forget(self) -> None:
        """Forget the sites that were to blame, since the run begins anew with all of them. Within a transaction."""
        self._db.put("suspected", "{}")

    def _repeats(self, round: int) -> tuple[int, int]:
        """Tries and blamed tries; journals of earlier versions lack the second number."""
        number, tries, *blamed = json.loads(self._db.get("repeats") or "[0, 0]")
        return (int(tries), int(blamed[0]) if blamed else 0) if number == round else (0, 0)

    def _suspect(self, sites: Sequence[str], round: int) -> None:
        if sites:
            suspects = self.suspects()
            again = {site: [*suspects.get(site, []), round] for site in sites}
            self._db.put("suspected", json.dumps({**suspects, **again}))
