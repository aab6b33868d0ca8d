"""Whether a server or a site daemon can do its work: checks of its disk, its audit log and its certificate."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fl_runtime.errors import FederationError
from fl_runtime.trust.certificates import read_certificate
from fl_runtime.trust.kits import CERTIFICATE

LEAST_FREE_BYTES = 2**26
"""Free space below which a disk counts as full. Journals and logs still fit, but no model does."""

Check = Callable[[], str]
"""Returns what is wrong, "" if nothing is."""


@dataclass(frozen=True)
class Health:
    """The state of one process, as `/healthz` tells it.

    Attributes:
        checks: What is looked at, in this order.
    """

    checks: Sequence[Check]

    def faults(self) -> list[str]:
        """Return what is wrong, a line each; none if all is well."""
        return [fault for check in self.checks if (fault := check())]


def disk_fault(folder: Path, what: str, least_free_bytes: int = LEAST_FREE_BYTES) -> str:
    """Return why a folder cannot be written to; "" if it can.

    Args:
        folder: The folder.
        what: What is kept there, such as "journals".
        least_free_bytes: Free space below which the disk counts as full.
    """
    try:
        free = shutil.disk_usage(folder).free
        if free < least_free_bytes:
            return f"disk full: {free} bytes are free at {folder}, {least_free_bytes} are needed"
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        return f"{what} cannot be written at {folder}: {error.strerror or error}"
    return ""


def certificate_end(kit: Path) -> datetime:
    """Return when the certificate in a kit expires, as its file is now.

    Args:
        kit: Folder of the startup kit.

    Raises:
        OSError: The file cannot be read.
        FederationError: It is not a certificate of ours.
    """
    return read_certificate((kit / CERTIFICATE).read_bytes()).not_after


def certificate_fault(kit: Path) -> str:
    """Return why the certificate in a kit cannot be used any more; "" if it can.

    Args:
        kit: Folder of the startup kit.
    """
    try:
        end = certificate_end(kit)
    except (OSError, FederationError) as error:
        return f"the certificate in {kit} cannot be read: {error}"
    if end > datetime.now(end.tzinfo):
        return ""
    return f"the certificate in {kit} expired on {end:%Y-%m-%d %H:%M} UTC"
