"""Error feedback: what a lossy encoding lost is added to what is sent next, by a site and by the server.

A site adds the error to its next update:

    sent_t = encode(d_t + e_t),  e_{t+1} = d_t + e_t - decode(sent_t),  e_0 = 0

Source: Karimireddy et al. 2019, "Error feedback fixes SignSGD and other gradient compression schemes", algorithm 2.

The error e is also written to disk, a file per round, so that a killed site continues with the error after the last
round that it answered. The files survive the death of the process, not that of the machine.

The server encodes the difference between the global model and what the sites hold, so its next difference includes the
error. Both sides add up what was decoded, with the same bits: `advanced`. See fl_runtime/server/broadcast.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fl_runtime.errors import ProtocolError, StoreError
from fl_runtime.filters.base import EncodingFilter, FilterHost, Layout, LazyArrays, is_real, layout_of, work_dtype
from fl_runtime.types import Array, Arrays, Task, is_floating

HELD_VERSION = "held_version"
"""Setting of a task whose arrays are an encoded difference: version of the model that the difference is added to."""


def decode_chain(chain: Sequence[EncodingFilter], arrays: Arrays, layout: Layout) -> Arrays:
    """Undo a chain of encodings, last first.

    Args:
        chain: The encodings, in the order in which they ran.
        arrays: The encoded arrays.
        layout: Layout before the first encoding.

    Returns:
        Arrays of this layout; see `EncodingFilter.decode`.
    """
    layouts = [layout]
    for item in chain[:-1]:
        layouts.append(item.layout(layouts[-1]))
    for item, input_layout in zip(reversed(chain), reversed(layouts), strict=True) if chain else ():
        arrays = item.decode(arrays, input_layout)
    return arrays


def difference_to(held: Arrays, arrays: Arrays) -> LazyArrays:
    """Return arrays minus what the sites hold, in float32 or wider; integers and booleans stay as they are."""

    def difference(name: str) -> Array:
        dtype = work_dtype(arrays[name].dtype)
        if not is_floating(dtype):
            return arrays[name]
        return np.subtract(arrays[name], held[name], dtype=dtype, casting="unsafe")

    return LazyArrays(arrays, difference)


def advanced(held: Arrays, difference: Arrays) -> dict[str, Array]:
    """Return what the sites hold after a decoded difference, in new arrays with the dtypes of `held`."""
    found: dict[str, Array] = {}
    for name, array in held.items():
        change = difference[name]
        if is_floating(array.dtype):
            change = np.add(array, change, dtype=work_dtype(array.dtype), casting="unsafe")
        found[name] = np.array(change, array.dtype)
    return found


class HeldModel:
    """The global model as this site holds it, if the job encodes models at `server_out`.

    Args:
        chain: The job's encodings at `server_out`, in order.
    """

    def __init__(self, chain: Sequence[EncodingFilter]) -> None:
        self.chain = chain
        self._arrays: dict[str, Array] = {}
        self._version: int | None = None

    def receive(self, task: Task) -> dict[str, Array]:
        """Take a task of training, and return the global model in arrays that the caller may change.

        Args:
            task: The task as it arrived: the model, or an encoded difference to the one that this site holds.

        Raises:
            ProtocolError: The difference is one to another model.
        """
        base = task.config.get(HELD_VERSION)
        if base is None:
            self._arrays = {name: np.array(array) for name, array in task.arrays.items()}
        elif base != self._version:
            raise ProtocolError(
                f"the server sent a difference to model {base}, but this site holds model {self._version}",
                where=f"task of round {task.round}",
            )
        else:
            layout = {n: (work_dtype(dtype), shape) for n, (dtype, shape) in layout_of(self._arrays).items()}
            self._arrays = advanced(self._arrays, decode_chain(self.chain, task.arrays, layout))
        self._version = task.version
        return {name: np.array(array) for name, array in self._arrays.items()}


class ErrorFeedback:
    """The error of one site's encodings. It covers real floating-point tensors only.

    Args:
        host: The site; its folder holds the files.
    """

    def __init__(self, host: FilterHost) -> None:
        self._folder = host.folder
        self._stem = f"feedback-{host.job.replace('/', '@')}-"  # a further training of a job is called "job/2"
        self._residuals: dict[str, Array] = {}
        self._loaded = False

    def add_to(self, arrays: Arrays, round: int) -> None:
        """Add the error to this round's differences.

        Args:
            arrays: The differences; changed in place.
            round: The round.
        """
        if not self._loaded:
            self._loaded = True
            self._load(arrays, round)
        for name, residual in self._residuals.items():
            if name in arrays:  # the error of a tensor that is held back now waits for a later round
                np.add(arrays[name], residual, out=arrays[name])

    def remember(self, exact: Arrays, decoded: Arrays, round: int) -> None:
        """Compute and save the error after this round's encoding.

        Args:
            exact: The differences, with the earlier error added.
            decoded: The differences as the receiver will decode them.
            round: The round.

        Raises:
            StoreError: If the error cannot be saved.
        """
        for name, array in exact.items():
            if is_real(array.dtype):
                if name not in self._residuals:
                    self._residuals[name] = np.empty(array.shape, array.dtype)
                np.subtract(array, decoded[name], out=self._residuals[name])
        self._save(round)

    def _save(self, round: int) -> None:
        if self._folder is None:
            return
        path = self._path(round)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(_digest(self._residuals))
                for residual in self._residuals.values():
                    file.write(np.ascontiguousarray(residual).reshape(-1).view(np.uint8).data)
            os.replace(partial, path)
            for number, old in self._files():
                if number < round - 1:  # the previous round may have to be repeated after a restart
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"the error of an encoding cannot be saved: {error.strerror or error}",
                where=str(path),
                fix="free disk space, or set error_feedback: false on the filter",
            ) from error

    def _load(self, like: Arrays, round: int) -> None:
        """Read the newest file of an earlier round, if it is of the same tensors."""
        files = [(number, path) for number, path in self._files() if number < round]
        if not files:
            return
        residuals = {name: np.zeros(a.shape, a.dtype) for name, a in like.items() if is_real(a.dtype)}
        with open(max(files)[1], "rb") as file:
            if file.read(16) != _digest(residuals):
                return
            for array in residuals.values():
                if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                    return
        self._residuals = residuals

    def _path(self, round: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._stem}{round}.bin"

    def _files(self) -> list[tuple[int, Path]]:
        if self._folder is None:
            return []
        return [
            (int(number), path)
            for path in self._folder.glob(f"{self._stem}*.bin")
            if (number := path.stem.removeprefix(self._stem)).isdigit()
        ]


def _digest(arrays: Arrays) -> bytes:
    text = "\n".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
    return hashlib.sha256(text.encode()).digest()[:16]
