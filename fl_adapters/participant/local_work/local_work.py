"""The local-training changes that a strategy requires (FedProx, SCAFFOLD, Ditto), round by round."""

from __future__ import annotations

from pathlib import Path

from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.local_work.backend import LocalBackend
from fl_adapters.participant.local_work.control_variate import ControlVariate, restore_control
from fl_adapters.participant.local_work.personal_model import PersonalModel
from fl_adapters.participant.outputs import SiteHome
from fl_adapters.participant.state_file import State
from fl_runtime.aggregation.corrections.local_terms import LocalTerms
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Task


class LocalWork:
    """Carries out what the job's strategy requires of one training run. Does nothing for a strategy such as FedAvg.

    A round trains the budget once, or twice with a personal model: first the global model, then the personal one.
    If a site trains with several processes (ranks), every rank makes the calls marked "collective", rank 0 with its
    task and the others with None.

    Attributes:
        home: The site's own folder for this job. Rank 0 sets it before the first round.
        personal: The personal model, or None before the first round and for other strategies.
    """

    def __init__(self, backend: LocalBackend, *, phases: int) -> None:
        """Prepare the rounds of one training run.

        Args:
            backend: The live model and its optimizer.
            phases: How often a round trains its budget: 2 with a personal model, else 1.
        """
        self.home = SiteHome(Path(), 1, fresh=True)
        self.personal: PersonalModel | None = None
        self._backend, self._phases = backend, phases
        self._terms = LocalTerms()
        self._control: ControlVariate | None = None
        self._resumed = False
        self._is_first_rank = False
        self._global_result: LocalResult | None = None
        self._restored_personal: State | None = None

    def begin(self, task: Task | None, *, resumed: bool = False) -> None:
        """Begin a round (collective). Call it once the round's global weights are in the model.

        Args:
            task: The round's task; None on ranks other than 0.
            resumed: Whether the model holds the weights of the middle of this round, from a checkpoint.

        Raises:
            ConfigError: If server and site disagree on a personal model, or a round with one is resumed.
        """
        config, number = self._backend.share([dict(task.config), task.round] if task else None)
        terms = self._terms = LocalTerms.from_config(config)
        self._is_first_rank, self._resumed, self._global_result = task is not None, resumed, None
        if (self._phases == 2) != (terms.personal_mu is not None):
            raise ConfigError(
                "the task and the job's strategy disagree on whether this site trains a personal model",
                where=f"task of round {number}",
                fix="install the same version of fl-adapters on the server and at all sites",
            )
        if terms.personal_mu is not None:
            self._prepare_personal(number)
        if terms.proximal_mu or terms.personal_mu is not None:
            self._backend.set_anchors(task.arrays if task else None, loaded=not resumed)
        if terms.control_variates:
            self._backend.add_offsets(self._control_offsets(task) if task else None)
        elif terms.proximal_mu:
            self._backend.pull_to_anchors(terms.proximal_mu)
        else:
            self._backend.leave_gradients()

    def end_phase(self, result: LocalResult, *, more: bool) -> LocalResult | None:
        """End a phase of the round: the trainer has used up the budget once (collective).

        Args:
            result: What the phase trained.
            more: Whether the trainer continues after this step. If not, a round has no second phase.

        Returns:
            What to send together with the weights in the model. None if the budget starts again, now for the
            personal model, which this call has put into the live model.

        Raises:
            ConfigError: If no gradient passed through the optimizer, so that none was corrected.
        """
        personal, mu = self.personal, self._terms.personal_mu
        self._require_corrected_steps(result)
        if personal is None or mu is None or (not personal.active and not more):
            return result
        personal.swap()
        if personal.active:
            self._global_result = result
            self._backend.pull_to_anchors(mu)
            return None
        self._backend.leave_gradients()
        if self._is_first_rank:
            personal.save(self.home.folder)
        assert self._global_result is not None
        return self._global_result.with_personal(result.metrics)

    def extras(self, weights: Arrays) -> Arrays:
        """Return the arrays that travel beside this round's update. Rank 0 only.

        Args:
            weights: The weights of the update, by name; borrowed for the call.

        Returns:
            The change of the site's control variate for SCAFFOLD, else an empty dict.
        """
        control = self._control
        if control is None or not self._terms.control_variates:
            return {}
        if self._resumed:
            return control.end_unchanged()
        record = self._backend.step_record()
        if record.rates is not None:
            return control.end_by_rates(weights, record.rates)
        assert record.mean_gradients is not None
        return control.end_by_gradients(record.mean_gradients)

    def submitted(self, status: str) -> None:
        """Note what the server counted this round's update as. Rank 0 only.

        Args:
            status: What `Session.submit` returned, such as "used" or "late".
        """
        if self._control is not None:
            self._control.submitted(status)

    def state_dict(self) -> State:
        """Return the state that outlives a round, for exact restarts.

        Returns:
            The state as it will be once the server has counted the round's update.
        """
        control = None if self._control is None else self._control.pending()
        return {"control": control, "personal": None if self.personal is None else self.personal.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Continue from the state of an earlier process of this site. Call it before `begin`.

        Args:
            state: What `state_dict` returned there.
        """
        restore_control(self.home, state["control"])
        self._restored_personal = state["personal"]

    def close(self) -> None:
        """End the corrections: training is over, or continues outside the federation."""
        self._backend.close()

    def _control_offsets(self, task: Task) -> Arrays:
        if self._control is None:
            dtypes = {name: task.arrays[name].dtype for name in self._backend.names}
            self._control = ControlVariate(self.home, dtypes)
        return self._control.begin(task.arrays, task.extras)

    def _prepare_personal(self, number: int) -> None:
        if self._resumed:
            raise ConfigError(
                "a round with a personal model cannot be resumed in the middle",
                where=f"checkpoint within round {number}",
                fix="resume from a checkpoint written at the end of a round, or delete the checkpoint or backup: the "
                "site saves its personal model separately",
            )
        if self.personal is not None:
            return
        self.personal = PersonalModel(self._backend.standby_model())
        if self._restored_personal is not None:
            self.personal.load_state_dict(self._restored_personal)
            return
        restarted = self._is_first_rank and not self.home.fresh
        folder = self._backend.share(str(self.home.folder) if restarted else None)
        if folder is not None:
            self.personal.load(Path(folder))

    def _require_corrected_steps(self, result: LocalResult) -> None:
        corrects = self._terms.corrects or (self.personal is not None and self.personal.active)
        if corrects and result.local_steps and not self._backend.steps:
            raise ConfigError(
                "no gradient of this round passed through the optimizer's step, so none could be corrected",
                where="optimizer",
                fix="use an optimizer of your framework whose step takes all gradients at once (not one that works "
                "layer by layer), or a strategy that does not change gradients, such as fedavg",
            )
