"""Cross-site evaluation: after the last round, every site scores the global model and every site's own.

A site's own model is what it has sent last, as far as that are weights as they are: what filters have changed or
encoded is nobody's model, and has no row. Tensors that a site has held back are those of the final global model.

Scores are kept like those of global models, under numbers behind the
last round's: rounds + 1 + the site's index. Each site asks for one model after the other and nobody waits for anybody;
the matrix is told when all are through, or at the deadline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_runtime.aggregation.metrics.pooling import plain
from fl_runtime.server.members import Member
from fl_runtime.server.state import Accepted, Model, Offer, leased
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal import ModelEntry
from fl_runtime.types import Arrays
from fl_runtime.wire.manifest import Manifest

if TYPE_CHECKING:
    from fl_runtime.server.run import Run

GLOBAL = "global"


class CrossSite:
    """The sites' own models of one run. Used under the run's lock."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._last: dict[str, Accepted] = {}
        self._models: dict[str, Model] = {}

    def keep(self, accepted: Accepted) -> Blob | None:
        """Takes over the blob of an update whose round is closed; gives back one that is not needed any more."""
        if not self._wanted or accepted.update.content != "weights":
            return accepted.blob
        site = accepted.update.site
        before = self._last.get(site)
        self._last[site] = accepted
        return before.blob if before else None

    def knows(self, run: Run, version: int) -> bool:
        """Whether a version is the number of a site's own model."""
        return self._wanted and run.rounds is not None and version > run.rounds

    def offer(self, run: Run, member: Member) -> Offer | None:
        """The next model that this site has not scored, or the word that there is none; None: too soon."""
        if run.phase not in ("final", "done") or not member.active:
            return None
        for name, version in self._asked(run, member.name).items():
            if member.name not in run.scores.reported(version):
                config = {"model": name}
                model = run.model if name == GLOBAL else self._model(run, name, version)
                return leased("evaluate", run.rounds or 0, config, model, member)
        return Offer("evaluated", run.rounds or 0, {}, None, True)

    def complete(self, run: Run) -> bool:
        """Whether every site that is there has scored every model that it is asked for."""
        active = [m.name for m in run.members.values() if m.active]
        return all(name in run.scores.reported(v) for name in active for v in self._asked(run, name).values())

    def matrix(self, run: Run) -> dict[str, dict[str, dict[str, float]]]:
        """Whose model -> on whose data -> metrics."""
        return {
            name: {site: plain(metrics) for site, metrics in sorted(run.scores.by_site(version).items())}
            for name, version in self._numbers(run).items()
        }

    def _asked(self, run: Run, site: str) -> dict[str, int]:
        """The models that a site evaluates, as the workflow says, by their numbers."""
        numbers = self._numbers(run)
        wanted = set(run.strategy.scored_by(site, tuple(numbers)))
        return {name: number for name, number in numbers.items() if name in wanted}

    def _numbers(self, run: Run) -> dict[str, int]:
        """The number of every model under which its scores are kept."""
        last = run.rounds or 0
        sites = {m.name: last + 1 + m.index for m in run.members.values() if m.name in self._last}
        return {GLOBAL: last} | sites

    def _model(self, run: Run, name: str, version: int) -> Model:
        if name not in self._models:
            assert run.model is not None
            blob, final = self._last[name].blob, run.model.blob.views()[0]
            arrays, extras = blob.views()
            if extras or len(arrays) < len(final):
                blob = _copy(run, f"own-{version}", {key: arrays.get(key, final[key]) for key in final})
            digests = blob.manifest.digests_of_payload(blob.buffer)
            self._models[name] = Model(ModelEntry(version, blob.name, blob.manifest.layout, digests), blob)
        return self._models[name]


def _copy(run: Run, name: str, arrays: Arrays) -> Blob:
    """The tensors of a model alone: extras (of the optimizer, say) are nobody else's business."""
    manifest = Manifest.of(arrays)
    run.add_layout(manifest)
    blob = run.blobs.create(name, manifest)
    for key, target in blob.views()[0].items():
        target[...] = arrays[key]
    return blob
