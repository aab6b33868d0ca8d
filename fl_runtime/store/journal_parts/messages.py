"""The part of a run's journal that is about the messages of a protocol with several steps in a round."""

from __future__ import annotations

from contextlib import AbstractContextManager

from fl_runtime.store.database import Database

TABLE = (
    "CREATE TABLE IF NOT EXISTS message (round INTEGER, stage TEXT, step TEXT, site TEXT, body TEXT NOT NULL, "
    "PRIMARY KEY (round, stage, step, site))"
)


class MessageJournal:
    """Records what sites have answered to the steps of a round. It is not thread-safe: callers hold the run's lock.

    A message is recorded before its site learns that it has arrived, so that a killed server goes on where it stopped.
    Every method raises StoreError if the database fails.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def write(self, round: int, stage: str, step: str, site: str, body: str) -> None:
        """Record a message, in place of an earlier one of the same step and site.

        Args:
            round: Number of the round; 0 for what holds in every round.
            stage: Label of the try at the round.
            step: Name of the step.
            site: Name of the site; "" for what the server itself has decided.
            body: The message as text.
        """
        self._db.run(
            "INSERT INTO message VALUES (?, ?, ?, ?, ?) ON CONFLICT (round, stage, step, site) "
            "DO UPDATE SET body=excluded.body",
            *(round, stage, step, site, body),
        )

    def together(self) -> AbstractContextManager[None]:
        """Record all messages of the block, or none of them if it raises."""
        return self._db.transaction()

    def read(self, round: int, stage: str) -> dict[tuple[str, str], str]:
        """Return the messages of one try at a round: (step, site) -> body."""
        found = self._db.rows("SELECT step, site, body FROM message WHERE round=? AND stage=?", round, stage)
        return {(step, site): body for step, site, body in found}

    def forget_before(self, round: int) -> None:
        """Delete the messages of the rounds before this one, but for those of round 0."""
        self._db.run("DELETE FROM message WHERE round > 0 AND round < ?", round)
