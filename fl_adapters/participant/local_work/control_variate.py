"""A site's SCAFFOLD control variate c_i, in NumPy for every framework.

Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", Algorithm 1. In
the formulas, c_i is this site's control variate and c the server's; x are the global weights that a round starts from
and y_i this site's weights at its end; K is the number of local steps and lr their learning rate; N is the number of
sites.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fl_adapters.participant.outputs import SiteHome
from fl_runtime.aggregation.corrections.local_terms import control_extras, control_of
from fl_runtime.store.tensorfile import read_tensors, write_tensors
from fl_runtime.types import Array, Arrays

FILE = "control.safetensors"
"""Name of the file with c_i, in the site's own folder."""

_COUNTED = ("used", "carried", "duplicate")


class ControlVariate:
    """The control variate of one site: an array for each trained tensor that travels.

    Arrays are float32, or float64 for a float64 tensor. c_i starts at zero and changes only with an update that the
    server has counted. A file in the site's folder carries it to a later process of this site. If a process dies
    after the server counted an update and before the file was written, the site continues with the c_i of the round
    before.
    """

    def __init__(self, home: SiteHome, dtypes: Mapping[str, np.dtype[np.generic]]) -> None:
        """Prepare the rounds of one training run.

        Args:
            home: The site's own folder. In the first process of a run, a file of an earlier run is deleted.
            dtypes: Tensor name -> dtype, for the tensors whose gradients are corrected.
        """
        self._file, self._sites = home.folder / FILE, home.sites
        self._dtypes = {name: _accumulation_dtype(dtype) for name, dtype in dtypes.items()}
        if home.fresh:
            self._file.unlink(missing_ok=True)
        self._own: dict[str, Array] | None = None
        self._next: dict[str, Array] | None = None
        self._global: dict[str, Array] = {}
        self._base: dict[str, Array] = {}

    def begin(self, model: Arrays, extras: Arrays) -> dict[str, Array]:
        """Begin a round with its global weights.

        Args:
            model: The global weights by name; copied.
            extras: The arrays that travelled beside them, with c if the server has one; copied.

        Returns:
            c - c_i by name, to be added to each gradient.
        """
        received = control_of(extras)
        self._base = {name: np.array(model[name], dtype) for name, dtype in self._dtypes.items()}
        self._global = {
            name: np.array(received[name], dtype) if name in received else np.zeros_like(self._base[name])
            for name, dtype in self._dtypes.items()
        }
        if self._own is None:
            self._own = self._load()
        return {name: self._global[name] - own for name, own in self._own.items()}

    def end_by_rates(self, weights: Arrays, rates: Mapping[str, float]) -> dict[str, Array]:
        """End a round of plain SGD: c_i becomes c_i - c + (x - y_i) / (K lr), option II of the paper.

        Args:
            weights: y_i, this site's weights after the round.
            rates: Tensor name -> K lr, the sum of the learning rates of its steps.

        Returns:
            The extras of the round's update.
        """
        assert self._own is not None
        following = {}
        for name, own in self._own.items():
            sum_of_rates = rates.get(name, 0.0)
            if not sum_of_rates:  # this tensor was not trained
                following[name] = own
                continue
            step = self._base[name] - weights[name].astype(own.dtype)
            following[name] = own - self._global[name] + step / own.dtype.type(sum_of_rates)
        return self._end(following)

    def end_by_gradients(self, means: Arrays) -> dict[str, Array]:
        """End a round of any other optimizer: c_i becomes the mean of the round's gradients before correction.

        Args:
            means: Tensor name -> mean gradient. A tensor that is missing keeps its c_i.

        Returns:
            The extras of the round's update.
        """
        assert self._own is not None
        return self._end({n: means[n].astype(c.dtype) if n in means else c for n, c in self._own.items()})

    def end_unchanged(self) -> dict[str, Array]:
        """End a round of which this process trained only a part: c_i stays. Returns the extras of the update."""
        assert self._own is not None
        return self._end(dict(self._own))

    def pending(self) -> dict[str, Array] | None:
        """Return c_i as it will be once the round's update has been counted; None before the first round."""
        return self._next if self._next is not None else self._own

    def submitted(self, status: str) -> None:
        """Adopt the new c_i if the server counted the round's update.

        Args:
            status: What the server counted the update as, such as "used" or "late".
        """
        if self._next is not None and status in _COUNTED:
            self._own = self._next
            write_tensors(self._file, self._own)
        self._next = None

    def _end(self, following: dict[str, Array]) -> dict[str, Array]:
        """Send (c_i's change) / N, so that the server adds up changes without knowing the number of sites."""
        assert self._own is not None
        self._next = following
        share = {name: (c - self._own[name]) / c.dtype.type(self._sites) for name, c in following.items()}
        return control_extras(share)

    def _load(self) -> dict[str, Array]:
        if self._file.exists():
            saved = read_tensors(self._file)
            if all(
                n in saved and (saved[n].shape, saved[n].dtype) == (c.shape, c.dtype) for n, c in self._global.items()
            ):
                return {name: np.array(saved[name]) for name in self._global}
        return {name: np.zeros_like(c) for name, c in self._global.items()}


def restore_control(home: SiteHome, arrays: Arrays | None) -> None:
    """Replace the file of c_i before the first round of a restarted process.

    Args:
        home: The site's own folder.
        arrays: What `ControlVariate.pending` returned; None starts from zero.
    """
    file = home.folder / FILE
    if arrays is None:
        file.unlink(missing_ok=True)
    else:
        write_tensors(file, arrays)


def _accumulation_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
