"""The end of a run at a site: exported models, the best model, and scores of other sites' models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fl_adapters.participant.gate import Gate
from fl_adapters.participant.kit import Kit
from fl_adapters.participant.results.model_files import Export, ModelFiles, send_files
from fl_runtime.client import SiteClient
from fl_runtime.errors import StoreError
from fl_runtime.store.tensorfile import write_tensors
from fl_runtime.types import Arrays, Summary, Task

_FILE = "model.safetensors"


class Results:
    """The end of a run at one site, after the task of kind "final".

    Other models arrive in the same buffer as the final one. A site that exports the final model therefore keeps a
    copy of it from the first such model on.
    """

    def __init__(
        self,
        client: SiteClient,
        gate: Gate,
        kit: Kit,
        own_folder: Path,
        *,
        cross_site: bool,
        current_task: Callable[[], Task],
        report: Callable[[Mapping[str, float | Summary], int], None],
    ) -> None:
        """Prepare for the end of a run.

        Args:
            client: The connection to the server.
            gate: The site's gate.
            kit: The site's startup kit.
            own_folder: Folder of the site in the job. Its models go there if the run has no folder.
            cross_site: Whether the job asks sites to evaluate each other's models.
            current_task: Returns the session's current task.
            report: Sends the metrics of the model that was evaluated last; see `Session.report`.
        """
        self._client, self._gate, self._kit, self._own_folder = client, gate, kit, own_folder
        self._cross_site, self._current_task, self._report = cross_site, current_task, report
        self._final: Task | None = None
        self._evaluated: Task | None = None

    def best(self) -> Task | None:
        """Return the model of the best round. Waits until all sites have reported on the last round.

        Returns:
            A task of kind "best", or None if no round has a score of the best metric. Its arrays are views of the
            session's buffer, valid until the next task.
        """
        self._keep_final()
        with self._gate.leaving_on_refusal("best model"):
            task = self._client.next_task(best=True)
            return self._gate.decode(task) if task.arrays else None

    def next_to_score(self) -> Task | None:
        """Return the next model that this site must evaluate, in jobs with `cross_site`.

        First the global model, if this site has not reported on it, then the model of every site. Evaluate each on
        this site's own validation data and pass the metrics to `Session.report`; a model without a report counts as
        one without metrics. Call this only after registering with `cross_evaluates`.

        Returns:
            A task of kind "evaluate", whose arrays are valid until the next task. None if no model is left, or if the
            job does not ask for cross-site evaluation.
        """
        if not self._cross_site:
            return None
        if self._evaluated is not None:
            self._report({}, 1)
        self._keep_final()
        task = self._client.next_task(evaluate=True)
        self._evaluated = self._gate.decode(task) if task.kind == "evaluate" else None
        return self._evaluated

    def cross_evaluate(self, evaluate: Callable[[Arrays], tuple[Mapping[str, float | Summary], int]]) -> None:
        """Evaluate and report every model that `next_to_score` returns.

        Args:
            evaluate: Function from the arrays of a model to (metrics on this site's validation data, number of
                validation examples). The arrays are valid during the call.
        """
        while task := self.next_to_score():
            self._report(*evaluate(task.arrays))

    def version_to_report(self) -> int:
        """Return the version of the model that a report is about, and regard that model as reported."""
        task, self._evaluated = self._evaluated or self._current_task(), None
        return task.version

    def write(self, export: Export | None, load: Callable[[Arrays], None] | None) -> None:
        """Write the final model into the folder `model` and, if there is a best round, that one into `best`.

        Both lie in the folder of the run. In a simulation, one site writes them for all. In a federation, a site
        without such a folder writes them into its own folder of the job, in its kit, and says so. A folder that cannot
        be written to is no error there: the model is in the script. The small files beside the model, such as
        config.json, then go to the server, as far as the site's policy allows.

        Args:
            export: Writes the live model to a folder in the framework's format. None writes safetensors; in a
                simulation the server does that, unless it cannot read the model.
            load: Loads arrays into the live model, for the export of the best model; None exports the final one only.
        """
        if not self._exports():
            return
        if self._kit.run:
            self._send_files(self._write(export, load))
            return
        try:
            found = self._write(export, load)
        except (OSError, StoreError) as error:
            print(f"fl-adapters: the final model was not written: {error}", file=sys.stderr, flush=True)
        else:
            print(f"fl-adapters: the final model is in {self._folder('model')}", file=sys.stderr, flush=True)
            self._send_files(found)

    def _write(self, export: Export | None, load: Callable[[Arrays], None] | None) -> ModelFiles | None:
        found = None
        if export is not None:
            found = export(str(self._folder("model")))
            if load is not None and (best := self.best()):
                load(best.arrays)
                export(str(self._folder("best")))
                load(self._final_task().arrays)
        elif self._gate.encrypts or not self._kit.simulated:
            write_tensors(self._folder("model") / _FILE, self._final_task().arrays)
            if best := self.best():
                write_tensors(self._folder("best") / _FILE, best.arrays)
        return found

    def _send_files(self, found: ModelFiles | None) -> None:
        """Send the small files of an export, unless the run owns the folder or the model is encrypted."""
        if found is not None and not self._kit.simulated and not self._gate.encrypts:
            send_files(found, self._final_task().arrays, self._gate, self._client)

    def _exports(self) -> bool:
        chosen = bool(self._current_task().config.get("export"))  # the one site that writes a folder which all share
        if self._kit.simulated:
            return bool(self._kit.run) and chosen
        return bool(self._kit.run or self._kit.credentials)

    def _folder(self, name: str) -> Path:
        return Path(self._kit.run or self._own_folder, name)

    def _final_task(self) -> Task:
        return self._final or self._current_task()

    def _keep_final(self) -> None:
        """Copy the final model before another one arrives in its buffer, if it is still to be exported."""
        final = self._current_task()
        if self._final is None and self._exports():
            copies = {name: np.copy(array) for name, array in final.arrays.items()}
            self._final = replace(final, arrays=copies)
