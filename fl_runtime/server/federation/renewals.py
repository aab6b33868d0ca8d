"""Renewed certificates: once the new one was seen in use, the one that it replaces does not count any more."""

from __future__ import annotations

import json
import logging
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fl_runtime.errors import ConfigError, StoreError
from fl_runtime.trust.certificates import Certificate, load
from fl_runtime.trust.files import write_file
from fl_runtime.version import check_format

log = logging.getLogger(__name__)

RENEWALS = "renewals.json"
"""File in the server's kit with the record."""

_FORMAT = 1  # of a file without a number

GRACE = timedelta(seconds=60)
"""How long a replaced certificate still counts after the new one was first used, for calls that are under way."""


class Renewals:
    """The newest certificate of each key and root that was ever used, in a file that survives a restart.

    The authority cannot know whether a renewed certificate has reached its owner. So the earlier one counts until the
    server sees the new one: a participant whose renewal was lost is not locked out. During a rotation of the authority,
    certificates of the old root count until it is retired.

    Args:
        path: The file; created with the first certificate.

    Raises:
        ConfigError: If the file cannot be read.
        NewerFormatError: A later version wrote it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._newest: dict[str, tuple[datetime, datetime]] = {}  # key and root -> begin of validity, first use
        if not path.exists():
            return
        try:
            entries = json.loads(path.read_bytes())
            check_format(entries.get("format"), _FORMAT, "the record of renewed certificates", where=str(path))
            for key, (begins, used) in entries.items():
                self._newest[key] = datetime.fromisoformat(begins), datetime.fromisoformat(used)
        except (OSError, ValueError, TypeError, AttributeError):
            raise ConfigError(
                "the record of renewed certificates cannot be read",
                where=str(path),
                fix="delete the file: replaced certificates then count until the renewed ones are used again",
            ) from None

    def replaced_since(self, certificate: Certificate) -> datetime | None:
        """Note that a certificate is being used, and tell whether a newer one of the same key has replaced it.

        Args:
            certificate: A valid certificate, whose key the caller has.

        Returns:
            When the newer one was first used, in UTC; None if this one counts.
        """
        now = datetime.now(UTC)
        with self._lock:
            key = f"{certificate.fingerprint} {load(certificate.pem).issuer.rfc4514_string()}"
            begins, used = self._newest.get(key, (None, now))
            if begins is not None and certificate.not_before <= begins:
                return used if certificate.not_before < begins and now > used + GRACE else None
            self._newest[key] = certificate.not_before, now
            entries = {name: [at.isoformat() for at in times] for name, times in self._newest.items()}
            try:
                write_file(self._path, json.dumps(entries, indent=1).encode())
            except StoreError as error:  # this process remembers it all the same
                log.warning("%s", error)
            return None
