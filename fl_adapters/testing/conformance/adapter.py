"""Conformance cases for reading and writing a model's state: one case per promise. Part of `fl_adapters.testing`.

A case is a function that takes the example and raises AssertionError with a sentence of its own. To add a case, write
it and list it in `adapter_cases`. `training.py` has the cases for whole trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fl_adapters.adapter import Adapter
from fl_adapters.participant.exchange import matches
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Exchange, Options
from fl_adapters.participant.registry import open_session
from fl_adapters.testing.local_federation import LocalFederation, Place
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.types import Array, Arrays, is_floating
from fl_runtime.wire.manifest import Manifest

MakeAdapter: TypeAlias = Callable[[int, Exchange, tuple[str, ...]], Adapter]
"""make(seed, exchange, keep_local) returns an adapter over a small new model; the seed decides the weights alone."""


@dataclass(frozen=True)
class AdapterExample:
    """An adapter under test, for `adapter_cases`.

    Attributes:
        make: Called as make(seed, exchange, keep_local), several times in a case. Returns an `Adapter` over a small
            new model. Models of different seeds differ in their weights and in nothing else. `exchange` and
            `keep_local` select what travels, as the arguments of a callback do; patterns without a match must raise
            ConfigError, here or in the first `get_state`.
        identities: Called with an adapter before and after `set_state`. Returns a value that `set_state` must not
            change, which is compared by ==, such as `[(id(p), p.device) for p in model.parameters()]`.

    Example:
        >>> example = AdapterExample(make=make_adapter, identities=parameter_ids)
        >>> for case in adapter_cases():
        ...     case(example)
    """

    make: MakeAdapter
    identities: Callable[[Adapter], object]

    def fresh(self, seed: int = 0) -> Adapter:
        """Make an adapter with the default selection of what travels.

        Args:
            seed: Seed of the weights.

        Returns:
            A new adapter.
        """
        return self.make(seed, "auto", ())


AdapterCase: TypeAlias = Callable[[AdapterExample], None]


def adapter_cases() -> tuple[AdapterCase, ...]:
    """All cases for the state of a model, as functions that take an `AdapterExample`.

    Returns:
        The cases. A case raises AssertionError if the adapter breaks its promise.

    Example:
        >>> @pytest.mark.parametrize("case", adapter_cases(), ids=lambda case: case.__name__)
        ... def test_adapter(case):
        ...     case(AdapterExample(make_adapter, identities))
    """
    return (
        names_and_shapes_do_not_depend_on_the_weights,
        state_survives_bit_for_bit,
        extreme_values_survive_bit_for_bit,
        what_arrives_is_copied,
        read_only_arrays_are_taken,
        parameters_keep_their_identity,
        mismatches_are_refused_and_change_nothing,
        patterns_choose_what_travels,
        patterns_without_a_match_are_refused,
        a_federation_equals_the_average_by_hand,
    )


def check_adapter(make_adapter: MakeAdapter, *, identities: Callable[[Adapter], object]) -> None:
    """Run every case of `adapter_cases`.

    Args:
        make_adapter: Makes an adapter; see `AdapterExample.make`.
        identities: What `set_state` must leave unchanged; see `AdapterExample.identities`.

    Raises:
        AssertionError: A case fails; the message begins with the name of the first one.
    """
    example = AdapterExample(make_adapter, identities)
    for case in adapter_cases():
        try:
            case(example)
        except AssertionError as error:
            raise AssertionError(f"{case.__name__}: {error}") from error


def names_and_shapes_do_not_depend_on_the_weights(example: AdapterExample) -> None:
    first, second = (Manifest.of(example.fresh(seed).get_state()) for seed in (0, 1))
    require(first == second, f"two models of the same kind have different states: {first} and {second}")
    require(len(first.tensors) > 0, "the state is empty")


def state_survives_bit_for_bit(example: AdapterExample) -> None:
    source, target = example.fresh(0), example.fresh(1)
    state = copied(source.get_state())
    target.set_state(state)
    require_same_bits(target.get_state(), state)


def extreme_values_survive_bit_for_bit(example: AdapterExample) -> None:
    adapter = example.fresh()
    state = {name: _extreme(array) for name, array in adapter.get_state().items()}
    adapter.set_state(state)
    require_same_bits(adapter.get_state(), state)


def what_arrives_is_copied(example: AdapterExample) -> None:
    """The next task overwrites the session's buffer, so the model must not be a view of it."""
    adapter = example.fresh(0)
    arriving = copied(example.fresh(1).get_state())
    expected = copied(arriving)
    adapter.set_state(arriving)
    for array in arriving.values():
        array[...] = np.zeros_like(array)
    require_same_bits(adapter.get_state(), expected)


def read_only_arrays_are_taken(example: AdapterExample) -> None:
    adapter = example.fresh(0)
    state = copied(example.fresh(1).get_state())
    for array in state.values():
        array.flags.writeable = False
    adapter.set_state(state)
    require_same_bits(adapter.get_state(), state)


def parameters_keep_their_identity(example: AdapterExample) -> None:
    adapter = example.fresh(0)
    before = example.identities(adapter)
    adapter.set_state(copied(example.fresh(1).get_state()))
    require(
        example.identities(adapter) == before, "set_state replaced or moved parameters instead of writing into them"
    )


def mismatches_are_refused_and_change_nothing(example: AdapterExample) -> None:
    adapter = example.fresh(0)
    before = copied(adapter.get_state())
    good = copied(example.fresh(1).get_state())
    name = list(good)[-1]  # an adapter that checks while it copies has changed all others before the last
    wrong: dict[str, Arrays] = {
        "a missing tensor": {key: array for key, array in good.items() if key != name},
        "an extra tensor": {**good, "unknown.tensor": np.zeros(2, np.float32)},
        "another shape": {**good, name: np.zeros((*good[name].shape, 2), good[name].dtype)},
        "another dtype": {**good, name: good[name].astype(np.float64 if good[name].dtype != np.float64 else np.int8)},
    }
    for what, arrays in wrong.items():
        try:
            adapter.set_state(arrays)
        except StateMismatchError as error:
            named = "unknown.tensor" if what == "an extra tensor" else name
            require(named in str(error), f"the error about {what} does not name {named!r}: {error}")
        else:
            raise AssertionError(f"set_state accepted {what}")
        require_same_bits(adapter.get_state(), before, f"after {what} was refused, ")


def patterns_choose_what_travels(example: AdapterExample) -> None:
    names = list(example.fresh().get_state())
    chosen = names[::2]
    state = example.make(0, tuple(map(_literally, chosen)), ()).get_state()
    require(list(state) == chosen, f"exchange={chosen} travels as {list(state)}")
    if len(names) > 1:
        pattern = _literally(names[0])
        state = example.make(0, "auto", (pattern,)).get_state()
        expected = [name for name in names if not matches(name, (pattern,))]
        require(list(state) == expected, f"keep_local=[{pattern!r}] travels as {list(state)}")


def patterns_without_a_match_are_refused(example: AdapterExample) -> None:
    choices: list[tuple[Exchange, tuple[str, ...]]] = [(("no.such.*",), ()), ("auto", ("no.such.*",)), ("auto", ("*",))]
    for exchange, keep_local in choices:
        try:
            example.make(0, exchange, keep_local).get_state()
        except ConfigError:
            continue
        raise AssertionError(f"exchange={exchange!r}, keep_local={keep_local!r} was accepted")


def a_federation_equals_the_average_by_hand(example: AdapterExample) -> None:
    """Three sites, two rounds and uneven numbers of examples give the mean of a plain loop in float64 at every site."""
    examples, rounds = (5, 1, 10), 2
    adapters = [example.fresh(seed) for seed in range(3)]

    def site(place: Place) -> Arrays:
        adapter = adapters[place.index]
        session = open_session(Options(kit=place.kit), framework="the conformance suite")
        assert session is not None
        session.register(adapter.get_state(), agreement={}, rounds=None, evaluates=False)
        task = session.start(adapter.get_state)
        while task.kind == "train":
            adapter.set_state(task.arrays)
            adapter.set_state(_trained(adapter.get_state(), place.index, task.round))
            task = session.exchange(adapter.get_state(), LocalResult(examples[place.index], 1, {}))
        adapter.set_state(task.arrays)
        session.finish()
        return copied(adapter.get_state())

    with LocalFederation(sites=3, rounds=rounds) as federation:
        states = federation.run(site)
        final = federation.model()
    expected = copied(example.fresh(0).get_state())
    for number in range(1, rounds + 1):
        expected = mean_by_hand([_trained(expected, index, number) for index in range(3)], examples)
    require_close(final, expected)
    for name, state in states.items():
        require_same_bits(state, final, f"the final weights of {name}: ")


def copied(arrays: Arrays) -> dict[str, Array]:
    """Copies of arrays that an adapter lends until its next call."""
    return {name: np.array(array) for name, array in arrays.items()}


def mean_by_hand(states: list[dict[str, Array]], examples: tuple[int, ...]) -> dict[str, Array]:
    """Expected result of a round, in the tensors' dtypes: weighted mean in float64 for floats, maximum for integers."""
    total = sum(examples)
    means = {}
    for name, like in states[0].items():
        values = [state[name] for state in states]
        if is_floating(like.dtype):
            wide = np.complex128 if like.dtype.kind == "c" else np.float64
            mean = sum(v.astype(wide) * (n / total) for v, n in zip(values, examples, strict=True))
        else:
            mean = np.maximum.reduce(values)
        means[name] = np.asarray(mean).astype(like.dtype)
    return means


def require(condition: bool, sentence: str) -> None:
    """Raise AssertionError with a sentence unless the condition holds."""
    if not condition:
        raise AssertionError(sentence)


def require_same_bits(actual: Arrays, expected: Arrays, where: str = "") -> None:
    """Raise AssertionError unless names, order, dtypes, shapes and bytes are equal."""
    require(list(actual) == list(expected), f"{where}the names are {list(actual)} and not {list(expected)}")
    for name, array in expected.items():
        array_here = actual[name]
        same_kind = (array_here.dtype, array_here.shape) == (array.dtype, array.shape)
        require(same_kind, f"{where}{name} is {array_here.dtype}{array_here.shape} and not {array.dtype}{array.shape}")
        require(array_here.tobytes() == array.tobytes(), f"{where}{name} differs")


def require_close(actual: Arrays, expected: Mapping[str, Array], tolerance: float = 1e-6) -> None:
    """Raise AssertionError unless the values are close, relative to the largest value of each tensor.

    The limit is `tolerance`, or twice the precision of the dtype if that is coarser. Integers must be equal.
    """
    require(sorted(actual) == sorted(expected), f"the names are {sorted(actual)} and not {sorted(expected)}")
    for name, array in expected.items():
        if not is_floating(array.dtype):
            require(actual[name].tobytes() == array.tobytes(), f"{name} differs")
            continue
        wide = np.complex128 if array.dtype.kind == "c" else np.float64
        theirs, ours = array.astype(wide), actual[name].astype(wide)
        worst = float(np.max(np.abs(theirs - ours), initial=0.0)) / max(float(np.max(np.abs(theirs), initial=0.0)), 1.0)
        limit = max(tolerance, 2 * _precision(array.dtype))
        require(worst <= limit, f"{name} differs by {worst:.3g}, more than {limit:.3g}")


def _precision(dtype: np.dtype[np.generic]) -> float:
    """The distance from 1 to the next larger number of a dtype."""
    one = np.ones(1, dtype)
    step = 1.0
    while (one.astype(np.float64) + step).astype(dtype).astype(np.float64)[0] > 1.0 and step > 1e-7:
        step /= 2
    return step


def _trained(state: Arrays, site: int, number: int) -> dict[str, Array]:
    """Stand-in for training: values that differ for every site and round, small enough for any float dtype."""
    trained = {}
    for name, array in state.items():
        if is_floating(array.dtype):
            noise = np.random.default_rng([site, number, len(name)]).uniform(-1, 1, array.shape)
            trained[name] = np.asarray(0.5 * array.astype(np.float64) + noise).astype(array.dtype)
        else:
            changed = array | (site == 1) if array.dtype == np.bool_ else array + np.asarray(site, array.dtype)
            trained[name] = np.asarray(changed)  # NumPy makes scalars of arrays without dimensions
    return trained


def _extreme(array: Array) -> Array:
    """Bit patterns that only an exact copy keeps: minus zero, the smallest numbers of both signs, and one more."""
    if array.dtype == np.bool_:
        return ~array
    bits = np.dtype(f"u{array.dtype.itemsize}") if array.dtype.itemsize <= 8 else np.dtype("u8")
    raw = np.array(array).reshape(-1).view(bits)
    sign, one = bits.type(1 << (8 * bits.itemsize - 1)), bits.type(1)
    pattern = np.array([sign, one, sign | one, bits.type(0x55 % (1 << (8 * bits.itemsize - 1)))], bits)
    raw[:] = np.resize(pattern, raw.shape)
    return raw.view(array.dtype).reshape(array.shape)


def _literally(name: str) -> str:
    """A pattern that matches this one name."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
