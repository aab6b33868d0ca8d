"""`FederatedLoop`: a PyTorch or Accelerate training loop of one's own as a site of a federation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fl_adapters.participant.local_work.dp_sgd import DPSGD
from fl_adapters.participant.options import Every, PrivateArguments
from fl_adapters.torch.local_work.correction import plain
from fl_adapters.torch.loop.local_round import LocalRound, LoopPort, StepCounter, TrainingData
from fl_adapters.torch.progress import Progress, Tally, size_of
from fl_adapters.torch.ranks.collectives import world_size
from fl_adapters.torch.ranks.sharded_state import save_module
from fl_adapters.torch.ranks.shards import reshard
from fl_adapters.torch.selection import parameters_of, warn_of_unknown_parameters
from fl_adapters.torch.trainer_run import TrainerRun
from fl_runtime.errors import ConfigError
from fl_runtime.types import Metrics

_FRAMEWORK = "torch"

Evaluate = Callable[[], Metrics | tuple[Metrics, int]]
"""evaluate() -> metrics of the model as it is, or (metrics, number of validation examples)."""


class FederatedLoop(PrivateArguments):
    """Makes a training loop of your own a site of a federation.

    Your loop runs over rounds in place of epochs, and takes the batches of each round from the round itself. Zeroing
    gradients, forward pass, backward pass and optimizer steps stay as they are. When the body of the outer loop ends,
    the weights are exchanged in place; after the loop the model holds the final global weights. One call of `rounds`
    is one run. Code of yours that runs after the inner loop sees this site's own weights.

    Outside a federation, that is without a startup kit, it prints one line, and `rounds` yields the same batches as
    `epochs` passes over the loader.

    With Accelerate, give it what `accelerator.prepare` returned. Under DDP and FSDP2 every rank runs the same loop, and
    rank 0 alone talks to the federation.

    Args:
        model: The module that is trained, in its wrapper (DDP, FSDP2) if it has one.
        optimizer: Its optimizer, or a list of all of them. Their steps are counted.
        evaluate: Function without arguments that scores the model as it is on this site's own validation data. It
            returns the metrics by name, such as `{"loss": 0.3}`, or a pair of them and the number of validation
            examples, by which the sites' metrics are weighted. Without the number all sites count the same. It is
            called for each global model that arrives, without gradients, and the model's training mode is restored
            afterwards. Under DDP and FSDP2 every rank calls it, and rank 0's metrics count.
        scheduler: Learning-rate schedule that your loop steps. It is saved for exact restarts, and moved on if this
            site comes back behind the others.
        scheduler_steps: What `scheduler` counts: "step" for optimizer steps, "epoch" for epochs.
        stateful: Other objects whose state an exact restart must restore, by name: a gradient scaler, say. Each has
            `state_dict` and `load_state_dict`.
        export: `export(folder)` writes the model in a format of your own. It is called on rank 0, and on every rank if
            the model is sharded. Default: its `save_pretrained` if it has one, else `model.safetensors`.
        best_at_end: Whether the model holds the weights of the best round after the loop, not those of the last.
        kit: Folder of this site's startup kit. Default: `$FL_ADAPTERS_KIT`, which `fl-adapters run` and
            `fl-adapters simulate` set.
        every: Training between two exchanges: "epoch", "2 epochs", or a number of optimizer steps. Default: the job's,
            else "epoch".
        exchange: What travels: "auto" (trained parameters and buffers; of a PEFT model the adapter alone),
            "trainable", "all", or a list of name patterns such as `["encoder.*"]`. Default: the job's, else "auto".
        keep_local: Name patterns of tensors that never leave this site. They are added to the job's own.
        optimizer_state: What becomes of the moments when new global weights arrive: "keep", "reset", or "average" over
            the sites. Default: the job's, else "keep".
        evaluate_global: Whether each global model is scored by `evaluate`. Default: yes if `evaluate` is given.
        num_examples: Weight of this site in the average. Default: the length of the loader's data set, or the examples
            seen in the round if it has none.
        required: Raise ConfigError instead of training alone if there is no startup kit.
        dp_sgd: Differential privacy for single records: `DPSGD(max_grad_norm=1.0, epsilon=8)`, see `fl_adapters.DPSGD`.
            Default: none.
        agree: Whether lists of names that the adapter sees (label names) must be equal at all sites. A dict adds lists
            that it cannot see, such as `{"labels": ["cat", "dog"]}`. Default: yes.

    Attributes:
        exchange_stats: Number, bytes and seconds of the last exchange, for logs: `federation_round`,
            `federation_bytes_up`, `federation_bytes_down`, `federation_seconds`. Empty before the first.

    Raises:
        ConfigError: For an argument that cannot work.

    Example:
        ```python
        loop = FederatedLoop(model, optimizer, evaluate=lambda: {"loss": validation_loss(model)})
        for round in loop.rounds(loader, epochs=10):
            for images, labels in round:
                optimizer.zero_grad()
                loss = criterion(model(images), labels)
                loss.backward()
                optimizer.step()
                round.add_loss(loss.detach())
        torch.save(model.state_dict(), f"final-{fl_adapters.site().name}.pt")
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        evaluate: Evaluate | None = None,
        scheduler: Any = None,
        scheduler_steps: Literal["step", "epoch"] = "step",
        stateful: Mapping[str, Any] | None = None,
        export: Callable[[str], None] | None = None,
        best_at_end: bool = False,
        kit: str | None = None,
        every: str | int | None = None,
        exchange: str | Sequence[str] | None = None,
        keep_local: Sequence[str] = (),
        optimizer_state: str | None = None,
        evaluate_global: bool | None = None,
        num_examples: int | None = None,
        required: bool = False,
        dp_sgd: DPSGD | None = None,
        agree: bool | Mapping[str, Sequence[Any]] = True,
    ) -> None:
        super().__init__(
            kit=kit,
            every=every,
            exchange=exchange,
            keep_local=keep_local,
            optimizer_state=optimizer_state,
            evaluate_global=evaluate_global,
            num_examples=num_examples,
            required=required,
            dp_sgd=dp_sgd,
            agree=agree,
        )
        optimizers: list[Any] = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        _check_kinds(model, optimizers, evaluate)
        if scheduler_steps not in ("step", "epoch"):
            raise ConfigError(f"scheduler_steps={scheduler_steps!r} is unknown", fix='give "step" or "epoch"')
        if evaluate is None and (best_at_end or self.options.evaluate_global):
            raise ConfigError(
                f"{'best_at_end' if best_at_end else 'evaluate_global'}=True needs a score of each global model",
                where="FederatedLoop",
                fix="pass evaluate=, a function that returns metrics such as {'loss': 0.3}",
            )
        self.exchange_stats: Mapping[str, float] = {}
        self._model, self._evaluate, self._export = model, evaluate, export
        self._optimizers = optimizers
        self._scheduler, self._scheduler_steps = scheduler, scheduler_steps
        self._stateful = dict(stateful or {}) | ({} if scheduler is None else {"scheduler": scheduler})
        self._best_at_end = best_at_end
        self._run: TrainerRun[LoopPort] | None = None
        self._resumed: Mapping[str, Any] = {}

    def rounds(self, loader: Any, *, epochs: int = 1) -> Iterator[LocalRound]:
        """Train round by round: iterate over the result in place of your epochs, and over each item for its batches.

        Args:
            loader: The training data: a DataLoader, or any iterable that gives an epoch's batches each time.
            epochs: Length of the training. In a federation the job's number of rounds decides, if it has one.

        Yields:
            A round, or a phase of it for strategies with a personal model (Ditto).

        Raises:
            ConfigError: For a model, optimizer or loop that cannot be federated.
            FederationError: If the sites do not fit together, or the run has failed.
        """
        reshard(self._model)  # an evaluation before may have left full parameters in it
        _check_parameters(self._model, self._optimizers)
        if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
            raise ConfigError(
                f"rounds() got {loader!r} in place of the training data",
                where="FederatedLoop.rounds",
                fix="write rounds(loader), with the DataLoader; the number of rounds is set in the job",
            )
        run: TrainerRun[LoopPort] | None = TrainerRun.join(self.options, _FRAMEWORK)
        data = TrainingData(loader, epochs)
        if run is None:
            warn_of_unknown_parameters(self._model, self._optimizers)  # in a federation `begin` does so
        with StepCounter(self._optimizers, data):
            yield from self._alone(data) if run is None else self._federated(run, data)

    def state_dict(self) -> dict[str, Any]:
        """Return the loop's place in its run, for a checkpoint of yours.

        Save it together with the model and the optimizer, between two rounds.

        Returns:
            Plain values; empty outside a federation.
        """
        return {} if self._run is None else self._run.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint in the next call of `rounds`. Load the model and the optimizer, too.

        Args:
            state: What `state_dict` returned.
        """
        self._resumed = dict(state)

    def _alone(self, data: TrainingData) -> Iterator[LocalRound]:
        every, tally = Every.parse(self.options.every or "epoch"), Tally()
        progress = Progress.at(1, 0, every)
        while not data.used_up:
            current = LocalRound(data, progress, every, tally, bounded=True)
            yield current
            current.end()
            tally.reset()
            progress = progress.next(progress.round + 1, every)

    def _federated(self, run: TrainerRun[LoopPort], data: TrainingData) -> Iterator[LocalRound]:
        with run.leaving_on_error():
            port = self._begin(run, data)
        own_length = run.budget.rounds is None
        try:
            while not run.over:
                port.begin_round()
                current = LocalRound(data, run.progress, run.settings.every, run.tally, bounded=own_length)
                yield current
                with run.leaving_on_error():
                    current.end()
                    metrics = {**run.tally.mean_loss(), **current.metrics}
                    run.exchange(run.tally.num_examples(), metrics, more=not (own_length and data.used_up))
        except GeneratorExit:  # the outer loop was left, by `break` or by an error in its body
            if run.active:
                run.stop_early(port.where)
            raise
        run.finish(self._export or self._save, end_with_best=self._best_at_end)
        run.settle()

    def _begin(self, run: TrainerRun[LoopPort], data: TrainingData) -> LoopPort:
        """Make the handshake and take the first global model."""
        checkpoint, self._resumed, self._run = self._resumed, {}, run
        port = LoopPort(
            run=run,
            data=data,
            model=self._model,
            evaluate=self._evaluated,
            note=self._note,
            stateful=self._stateful,
            schedule=self._scheduler,
            counts_epochs=self._scheduler_steps == "epoch",
            checkpoint=checkpoint,
        )
        batches = data.batches_per_epoch
        rounds = run.budget.rounds or run.budget.rounds_within(
            epochs=data.epochs,
            steps=None,
            per_epoch=None,
            where="FederatedLoop.rounds",
            fix='count them: every="epoch"',
        )
        run.begin(
            port,
            self._model,
            self._optimizers,
            rounds=rounds,
            evaluates=self._evaluate is not None and self.options.evaluate_global is not False,
            examples=size_of(data.loader, batches or math.inf, world_size()),
        )
        port.warn_if_schedule_ends_early(rounds)
        return port

    def _save(self, folder: str) -> None:
        save_module(self._model, folder)

    @torch.no_grad()
    def _evaluated(self) -> tuple[Metrics, int]:
        assert self._evaluate is not None
        training = self._model.training
        try:
            scored = self._evaluate()
        finally:
            self._model.train(training)
        metrics, examples = scored if isinstance(scored, tuple) else (scored, 1)
        if not isinstance(metrics, Mapping):
            raise ConfigError(
                f"evaluate() returned {type(metrics).__name__}",
                where="FederatedLoop",
                fix="return metrics by name, such as {'loss': 0.3}, or a pair of them and the number of examples",
            )
        return {name: float(value) for name, value in metrics.items()}, examples

    def _note(self, row: Mapping[str, float]) -> None:
        self.exchange_stats = dict(row)


def _check_kinds(model: Any, optimizers: Sequence[Any], evaluate: Any) -> None:
    """Raise ConfigError for arguments in the wrong order or of the wrong kind."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model is of the type {type(model).__name__}, which is no torch.nn.Module",
            where="FederatedLoop",
            fix="write FederatedLoop(model, optimizer)",
        )
    for optimizer in optimizers:
        if not hasattr(plain(optimizer), "register_step_post_hook"):
            raise ConfigError(
                f"the optimizer is of the type {type(optimizer).__name__}, which is no torch.optim.Optimizer",
                where="FederatedLoop",
                fix="write FederatedLoop(model, optimizer), or give a list of all optimizers",
            )
    if not (evaluate is None or callable(evaluate)):
        raise ConfigError(
            f"evaluate={evaluate!r} is not a function",
            where="FederatedLoop",
            fix="pass a function that scores the model when it is called: evaluate=lambda: {'loss': score(model)}",
        )


def _check_parameters(model: nn.Module, optimizers: Sequence[Any]) -> None:
    """Raise ConfigError if the optimizers train nothing of the model."""
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for parameter in parameters_of(optimizers)):
        raise ConfigError(
            "the optimizer holds no parameter of the model, so the weights that travel would never change",
            where="FederatedLoop",
            fix="give the model and the optimizer that was made from its parameters(); make it after fully_shard()",
        )
