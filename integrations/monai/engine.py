"""Facts of a MONAI trainer and its handlers, and what cannot be federated."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from monai.handlers import ValidationHandler
from torch.nn.parameter import is_lazy

from fl_adapters.participant.options import SiteSettings
from fl_adapters.torch.batches import rows_of, size_of
from fl_adapters.torch.state import unwrap
from fl_runtime.errors import ConfigError

from .budget import ENDLESS

H = TypeVar("H")


def put_first(engine: Any, event: Any, hook: Callable[..., None]) -> None:
    """Make `hook` the first handler of `event`, whatever was attached before; once, however often this is called.

    Ignite runs handlers in the order in which they were attached and has no other way to say which comes first.
    """
    handlers = engine._event_handlers[event]
    if not engine.has_event_handler(hook, event):
        engine.add_event_handler(event, hook)
    place = next(i for i, (handler, _, _) in enumerate(handlers) if handler == hook)
    handlers.insert(0, handlers.pop(place))


def attached(engine: Any, kind: type[H]) -> list[H]:
    """The handlers of this kind, each once, in the order in which they were attached."""
    found: dict[int, H] = {}
    for handlers in list(engine._event_handlers.values()):
        for handler, _, _ in handlers:
            hook = getattr(handler, "__wrapped__", handler)  # Ignite wraps those of every n-th event
            owner = getattr(hook, "__self__", hook)
            if isinstance(owner, kind):
                found[id(owner)] = owner
    return list(found.values())


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
    """Raise ConfigError where parameters have no shape as yet: what travels could not be agreed on."""
    lazy = [name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise ConfigError(
            f"{len(lazy)} lazily initialised tensors have no shape yet: {', '.join(lazy[:4])}",
            where=type(unwrap(network)).__name__,
            fix="put one batch through the network before trainer.run()",
        )


def validator_of(engine: Any, settings: SiteSettings) -> ValidationHandler | None:
    """The ValidationHandler that scores each global model; None where there is none, or none is wanted.

    Raises ConfigError where one is wanted and there is none for the network that is trained.
    """
    if settings.evaluate_global is False:
        return None
    handlers = [handler for handler in attached(engine, ValidationHandler) if handler.validator is not None]
    mine = {id(parameter) for parameter in engine.network.parameters()}
    for handler in handlers:
        network = getattr(handler.validator, "network", None)
        if network is not None and mine == {id(parameter) for parameter in network.parameters()}:
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

    in_iteration: whether handlers of this iteration are still to run. epoch_ends: whether those of an epoch are.
    """
    if handler.epoch_level:
        return epoch_ends and engine.state.epoch % handler.interval == 0
    return in_iteration and engine.state.iteration % handler.interval == 0


def training_examples(engine: Any) -> int | None:
    """Size of the training set over all ranks, as far as an epoch uses it; None without a length."""
    batches = engine.state.epoch_length
    return size_of(engine.data_loader, math.inf if batches is None else batches, ranks())


def validation_examples(evaluator: Any) -> int:
    """Size of the validation set; 1 where it is not known."""
    batches = evaluator.state.epoch_length
    return size_of(evaluator.data_loader, math.inf if batches is None else batches, ranks()) or 1


def ranks() -> int:
    """How many processes train together at this site."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def loss_of(engine: Any) -> torch.Tensor | float | None:
    """The loss of the iteration that has just ended, undivided by accumulation; None if its output has none."""
    output = engine.state.output
    if isinstance(output, list) and output:  # decollated: every example bears the loss of its batch
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
