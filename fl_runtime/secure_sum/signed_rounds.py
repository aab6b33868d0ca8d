"""The survivors that a site has signed, a set for each round: a server cannot get two sums that differ by one site."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from fl_runtime.errors import ConfigError, PermissionDeniedError

OPEN_ROUNDS = 8
"""Number of rounds, up to the newest, in which a site still takes part."""
_VERSION = 1


class SignedRounds:
    """Which survivors a site has signed in each of the last rounds.

    Args:
        site: Name of the site, for errors.
        record: What `record` returned in an earlier process, or None.
        attempt: Number of this process in the run.

    Raises:
        ConfigError: If the record cannot be read.
        PermissionDeniedError: If the record is that of this attempt or a later one.
    """

    def __init__(self, site: str, record: Mapping[str, Any] | None = None, *, attempt: int = 1) -> None:
        self._site, self._attempt = site, attempt
        self._newest, self._signed = 0, dict[int, str]()
        if record is None:
            return
        try:
            if record["version"] != _VERSION:
                raise ValueError
            self._newest, earlier = int(record["newest"]), int(record["attempt"])
            self._signed = {int(number): str(digest) for number, digest in record["signed"].items()}
        except (KeyError, ValueError, TypeError, AttributeError):
            raise ConfigError(
                "the record of this site's secure sums cannot be read",
                where=site,
                fix="restore the file; without it this site cannot tell which survivors it has signed",
            ) from None
        if attempt <= earlier:
            raise PermissionDeniedError(
                f"the server calls this process number {attempt} of this site in the run, and number {earlier} has "
                f"signed sums of round {self._newest} already: the server may be asking for the same rounds again",
                where=f"{site}, secure sum",
                fix="ask who runs the server; give a job that is begun anew another name",
            )

    def record(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        signed = {str(number): digest for number, digest in sorted(self._signed.items())}
        return {"version": _VERSION, "attempt": self._attempt, "newest": self._newest, "signed": signed}

    def is_open(self, round: int) -> bool:
        """Whether a round is recent enough to take part in."""
        return round > self._newest - OPEN_ROUNDS

    def check_begin(self, round: int, stage: str, names: Collection[str]) -> None:
        """Check that the site may take part in a stage with these participants, and note the round.

        Raises:
            PermissionDeniedError: If it is an old round, or one whose survivors the site has signed were others.
        """
        if not self.is_open(round):
            self._refuse(f"rounds go forward: this site has begun round {self._newest}", round, stage)
        if self._signed.get(round, _digest(names)) != _digest(names):
            self._refuse("one set of survivors a round: this site has signed another", round, stage)
        self._newest = max(self._newest, round)
        self._signed = {number: digest for number, digest in self._signed.items() if self.is_open(number)}

    def sign(self, round: int, stage: str, survivors: Collection[str]) -> None:
        """Note that the site signs survivors. Raises PermissionDeniedError as `check_begin` does."""
        self.check_begin(round, stage, survivors)
        self._signed[round] = _digest(survivors)

    def _refuse(self, rule: str, round: int, stage: str) -> None:
        raise PermissionDeniedError(
            rule,
            where=f"{self._site}, secure sum of round {round}, stage {stage}",
            fix="repeat the round with the same sites, or go on to the next round",
        )


def _digest(names: Collection[str]) -> str:
    return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()
