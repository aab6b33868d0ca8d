"""Checks of an update before it counts: its tensors must be those that the sites agreed on, and finite."""

from __future__ import annotations

from fl_runtime.errors import StateMismatchError, UpdateRefusedError
from fl_runtime.filters.base import Layout
from fl_runtime.filters.ckks import HomomorphicCKKS
from fl_runtime.filters.server import applied_filters, update_layout
from fl_runtime.server.calls import limits
from fl_runtime.server.membership import Membership
from fl_runtime.server.registration import agreed_layout
from fl_runtime.server.state import RunState
from fl_runtime.types import Update
from fl_runtime.wire.dtypes import dtype_name, dtype_of
from fl_runtime.wire.finite import check_finite
from fl_runtime.wire.manifest import Manifest, TensorSpec, differences


class TensorChecks:
    """Checks of updates that hold tensors. See the protocol `UpdateChecks`."""

    def __init__(self, state: RunState, membership: Membership) -> None:
        self._state, self._membership = state, membership

    def check_layout(self, manifest: Manifest, content: str, encoding: str) -> None:
        """Compare an update's tensors with the agreed ones, as the update's filters change them."""
        state = self._state
        with state.lock:  # the comparison itself may be long
            strategy, encrypted = state.plan.strategy, state.filters.encrypted
            agreed = state.layouts.get(agreed_layout(self._membership.members))
            newest = state.models.newest.blob.manifest.nbytes if state.models.newest else 0
        strategy_content = strategy.content
        plain = content == strategy_content == "weights" and not encoding and encrypted is None
        if agreed is None or (plain and manifest.layout == agreed.layout):
            return
        expected = travelling_manifest(agreed, content, encoding, strategy_content, encrypted)
        lines: list[str] = []
        if expected.layout != manifest.layout:
            lines = differences(expected, manifest, strategy.agreed_shape if strategy_content == "encoded" else None)
        if lines:
            raise StateMismatchError(
                f"an update differs from the agreed model in {len(lines)} tensors (agreed != update):\n    "
                + "\n    ".join(lines[:8]),
                fix="the model must not change its parameters during a run",
            )
        limits.check_size(manifest, max(expected.nbytes, newest))

    def check_values(self, update: Update) -> None:
        """Decode the update, check that its values are finite, and ask the strategy."""
        state = self._state
        with state.lock:
            model, held = state.models.newest, state.models.held
            leased = [item for item in (model, held) if item is not None]
            for item in leased:
                item.leases += 1
        try:
            where = f"update of {update.site}, round {update.round}"
            base = model.blob.views()[0] if model else {}
            state.filters.check(
                update,
                base,
                lambda arrays: check_finite(arrays, where),
                state.plan.strategy,
                held=held.blob.views()[0] if held else None,
            )
        finally:
            for item in leased:
                state.models.release(item)


def travelling_manifest(
    agreed: Manifest, content: str, encoding: str, strategy_content: str, encrypted: HomomorphicCKKS | None
) -> Manifest:
    """The tensors that an update must consist of.

    Args:
        agreed: The tensors that the sites agreed on.
        content: What the update holds.
        encoding: How it is encoded, as the update names it.
        strategy_content: The content that the job's strategy sums.
        encrypted: How the job encrypts, or None if it does not.

    Raises:
        UpdateRefusedError: The strategy sums another content.
        ProtocolError: The encoding cannot be read.
    """
    foreign = content == "encoded" and not applied_filters(encoding)
    if foreign != (strategy_content == "encoded"):
        raise UpdateRefusedError(
            f"an update has the content {content!r} in the encoding {encoding[:60]!r}, but the job's strategy sums "
            f"{strategy_content!r}",
            fix="use the same adapter and the same strategy at every site",
        )
    if foreign:
        return agreed
    layout: Layout = {t.name: (dtype_of(t.dtype), t.shape) for t in agreed.tensors if not t.extra}
    encoded = update_layout(layout, content, encoding, encrypted)
    return Manifest(tuple(TensorSpec(n, dtype_name(d, tensor=n), shape) for n, (d, shape) in encoded.items()))
