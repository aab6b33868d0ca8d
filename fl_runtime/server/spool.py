"""Where arriving updates lie until they are accepted: one blob per transfer, resumable, checked before it counts."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

from fl_runtime.store.blobs import Blob, Blobs
from fl_runtime.wire.frames import Receiver
from fl_runtime.wire.manifest import Manifest


@dataclass
class Transfer:
    """One upload under way. `receiver` fills `blob`."""

    site: str
    digest: bytes
    blob: Blob
    receiver: Receiver


class Spool:
    """Transfers by site and digest. A broken one is kept, so that it resumes where it stopped."""

    def __init__(self, blobs: Blobs, lock: threading.RLock) -> None:
        self._blobs, self._lock = blobs, lock
        self._broken: dict[str, Transfer] = {}
        self._number = itertools.count()

    def begin(self, site: str, digest: bytes, manifest: Manifest, digests: bytes) -> Transfer:
        """A new transfer, or the site's broken one if it is of the same content."""
        with self._lock:
            broken = self._broken.pop(site, None)
            if broken and broken.digest == digest:
                return broken
            if broken:
                self._blobs.free(broken.blob)
            blob = self._blobs.create(f"upload-{next(self._number)}", manifest)
        return Transfer(site, digest, blob, Receiver(manifest, digests, blob.buffer, finite=True))

    def broke(self, transfer: Transfer) -> None:
        """Keep what has arrived; an earlier broken transfer of the site is given up."""
        with self._lock:
            old = self._broken.pop(transfer.site, None)
            if old:
                self._blobs.free(old.blob)
            self._broken[transfer.site] = transfer

    def drop(self, transfer: Transfer) -> None:
        with self._lock:
            self._blobs.free(transfer.blob)
