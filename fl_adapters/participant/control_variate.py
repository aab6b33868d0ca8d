"""SCAFFOLD at a site: its control variate c_i, in NumPy, for every framework (Karimireddy et al. 2020, "SCAFFOLD:
Stochastic Controlled Averaging for Federated Learning", Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fl_adapters.participant.local_phases import SiteHome
from fl_runtime.aggregation.corrections.local_terms import control_extras, control_of
from fl_runtime.store.tensorfile import read_tensors, write_tensors
from fl_runtime.types import Array, Arrays

FILE = "control.safetensors"
_COUNTED = ("used", "carried", "duplicate")


class ControlVariate:
    """c_i of one site, an array for each trained tensor that travels: float32, float64 for a float64 tensor.

    Kept in the site's folder, so that a new process of this site goes on with it; without that file c_i is 0, as it is
    for a site that has not trained before. c_i changes only with an update that the server has counted. A process that
    dies between that and the file's writing goes on with the c_i of the round before.
    """

    def __init__(self, home: SiteHome, names: Mapping[str, np.dtype[np.generic]]) -> None:
        """names: tensor -> its dtype, of what is corrected."""
        self._file, self._dtypes, self._sites = home.folder / FILE, {n: _wide(d) for n, d in names.items()}, home.sites
        if home.fresh:
            self._file.unlink(missing_ok=True)
        self._own: dict[str, Array] | None = None
        self._next: dict[str, Array] | None = None
        self._global: dict[str, Array] = {}
        self._base: dict[str, Array] = {}

    def begin(self, model: Arrays, extras: Arrays) -> dict[str, Array]:
        """A round begins with these global weights and what came beside them: c - c_i, which each gradient gets."""
        came = control_of(extras)
        self._base = {name: np.array(model[name], dtype) for name, dtype in self._dtypes.items()}
        self._global = {
            name: np.array(came[name], dtype) if name in came else np.zeros_like(self._base[name])
            for name, dtype in self._dtypes.items()
        }
        if self._own is None:
            self._own = self._found()
        return {name: self._global[name] - own for name, own in self._own.items()}

    def end_by_rates(self, weights: Arrays, rates: Mapping[str, float]) -> dict[str, Array]:
        """Option II, for SGD without momentum: c_i+ = c_i - c + (x - y_i) / (K lr).

        weights: y_i, this site's after the round. rates: K lr of each tensor, the sum of the rates of its steps.
        Returns the extras of the update.
        """
        assert self._own is not None
        following = {}
        for name, own in self._own.items():
            sum_of_rates = rates.get(name, 0.0)
            if not sum_of_rates:  # never trained
                following[name] = own
                continue
            step = self._base[name] - weights[name].astype(own.dtype)
            following[name] = own - self._global[name] + step / own.dtype.type(sum_of_rates)
        return self._ended(following)

    def end_by_gradients(self, means: Arrays) -> dict[str, Array]:
        """The variant for all other optimizers: c_i+ is the mean of the round's gradients, as they were before they
        were corrected. A tensor without one keeps its c_i. Returns the extras of the update."""
        assert self._own is not None
        return self._ended({n: means[n].astype(c.dtype) if n in means else c for n, c in self._own.items()})

    def end_without(self) -> dict[str, Array]:
        """A round of which this process has seen a part only: c_i stays. Returns the extras of the update."""
        assert self._own is not None
        return self._ended(dict(self._own))

    def kept(self) -> dict[str, Array] | None:
        """c_i once the round's update has been counted; None before the first round."""
        return self._next if self._next is not None else self._own

    def submitted(self, status: str) -> None:
        """What the round's update counted as: c_i follows if it did."""
        if self._next is not None and status in _COUNTED:
            self._own = self._next
            write_tensors(self._file, self._own)
        self._next = None

    def _ended(self, following: dict[str, Array]) -> dict[str, Array]:
        """Each site sends its share of the change of c, so that the server needs no number of sites: the change of
        its c_i by N."""
        assert self._own is not None
        self._next = following
        share = {name: (c - self._own[name]) / c.dtype.type(self._sites) for name, c in following.items()}
        return control_extras(share)

    def _found(self) -> dict[str, Array]:
        if self._file.exists():
            kept = read_tensors(self._file)
            if all(n in kept and (kept[n].shape, kept[n].dtype) == (c.shape, c.dtype) for n, c in self._global.items()):
                return {name: np.array(kept[name]) for name in self._global}
        return {name: np.zeros_like(c) for name, c in self._global.items()}


def put_control(home: SiteHome, kept: Arrays | None) -> None:
    """Let the site go on with what `ControlVariate.kept` gave; None: with zeros."""
    file = home.folder / FILE
    if kept is None:
        file.unlink(missing_ok=True)
    else:
        write_tensors(file, kept)


def _wide(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
