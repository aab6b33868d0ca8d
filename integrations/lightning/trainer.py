"""Facts of a Lightning Trainer, what it can be asked to do, and what cannot be federated.

All access to private attributes of Lightning stands here. Checked in lightning 2.4.0 and 2.6.6.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from fl_adapters.participant.local_result import without_prefix
from fl_adapters.participant.options import BestMetric, SiteSettings
from fl_adapters.torch.progress import size_of
from fl_runtime.errors import ConfigError

from . import scores
from .framework import silent_logger

_STRATEGIES = {
    "FSDPStrategy": "it is FSDP1, which puts the parameters of a layer into one flat tensor, without names and shapes",
    "DeepSpeedStrategy": "DeepSpeed keeps master copies of the weights that new global weights would not reach",
    "XLAStrategy": "several XLA devices have not been tested",
    "XLAFSDPStrategy": "several XLA devices have not been tested",
}
_FOLDERS_OF_A_LOGGER = ("_root_dir", "_save_dir")  # TensorBoardLogger, CSVLogger; lightning 2.4.0 and 2.6.6
# of lightning's logger connector, in 2.4.0 and 2.6.6
_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
# of ModelCheckpoint in 2.6.6; 2.4.0 has the first two
_SAVING = ("_last_global_step_saved", "_last_checkpoint_saved", "_defer_save_until_validation")
# of `_Metadata`, which describes a logged value, in 2.4.0 and 2.6.6
_LOGGED = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)
_CALLBACKS = {
    "StochasticWeightAveraging": "StochasticWeightAveraging puts an average of its own in place of the global weights",
    "WeightAveraging": "WeightAveraging puts an average of its own in place of the global weights",
}


@dataclass(frozen=True)
class CheckpointInterval:
    """When one checkpoint callback saves the state of training.

    Attributes:
        steps: Optimizer steps between two files, or None.
        epochs: Epochs between two files, or None.
        timed: Whether it saves after so much time.
        picks: Whether it saves only what is better by a metric than before.
    """

    steps: int | None
    epochs: int | None
    timed: bool
    picks: bool


def refuse_unsupported(trainer: Any, callback_class: type) -> None:
    """Raise ConfigError for a trainer that cannot be federated. Call in `setup`, before anything else."""
    if sum(isinstance(callback, callback_class) for callback in trainer.callbacks) > 1:
        raise ConfigError("FederatedCallback is given twice", where="Trainer(callbacks=...)", fix="give it once")
    for names, what in ((_STRATEGIES, [trainer.strategy]), (_CALLBACKS, trainer.callbacks)):
        for thing in what:
            reason = next((names[c.__name__] for c in type(thing).__mro__ if c.__name__ in names), None)
            if reason is not None:
                other = "use ModelParallelStrategy with fully_shard() in configure_model (FSDP2), or strategy='ddp'"
                fix = other if names is _STRATEGIES else "leave that callback out"
                raise ConfigError(f"this cannot be federated: {reason}", where=type(thing).__name__, fix=fix)
    if trainer.global_step > 0:
        raise ConfigError(
            f"this Trainer has made {trainer.global_step} steps in an earlier fit",
            where="lightning Trainer",
            fix="make a new Trainer for each federated run; the model may be the same",
        )


def refuse_lazy_parameters(module: torch.nn.Module) -> None:
    """Raise ConfigError for parameters without a shape: the sites could not agree on what travels."""
    lazy = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise ConfigError(
            f"{len(lazy)} lazily initialised tensors have no shape yet: {', '.join(lazy[:4])}",
            where=type(module).__name__,
            fix="put one batch through the model before trainer.fit, or in configure_model()",
        )


def evaluates(trainer: Any, settings: SiteSettings) -> bool:
    """Whether each global model is evaluated here. Raises ConfigError if it must be, and cannot be."""
    possible = _has_validation_data(trainer)
    if settings.evaluate_global and not possible:
        raise ConfigError(
            "evaluate_global=True needs validation data",
            where="lightning Trainer",
            fix="pass val_dataloaders to fit(), and let the module have a validation_step",
        )
    return possible if settings.evaluate_global is None else settings.evaluate_global


def best_metric(trainer: Any) -> BestMetric | None:
    """What the first ModelCheckpoint with a `monitor` picks its best model by; None if that is a training metric."""
    for saver in trainer.checkpoint_callbacks:
        if saver.monitor:
            trained = saver.monitor.startswith("train")
            return None if trained else BestMetric(without_prefix(saver.monitor), saver.mode)
    return None


def _has_validation_data(trainer: Any) -> bool:
    loop = trainer.fit_loop.epoch_loop.val_loop
    source = loop._data_source  # lightning 2.4.0 and 2.6.6
    return bool(trainer.enable_validation and source.is_defined())


def is_last_batch(trainer: Any, batch_idx: int) -> bool:
    """Whether the batch that has just ended is the last of its epoch."""
    return bool(trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches)


def stop(trainer: Any) -> None:
    """End training after this batch. `should_stop` would wait for min_epochs and min_steps."""
    trainer.fit_loop.epoch_loop.max_steps = trainer.global_step


def validate_next(trainer: Any) -> Callable[[], None]:
    """Let Lightning's own loop validate right after this batch, whatever the trainer's interval.

    Returns a function to call when validation has begun: it gives the trainer its own intervals back.
    """
    names = ("val_check_batch", "check_val_every_n_epoch", "_last_val_time")
    before = {name: getattr(trainer, name) for name in names if hasattr(trainer, name)}
    trainer.val_check_batch = 1
    if trainer.check_val_every_n_epoch is not None:
        trainer.check_val_every_n_epoch = 1
    if before.get("_last_val_time") is not None:
        trainer._last_val_time = -math.inf  # an interval of the clock, in lightning 2.6.6

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
    """Validate within this block without a trace.

    No other callback hears of it, so that none takes it for its best; no logger gets a row; and
    `trainer.callback_metrics` and the like are restored afterwards.
    """
    callbacks, loggers = trainer.callbacks, trainer.loggers
    connector = trainer._logger_connector  # lightning 2.4.0 and 2.6.6
    metrics = {name: dict(vars(connector)[name]) for name in _METRICS if name in vars(connector)}
    trainer.callbacks, trainer.loggers = [callback], [silent_logger(trainer)] if loggers else []
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers
        vars(connector).update(metrics)


def validation_score(trainer: Any, before: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """Metrics of the validation that is just ending, means over the ranks; and the examples behind them.

    `before` is `trainer.callback_metrics` when it began: a tensor that is still the same was logged by training.
    """
    logged = {name: v for name, v in trainer.callback_metrics.items() if v is not before.get(name)}
    values = {}
    for name in sorted(logged):
        value = torch.as_tensor(logged[name], dtype=torch.float32, device=trainer.strategy.root_device)
        if value.numel() == 1:
            values[name] = float(trainer.strategy.reduce(value.reshape(()), reduce_op="mean"))
    loop = trainer.fit_loop.epoch_loop.val_loop
    loaders = loop._combined_loader.flattened  # lightning 2.4.0 and 2.6.6
    sizes = [
        size_of(loader, batches, trainer.world_size) or 1
        for loader, batches in zip(loaders, loop.max_batches, strict=True)
    ]
    return scores.plain_metrics(values, sizes), max(sum(sizes), 1)


def training_examples(trainer: Any) -> int | None:
    """Training examples that an epoch uses, over all ranks; of several loaders the most. None without a length."""
    batches, ranks = trainer.num_training_batches, trainer.world_size
    sizes = [size_of(loader, batches, ranks) for loader in training_loaders(trainer)]
    return max((size for size in sizes if size), default=None)


def training_loaders(trainer: Any) -> list[Any]:
    """The loaders of the training data."""
    return list(trainer.fit_loop._combined_loader.flattened)  # lightning 2.4.0 and 2.6.6


def begin_data_anew(trainer: Any, *, skipped: int = 0) -> None:
    """Let the epoch draw its data again, from random states that were seeded since.

    `skipped` batches at its beginning are loaded, so that workers draw what they drew before, and not trained.
    """
    fetcher = trainer.fit_loop._data_fetcher  # lightning 2.4.0 and 2.6.6
    iter(fetcher)
    for _ in range(skipped):
        next(fetcher)
    fetcher.fetched -= skipped  # the training loop adds the batches that it takes for trained


def takes_batches_itself(trainer: Any) -> bool:
    """Whether `training_step` takes its batches from an iterator (`dataloader_iter`)."""
    fetcher = trainer.fit_loop._data_fetcher  # lightning 2.4.0 and 2.6.6
    return any(kind.__name__ == "_DataLoaderIterDataFetcher" for kind in type(fetcher).__mro__)


def batches_ready(trainer: Any) -> tuple[int, int]:
    """Batches that have been fetched for training: in all, and of this epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.total.ready, progress.current.ready


def within_epoch(trainer: Any) -> bool:
    """Whether training stands between two batches of an epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    begun = 0 < progress.current.ready == progress.current.completed
    return begun and not trainer.fit_loop.epoch_loop._num_ready_batches_reached()  # lightning 2.4.0 and 2.6.6


def begin_within_epoch(trainer: Any, batch: int) -> Callable[[], None]:
    """Let the training loop begin its next epoch at `batch`, counted from 0, without validating before.

    Call it before the epoch begins. Returns a function to call when the batch begins, which restores the intervals.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress.current
    progress.ready = progress.started = progress.processed = progress.completed = batch
    loop.restarting = True
    interval = trainer.check_val_every_n_epoch
    trainer.check_val_every_n_epoch = trainer.current_epoch + 2  # not in this epoch
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")

    def restore() -> None:
        trainer.check_val_every_n_epoch = interval

    return restore


def count_begun(trainer: Any) -> None:
    """Count an epoch and a batch that have begun, after the counts were set to those before."""
    epochs = trainer.fit_loop.epoch_progress
    epochs.increment_ready()
    epochs.increment_started()
    trainer.fit_loop.epoch_loop.batch_progress.total.ready += 1


def is_sigterm(error: BaseException) -> bool:
    """Whether Lightning ends training because of a SIGTERM."""
    return type(error).__name__ == "SIGTERMException"


def batches_that_stepped(trainer: Any) -> int:
    """Lightning's own count of batches after which optimizers made a step: the x axis of its logs."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)  # lightning 2.4.0 and 2.6.6


def set_batches_that_stepped(trainer: Any, count: int) -> None:
    """Set the count that `batches_that_stepped` gives."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = count  # lightning 2.4.0 and 2.6.6


def saves_state(trainer: Any) -> list[CheckpointInterval]:
    """When the trainer's checkpoint callbacks save the state of training, without those that save weights alone."""
    return [
        CheckpointInterval(
            # lightning 2.4.0 and 2.6.6
            steps=getattr(saver, "_every_n_train_steps", None) or None,
            epochs=getattr(saver, "_every_n_epochs", None) or None,
            timed=getattr(saver, "_train_time_interval", None) is not None,
            picks=getattr(saver, "monitor", None) is not None,
        )
        for saver in trainer.checkpoint_callbacks
        if not getattr(saver, "save_weights_only", False)
        and (getattr(saver, "save_top_k", 1) != 0 or getattr(saver, "save_last", None))
    ]


def saving_state(saver: Any) -> dict[str, Any]:
    """What a ModelCheckpoint remembers beside its `state_dict`, such as the step of its last file."""
    return {name: vars(saver)[name] for name in _SAVING if name in vars(saver)}


def set_saving_state(saver: Any, state: Mapping[str, Any]) -> None:
    """Set what `saving_state` gives."""
    vars(saver).update(state)


def logged_state(trainer: Any, module: torch.nn.Module) -> dict[str, Any]:
    """What training has logged so far: the newest values, the means of this epoch, and the module's torchmetrics."""
    return {
        "newest": [dict(values) for values in _newest(trainer)],
        "epoch": [_logged(key, metric) for key, metric in _epoch_results(trainer).items() if _accumulates(metric)],
        "metrics": {name: [_metric_state(metric), metric._update_count] for name, metric in _metrics_of(module)},
    }


def set_logged_state(trainer: Any, module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Set what `logged_state` gives."""
    for values, saved in zip(_newest(trainer), state["newest"], strict=True):
        values.update(saved)
    results = _epoch_results(trainer)
    kinds = import_module(type(results).__module__)
    for key, fields, should_sync, rank_zero_only, values, updates in state["epoch"]:
        meta = kinds._Metadata(**fields)
        meta.sync = kinds._Sync(_should=should_sync, fn=trainer.strategy.reduce, rank_zero_only=rank_zero_only)
        results[key] = kinds._ResultMetric(meta, True)
        _set_metric_state(results[key], values, updates)
    for name, metric in _metrics_of(module):
        if name in state["metrics"]:
            _set_metric_state(metric, *state["metrics"][name])


def _newest(trainer: Any) -> list[dict[str, Any]]:
    connector = vars(trainer._logger_connector)  # lightning 2.4.0 and 2.6.6
    return [connector[name] for name in _METRICS if name in connector]


def _epoch_results(trainer: Any) -> Any:
    return trainer.fit_loop.epoch_loop._results  # lightning 2.4.0 and 2.6.6


def _accumulates(metric: Any) -> bool:
    return bool(metric.is_tensor and metric.meta.on_epoch and not metric.has_reset)


def _logged(key: str, metric: Any) -> list[Any]:
    meta = metric.meta
    fields = {**{name: getattr(meta, name) for name in _LOGGED}, "reduce_fx": meta.reduce_fx.__name__}
    return [key, fields, meta.sync.should, meta.sync.rank_zero_only, _metric_state(metric), metric._update_count]


def _metrics_of(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, Metric)]


def _metric_state(metric: Any) -> dict[str, Any]:
    return {name: getattr(metric, name) for name in metric._defaults}  # torchmetrics 0.7.0 and 1.9.0


def _set_metric_state(metric: Any, values: Mapping[str, Any], updates: int) -> None:
    for name, value in values.items():
        setattr(metric, name, value)
    metric._update_count, metric._computed = updates, None  # torchmetrics 0.7.0 and 1.9.0


def set_root_folder(trainer: Any, folder: str) -> None:
    """Set the folder below which Lightning writes by default."""
    trainer._default_root_dir = folder  # lightning 2.4.0 and 2.6.6


def move_logger(logger: Any, moved: Callable[[str], str]) -> None:
    """Replace the folders of a file logger by `moved(folder)`."""
    for name in _FOLDERS_OF_A_LOGGER:
        if isinstance(folder := getattr(logger, name, None), str):
            setattr(logger, name, moved(folder))


def weights_checkpoint(trainer: Any) -> dict[str, Any]:
    """A checkpoint without the state of training. `trainer.save_checkpoint` is a collective; this runs on one rank."""
    connector = trainer._checkpoint_connector  # lightning 2.4.0 and 2.6.6
    checkpoint: dict[str, Any] = connector.dump_checkpoint(weights_only=True)
    return checkpoint


def loss_of(outputs: Any) -> torch.Tensor | None:
    """The loss that a training step returned, undivided by accumulation; None if it returned none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach() if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


def loss_scaling(trainer: Any, optimizer: Any) -> tuple[float | None, bool]:
    """Just before a step: the factor that the gradients still contain, and whether a scaler may skip the step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None, False
    by_itself = getattr(optimizer, "_step_supports_amp_scaling", False)  # torch 2.13.0, fused: unscales in its step
    return (scaler.get_scale() if by_itself else None), True


def log_row(trainer: Any, module: Any, row: Mapping[str, float], *, in_batch: bool) -> None:
    """Write `row` to every logger, and to `trainer.callback_metrics`, so that checkpoint file names can use it."""
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": trainer.current_epoch, **row}, step=trainer.global_step)
    module.log_dict(dict(row), on_step=in_batch, on_epoch=not in_batch, logger=False, batch_size=1)
