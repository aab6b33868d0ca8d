"""The spool: files in which updates arrive. Each is verified before it counts, and a broken upload can resume."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

from fl_runtime.store.blobs import Blob, Blobs
from fl_runtime.wire.frames import Receiver
from fl_runtime.wire.manifest import Manifest


@dataclass
class Transfer:
    """One upload under way.

    Attributes:
        site: The site that uploads.
        digest: Digest of the whole update.
        blob: The file that it is written to.
        receiver: Checks what arrives, and writes it into the blob.
    """

    site: str
    digest: bytes
    blob: Blob
    receiver: Receiver


class Spool:
    """The uploads of all sites. Each site's last broken upload is kept, so that it can resume. Takes the run's lock."""

    def __init__(self, blobs: Blobs, lock: threading.RLock) -> None:
        self._blobs, self._lock = blobs, lock
        self._broken: dict[str, Transfer] = {}
        self._number = itertools.count()

    def begin(self, site: str, digest: bytes, manifest: Manifest, digests: bytes) -> Transfer:
        """A new transfer, or the site's broken one if that is of the same update."""
        with self._lock:
            broken = self._broken.pop(site, None)
            if broken and broken.digest == digest:
                return broken
            if broken:
                self._blobs.free(broken.blob)
            blob = self._blobs.create(f"upload-{next(self._number)}", manifest)
        return Transfer(site, digest, blob, Receiver(manifest, digests, blob.buffer, finite=True))

    def keep_broken(self, transfer: Transfer) -> None:
        """Keep what has arrived of a broken transfer, in place of an earlier one of the site."""
        with self._lock:
            old = self._broken.pop(transfer.site, None)
            if old:
                self._blobs.free(old.blob)
            self._broken[transfer.site] = transfer

    def drop(self, transfer: Transfer) -> None:
        """Free the file of a transfer that will not be continued."""
        with self._lock:
            self._blobs.free(transfer.blob)
