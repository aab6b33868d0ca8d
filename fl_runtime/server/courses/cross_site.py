"""Cross-site evaluation: after the last round, every site scores the global model and every site's own model.

A site's own model is the last update that it sent, if that holds plain weights. An update that filters have changed or
encoded is no model of the site, and has no row in the matrix. Tensors that a site has held back are taken from the
final global model.

Scores are kept like those of global models, under version numbers after the last round's: rounds + 1 + the site's
index. Each site asks for one model after the other, and no site waits for another. The matrix is emitted when all sites
have scored all models, or at the deadline.
"""

from __future__ import annotations

from fl_runtime.aggregation.metrics.pooling import plain
from fl_runtime.errors import ProtocolError
from fl_runtime.filters import check_cross_site
from fl_runtime.server.courses.base import Offer, leased
from fl_runtime.server.courses.scoring import Scoring
from fl_runtime.server.membership import Membership
from fl_runtime.server.models import Model
from fl_runtime.server.recovery import load_update
from fl_runtime.server.registration import Member
from fl_runtime.server.state import Accepted, RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal_entries import ModelEntry
from fl_runtime.types import Arrays, Report
from fl_runtime.wire.manifest import Manifest

GLOBAL = "global"


class CrossEvaluation:
    """The cross-site evaluation of one run; without `cross_site` in the job, it has nothing to do.

    Called under the run's lock, except `conclude`.
    """

    def __init__(self, state: RunState, membership: Membership, scoring: Scoring) -> None:
        self._state, self._membership, self._scoring = state, membership, scoring
        self._enabled = state.settings.cross_site
        self._last: dict[str, Accepted] = {}
        self._models: dict[str, Model] = {}

    def check_settings(self) -> None:
        """Raise ConfigError if filters or strategy leave no models of single sites to evaluate."""
        if self._enabled:
            check_cross_site(self._state.settings.filters, self._state.plan.strategy)

    def keep(self, accepted: Accepted) -> Blob | None:
        """Take over the file of an update whose round is closed. Returns a file that is not needed any more, if any."""
        site = accepted.update.site
        rules = self._membership.quorum.rules.get(site)
        if not self._enabled or accepted.update.content != "weights" or (rules and rules.own_model_stays):
            return accepted.blob
        previous = self._last.get(site)
        self._last[site] = accepted
        return previous.blob if previous else None

    def covers(self, version: int) -> bool:
        """Whether a version is the number of a site's own model."""
        rounds = self._state.plan.rounds
        return self._enabled and rounds is not None and version > rounds

    def report(self, report: Report) -> None:
        """Take a site's report on another site's model. Raises ProtocolError if there is no such model."""
        if report.version not in self._numbers().values():
            raise ProtocolError(f"a site sent a score of model {report.version}, which is the model of no site")
        self._scoring.record(report, "cross_score")

    def offer(self, member: Member) -> Offer | None:
        """The next model that this site has not scored, or "evaluated" if none is left. None before the run's end."""
        state = self._state
        if state.phase not in ("final", "done") or not member.active:
            return None
        for name, version in self._models_for(member.name).items():
            if member.name not in self._scoring.scores.reported(version):
                model = state.models.newest if name == GLOBAL else self._model(name, version)
                return leased("evaluate", state.plan.rounds or 0, {"model": name}, model, member)
        return Offer("evaluated", state.plan.rounds or 0, {}, None, True)

    def conclude(self) -> None:
        """Wait until all sites have scored all models, or for the deadline, and emit the matrix."""
        state = self._state
        if self._enabled:
            with state.lock:
                self._membership.wait_until(self._complete, state.settings.deadline_s)
                state.events.emit("cross_site", state.plan.rounds or 0, matrix=self._matrix())

    def recover(self) -> set[str]:
        """Restore the sites' last updates from the journal; returns the names of their files."""
        state, names = self._state, set[str]()
        if self._enabled and state.models.newest:
            for entry in state.journal.reader.last_updates():
                if 0 < entry.round <= state.models.version:
                    self.keep(load_update(state, entry))
                    names.add(entry.blob)
        return names

    def _complete(self) -> bool:
        """Whether every site that is present has scored every model that it is asked for."""
        reported = self._scoring.scores.reported
        return all(name in reported(v) for name in self._membership.present() for v in self._models_for(name).values())

    def _matrix(self) -> dict[str, dict[str, dict[str, float]]]:
        """Metrics by model, then by the site that scored it."""
        return {
            name: {site: plain(metrics) for site, metrics in sorted(self._scoring.scores.by_site(version).items())}
            for name, version in self._numbers().items()
        }

    def _models_for(self, site: str) -> dict[str, int]:
        """Numbers of the models that the strategy asks a site to evaluate, by name."""
        numbers = self._numbers()
        wanted = set(self._state.plan.strategy.scored_by(site, tuple(numbers)))
        return {name: number for name, number in numbers.items() if name in wanted}

    def _numbers(self) -> dict[str, int]:
        """The version number under which each model's scores are kept."""
        last = self._state.plan.rounds or 0
        sites = {m.name: last + 1 + m.index for m in self._membership.members.values() if m.name in self._last}
        return {GLOBAL: last} | sites

    def _model(self, name: str, version: int) -> Model:
        if name not in self._models:
            newest = self._state.models.newest
            assert newest is not None
            blob, final = self._last[name].blob, newest.blob.views()[0]
            arrays, extras = blob.views()
            if extras or len(arrays) < len(final):
                blob = self._copy(f"own-{version}", {key: arrays.get(key, final[key]) for key in final})
            digests = blob.manifest.digests_of_payload(blob.buffer)
            self._models[name] = Model(ModelEntry(version, blob.name, blob.manifest.layout, digests), blob)
        return self._models[name]

    def _copy(self, name: str, arrays: Arrays) -> Blob:
        """A file with the tensors of a model alone: extras, such as an optimizer's, are not for other sites."""
        manifest = Manifest.of(arrays)
        self._state.add_layout(manifest)
        blob = self._state.blobs.create(name, manifest)
        for key, target in blob.views()[0].items():
            target[...] = arrays[key]
        return blob
