"""The spool: files in which updates arrive. Each is verified before it counts, and a broken upload can resume.

The space of an upload is allocated when it is announced, so the free space of the disk is what all announced uploads
leave. One that does not fit is refused before anything is allocated, and the run goes on.
"""

from __future__ import annotations

import errno
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fl_runtime.errors import ConnectionLostError, FederationError, ProtocolError, StoreError, TransferDamagedError
from fl_runtime.server.calls.requests import expected
from fl_runtime.store.blobs import UPLOAD, Blob, Blobs
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.transport.turns import Turn
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.frames import Receiver
from fl_runtime.wire.manifest import Manifest

_HEADROOM_BYTES = 16 * 2**20
"""Free space that uploads leave to the journal, the histories and the audit log."""
_HANG_UP_S = 10.0
WAITING = pb.SubmitReply(waiting=pb.Waiting()).SerializeToString()
"""Sign of life to a site that waits for its turn."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoomError(StoreError):
    """The disk has no room for an upload. The site repeats it while its patience lasts, and the run goes on."""


@dataclass(frozen=True)
class FairShare:
    """What the uploads of a round take if every site sends the weights alone.

    Attributes:
        weights_bytes: Size of the weights.
        others: Number of the run's other sites, and of the models that the server makes of their updates.
    """

    weights_bytes: int
    others: int


@dataclass
class Transfer:
    """One upload under way.

    Attributes:
        site: The site that uploads.
        digest: Digest of the whole update.
        blob: The file that it is written to.
        receiver: Checks what arrives, and writes it into the blob.
        hang_up: Ends the call that it arrives by.
        usual: Whether it is no larger than the weights, so that its file will be of use again.
    """

    site: str
    digest: bytes
    blob: Blob
    receiver: Receiver
    hang_up: Callable[[], object]
    usual: bool


def receive_frames(
    transfer: Transfer, requests: Iterator[bytes], turn: Turn, beat_s: float
) -> Generator[bytes, None, int]:
    """Take frames until the payload is whole.

    Args:
        transfer: The transfer.
        requests: The messages of its call.
        turn: Its turn.
        beat_s: Seconds between signs of life to the site while the transfer waits for its turn.

    Yields:
        The signs of life.

    Returns:
        The bytes of the messages.
    """
    count = 0
    while transfer.receiver.arrived < transfer.receiver.manifest.nbytes:
        yield from turn.beats(beat_s, WAITING)
        nbytes = _take_frame(transfer, requests)
        count += nbytes
        turn.moved(nbytes)
    return count


def _take_frame(transfer: Transfer, requests: Iterator[bytes]) -> int:
    """Take the next frame, which is free again while the one after it arrives; returns its bytes."""
    message = expected(requests, f"an upload ended after {transfer.receiver.arrived} bytes")
    if not frames.is_frame(message):
        raise ProtocolError(f"an upload has no frame after {transfer.receiver.arrived} bytes")
    transfer.receiver.take(frames.frame_data(message))
    return len(message)


class Spool:
    """The uploads of all sites, one of each at a time. Takes the run's lock.

    Each site's last broken upload is kept, so that it can resume.
    """

    def __init__(self, blobs: Blobs, lock: threading.RLock) -> None:
        self._blobs, self._lock = blobs, lock
        self._ended = threading.Condition(lock)
        self._active: dict[str, Transfer] = {}
        self._broken: dict[str, Transfer] = {}
        self._number = itertools.count()

    def begin(
        self,
        site: str,
        digest: bytes,
        manifest: Manifest,
        digests: bytes,
        share: FairShare,
        hang_up: Callable[[], object],
    ) -> Transfer:
        """Begin a transfer, or go on with the site's broken one if that is of the same update.

        An earlier upload of the site that is still under way is ended: its process has taken up another one.

        Args:
            site: The site that uploads.
            digest: Digest of the whole update.
            manifest: Its tensors.
            digests: Digest of each tensor.
            share: What the other sites need of the disk.
            hang_up: Ends the call.

        Returns:
            The transfer, for `receiving`.

        Raises:
            NoRoomError: The disk has no room for it.
            ConnectionLostError: The site's earlier upload does not end.
        """
        with self._lock:
            self._end_earlier(site)
            broken = self._broken.pop(site, None)
            if broken and broken.digest == digest:
                broken.hang_up = hang_up
                self._active[site] = broken
                return broken
            if broken:
                self._give_back(broken)
            blob = self._created(site, manifest, share)
            receiver = Receiver(manifest, digests, blob.buffer, finite=True)
            usual = manifest.nbytes <= share.weights_bytes
            self._active[site] = transfer = Transfer(site, digest, blob, receiver, hang_up, usual)
            return transfer

    @contextmanager
    def receiving(self, transfer: Transfer) -> Iterator[None]:
        """End a transfer when the block has received it: whole, dropped, or kept so that the site can resume it.

        Args:
            transfer: The transfer. Its file belongs to the caller if the block raises nothing.
        """
        try:
            yield
        except TransferDamagedError:  # keep the part that is intact
            self.keep_broken(transfer)
            raise
        except FederationError:
            self.drop(transfer)
            raise
        except BaseException:  # the connection broke: keep what has arrived for the next attempt
            self.keep_broken(transfer)
            raise
        self.end(transfer)

    def end(self, transfer: Transfer) -> None:
        """Note that a transfer is whole. Its file belongs to the caller from now on."""
        with self._lock:
            self._active.pop(transfer.site, None)
            self._ended.notify_all()

    def _end_earlier(self, site: str) -> None:
        deadline = time.monotonic() + _HANG_UP_S
        while (earlier := self._active.get(site)) is not None:
            earlier.hang_up()
            if self._active.get(site) is earlier and not self._ended.wait(deadline - time.monotonic()):
                raise ConnectionLostError(f"an earlier upload of {site} is still under way", fix="send it again")

    def _created(self, site: str, manifest: Manifest, share: FairShare) -> Blob:
        """Create the file of an upload. One that is larger than the weights must leave the others their room."""
        if not self._blobs.recycles(manifest):
            excess = manifest.nbytes > share.weights_bytes
            needed = manifest.nbytes + _HEADROOM_BYTES + excess * share.others * share.weights_bytes
            if self._free_bytes() < needed:
                self._blobs.trim()
            free = self._free_bytes()
            if free < needed:
                raise _no_room(site, manifest, f"{free} are free, and {needed - manifest.nbytes} must be left")
        try:
            return self._blobs.create(f"{UPLOAD}{next(self._number)}", manifest)
        except StoreError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
                raise _no_room(site, manifest, error.what) from error
            raise

    def _free_bytes(self) -> int:
        """Free space of the disk. Raises StoreError if the disk fails."""
        try:
            return shutil.disk_usage(self._blobs.folder).free
        except OSError as error:
            raise disk_error(error, self._blobs.folder) from error

    def _give_back(self, transfer: Transfer) -> None:
        (self._blobs.free if transfer.usual else self._blobs.discard)(transfer.blob)

    def keep_broken(self, transfer: Transfer) -> None:
        """Keep what has arrived of a broken transfer, in place of an earlier one of the site."""
        with self._lock:
            self.end(transfer)
            old = self._broken.pop(transfer.site, None)
            if old:
                self._give_back(old)
            self._broken[transfer.site] = transfer

    def drop(self, transfer: Transfer) -> None:
        """Free the file of a transfer that will not be continued."""
        with self._lock:
            self.end(transfer)
            self._give_back(transfer)


def _no_room(site: str, manifest: Manifest, why: str) -> NoRoomError:
    return NoRoomError(
        f"the server's disk has no room for an upload of {manifest.nbytes} bytes by {site}: {why}",
        where="rule quota: announced bytes must fit the free disk",
        fix="free disk space at the server; the site repeats the upload",
    )
