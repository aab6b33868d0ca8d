"""DP-SGD in any torch trainer: per-record gradients by Opacus, noise before each optimizer step, and its accounting."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils.data import RandomSampler, SequentialSampler

from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.local_work.dp_sgd import DPSGD, EPSILON_METRIC
from fl_adapters.participant.options import Every
from fl_adapters.torch.local_work.correction import plain
from fl_adapters.torch.ranks.collectives import world_size
from fl_runtime.errors import ConfigError
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.gaussian import Releases
from fl_runtime.filters.ledger import Mechanism

_SHUFFLED = ("DistributedSampler", "LengthGroupedSampler", "DistributedLengthGroupedSampler")


@dataclass(frozen=True)
class Batches:
    """How the batches of a training set are drawn.

    Attributes:
        size: Number of records of a batch, or their expected number.
        per_epoch: Number of batches of an epoch.
        sampling: Probability with which a record is in a batch, drawn anew for each batch (Poisson sampling); None if
            each record is in one batch per epoch.
    """

    size: float
    per_epoch: int
    sampling: float | None

    @classmethod
    def of(cls, loader: Any) -> Batches:
        """Read how a data loader draws its batches.

        Args:
            loader: The DataLoader of the training set.

        Returns:
            Its batches.

        Raises:
            ConfigError: If it is not known how often a record is drawn.
        """
        source, size = _source_of(loader)
        if type(source).__name__ == "UniformWithReplacementSampler":
            return cls(source.sample_rate * len(loader.dataset), len(loader), float(source.sample_rate))
        once = isinstance(source, SequentialSampler) or type(source).__name__ in _SHUFFLED
        if size is None or not (once or (isinstance(source, RandomSampler) and not source.replacement)):
            raise ConfigError(
                "DP-SGD cannot tell how often a record is drawn from the training data "
                f"({type(loader).__name__} with {type(source).__name__})",
                where="dp_sgd",
                fix="use a DataLoader with a data set of known length, and shuffle=True or Poisson batches "
                "(opacus.data_loader.DPDataLoader)",
            )
        return cls(float(size), len(loader), None)

    def release(self, every: Every) -> Mechanism:
        """Return what a round of training releases, at a noise multiplier of 1.

        Args:
            every: Local budget of a round.

        Returns:
            The release; its `count` is the largest number of times that a record can be in a batch.

        Raises:
            ConfigError: For shuffled batches and a budget in steps.
        """
        if self.sampling is not None:
            steps = every.steps or (every.epochs or 1) * self.per_epoch
            return Mechanism("gaussian", 1.0, self.sampling, unit="record", count=steps)
        if every.epochs is None:
            raise ConfigError(
                f"DP-SGD with shuffled batches needs rounds of whole epochs, but every is {every}",
                where="every",
                fix='use every="epoch", or Poisson batches (opacus.data_loader.DPDataLoader)',
            )
        return Mechanism("gaussian", 1.0, unit="record", count=every.epochs)


def _source_of(loader: Any) -> tuple[Any, int | None]:
    """Return what draws the records of a data loader, below all wrappers, and the batch size."""
    part, size = loader, None
    while True:
        size = size or getattr(part, "batch_size", None)
        inner = getattr(part, "batch_sampler", None) or getattr(part, "sampler", None)
        if inner is None:
            return part, size
        part = inner


class PrivateTraining:
    """DP-SGD on a live model, from the first round to the last. It changes the gradients that optimizers see.

    The module stays as it is: Opacus attaches hooks to it, which `close` removes.

    Args:
        settings: The script's settings.
        model: The module that is trained.
        optimizers: All its optimizers.
        batches: How batches are drawn.
        every: Local budget of a round.
        host: The site, with the folder of its ledger.

    Raises:
        ConfigError: If Opacus is not installed or cannot train the model, such as one with batch normalization.
    """

    def __init__(
        self,
        settings: DPSGD,
        model: nn.Module,
        optimizers: Sequence[Any],
        batches: Batches,
        every: Every,
        host: FilterHost,
    ) -> None:
        _check_installed()
        if world_size() > 1:
            raise ConfigError(
                "DP-SGD runs in one process per site, but this site has several ranks",
                where="dp_sgd",
                fix="train with one process per site",
            )
        self._settings, self._batches = settings, batches
        kind = batches.release(every)
        self._releases = Releases("DPSGD", kind, settings.noise_multiplier, settings.budget, host)
        self._hooks = _attached(model)
        device = next(iter(model.parameters())).device
        self._generator = torch.Generator(device).manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
        self._optimizers = {id(plain(optimizer)): self._private(plain(optimizer)) for optimizer in optimizers}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._round = 0
        self._noise = math.nan

    def begin(self, round: int) -> None:
        """Begin a round.

        Args:
            round: Number of the round.

        Raises:
            PrivacyBudgetError: If the budget does not allow it.
        """
        self._round, self._noise = round, self._releases.afford(round)

    def change_gradients(self, optimizer: Any) -> None:
        """Replace the gradients by the noisy mean of the clipped gradients of single records, before a step.

        Args:
            optimizer: The optimizer that is about to make a step.

        Raises:
            ConfigError: If gradients of several batches have been accumulated, or records cannot be told apart.
        """
        private = self._optimizers.get(id(plain(optimizer)))
        if private is None:
            raise ConfigError(
                "an optimizer that was not there at the start makes a step",
                where="dp_sgd",
                fix="make all optimizers first",
            )
        self._check_gradients(private.params)
        private.noise_multiplier = self._noise
        private.clip_and_accumulate()
        private.add_noise()
        private.scale_grad()
        for parameter in private.params:
            parameter.grad_sample = parameter.summed_grad = None

    def spend(self, result: LocalResult) -> LocalResult:
        """Record the round in the ledger, before its update leaves.

        Args:
            result: Result of the training.

        Returns:
            The result with the epsilon spent so far as a metric.

        Raises:
            PrivacyBudgetError: If the budget does not allow it.
        """
        self._releases.spend(self._round, self._noise)
        spent = self._releases.spent(self._settings.delta)
        return replace(result, metrics={**result.metrics, EPSILON_METRIC: round(spent, 6)})

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._hooks.cleanup()
        for private in self._optimizers.values():
            for parameter in private.params:
                del parameter.summed_grad
        self._optimizers = {}

    def _private(self, optimizer: torch.optim.Optimizer) -> Any:
        from opacus.optimizers import DPOptimizer

        return DPOptimizer(
            optimizer,
            noise_multiplier=1.0,  # chosen for each round
            max_grad_norm=self._settings.max_grad_norm,
            expected_batch_size=self._batches.size,
            generator=self._generator,
            secure_mode=True,  # noise whose low bits do not tell what it was added to
        )

    def _check_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Raise ConfigError unless every parameter has the gradients of the records of one batch."""
        lengths: dict[str, int] = {}
        for parameter in parameters:
            name, found = self._names.get(id(parameter), "?"), getattr(parameter, "grad_sample", None)
            if found is None:
                raise ConfigError(
                    f"the parameter {name} is trained, but the loss gives it no gradients of single records",
                    where="dp_sgd",
                    fix="freeze it with requires_grad_(False) before the optimizer is made",
                )
            if isinstance(found, list):
                raise ConfigError(
                    "DP-SGD needs a step after every batch, but gradients of several were accumulated",
                    where="dp_sgd",
                    fix="use larger batches without gradient accumulation",
                )
            lengths[name] = len(found)
        if len(set(lengths.values())) > 1:
            usual = max(lengths.values())
            odd = next(name for name, length in lengths.items() if length != usual)
            raise ConfigError(
                f"the gradient of {odd} cannot be told apart by records: its input has {lengths[odd]} rows for {usual}",
                where="dp_sgd",
                fix="freeze it with requires_grad_(False), as is usual for embeddings of positions",
            )


def _check_installed() -> None:
    if find_spec("opacus") is None:
        raise ConfigError(
            "DP-SGD needs the package opacus, which is not installed",
            where="dp_sgd",
            fix='pip install "fl-adapters[dp]"',
        )


def _attached(model: nn.Module) -> Any:
    """Attach Opacus' hooks to a module, or raise ConfigError with the layers that it cannot train."""
    from opacus.grad_sample import GradSampleHooks
    from opacus.validators import ModuleValidator

    training = model.training
    model.train()
    errors = [str(error) for error in ModuleValidator.validate(model, strict=False)]
    model.train(training)
    if not errors:
        try:
            return GradSampleHooks(model)
        except NotImplementedError as error:
            errors = [str(error)]
    names = _named_layers(model)
    raise ConfigError(
        f"Opacus cannot train this model with DP-SGD{names}: {errors[0]}",
        where="dp_sgd",
        fix="use GroupNorm or LayerNorm in place of batch normalization; "
        "opacus.validators.ModuleValidator.fix(model) replaces what it can",
    )


def _named_layers(model: nn.Module) -> str:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    found = [name for name, layer in model.named_modules() if isinstance(layer, kinds)]
    return f" because of {', '.join(found[:3])}" if found else ""
