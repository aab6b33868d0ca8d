"""Filters: what changes an update, a task or a report on its way, at four points.

    site_out    on what leaves a site: the job's list, then the list of the site's own policy
    server_in   on each update before it is summed
    server_out  on the global model before it is handed out for a round
    site_in     on the global model as it arrives

A filter is written as settings: its name, its arguments, and `at`, the point. `make_filter` makes it and refuses bad
arguments; `check_filters` is for a whole job. Filters that change the values run first, in order; those that change
the encoding (Quantize, TopK, HomomorphicCKKS) come after all of them, since nothing else can read what they make.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from fl_runtime.errors import ConfigError
from fl_runtime.filters.base import EncodingFilter, FactsFilter, Point, refuse
from fl_runtime.filters.ckks import HomomorphicCKKS
from fl_runtime.filters.exclude import ExcludeVars
from fl_runtime.filters.facts import AllowMetrics, Examples, NoisyMetrics, RoundMetrics
from fl_runtime.filters.gaussian import GaussianDP
from fl_runtime.filters.percentile import PercentilePrivacy
from fl_runtime.filters.quantize import Quantize
from fl_runtime.filters.svt import SVTPrivacy
from fl_runtime.filters.topk import TopK
from fl_runtime.types import Settings, Strategy

__all__ = [
    "PlacedFilter",
    "at_point",
    "check_cross_site",
    "check_filters",
    "check_repeatable",
    "known_filters",
    "make_filter",
    "place_filter",
]

_SHIPPED: tuple[type[Any], ...] = (
    ExcludeVars,
    PercentilePrivacy,
    SVTPrivacy,
    GaussianDP,
    Quantize,
    TopK,
    HomomorphicCKKS,
    AllowMetrics,
    RoundMetrics,
    NoisyMetrics,
    Examples,
)
MAX_FILTERS = 32


@dataclass(frozen=True)
class PlacedFilter:
    """A filter and the point where it stands."""

    at: Point
    filter: Any


def known_filters() -> tuple[str, ...]:
    """The names that `filters` of a job and of a policy take."""
    return tuple(kind.__name__ for kind in _SHIPPED)


def make_filter(settings: Settings) -> Any:
    """The filter that `settings` describe; `at` is left aside. ConfigError names what is wrong with them."""
    return place_filter(settings).filter


def place_filter(settings: Settings) -> PlacedFilter:
    """The filter that `settings` describe, and its point."""
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise refuse(f"{settings!r} is no filter", 'write {"name": "Quantize", "to": "int8"}')
    kind = next((kind for kind in _SHIPPED if kind.__name__ == settings["name"]), None)
    if kind is None:
        raise refuse(f"there is no filter {settings['name']!r}", f"use one of: {', '.join(known_filters())}")
    arguments = {name: value for name, value in settings.items() if name not in ("name", "at")}
    known = [field.name for field in fields(kind)]
    unknown = [str(name) for name in arguments if name not in known]
    if unknown:
        raise refuse(f"{kind.__name__} has no argument {unknown[0]!r}", f"its arguments are: {', '.join(known)}")
    at = settings.get("at", kind.points[0])
    if at not in kind.points:
        points = ", ".join(kind.points)
        raise refuse(f"{kind.__name__} cannot stand at {at!r}", f"its points are: {points}" + _of_all(at))
    try:
        return PlacedFilter(at, kind(**arguments))
    except TypeError:
        needed = [field.name for field in fields(kind) if field.name not in arguments and field.default is _MISSING]
        raise refuse(f"{kind.__name__} needs {', '.join(needed) or 'other arguments'}", "see its docstring") from None


def at_point(filters: Iterable[Settings], point: Point) -> list[Any]:
    """The filters of a job that stand at `point`, in order."""
    return [found.filter for found in map(place_filter, filters) if found.at == point]


def check_filters(
    filters: Sequence[Settings], optimizer_state: str | None = None, strategy: Strategy | None = None
) -> None:
    """ConfigError if these filters cannot be made, or do not work together or with what is given of the job."""
    if len(filters) > MAX_FILTERS:
        raise refuse(f"a list of {len(filters)} filters; the limit is {MAX_FILTERS}", "leave some out")
    found = [place_filter(settings) for settings in filters]
    for item in found:
        if strategy is not None and strategy.content != "weights" and not isinstance(item.filter, FactsFilter):
            raise refuse(
                f"{type(item.filter).__name__} works on weights, which {type(strategy).__name__} does not take",
                "leave it out: only what travels beside such updates can be filtered",
            )
        if strategy is not None and strategy.relayed and not isinstance(item.filter, FactsFilter):
            name, of = type(item.filter).__name__, type(strategy).__name__
            raise refuse(
                f"{name} works on weights, which the sites send each other under {of}",
                "leave it out: only what travels beside them can be filtered",
            )
        if strategy is not None and strategy.buffer and item.at in ("server_in", "server_out"):
            name, of = type(item.filter).__name__, type(strategy).__name__
            raise refuse(
                f"{name} at {item.at} works on rounds, which {of} does not have",
                "let it stand at site_out, or use another strategy",
            )
        if isinstance(item.filter, GaussianDP):
            _check_gaussian(item, found, strategy)
        if isinstance(item.filter, HomomorphicCKKS):
            _check_encrypted(item, found, strategy)
        if optimizer_state == "average" and item.at in ("site_out", "server_in"):
            check_extras(item.filter)


def check_cross_site(filters: Sequence[Settings], strategy: Strategy | None) -> None:
    """ConfigError where what the sites send is no model that others could evaluate."""
    changing = [
        type(f).__name__ for f in at_point(filters, "site_out") if not isinstance(f, (FactsFilter, ExcludeVars))
    ]
    if changing:
        raise ConfigError(
            f"cross_site evaluates what the sites have sent, and {changing[0]} makes that something else than a model",
            where="cross_site",
            fix="leave cross_site out of the job, or the filter",
        )
    if strategy is not None and (strategy.content != "weights" or strategy.relayed):
        raise ConfigError(
            f"cross_site evaluates the sites' weights, which the server does not get under {type(strategy).__name__}",
            where="cross_site",
            fix="leave cross_site out of the job, or choose another strategy",
        )


def _check_gaussian(item: PlacedFilter, found: Sequence[PlacedFilter], strategy: Strategy | None) -> None:
    if item.at == "site_out":
        if item.filter.sampling < 1:
            raise refuse(
                "GaussianDP: at a site sampling is no secret, since the server knows who takes part",
                "leave sampling out, or use at: server_in",
            )
        return
    if sum(isinstance(other.filter, GaussianDP) and other.at == "server_in" for other in found) > 1:
        raise refuse("GaussianDP stands at server_in twice", "leave one out")
    if found[-1] is not item and any(other.at == "server_in" for other in found[found.index(item) + 1 :]):
        raise refuse("after GaussianDP at server_in there are no single updates to be filtered", "let it be the last")
    if strategy is not None and not strategy.linear:
        raise refuse(
            f"GaussianDP at server_in adds its noise to a mean, which {type(strategy).__name__} does not take",
            "use the strategy fedavg without arguments, or GaussianDP at the sites",
        )


def _check_encrypted(item: PlacedFilter, found: Sequence[PlacedFilter], strategy: Strategy | None) -> None:
    """What cannot be done with weights that the server cannot read."""
    others = [other for other in found if other is not item]
    for other in others:
        name = type(other.filter).__name__
        if isinstance(other.filter, (EncodingFilter, HomomorphicCKKS)) or other.at in ("server_in", "server_out"):
            raise refuse(
                f"{name} at {other.at} needs weights that the server can read, which HomomorphicCKKS does not leave it",
                f"leave out one of the two: {name} or HomomorphicCKKS",
            )
    if strategy is not None and not strategy.linear:
        raise refuse(
            f"{type(strategy).__name__} needs the updates themselves, and HomomorphicCKKS lets the server form no more "
            "than their weighted mean",
            "use the strategy fedavg without arguments (for equal weights there is the filter Examples), or leave "
            "HomomorphicCKKS out",
        )


def check_extras(item: Any) -> None:
    """ConfigError for a filter that optimizer state, which travels beside the weights, would slip past."""
    if hasattr(item, "open") or isinstance(item, (ExcludeVars, HomomorphicCKKS)):
        raise refuse(
            f"{type(item).__name__} does not reach what leaves the site beside the weights: the optimizer's moments "
            'with optimizer_state="average", the control variates of scaffold',
            'use optimizer_state="keep" or "reset", and another strategy than scaffold',
        )


def check_repeatable(filters: Iterable[Settings]) -> None:
    """ConfigError for a filter with which no two runs end with the same bits, as `exact_restart` promises."""
    for item in map(place_filter, filters):
        if isinstance(item.filter, (GaussianDP, SVTPrivacy, HomomorphicCKKS)):
            raise refuse(
                f"{type(item.filter).__name__} draws from the operating system's randomness, so that no two runs end "
                "with the same bits, as exact_restart promises",
                "leave out one of the two",
            )


def encodings(filters: Iterable[Any]) -> list[EncodingFilter]:
    """Those that change the encoding of tensors, in order."""
    return [item for item in filters if isinstance(item, EncodingFilter) and not isinstance(item, ExcludeVars)]


def _of_all(at: object) -> str:
    return "" if at in get_args(Point) else f" (all points: {', '.join(get_args(Point))})"


_MISSING = fields(ExcludeVars)[0].default
