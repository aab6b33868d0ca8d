"""Facts of a Lightning Trainer, what can be asked of it, and what cannot be federated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from fl_adapters.participant.options import SiteSettings
from fl_adapters.torch.batches import size_of
from fl_runtime.errors import ConfigError

from . import scores
from .framework import silent_logger

_STRATEGIES = {
    "FSDPStrategy": "FSDP keeps each rank's part of the weights alone, which new global weights would not reach",
    "ModelParallelStrategy": "parameters that are split over ranks have not been tried",
    "DeepSpeedStrategy": "DeepSpeed keeps master copies of the weights that new global weights would not reach",
    "XLAStrategy": "several XLA devices have not been tried",
    "XLAFSDPStrategy": "several XLA devices have not been tried",
}
_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_CALLBACKS = {
    "StochasticWeightAveraging": "StochasticWeightAveraging puts an average of its own in place of the global weights",
    "WeightAveraging": "WeightAveraging puts an average of its own in place of the global weights",
}


def refuse_unsupported(trainer: Any, callback_class: type) -> None:
    """Raise ConfigError for what cannot work in a federation, with the reason. In `setup`, before anything else."""
    if sum(isinstance(callback, callback_class) for callback in trainer.callbacks) > 1:
        raise ConfigError("FederatedCallback is given twice", where="Trainer(callbacks=...)", fix="give it once")
    for names, what in ((_STRATEGIES, [trainer.strategy]), (_CALLBACKS, trainer.callbacks)):
        for thing in what:
            reason = next((names[c.__name__] for c in type(thing).__mro__ if c.__name__ in names), None)
            if reason is not None:
                fix = "use strategy='ddp', or one device" if names is _STRATEGIES else "leave that callback out"
                raise ConfigError(f"this cannot be federated: {reason}", where=type(thing).__name__, fix=fix)
    if trainer.global_step > 0:
        raise ConfigError(
            f"this Trainer has made {trainer.global_step} steps in an earlier fit",
            where="lightning Trainer",
            fix="make a new Trainer for each federated run; the model may be the same",
        )


def refuse_lazy_parameters(module: torch.nn.Module) -> None:
    """Raise ConfigError where parameters have no shape as yet: what travels could not be agreed on."""
    lazy = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise ConfigError(
            f"{len(lazy)} lazily initialised tensors have no shape yet: {', '.join(lazy[:4])}",
            where=type(module).__name__,
            fix="put one batch through the model before trainer.fit, or in configure_model()",
        )


def evaluates(trainer: Any, settings: SiteSettings) -> bool:
    """Whether each global model is evaluated here. Raises ConfigError where it must be and cannot be."""
    possible = _has_validation_data(trainer)
    if settings.evaluate_global and not possible:
        raise ConfigError(
            "evaluate_global=True needs validation data",
            where="lightning Trainer",
            fix="pass val_dataloaders to fit(), and let the module have a validation_step",
        )
    return possible if settings.evaluate_global is None else settings.evaluate_global


def _has_validation_data(trainer: Any) -> bool:
    loop = trainer.fit_loop.epoch_loop.val_loop
    return bool(trainer.enable_validation and loop._data_source.is_defined())


def is_last_batch(trainer: Any, batch_idx: int) -> bool:
    """Whether the batch that has just ended is the last of its epoch."""
    return bool(trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches)


def stop(trainer: Any) -> None:
    """End training after this batch. `should_stop` would wait for min_epochs and min_steps."""
    trainer.fit_loop.epoch_loop.max_steps = trainer.global_step


def validate_next(trainer: Any) -> Callable[[], None]:
    """Let Lightning's own loop run validation right after this batch, whatever its interval. Call the result when it
    has begun: the trainer's intervals are then what they were."""
    names = ("val_check_batch", "check_val_every_n_epoch", "_last_val_time")
    before = {name: getattr(trainer, name) for name in names if hasattr(trainer, name)}
    trainer.val_check_batch = 1
    if trainer.check_val_every_n_epoch is not None:
        trainer.check_val_every_n_epoch = 1
    if before.get("_last_val_time") is not None:
        trainer._last_val_time = -math.inf  # for an interval of the clock

    def restore() -> None:
        for name in ("val_check_batch", "check_val_every_n_epoch"):
            setattr(trainer, name, before[name])

    return restore


def validate_now(trainer: Any) -> None:
    """Run the validation loop between batches, as Lightning's own training loop does."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


@contextmanager
def unseen(trainer: Any, callback: Any) -> Iterator[None]:
    """What is validated within this block leaves no trace: no other callback hears of it (none keeps it for the best),
    no logger gets a row, and `trainer.callback_metrics` and their kin are afterwards what they were."""
    callbacks, loggers, connector = trainer.callbacks, trainer.loggers, trainer._logger_connector
    metrics = {name: dict(vars(connector)[name]) for name in _METRICS if name in vars(connector)}
    trainer.callbacks, trainer.loggers = [callback], [silent_logger(trainer)] if loggers else []
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers
        vars(connector).update(metrics)


def validation_score(trainer: Any, before: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """(metrics, examples) of the validation run that is just ending; metrics are means over the ranks.

    before: `trainer.callback_metrics` when it began; what is still the same tensor there was logged by training.
    """
    logged = {name: v for name, v in trainer.callback_metrics.items() if v is not before.get(name)}
    values = {}
    for name in sorted(logged):
        value = torch.as_tensor(logged[name], dtype=torch.float32, device=trainer.strategy.root_device)
        if value.numel() == 1:
            values[name] = float(trainer.strategy.reduce(value.reshape(()), reduce_op="mean"))
    loop = trainer.fit_loop.epoch_loop.val_loop
    sizes = [
        size_of(loader, batches, trainer.world_size) or 1
        for loader, batches in zip(loop._combined_loader.flattened, loop.max_batches, strict=True)
    ]
    return scores.plain_metrics(values, sizes), max(sum(sizes), 1)


def training_examples(trainer: Any) -> int | None:
    """Size of the training set over all ranks, as far as an epoch uses it; the largest of several. None without a
    length."""
    loaders = trainer.fit_loop._combined_loader.flattened
    sizes = [size_of(loader, trainer.num_training_batches, trainer.world_size) for loader in loaders]
    return max((size for size in sizes if size), default=None)


def loss_of(outputs: Any) -> torch.Tensor | None:
    """The loss that a training step returned, undivided by accumulation; None if it returned none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach() if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


def loss_scaling(trainer: Any, optimizer: Any) -> tuple[float | None, bool]:
    """(what the gradients are multiplied by still, whether their step may be left out) just before a step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None, False
    by_itself = getattr(optimizer, "_step_supports_amp_scaling", False)  # fused: it unscales within its step
    return (scaler.get_scale() if by_itself else None), True


def log_row(trainer: Any, module: Any, row: Mapping[str, float], *, in_batch: bool) -> None:
    """Write `row` to every logger, and to `trainer.callback_metrics`, where file names of checkpoints find it."""
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": trainer.current_epoch, **row}, step=trainer.global_step)
    module.log_dict(dict(row), on_step=in_batch, on_epoch=not in_batch, logger=False, batch_size=1)
