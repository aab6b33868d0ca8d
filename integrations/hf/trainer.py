"""Trainer facts that `transformers` does not pass to callbacks, and trainer features that cannot be federated.

All access to private attributes of transformers stands here. Checked in transformers 4.57.6 and 5.23.0.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from fl_adapters.participant.kit import Kit
from fl_adapters.participant.options import BestMetric, SiteSettings
from fl_adapters.participant.outputs import SavesApart
from fl_runtime.errors import ConfigError

_IGNORED = "ignore_keys_for_eval"  # argument of `train()`, by its name there


def calling_trainer() -> Trainer:
    """The Trainer whose hook is running. HF gives a callback no reference to it, but it is on the call stack."""
    return _trainer_frame()[0]


class SavesModel:
    """`save_model` of one simulated site's Trainer: a folder that the script names is the site's own."""

    def __init__(self, trainer: Trainer, kit: Kit) -> None:
        self._save_model, self._paths = trainer.save_model, SavesApart(kit, "trainer.save_model")

    def __call__(self, output_dir: Any = None, *args: Any, **options: Any) -> None:
        folder = None if output_dir is None else self._paths.written(os.fspath(output_dir))
        self._save_model(folder, *args, **options)


def keep_saves_apart(trainer: Trainer, kit: Kit | None) -> None:
    """Let `trainer.save_model(folder)` write below a simulated site's own folder, like the trainer's other outputs.

    HF has no hook for it, so this Trainer gets a `save_model` of its own. Its class is left alone.
    """
    if kit is not None and kit.run and not isinstance(trainer.save_model, SavesModel):
        trainer.save_model = SavesModel(trainer, kit)


def copy_length(args: TrainingArguments, passed: Any) -> None:
    """Copy the trainer's length to the arguments that its callbacks get, if these are other ones.

    SetFit passes its own, from which it sets those of its trainer before each training.
    """
    if passed is not args:
        passed.max_steps = args.max_steps
        passed.num_epochs = (args.num_train_epochs, passed.classifier_num_epochs)


def warn_of_head(trainer: Trainer) -> None:
    """Warn that SetFit fits its head after the training of the body, with the rows of this site."""
    if hasattr(trainer, "setfit_model"):
        warnings.warn(
            "the head of this SetFit model is fitted after the federated training of its body, with the rows of this "
            "site alone; it stays here, and model/ holds the body",
            stacklevel=2,
        )


def has_validation_data(trainer: Trainer) -> bool:
    """Whether the trainer can evaluate: on a data set, or by an evaluator of sentence-transformers."""
    return trainer.eval_dataset is not None or getattr(trainer, "evaluator", None) is not None


def training_examples(args: TrainingArguments, dataloader: Any, steps: int) -> int:
    """Size of the training set over all ranks. Without a length, the examples seen in `steps` optimizer steps."""
    dataset = getattr(dataloader, "dataset", None)
    if isinstance(dataset, IterableDatasetShard):  # one rank's share
        dataset = dataset.dataset
    if dataset is not None and has_length(dataset):
        return len(dataset)
    # args.train_batch_size is that of one rank: per device, times the devices that the rank drives
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size * steps


def validation_examples(dataloader: Any) -> int:
    """Size of the validation set whose evaluation has just ended; 1 if unknown."""
    dataset = getattr(dataloader, "dataset", None)
    if dataset is not None and has_length(dataset):
        return max(len(dataset), 1)
    return 1


def loss_sum() -> float | None:
    """Sum of HF's training loss over the optimizer steps of this `train()` so far; None if out of reach.

    HF adds the losses up on the device. This is read once a round, so that no step waits for it.
    """
    trainer, frame = _trainer_frame()
    running = getattr(trainer, "_tr_loss", None)  # transformers 5.23.0
    if running is None:
        running = frame.f_locals.get("tr_loss")  # transformers 4.57.6
    if not isinstance(running, torch.Tensor):
        return None
    logged = getattr(trainer, "_total_loss_scalar", 0.0)  # transformers 4.57.6 and 5.23.0
    return float(running.item()) + float(logged)


def log_round(
    trainer: Trainer, state: TrainerState, control: TrainerControl, row: Mapping[str, float], job: str
) -> None:
    """Write `row` to HF's own log: log_history and every logger. log_history also gets the name of the run.

    A subclass's `log` is left out on purpose: SFTTrainer's would take the metrics of the user's own next row.
    """
    should_log = control.should_log
    Trainer.log(trainer, dict(row))
    control.should_log = should_log  # logging clears the user's own wish to log at this step
    state.log_history[-1]["federation_job"] = job


def evaluate_unseen(trainer: Trainer, callback: TrainerCallback) -> None:
    """Evaluate the model as it is, without a trace in the trainer's state. Only the hooks of `callback` are called."""
    handler, state, control = trainer.callback_handler, trainer.state, trainer.control
    callbacks, rows, training = handler.callbacks, len(state.log_history), trainer.is_in_train
    flags = vars(control).copy()
    ignored = next((f.f_locals[_IGNORED] for f in _trainer_frames() if _IGNORED in f.f_locals), None)
    handler.callbacks = [callback]
    trainer.is_in_train = True  # else the model itself would be cast where the arguments say fp16_full_eval
    try:
        trainer.evaluate(ignore_keys=ignored)
    finally:
        handler.callbacks, trainer.is_in_train = callbacks, training
        vars(control).update(flags)
        del state.log_history[rows:]


class _AtEnd(TrainerCallback):
    """Calls a function in `on_train_end`, once."""

    def __init__(self, trainer: Trainer, function: Callable[[], None]) -> None:
        self._trainer, self._function = trainer, function

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.remove_callback(self)
        self._function()


def call_last(trainer: Trainer, function: Callable[[], None]) -> None:
    """Call a function after the `on_train_end` of all other callbacks. Only within an `on_train_end`.

    HF runs through its list of callbacks, and so comes to one that is appended meanwhile.
    """
    trainer.callback_handler.callbacks.append(_AtEnd(trainer, function))


def refuse_unsupported(trainer: Trainer, settings: SiteSettings) -> None:
    """Raise ConfigError, before the first step, for a trainer that cannot be federated."""
    args = trainer.args
    if trainer.is_deepspeed_enabled:
        raise _refused(
            "DeepSpeed keeps master copies of the weights that new global weights would not reach",
            fix="use FSDP2: fsdp_version: 2 in fsdp_config or in the configuration of accelerate",
        )
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise _refused(
            "FSDP1 puts the parameters of a layer into one flat tensor, without names and shapes that could travel",
            fix="use FSDP2: fsdp_version: 2 in fsdp_config or in the configuration of accelerate",
        )
    if getattr(trainer.model, "_tp_size", None) not in (None, 1):  # transformers 4.57.6 and 5.23.0
        raise _refused("tensor parallelism has not been tested with it", fix="use FSDP2 or DDP")
    if args.auto_find_batch_size:
        raise _refused(
            "auto_find_batch_size starts training over in the middle of a round", fix="set per_device_train_batch_size"
        )
    if hasattr(trainer, "setfit_model") and trainer.train_dataset is None:
        return  # SetFit gives its trainer the data sets when it trains
    if settings.evaluate_global and not has_validation_data(trainer):
        raise ConfigError(
            "evaluate_global=True needs validation data", where="Trainer", fix="pass eval_dataset= to the Trainer"
        )
    if args.load_best_model_at_end:
        _refuse_other_best(trainer, args, settings)


def best_metric(args: TrainingArguments) -> BestMetric | None:
    """The metric by which the trainer picks its best model; None if the arguments name none."""
    if not args.metric_for_best_model:
        return None
    name = args.metric_for_best_model.removeprefix("eval_")
    return BestMetric(name, "max" if args.greater_is_better else "min")


def refuse_search(state: TrainerState) -> None:
    """Raise ConfigError for a trial of `hyperparameter_search`."""
    if state.is_hyper_param_search:
        raise _refused("a hyperparameter search trains many models", fix="search first, then train in the federation")


def _refuse_other_best(trainer: Trainer, args: TrainingArguments, settings: SiteSettings) -> None:
    """Refuse `load_best_model_at_end` if the trainer and the job pick the best round by different scores."""
    if settings.evaluate_global is False or not has_validation_data(trainer):
        raise _refused(
            "load_best_model_at_end means the best global round, but no round is scored with evaluate_global=False",
            fix="leave evaluate_global on, or set load_best_model_at_end=False",
        )
    own = best_metric(args) or BestMetric("loss", "min")
    jobs = settings.best(own)
    if own != jobs:
        raise _refused(
            f"load_best_model_at_end asks for the {own.mode} of {own.name!r}, while the job picks the best round by "
            f"the {jobs.mode} of {jobs.name!r}",
            fix=f"set best_metric: {own.name} and best_mode: {own.mode} in the job, or change metric_for_best_model",
        )


def _refused(reason: str, *, fix: str) -> ConfigError:
    return ConfigError(f"this cannot be federated: {reason}", where="TrainingArguments", fix=fix)


def _trainer_frames() -> Iterator[FrameType]:
    """Frames of the Trainer's methods on this thread's call stack, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            yield frame
        frame = frame.f_back


def _trainer_frame() -> tuple[Trainer, FrameType]:
    for frame in _trainer_frames():
        return frame.f_locals["self"], frame
    raise ConfigError(
        "FederatedCallback works within a transformers.Trainer only",
        where="a hook called from elsewhere",
        fix="for a loop of your own use fl_adapters.connect()",
    )


def round_metrics(loss_now: float | None, loss_before: float | None, steps: int) -> dict[str, float]:
    """{"train_loss": mean over the round} from `loss_sum` at both ends; empty if that is unknown."""
    if loss_now is None or loss_before is None or steps < 1:
        return {}
    return {"train_loss": (loss_now - loss_before) / steps}


def mark_run(state: TrainerState, job: str) -> None:
    """Note the name of the run in log_history, and so in every checkpoint from here on."""
    state.log_history.append({"federation_job": job, "step": state.global_step})


def run_of_checkpoint(state: TrainerState) -> str | None:
    """Name of the run in which a checkpoint was saved, by its log_history; None if outside a federation."""
    return next((row["federation_job"] for row in reversed(state.log_history) if "federation_job" in row), None)


def set_first_step(trainer: Trainer, step: int) -> None:
    """Let HF's means of losses and of speed begin at `step`, after an exact restart."""
    # transformers 4.57.6 and 5.23.0 have the first, 5.23.0 alone the second
    for name in ("_globalstep_last_logged", "_initial_global_step"):
        setattr(trainer, name, step)


def warn_of_loss_over_tokens(model: Any) -> None:
    """Warn if a model's own loss is a mean over tokens, which DP-SGD cannot divide among records."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(base).__name__.endswith(_OVER_TOKENS):
        warnings.warn(
            f"the loss of {type(base).__name__} is a mean over the tokens of a batch: the epsilon of DP-SGD holds only "
            "if all records have the same number of labels, such as blocks of equal length",
            stacklevel=2,
        )


_OVER_TOKENS = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForTokenClassification")
