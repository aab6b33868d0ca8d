"""What a training framework implements so that FedProx, SCAFFOLD and Ditto work in its training loop."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fl_adapters.participant.state_file import State
from fl_runtime.types import Arrays


@dataclass(frozen=True)
class StepRecord:
    """The optimizer steps of one round, as SCAFFOLD needs them for the next control variate. One field is set.

    Attributes:
        rates: Tensor name -> sum of the learning rates of its steps. Set if every step was plain SGD, without
            momentum: then the change of the weights is the sum of the gradients.
        mean_gradients: Tensor name -> mean of its gradients before correction, on the host. Set for every other
            optimizer.
    """

    rates: Mapping[str, float] | None = None
    mean_gradients: Arrays | None = None


class StandbyModel(Protocol):
    """A second set of weights and optimizer state, kept aside while the other set is in the live model.

    The weights are everything that training changes: trained tensors, and buffers of trained layers, including those
    that never leave the site. The set starts as a copy of the live weights, with an optimizer that has made no step.
    """

    def swap(self) -> None:
        """Exchange the set kept here with the one in the live model and its optimizer."""
        ...

    def weights(self) -> Arrays:
        """Return the weights kept here, by name.

        Returns:
            Host arrays, borrowed until the next call of `swap` or `set_weights`.
        """
        ...

    def set_weights(self, arrays: Arrays) -> None:
        """Replace the weights kept here; the optimizer state kept here stays.

        Args:
            arrays: Arrays of the names, shapes and dtypes of `weights()`. They are copied.
        """
        ...

    def state_dict(self) -> State:
        """Return the weights and the optimizer state kept here, for an exact restart.

        Returns:
            Arrays and plain values, borrowed until the next step.
        """
        ...

    def load_state_dict(self, state: State) -> None:
        """Continue from the state of an earlier process of this site.

        Args:
            state: What `state_dict` returned there.
        """
        ...


class LocalBackend(Protocol):
    """One live model and its optimizer, as `LocalWork` changes their training.

    A backend corrects gradients after accumulation and unscaling, right before the optimizer step. Corrections hold
    from the next step on. If a site trains with several processes (ranks), every rank makes the same calls, and only
    rank 0 passes arrays; the others pass None.
    """

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors that are trained and travel. Only their gradients are corrected."""
        ...

    @property
    def steps(self) -> int:
        """Number of optimizer steps that were corrected since a correction was last chosen."""
        ...

    def share(self, value: Any) -> Any:
        """Give every rank the value of rank 0.

        Args:
            value: A JSON value on rank 0, anything on the others.

        Returns:
            Rank 0's value. With one process per site, `value` itself.
        """
        ...

    def set_anchors(self, weights: Arrays | None, *, loaded: bool) -> None:
        """Keep a copy of the round's global weights, the anchors of `pull_to_anchors`.

        Called at the start of every round that uses anchors, possibly long before `pull_to_anchors`.

        Args:
            weights: The global weights by name, which include `names`; borrowed for the call.
            loaded: Whether the live model holds exactly these weights now.
        """
        ...

    def pull_to_anchors(self, mu: float) -> None:
        """Add mu * (w - anchor) to each gradient: the proximal term of FedProx and Ditto.

        Args:
            mu: Weight of the proximal term, at least 0.
        """
        ...

    def add_offsets(self, offsets: Arrays | None) -> None:
        """Add an offset to each gradient, and record the steps for `step_record`: SCAFFOLD's c - c_i.

        Args:
            offsets: Tensor name -> array of the tensor's shape, float32 or float64; borrowed for the call.
        """
        ...

    def leave_gradients(self) -> None:
        """Leave the gradients as the training script computes them."""
        ...

    def step_record(self) -> StepRecord:
        """Return the optimizer steps since the last call of `add_offsets`.

        Returns:
            Learning rates and gradients of these steps.
        """
        ...

    def standby_model(self) -> StandbyModel:
        """Make a second set of weights and optimizer state for this model.

        Returns:
            A copy of the live weights, with an optimizer that has made no step.
        """
        ...

    def close(self) -> None:
        """Stop all corrections and give the optimizer back as it was."""
        ...
