"""The small files that sites send beside the final model, such as config.json and a tokenizer.

Every site may send its own. Those of the first site in the job's order go with the model, whoever sends first, and the
other sites' are only compared with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fl_runtime.errors import ProtocolError
from fl_runtime.server.state import RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.store.tensorfile import write_tensors
from fl_runtime.trust.files import write_file
from fl_runtime.types import Arrays
from fl_runtime.wire import frames
from fl_runtime.wire.manifest import Manifest


@dataclass(frozen=True)
class DescribedFiles:
    """The files of one site, as it announces them.

    Attributes:
        site: The site.
        manifest: One tensor for each file: its name and its bytes.
        digests: xxh3-64 of every file, in the manifest's order.
        weights_file: File that the framework reads the weights from; "" for model.safetensors.
    """

    site: str
    manifest: Manifest
    digests: bytes
    weights_file: str

    @property
    def digest(self) -> bytes:
        """Identifier of the names and contents of all files."""
        return frames.digest_of(self.manifest, self.digests)

    @property
    def files(self) -> dict[str, str]:
        """Name of each file -> digest of its contents in hexadecimal."""
        starts = range(0, len(self.digests), 8)
        return {
            spec.name: self.digests[start : start + 8].hex()
            for spec, start in zip(self.manifest.tensors, starts, strict=True)
        }


@dataclass(frozen=True)
class FilesAnswer:
    """What becomes of the files of one site.

    Attributes:
        status: "kept": they go with the model, unless a site before this one sends others. "same": those that go with
            the model are the same. "different": they are not.
        kept_of: The site whose files go with the model.
        differ: Names of the files that differ from that site's.
    """

    status: Literal["kept", "same", "different"]
    kept_of: str
    differ: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Kept:
    """The files that go with the model, as the journal has them, and where they lie."""

    site: str
    weights_file: str
    blob: Blob


class ModelFiles:
    """The files that go with the final model of a run. Used under the run's lock."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._order = {name: index for index, name in enumerate(state.settings.sites)}
        self._sent: dict[str, dict[str, str]] = {}  # site -> name of a file -> its digest
        self._kept: _Kept | None = None
        self._closed = False

    def recover(self) -> None:
        """Go on with what the journal holds."""
        journal = self._state.journal
        entry = journal.files.read()
        if entry is not None:
            blob = self._state.blobs.open(entry["blob"], journal.reader.manifest(bytes.fromhex(entry["layout"])))
            self._sent = entry["sent"]
            self._kept = _Kept(entry["site"], entry["weights_file"], blob)

    def blob_names(self) -> set[str]:
        """Name of the tensor file that the files lie in, if there are any."""
        return {self._kept.blob.name} if self._kept else set()

    def answer(self, described: DescribedFiles) -> FilesAnswer | None:
        """Say what becomes of a site's files.

        Args:
            described: The files.

        Returns:
            The answer; None if their contents are wanted first.

        Raises:
            ProtocolError: The last round is not over yet, or the results are written already.
        """
        site, kept = described.site, self._kept
        if self._state.phase not in ("final", "done") or self._closed:
            when = "the results of this run are written already" if self._closed else "the last round is not over yet"
            raise ProtocolError(f"the files beside the model come at the wrong time: {when}", where=site)
        if kept is None:
            return None
        if described.files == self._sent[kept.site]:
            answer = FilesAnswer("kept" if site == kept.site else "same", kept.site)
        elif self._order[site] <= self._order[kept.site]:
            return None
        else:
            answer = FilesAnswer("different", kept.site, _differing(described.files, self._sent[kept.site]))
        if self._sent.get(site) != described.files:
            self._record(described, answer)
        return answer

    def keep(self, described: DescribedFiles, blob: Blob) -> FilesAnswer:
        """Keep files whose contents have been checked, in place of another site's.

        Args:
            described: The files.
            blob: What they lie in. It is taken over, and given back if other files have come in the meantime.

        Returns:
            What becomes of them.
        """
        blobs = self._state.blobs
        try:
            answer = self.answer(described)
        except ProtocolError:
            blobs.discard(blob)
            raise
        if answer is not None:
            blobs.discard(blob)
            return answer
        before = self._kept
        blobs.rename(blob, f"files-{described.digest.hex()}")
        blobs.settle(blob)
        self._state.add_layout(described.manifest)
        self._kept = _Kept(described.site, described.weights_file, blob)
        answer = FilesAnswer("kept", described.site)
        self._record(described, answer)
        if before is not None:
            blobs.discard(before.blob)
        return answer

    def close(self) -> None:
        """Take no more files, and warn of each site whose files differ from those that go with the model."""
        self._closed = True
        for site, names in self.differing().items():
            text = (
                f"{site} has another {', '.join(names)} than {self.source}, whose files go with the model; compare the "
                "base models and versions of the two sites"
            )
            self._state.events.emit("warning", site=site, text=text)

    @property
    def source(self) -> str:
        """Name of the first site that sent the files that go with the model; "" if there are none."""
        if self._kept is None:
            return ""
        files = self._sent[self._kept.site]
        return min((site for site, sent in self._sent.items() if sent == files), key=self._order.__getitem__)

    def differing(self) -> dict[str, tuple[str, ...]]:
        """Each site that sent other files than those that go with the model -> their names."""
        if self._kept is None:
            return {}
        files = self._sent[self._kept.site]
        others = sorted(self._sent.items(), key=lambda item: self._order[item[0]])
        return {site: _differing(sent, files) for site, sent in others if sent != files}

    def summary(self) -> dict[str, Any] | None:
        """What goes with the model, as JSON values: `site`, `names`, `different`; None if nothing does."""
        if self._kept is None:
            return None
        names = [spec.name for spec in self._kept.blob.manifest.tensors]
        different = {site: list(names) for site, names in self.differing().items()}
        return {"site": self.source, "names": names, "different": different}

    def write(self, folder: Path, model: Arrays) -> None:
        """Write the files to a folder, and the weights once more if the framework reads them from another file.

        Args:
            folder: The folder, which exists.
            model: The tensors of the model that they go with.

        Raises:
            StoreError: The disk fails.
        """
        kept = self._kept
        if kept is None:
            return
        for name, content in kept.blob.views()[0].items():
            write_file(folder / name, content.tobytes())
        if kept.weights_file:
            write_tensors(folder / kept.weights_file, model, {"format": "pt"})

    def _record(self, described: DescribedFiles, answer: FilesAnswer) -> None:
        """Write what a site sent, and what is kept, to the journal before anybody learns of it."""
        self._sent[described.site] = described.files
        kept = self._kept
        assert kept is not None
        self._state.journal.files.write(
            {
                "sent": self._sent,
                "site": kept.site,
                "blob": kept.blob.name,
                "layout": kept.blob.manifest.layout.hex(),
                "weights_file": kept.weights_file,
            }
        )
        self._state.events.emit(
            "files",
            site=described.site,
            status=answer.status,
            names=list(described.files),
            bytes=described.manifest.nbytes,
            kept_of=answer.kept_of,
            differ=list(answer.differ),
        )


def _differing(files: Mapping[str, str], kept: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the files that only one of two sites has, or that have other contents."""
    return tuple(name for name in {**kept, **files} if files.get(name) != kept.get(name))
