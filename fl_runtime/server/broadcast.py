"""The global model as it travels to the sites of a round: whole, or as an encoded difference to what they hold.

With encodings at `server_out`, the sites hold h in place of the global model x. In the round that begins with x:

    sent = encode(x - h),   h' = h + decode(sent)

So what the encoding loses is part of the next difference (error feedback), x stays exact at the server, and h follows
it. The first h is the initial model, which travels whole. A site that does not hold h, because it is new, was started
again or has missed a round, gets h' whole.

Source: Tang et al. 2019, "DoubleSqueeze: Parallel stochastic gradient descent with double-pass error-compensated
compression"; with a common h as in Richtarik et al. 2021, "EF21: A new, simpler, theoretically better, and practically
faster error feedback".
"""

from __future__ import annotations

from collections.abc import Mapping

from fl_runtime.filters.feedback import HELD_VERSION
from fl_runtime.server.models import Model
from fl_runtime.server.registration import Member
from fl_runtime.server.state import RunState
from fl_runtime.store.journal_entries import ModelEntry
from fl_runtime.types import Array, Arrays, Settings
from fl_runtime.wire.manifest import Manifest

_KEPT = "held:"


class Broadcast:
    """Prepares the global model of a round for the sites. Called under the run's lock.

    `RunState.models.held` is h'. It is kept with the strategy's state of the model that the round makes, so that a
    server that is started again continues with the same bits.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._difference: Model | None = None  # the encoded difference between the last h and this one
        self._restored = state.journal.restored
        self._given: set[str] = set()  # sites that have an h of this process

    def prepare(self) -> None:
        """Encode the newest model, once for all sites of the round and all tries at it."""
        state, models, newest = self._state, self._state.models, self._state.models.newest
        assert newest is not None
        if self._difference is not None and self._difference.version == newest.version:
            return
        previous, before = models.held, self._difference
        models.held = self._difference = None
        kept = newest.strategy_state.views()[0] if newest.strategy_state else {}
        base = {name: kept[_KEPT + name] for name in newest.blob.views()[0] if _KEPT + name in kept}
        if state.filters.encodes_model and base:
            arrays, extras = newest.blob.views()
            encoded = state.filters.encode_difference(arrays, base)
            self._difference = self._stored(f"difference-{newest.version}", encoded, extras)
            models.held = self._stored(f"held-{newest.version}", state.filters.decode_difference(encoded, base), extras)
        for model in filter(None, (previous, before)):
            models.recycle(model)

    def model_for(self, member: Member) -> tuple[Model | None, Settings]:
        """The model that this site receives, and what its task's config says about it."""
        models, difference = self._state.models, self._difference
        known = not self._restored or member.name in self._given  # else the same number may be of another model
        if difference is not None and known and member.held == difference.version - 1:
            return difference, {HELD_VERSION: member.held}
        self._given.add(member.name)
        return models.held or models.newest, {}

    def _stored(self, name: str, arrays: Arrays, extras: Arrays) -> Model:
        """A model that lies in a file of its own and is not in the journal."""
        state, manifest = self._state, Manifest.of(arrays, extras)
        state.add_layout(manifest)
        blob = state.blobs.create(name, manifest)
        for targets, values in zip(blob.views(), (arrays, extras), strict=True):
            for key, target in targets.items():
                target[...] = values[key]
        digests = manifest.digests_of_payload(blob.buffer)
        version = state.models.version
        return Model(ModelEntry(version, blob.name, manifest.layout, digests), blob)


def held_arrays(state: RunState) -> dict[str, Array]:
    """What the sites of the open round hold, under the names that it is kept by; empty if nothing encodes the model."""
    model = state.models.held or state.models.newest
    if not state.filters.encodes_model or model is None:
        return {}
    return {_KEPT + name: array for name, array in model.blob.views()[0].items()}


def without_held(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return a strategy's state without what the sites hold."""
    return {name: array for name, array in arrays.items() if not name.startswith(_KEPT)}
