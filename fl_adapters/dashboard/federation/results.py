"""Result files of a job, passed from the server to a browser piece by piece."""

from __future__ import annotations

import hashlib
import time
import zipfile
from collections.abc import Iterator, Sequence

from fl_adapters.dashboard.federation.view import ResultFile
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConnectionLostError, TransferDamagedError
from fl_runtime.transport.base import Transport

_PATIENCE_S, _PAUSE_S = 30.0, 0.5


def pieces_of(transport: Transport, job: str, file: ResultFile) -> Iterator[bytes]:
    """Fetch a result file. A lost connection is made again, and the file goes on where it stopped.

    Args:
        transport: Connection to the server as an admin.
        job: Name of the job.
        file: The file, as the server has listed it.

    Yields:
        The pieces of the file.

    Raises:
        ConnectionLostError: The server is out of reach.
        FederationError: The server refused the call.
        TransferDamagedError: The file is not what the server has listed. The last piece is held back until that is
            known, so that a browser sees that the download is not whole.
    """
    digest, held, lost_since = hashlib.sha256(), b"", None
    done = 0
    while True:
        try:
            for piece in ControlClient(transport).stream("Download", job=job, file=file.path, **{"from": done}):
                taken = piece[: file.size_bytes - done]
                done += len(taken)
                digest.update(taken)
                lost_since = None
                if held:
                    yield held
                held = taken
            break
        except ConnectionLostError:
            lost_since = lost_since or time.monotonic()
            if time.monotonic() > lost_since + _PATIENCE_S:
                raise
        time.sleep(_PAUSE_S)
    if digest.hexdigest() != file.sha256:
        raise TransferDamagedError(
            f"{file.path} did not arrive as the server has it", where=f"job {job}", fix="download it again"
        )
    yield held


def archive_of(transport: Transport, job: str, files: Sequence[ResultFile]) -> Iterator[bytes]:
    """Fetch all result files of a job as one ZIP archive, which needs no room on this machine.

    Args:
        transport: Connection to the server as an admin.
        job: Name of the job, which is the folder in the archive.
        files: The files, as the server has listed them.

    Yields:
        The pieces of the archive.

    Raises:
        FederationError: As `pieces_of` does.
    """
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:  # type: ignore[call-overload]
        for file in files:
            info = zipfile.ZipInfo(f"{job}/{file.path}", time.localtime()[:6])
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as entry:
                for piece in pieces_of(transport, job, file):
                    entry.write(piece)
                    yield sink.taken()
            yield sink.taken()
    yield sink.taken()


class _Sink:
    """A file that cannot seek, from which what was written is taken away."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        return

    def taken(self) -> bytes:
        data, self._parts = b"".join(self._parts), []
        return data
