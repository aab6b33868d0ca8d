"""The initial model, version 0: a site's own weights, the tensors of a file, or the result of an earlier job."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from fl_runtime.errors import ConfigError, PermissionDeniedError, QuorumError, StateMismatchError
from fl_runtime.server.courses.base import Offer
from fl_runtime.server.membership import Membership
from fl_runtime.server.models import Model
from fl_runtime.server.quorum import Quorum
from fl_runtime.server.registration import agreed_layout
from fl_runtime.server.state import RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal_entries import ModelEntry
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Arrays
from fl_runtime.wire.manifest import Manifest, differences

INITIAL_FILE = "initial.safetensors"
"""Name of the file, in a job's folder, that holds the result of the earlier job that it begins with."""


class InitialModel:
    """Where the initial model comes from, and its commit. `wanted_from`, `offer` and `commit` need the run's lock."""

    def __init__(self, state: RunState, membership: Membership, folder: Path) -> None:
        self._state, self._membership, self._folder = state, membership, folder

    def wanted_from(self, site: str) -> bool:
        """Whether this site's own weights are to become the initial model."""
        state = self._state
        wanted = state.phase == "initial" and not state.models.newest and not state.settings.names_initial
        first = state.plan.strategy.initial == "first"
        return wanted and first and self._membership.initial_source() == site

    def offer(self, site: str) -> Offer | None:
        """The task of sending the initial weights, if they are this site's to send."""
        return Offer("initial", 0, {}, None, True) if self.wanted_from(site) else None

    def obtain(self) -> None:
        """Wait until the initial model is there. Raises QuorumError if no site sends it before the deadline."""
        state, membership = self._state, self._membership
        with state.lock:
            if state.models.newest is not None:
                return
            state.phase = "initial"
            if state.plan.strategy.initial == "none":
                self.commit(self._zeros())
                return
            if state.settings.initial:
                path = Path(state.settings.initial)
                self._take(read_tensors(path), str(path))
                return
            if state.settings.initial_job:
                self._take_from_job(state.settings.initial_job)
                return

            def ready() -> bool:
                if membership.check_quorum(membership.known(), "waiting for the initial model"):
                    check_initial_source(state, membership.quorum, membership.remaining())
                state.published.notify_all()  # the source may have changed: another site is asked
                return state.models.newest is not None

            if not membership.wait_until(ready, state.settings.deadline_s):
                source = membership.initial_source() or "a site whose policy allows it"
                raise QuorumError(
                    f"{source} did not send the initial model within {state.settings.deadline_s:g} s",
                    fix="raise deadline_s, or give the initial weights as a file with Job(initial=)",
                )

    def commit(self, blob: Blob) -> None:
        """Make a filled file version 0 of the global model."""
        state = self._state
        state.blobs.rename(blob, "model-0")
        state.blobs.settle(blob)
        state.add_layout(blob.manifest)
        digests = blob.manifest.digests_of_payload(blob.buffer)
        entry = ModelEntry(0, blob.name, blob.manifest.layout, digests)
        state.journal.committed(entry, 0, {})
        state.models.newest = Model(entry, blob)
        state.changed.notify_all()

    def _take_from_job(self, origin: Mapping[str, str]) -> None:
        """Begin with an earlier job's result, if it is still what it was when this job was submitted."""
        name = f"the {origin['model']} model of the job {origin['job']}"
        path = self._folder / INITIAL_FILE
        if digest_of(path) != origin.get("sha256"):
            raise ConfigError(
                f"{name} has changed since this job was submitted, or is damaged",
                where="initial",
                fix="submit the job again under another name",
            )
        self._take(read_tensors(path), name)

    def _take(self, arrays: Arrays, where: str) -> None:
        """Make `arrays` the initial model. Raises StateMismatchError if the sites exchange other tensors."""
        expected = self._agreed()
        if self._state.plan.strategy.initial == "all":
            raise ConfigError(
                "this strategy makes its initial model from the data of all sites",
                where="initial",
                fix="leave initial out of the job",
            )
        lines = differences(expected, Manifest.of(arrays))
        if lines:
            raise StateMismatchError(
                f"the initial model differs from the sites' in {len(lines)} tensors (site != initial):\n    "
                + "\n    ".join(lines[:8]),
                where=where,
                fix="give a model with exactly the tensors that the sites exchange",
            )
        blob = self._zeros()
        for name, target in blob.views()[0].items():
            target[...] = arrays[name]
        self.commit(blob)

    def _agreed(self) -> Manifest:
        """The tensors that the sites have agreed on."""
        return self._state.layouts[agreed_layout(self._membership.members)]

    def _zeros(self) -> Blob:
        """A file for version 0, of zeros."""
        manifest = Manifest(tuple(tensor for tensor in self._agreed().tensors if not tensor.extra))
        blob = self._state.blobs.create("model-0", manifest)
        for target in blob.views()[0].values():
            target[...] = 0
        return blob


def check_initial_source(state: RunState, quorum: Quorum, sites: Iterable[str]) -> None:
    """Check that one of these sites may give the initial model, if a site has to.

    Args:
        state: The run's state.
        quorum: What the policies of the sites ask for.
        sites: Names of the sites.

    Raises:
        PermissionDeniedError: The policies of all of them keep their weights.
    """
    asked = state.plan.strategy.initial == "first" and not state.settings.names_initial and not state.models.newest
    if asked and all(map(quorum.keeps_initial, sites)):
        raise PermissionDeniedError(
            f"no site may give the initial model of {state.settings.name}",
            where=f"rule initial: false (policy.yml of {', '.join(list(sites)[:8])})",
            fix="begin with the result of an earlier job, initial: {job: NAME}, or ask one site to allow it",
        )


def digest_of(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hex.

    Args:
        path: The file.

    Returns:
        The digest; "" for a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
