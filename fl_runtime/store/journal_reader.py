"""What a run's journal holds, as a restarted server reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fl_runtime.errors import FederationError, StoreError
from fl_runtime.store.database import Database
from fl_runtime.store.journal_entries import ModelEntry, RoundEntry, StrategyStateEntry, UpdateEntry, row_check
from fl_runtime.types import Terms
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

RESTORE = "restore the file from a copy, or start the job again under another name"


class JournalReader:
    """The reading side of a `Journal`. It is not thread-safe: callers hold the run's lock.

    Every method raises StoreError if the database fails.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def finished(self) -> bool:
        """Whether the run has ended without an error."""
        return self._db.get("ended") == "null"

    def failed(self) -> bool:
        """Whether the run has ended with an error."""
        return self._db.get("ended") not in (None, "null")

    def over(self) -> bool:
        """Whether the job had ended with this run: no site's script could begin another training."""
        value = self._db.get("over")
        return self.finished() if value is None else value == "true"  # jobs of earlier versions had one run

    def rounds(self) -> int | None:
        """Return the number of rounds that the handshake agreed on, or None before it."""
        value = self._db.get("rounds")
        return int(value) if value else None

    def terms(self) -> Terms:
        """Return the terms that the sites' scripts agreed on; defaults before the handshake and in older journals."""
        value = self._db.get("terms")
        return Terms(**json.loads(value)) if value else Terms()

    def sites(self) -> Iterator[tuple[str, int, dict[str, Any] | None]]:
        """Yield (name, attempt, registration) of every site that has ever joined."""
        for name, attempt, registration in self._db.rows("SELECT name, attempt, registration FROM site"):
            yield name, attempt, json.loads(registration) if registration else None

    def manifest(self, layout: bytes) -> Manifest:
        """Return the manifest that was recorded under a layout.

        Raises:
            StoreError: If there is none, or it is damaged.
        """
        rows = self._db.rows("SELECT manifest FROM layout WHERE layout=?", layout)
        if not rows:
            raise StoreError(
                f"the journal is damaged: it has no manifest for layout {layout.hex()}",
                where=self._db.where,
                fix=RESTORE,
            )
        manifest = Manifest.from_proto(pb.Manifest.FromString(rows[0][0]))
        if manifest.layout != layout:
            raise self._damaged("a layout")
        return manifest

    def manifests(self) -> list[Manifest]:
        """Return every manifest on record."""
        return [
            Manifest.from_proto(pb.Manifest.FromString(row[0])) for row in self._db.rows("SELECT manifest FROM layout")
        ]

    def models(self) -> list[ModelEntry]:
        """Return the models on record, in the order of their versions."""
        return [ModelEntry(*row) for row in self._db.rows("SELECT * FROM model ORDER BY version")]

    def strategy_state(self) -> StrategyStateEntry | None:
        """Return the strategy's own state beside the newest model, or None."""
        rows = self._db.rows("SELECT blob, layout FROM kept")
        return StrategyStateEntry(*rows[0]) if rows else None

    def round_entries(self) -> list[RoundEntry]:
        """Return all rounds on record, in order."""
        rows = self._db.rows("SELECT round, participants, opened_at, result FROM round ORDER BY round")
        return [RoundEntry(r, tuple(json.loads(p)), at, json.loads(x) if x else None) for r, p, at, x in rows]

    def updates(self, round: int) -> list[UpdateEntry]:
        """Return the accepted updates of a round.

        Raises:
            StoreError: If an entry's check sum is wrong.
        """
        rows = self._db.rows("SELECT round, site, digest, blob, layout, header FROM update_ WHERE round=?", round)
        return [self._update_of(row) for row in rows]

    def buffer(self) -> list[UpdateEntry]:
        """Return the updates in the buffer of a buffered run, in the order of arrival."""
        rows = {(entry.site, entry.round): entry for entry in self.last_updates()}
        return [rows[site, number] for site, number in json.loads(self._db.get("buffer") or "[]")]

    def last_updates(self) -> list[UpdateEntry]:
        """Return the newest update of every site, and in a buffered run those in the buffer."""
        rows = self._db.rows("SELECT round, site, digest, blob, layout, header FROM update_")
        return [self._update_of(row) for row in rows]

    def last_used(self) -> dict[str, int]:
        """Return, for each site, the last round whose task it answered with an accepted update."""
        rows = self._db.rows("SELECT site, header FROM update_ ORDER BY round")
        return {site: json.loads(header.split("\n")[0])["round"] for site, header in rows}

    def scores(self) -> Iterator[tuple[int, str, dict[str, Any], int]]:
        """Yield (version, site, metrics, number of examples) of every evaluation."""
        for version, site, metrics, n in self._db.rows("SELECT version, site, metrics, num_examples FROM score"):
            yield version, site, json.loads(metrics), n

    def who_left(self) -> dict[str, FederationError | None]:
        """Return the sites that have left and not come back, each with the error if it was excluded, or None."""
        sites: list[str] = json.loads(self._db.get("left") or "[]")
        errors: dict[str, dict[str, str]] = json.loads(self._db.get("refusals") or "{}")
        return {site: FederationError.from_wire(errors[site]) if site in errors else None for site in sites}

    def who_is_lost(self) -> list[str]:
        """Return the names of the sites whose connection was lost for too long, and that have not come back."""
        sites: list[str] = json.loads(self._db.get("lost") or "[]")
        return sites

    def who_rests(self) -> list[str]:
        """Return the names of the sites that have left, and whose scripts may begin another training."""
        sites: list[str] = json.loads(self._db.get("resting") or "[]")
        return sites

    def _update_of(self, row: tuple[Any, ...]) -> UpdateEntry:
        """Return the entry of a row after comparing its check sum, which rows of older journals lack."""
        round, site, digest, blob, layout, text = row
        header, _, check = text.partition("\n")
        if check and check != row_check((round, site, digest, blob, layout), header):
            raise self._damaged("an update's entry")
        return UpdateEntry(round, site, digest, blob, layout, json.loads(header))

    def _damaged(self, what: str) -> StoreError:
        return StoreError(
            f"the journal is damaged: {what} differs from what was written", where=self._db.where, fix=RESTORE
        )
