"""The call with which a site sends the small files that the final model needs beside its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fl_runtime.errors import ProtocolError
from fl_runtime.server.calls.spool import FairShare, Spool, receive_frames
from fl_runtime.server.records.model_files import DescribedFiles, FilesAnswer
from fl_runtime.server.run import Run
from fl_runtime.transport.base import Peer
from fl_runtime.wire import model_files
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest


class FilesCalls:
    """Takes the files of sites. Names and sizes are checked before contents are received, and those before they count.

    Args:
        run: The run.
        spool: Where the files arrive.
    """

    def __init__(self, run: Run, spool: Spool) -> None:
        self._run, self._spool = run, spool

    def take(
        self, peer: Peer, attempt: int, header: pb.FilesHeader, requests: Iterator[bytes], share: FairShare
    ) -> Iterator[bytes]:
        """Answer the call of one site.

        Args:
            peer: The site.
            attempt: Number of its process.
            header: The first message.
            requests: The messages after it.
            share: What the other sites need of the disk.

        Yields:
            The encoded messages of the answer.

        Raises:
            ProtocolError: A file may not travel, or does not hold what its name says.
        """
        self._run.check_attempt(peer.name, attempt)
        described = self._described(peer.name, header)
        peer.account.read()
        state, files = self._run.state, self._run.files
        with state.lock:
            answer = files.answer(described)
        if answer is None:
            transfer = self._spool.begin(
                peer.name, described.digest, described.manifest, described.digests, share, peer.hang_up
            )
            with self._spool.receiving(transfer):
                yield pb.SubmitReply(send_from=transfer.receiver.arrived).SerializeToString()
                yield from receive_frames(transfer, requests, peer.turns.ask(0), math.inf)  # they are small
                for name, content in transfer.receiver.finish()[0].items():
                    model_files.check_contents(name, content.tobytes())
            with state.lock:
                answer = files.keep(described, transfer.blob)
        else:
            peer.account.void()
        yield pb.SubmitReply(accepted=_accepted(answer)).SerializeToString()

    @staticmethod
    def _described(site: str, header: pb.FilesHeader) -> DescribedFiles:
        payload = header.payload
        if len(payload.manifest.tensors) > model_files.MAX_FILES:
            raise ProtocolError(f"{site} announces {len(payload.manifest.tensors)} files beside the model")
        manifest = Manifest.from_proto(payload.manifest)
        model_files.check_described(manifest)
        if len(payload.digests) != 8 * len(manifest.tensors) or payload.total_bytes != manifest.nbytes:
            raise ProtocolError(f"the files of {site} do not have the digests or the size that it announces")
        if header.weights_file not in model_files.WEIGHTS_FILES:
            raise ProtocolError(f"no framework reads weights from {header.weights_file[:100]!r}")
        return DescribedFiles(site, manifest, payload.digests, header.weights_file)


def _accepted(answer: FilesAnswer) -> pb.Accepted:
    return pb.Accepted(status=answer.status, kept_of=answer.kept_of, differ=answer.differ)
