"""The files of a job that has ended, as admins and the job's sites can download them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fl_runtime.errors import ConfigError
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.trust.files import file_digest

_PRIVATE = ("server", "job.json")  # the journal with the updates of sites, and the server's own record
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class ResultFile:
    """A file of a job's results.

    Attributes:
        path: Its path below the job's folder, with "/" between the parts.
        size_bytes: Its size.
        sha256: Its SHA-256 digest in hexadecimal.
    """

    path: str
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """The file as JSON values, with a key for every attribute."""
        return asdict(self)


def files_of(folder: Path) -> list[ResultFile]:
    """List the result files of a job: models, history, events and figures.

    Args:
        folder: The job's folder.

    Returns:
        The files, ordered by path. The server's own files and links are not among them.

    Raises:
        StoreError: A file cannot be read.
    """
    paths = sorted(path for path in folder.rglob("*") if _is_result(folder, path))
    try:
        return [
            ResultFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_digest(path)) for path in paths
        ]
    except OSError as error:
        raise disk_error(error, folder) from error


def chunks(folder: Path, name: str, offset_bytes: int) -> Iterator[bytes]:
    """Read a result file from an offset on.

    Args:
        folder: The job's folder.
        name: Path of the file, as `files_of` lists it.
        offset_bytes: Where to begin.

    Yields:
        Pieces of at most 1 MiB; at least one, which may be empty.

    Raises:
        ConfigError: There is no such result file.
        StoreError: It cannot be read.
    """
    parts = PurePosixPath(name)
    path = folder.joinpath(*parts.parts)
    inside = not parts.is_absolute() and ".." not in parts.parts and "\0" not in name
    if not inside or not _is_result(folder, path):
        raise ConfigError(f"the job has no file {name[:200]!r}", fix="see `fl-adapters job show`")
    try:
        with path.open("rb") as file:
            file.seek(max(0, offset_bytes))
            yield file.read(CHUNK_BYTES)
            while piece := file.read(CHUNK_BYTES):
                yield piece
    except OSError as error:
        raise disk_error(error, path) from error


def _is_result(folder: Path, path: Path) -> bool:
    parts = path.relative_to(folder).parts
    private = any(part in _PRIVATE or part.startswith(".") for part in parts)
    links = any(step.is_symlink() for step in (path, *path.parents) if step != folder and folder in step.parents)
    return not private and not links and path.is_file()
