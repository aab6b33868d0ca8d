"""Facts of a MONAI trainer and its handlers, what they can be asked to do, and what cannot be federated.

All access to private attributes of Ignite and MONAI stands here. Checked in Ignite 0.4.11 and 0.5.5, and in MONAI
1.4.0 and 1.6.1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from monai.handlers import CheckpointSaver, ValidationHandler
from torch.nn.parameter import is_lazy

from fl_adapters.participant.options import SiteSettings
from fl_adapters.torch.progress import rows_of, size_of
from fl_adapters.torch.ranks import collectives as ranks
from fl_adapters.torch.selection import unwrap
from fl_runtime.errors import ConfigError

from .budget import ENDLESS

H = TypeVar("H")
_CHECKPOINTS = ("_final_checkpoint", "_key_metric_checkpoint", "_interval_checkpoint")  # MONAI 1.4.0 and 1.6.1


def event_handlers(engine: Any) -> dict[Any, list[tuple[Any, Any, Any]]]:
    """Handlers by event, each as (handler, arguments, keyword arguments). The engine's own dict."""
    handlers: dict[Any, list[tuple[Any, Any, Any]]] = engine._event_handlers  # Ignite 0.4.11 and 0.5.5
    return handlers


def set_event_handlers(engine: Any, handlers: dict[Any, list[tuple[Any, Any, Any]]]) -> None:
    """Replace all handlers of an engine."""
    engine._event_handlers = handlers  # Ignite 0.4.11 and 0.5.5


def is_only_handler(engine: Any, event: Any) -> bool:
    """Whether `event` has exactly one handler."""
    return len(event_handlers(engine)[event]) == 1


def put_first(engine: Any, event: Any, hook: Callable[..., None]) -> None:
    """Make `hook` the first handler of `event`, whatever was attached before; once, however often this is called.

    Ignite runs handlers in the order in which they were attached and has no other way to say which comes first.
    """
    handlers = event_handlers(engine)[event]
    handlers.insert(0, _taken(engine, event, hook))


def put_last(engine: Any, event: Any, hook: Callable[..., None]) -> None:
    """Make `hook` the last of the handlers that `event` has so far; once, however often this is called."""
    handlers = event_handlers(engine)[event]
    handlers.append(_taken(engine, event, hook))


def _taken(engine: Any, event: Any, hook: Callable[..., None]) -> tuple[Any, Any, Any]:
    """Attach `hook` if it is not attached, and take its entry out of the list of handlers."""
    handlers = event_handlers(engine)[event]
    if not engine.has_event_handler(hook, event):
        engine.add_event_handler(event, hook)
    return handlers.pop(next(i for i, (handler, _, _) in enumerate(handlers) if handler == hook))


def attached(engine: Any, kind: type[H]) -> list[H]:
    """Attached handlers of class `kind`, each once, in the order in which they were attached."""
    owners: dict[int, H] = {}
    for handlers in list(event_handlers(engine).values()):
        for handler, _, _ in handlers:
            hook = getattr(handler, "__wrapped__", handler)  # Ignite wraps those of every n-th event
            owner = getattr(hook, "__self__", hook)
            if isinstance(owner, kind):
                owners[id(owner)] = owner
    return list(owners.values())


def refuse_unsupported(engine: Any) -> None:
    """Raise ConfigError for an engine that is no trainer of one network with one optimizer."""
    missing = [name for name in ("network", "optimizer", "data_loader") if not hasattr(engine, name)]
    if missing:
        raise ConfigError(
            f"this engine has no {missing[0]}: it does not train one network with one optimizer",
            where=type(engine).__name__,
            fix="attach the handler to a monai.engines.SupervisedTrainer, in train_handlers; trainers of several "
            "networks (GanTrainer, AdversarialTrainer) cannot be federated",
        )


def refuse_lazy_parameters(network: torch.nn.Module) -> None:
    """Raise ConfigError for parameters without a shape: the sites could not agree on what travels."""
    lazy = [name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise ConfigError(
            f"{len(lazy)} lazily initialised tensors have no shape yet: {', '.join(lazy[:4])}",
            where=type(unwrap(network)).__name__,
            fix="put one batch through the network before trainer.run()",
        )


def validator_of(engine: Any, settings: SiteSettings) -> ValidationHandler | None:
    """The ValidationHandler that scores each global model; None without one, and with `evaluate_global=False`.

    Raises ConfigError for `evaluate_global=True` if no handler validates the network that is trained.
    """
    if settings.evaluate_global is False:
        return None
    handlers = [handler for handler in attached(engine, ValidationHandler) if handler.validator is not None]
    trained = {id(parameter) for parameter in engine.network.parameters()}
    for handler in handlers:
        network = getattr(handler.validator, "network", None)
        if network is not None and trained == {id(parameter) for parameter in network.parameters()}:
            return handler
    reason = "its evaluator has another network (an average of it?)" if handlers else "there is no ValidationHandler"
    if settings.evaluate_global:
        raise ConfigError(
            f"evaluate_global=True needs validation of the network that is trained, but {reason}",
            where="train_handlers of the trainer",
            fix="add a monai.handlers.ValidationHandler, with an evaluator of the same network",
        )
    if handlers:
        warnings.warn(f"global models are not scored: {reason}", stacklevel=2)
    return None


def validates_now(engine: Any, handler: ValidationHandler, *, in_iteration: bool, epoch_ends: bool) -> bool:
    """Whether the handler itself is about to validate the weights as they are.

    `in_iteration` says whether handlers of this iteration are still to run, `epoch_ends` whether those of an epoch are.
    """
    if handler.epoch_level:
        return epoch_ends and engine.state.epoch % handler.interval == 0
    return in_iteration and engine.state.iteration % handler.interval == 0


def training_examples(engine: Any) -> int | None:
    """Training examples that an epoch uses, over all ranks; None without a length."""
    batches = engine.state.epoch_length
    return size_of(engine.data_loader, math.inf if batches is None else batches, ranks.world_size())


def validation_examples(evaluator: Any) -> int:
    """Size of the validation set over all ranks; 1 if unknown."""
    batches = evaluator.state.epoch_length
    return size_of(evaluator.data_loader, math.inf if batches is None else batches, ranks.world_size()) or 1


def loss_of(engine: Any) -> torch.Tensor | float | None:
    """The loss of the iteration that has just ended, undivided by accumulation; None if its output has none."""
    output = engine.state.output
    if isinstance(output, list) and output:  # decollated: every example has the loss of its batch
        output = output[0]
    if isinstance(output, Mapping):
        output = output.get("loss")
    if isinstance(output, torch.Tensor):
        return output.detach() if output.numel() == 1 else None
    return output if isinstance(output, float) else None


def rows_in_batch(engine: Any) -> int:
    """Examples in the batch of the iteration that has just ended."""
    batch = engine.state.batch
    if isinstance(batch, list) and batch and not isinstance(batch[0], torch.Tensor):  # decollated
        return len(batch)
    return rows_of(batch)


def stop(engine: Any, *, epoch_ends: bool) -> None:
    """End the run after this epoch, or in its middle."""
    if epoch_ends:
        engine.state.max_epochs = engine.state.epoch
    else:
        engine.terminate()


def at_last_iteration(engine: Any) -> bool:
    """Whether the iteration that is ending is the trainer's last, as far as that is known."""
    return has_ended(engine) and engine.state.iteration == engine.state.max_epochs * (engine.state.epoch_length or 0)


def has_ended(engine: Any) -> bool:
    """Whether the epoch that is ending is the trainer's last."""
    return engine.state.max_epochs != ENDLESS and engine.state.epoch >= engine.state.max_epochs


def begin_data_anew(engine: Any) -> None:
    """Let this epoch draw its data anew. Otherwise Ignite asks the iterator of the epoch before for one batch more."""
    engine._dataloader_iter, engine._init_iter = None, 0  # Ignite 0.4.11 and 0.5.5


def checkpoints_of(saver: CheckpointSaver) -> list[Any]:
    """Ignite's checkpoints within MONAI's handler, each with a disk saver of its own."""
    return [made for name in _CHECKPOINTS if (made := getattr(saver, name, None)) is not None]


def metric_name(handler: Any) -> str:
    """Name under which a metric of MONAI appears in the evaluator's state."""
    return str(handler._name)  # MONAI 1.4.0 and 1.6.1
