"""What the server does beside summing where filters may be at work: checking updates, encoding the model."""

from __future__ import annotations

from fl_runtime.errors import ProtocolError, StateMismatchError
from fl_runtime.server import limits
from fl_runtime.server.courses.swarm import check_receipt, without_tensors
from fl_runtime.server.encoding import travelling_manifest
from fl_runtime.server.run import Run
from fl_runtime.server.state import Model
from fl_runtime.store.journal import ModelEntry
from fl_runtime.types import Update
from fl_runtime.wire.finite import check_finite
from fl_runtime.wire.manifest import Manifest, differences


def check_layout(run: Run, manifest: Manifest, content: str, encoding: str) -> None:
    """StateMismatchError if a manifest does not hold the weights that the sites agreed on, as they are encoded.
    Called under the lock."""
    if run.strategy.relayed and without_tensors(encoding):
        if manifest.tensors:
            raise ProtocolError("a receipt with tensors")
        return
    agreed = next((m.registration.layout for m in run.members.values() if m.registration), b"")
    takes = run.strategy.content
    plain = content == takes == "weights" and not encoding and run.filters.encrypted is None
    if not agreed or (plain and manifest.layout == agreed):
        return
    expected = travelling_manifest(run.manifests[agreed], content, encoding, takes, run.filters.encrypted)
    lines: list[str] = []
    if expected.layout != manifest.layout:
        lines = differences(expected, manifest, run.strategy.agreed_shape if takes == "encoded" else None)
    if lines:
        raise StateMismatchError(
            f"an update differs from the agreed model in {len(lines)} tensors (agreed != update):\n    "
            + "\n    ".join(lines[:8]),
            fix="the model must not change its parameters during a run",
        )
    newest = run.model.blob.manifest.nbytes if run.model else 0
    limits.check_size(manifest, max(expected.nbytes, newest))


def check_update(run: Run, update: Update) -> None:
    """Raises UpdateRefusedError or ProtocolError for an update that does not decode to finite weights, or that the
    strategy refuses."""
    if run.strategy.relayed and update.round > 0:
        check_receipt(update)
        if without_tensors(update.encoding):
            return
    with run.lock:
        model = run.model
        if model is not None:
            model.leases += 1
    try:
        where = f"update of {update.site}, round {update.round}"
        base = model.blob.views()[0] if model else {}
        run.filters.check(update, base, lambda arrays: check_finite(arrays, where), run.strategy)
    finally:
        if model is not None:
            run.release(model)


def hand_out(run: Run) -> None:
    """Encode the global model for the round that opens, once for all sites and tries. Called under the lock.

    PrivacyBudgetError if the server's own budget does not allow another round.
    """
    if run.model is None:  # round 0: the first model is being made
        return
    run.filters.afford(run.model.version + 1)
    if run.handed_out is not None and run.handed_out.version == run.model.version:
        return
    previous, run.handed_out = run.handed_out, None
    if previous is not None:
        run.recycle(previous)
    source, extras = run.model.blob.views()
    arrays = run.filters.handed_out(source)
    if arrays is None:
        return
    manifest = Manifest.of(arrays, extras)
    run.add_layout(manifest)
    blob = run.blobs.create(f"handed-out-{run.model.version}", manifest)
    for targets, values in zip(blob.views(), (arrays, extras), strict=True):
        for name, target in targets.items():
            target[...] = values[name]
    digests = manifest.digests_of_payload(blob.buffer)
    run.handed_out = Model(ModelEntry(run.model.version, blob.name, manifest.layout, digests), blob)
