"""Filters: steps that change updates, global models and reports on their way, at four points.

    site_out    what leaves a site: the job's filters, then those of the site's policy
    server_in   each update, before it is aggregated
    server_out  the global model, before it is sent for a round
    site_in     the global model, as it arrives at a site

A filter is written as settings: {"name": "Quantize", "to": "int8", "at": "site_out"}, with its name, its arguments and
optionally its point. Filters that change values run first, in the given order. Those that change the encoding
(Quantize, TopK, HomomorphicCKKS) run after them, since no other filter can read their result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from fl_runtime.errors import ConfigError, did_you_mean
from fl_runtime.filters.base import EncodingFilter, FactsFilter, Point, matches, refuse
from fl_runtime.filters.calibration import participation, rounded_up
from fl_runtime.filters.ckks import HomomorphicCKKS
from fl_runtime.filters.exclude import ExcludeVars
from fl_runtime.filters.facts import AllowMetrics, Examples, NoisyMetrics, RoundMetrics
from fl_runtime.filters.gaussian import GaussianDP
from fl_runtime.filters.ledger import epsilon
from fl_runtime.filters.percentile import PercentilePrivacy
from fl_runtime.filters.quantize import Quantize
from fl_runtime.filters.svt import SVTPrivacy
from fl_runtime.filters.topk import TopK
from fl_runtime.types import RunSettings, Settings, Strategy

__all__ = [
    "PlacedFilter",
    "at_point",
    "check_best_metric",
    "check_budgets",
    "check_cross_site",
    "check_filters",
    "check_repeatable",
    "check_site_weights",
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
    """A filter and the point at which it runs.

    Attributes:
        at: The point.
        filter: The filter, an instance of one of the shipped classes.
    """

    at: Point
    filter: Any


def known_filters() -> tuple[str, ...]:
    """Return the names of all shipped filters."""
    return tuple(kind.__name__ for kind in _SHIPPED)


def make_filter(settings: Settings) -> Any:
    """Make a filter from its settings.

    Args:
        settings: Name and arguments; "at" is checked and otherwise ignored.

    Returns:
        The filter.

    Raises:
        ConfigError: If there is no such filter, or an argument is unknown, missing or out of range.
    """
    return place_filter(settings).filter


def place_filter(settings: Settings) -> PlacedFilter:
    """Make a filter from its settings, together with its point.

    Args:
        settings: Name, arguments, and optionally "at".

    Returns:
        The filter and its point; without "at", the first of the filter's `points`.

    Raises:
        ConfigError: If the settings are not those of a filter that can run at this point.
    """
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise refuse(f"{settings!r} is not a filter", 'write it as in {"name": "Quantize", "to": "int8"}')
    kind = next((kind for kind in _SHIPPED if kind.__name__ == settings["name"]), None)
    if kind is None:
        name, names = settings["name"], known_filters()
        raise refuse(f"there is no filter {name!r}", f"{did_you_mean(name, names)}use one of: {', '.join(names)}")
    arguments = {name: value for name, value in settings.items() if name not in ("name", "at")}
    known = [field.name for field in fields(kind)]
    unknown = [str(name) for name in arguments if name not in known]
    if unknown:
        fix = f"{did_you_mean(unknown[0], known)}its arguments are: {', '.join(known)}"
        raise refuse(f"{kind.__name__} has no argument {unknown[0]!r}", fix)
    at = settings.get("at", kind.points[0])
    if at not in kind.points:
        points = ", ".join(kind.points)
        raise refuse(f"{kind.__name__} cannot run at {at!r}", f"its points are: {points}" + _all_points(at))
    try:
        return PlacedFilter(at, kind(**arguments))
    except TypeError:
        needed = [field.name for field in fields(kind) if field.name not in arguments and field.default is _MISSING]
        raise refuse(f"{kind.__name__} needs {', '.join(needed) or 'other arguments'}", "see docs/filters.md") from None


def at_point(filters: Iterable[Settings], point: Point) -> list[Any]:
    """Make the filters that run at one point.

    Args:
        filters: Settings of all filters of a job.
        point: The point.

    Returns:
        The filters at this point, in order.

    Raises:
        ConfigError: If a filter cannot be made.
    """
    return [placed.filter for placed in map(place_filter, filters) if placed.at == point]


def check_filters(
    filters: Sequence[Settings], optimizer_state: str | None = None, strategy: Strategy | None = None
) -> None:
    """Check that filters can be made and work together, and with the rest of a job.

    Args:
        filters: Settings of all filters of a job or a policy, at most 32.
        optimizer_state: The job's `optimizer_state`; None if not known.
        strategy: The job's strategy; None if not known.

    Raises:
        ConfigError: If they do not; the message names the filter.
    """
    if len(filters) > MAX_FILTERS:
        raise refuse(f"there are {len(filters)} filters; the limit is {MAX_FILTERS}", "leave some out")
    placed = [place_filter(settings) for settings in filters]
    for item in placed:
        if strategy is not None and strategy.content != "weights" and not isinstance(item.filter, FactsFilter):
            raise refuse(
                f"{type(item.filter).__name__} works on weights, which {type(strategy).__name__} does not take",
                "leave the filter out; metrics and numbers of examples can still be filtered",
            )
        if strategy is not None and strategy.relayed and not isinstance(item.filter, FactsFilter):
            name, strategy_name = type(item.filter).__name__, type(strategy).__name__
            raise refuse(
                f"{name} works on weights, which the sites send each other under {strategy_name}",
                "leave the filter out; metrics and numbers of examples can still be filtered",
            )
        if strategy is not None and strategy.buffer and item.at in ("server_in", "server_out"):
            name, strategy_name = type(item.filter).__name__, type(strategy).__name__
            raise refuse(
                f"{name} at {item.at} works on rounds, which {strategy_name} does not have",
                "use at: site_out, or another strategy",
            )
        if strategy is not None and strategy.needs_steps and isinstance(item.filter, Examples):
            raise refuse(
                f"the filter Examples hides the number of local steps, which {strategy.spec} needs",
                "leave the filter out, or use another strategy",
            )
        if isinstance(item.filter, ExcludeVars) and item.at == "site_out":
            _check_held_back(placed)
        if isinstance(item.filter, GaussianDP):
            _check_gaussian(item, placed, strategy)
        if isinstance(item.filter, HomomorphicCKKS):
            _check_encrypted(item, placed, strategy)
        if optimizer_state == "average" and item.at in ("site_out", "server_in"):
            check_extras(item.filter)


def check_budgets(filters: Sequence[Settings], settings: RunSettings, strategy: Strategy | None = None) -> None:
    """Refuse privacy budgets that cannot hold until the last round.

    Args:
        filters: Settings of the filters.
        settings: The job's settings. Without a number of rounds, only what holds for any number is checked.
        strategy: The job's strategy; None if not known.

    Raises:
        ConfigError: If a budget cannot hold, or noise cannot be computed from it.
    """
    for placed in map(place_filter, filters):
        item = placed.filter
        if not isinstance(item, GaussianDP) or item.epsilon is None:
            continue
        auto = item.noise_multiplier == "auto"
        if auto and strategy is not None and strategy.buffer is not None:
            raise refuse(
                f"GaussianDP cannot compute its noise under {type(strategy).__name__}, which has no rounds",
                "give a number as noise_multiplier",
            )
        if settings.rounds is None:
            if auto:
                raise refuse(
                    f"GaussianDP computes the noise for epsilon {item.epsilon:g} from the number of rounds, which the "
                    "job does not set",
                    "give --rounds or Job(rounds=), or a number as noise_multiplier",
                )
            continue
        if item.sampling == 1 and not auto:
            releases = settings.rounds
            if placed.at == "site_out":
                releases = max(own.most for own in participation(settings, strategy).values())
            _check_budget(item, releases * (settings.trainings or 1), settings)


def _check_budget(item: GaussianDP, releases: int, settings: RunSettings) -> None:
    """Refuse noise with which the releases of a whole job exceed the budget."""
    noise = float(item.noise_multiplier)
    release, limit = item.release(noise), float(item.epsilon or 0)
    total = epsilon([replace(release, count=releases)], item.delta)
    if total > limit:
        enough = rounded_up(replace(item, noise_multiplier="auto").multiplier(releases))
        raise refuse(
            f"GaussianDP: noise_multiplier {noise:g} spends epsilon {total:.4g} at delta {item.delta:g} in "
            f"{settings.rounds} rounds, with {releases} updates of a site; the budget is {limit:g}",
            f"leave noise_multiplier out, so that it is computed (it would be {enough:g}), or lower rounds",
        )


def check_site_weights(filters: Sequence[Settings]) -> None:
    """Refuse filters that give all sites the same weight, for a job with `site_weights`.

    Args:
        filters: Settings of the job's filters.

    Raises:
        ConfigError: If `GaussianDP` runs at `server_in`.
    """
    if any(isinstance(item, GaussianDP) for item in at_point(filters, "server_in")):
        raise ConfigError(
            "GaussianDP at server_in counts every site the same, so it does not support site_weights",
            where="site_weights",
            fix="leave site_weights out of the job, or use GaussianDP at site_out",
        )


def check_best_metric(filters: Sequence[Settings], metric: str) -> None:
    """Refuse filters that withhold the metric by which a job picks the best round.

    Args:
        filters: Settings of the job's filters.
        metric: The job's `best_metric`.

    Raises:
        ConfigError: If no pattern of an `AllowMetrics` matches the metric.
    """
    for item in at_point(filters, "site_out"):
        if isinstance(item, AllowMetrics) and not matches(metric, item.names):
            raise refuse(
                f"AllowMetrics withholds {metric!r}, by which the job picks the best round",
                f"add {metric!r} to the filter's names, or leave best_metric out of the job",
            )


def check_cross_site(filters: Sequence[Settings], strategy: Strategy | None) -> None:
    """Check that the updates of sites are models that other sites can evaluate, as `cross_site` needs.

    Args:
        filters: Settings of the job's filters.
        strategy: The job's strategy; None if not known.

    Raises:
        ConfigError: If a filter or the strategy prevents that.
    """
    changing = [
        type(f).__name__ for f in at_point(filters, "site_out") if not isinstance(f, (FactsFilter, ExcludeVars))
    ]
    if changing:
        raise ConfigError(
            f"cross_site evaluates the updates as models, but {changing[0]} changes their values or encoding",
            where="cross_site",
            fix="leave cross_site or the filter out of the job",
        )
    if strategy is not None and (strategy.content != "weights" or strategy.relayed):
        raise ConfigError(
            f"cross_site evaluates the sites' weights, which the server does not get under {type(strategy).__name__}",
            where="cross_site",
            fix="leave cross_site out of the job, or choose another strategy",
        )


def _check_gaussian(item: PlacedFilter, placed: Sequence[PlacedFilter], strategy: Strategy | None) -> None:
    if item.at == "site_out":
        if item.filter.sampling < 1:
            raise refuse(
                "GaussianDP: sampling is not secret at site_out, since the server knows who takes part",
                "leave sampling out, or use at: server_in",
            )
        return
    if item.filter.distributed:
        raise refuse("GaussianDP: distributed is noise of the sites, not at server_in", "leave one of both out")
    if sum(isinstance(other.filter, GaussianDP) and other.at == "server_in" for other in placed) > 1:
        raise refuse("GaussianDP is given twice at server_in", "leave one out")
    if placed[-1] is not item and any(other.at == "server_in" for other in placed[placed.index(item) + 1 :]):
        raise refuse(
            "no filter can follow GaussianDP at server_in, since only the sum is left",
            "make GaussianDP the last filter at server_in",
        )
    if strategy is not None and not strategy.linear:
        raise refuse(
            f"GaussianDP at server_in adds its noise to a mean, but {type(strategy).__name__} needs the updates",
            "use the strategy fedavg without arguments, or GaussianDP at site_out",
        )


def _check_held_back(placed: Sequence[PlacedFilter]) -> None:
    if any(isinstance(other.filter, GaussianDP) and other.at == "server_in" for other in placed):
        raise refuse(
            "GaussianDP at server_in adds noise to every tensor, also to those that ExcludeVars holds back",
            "keep the tensors at all sites with keep_local, or use GaussianDP at site_out",
        )


def _check_encrypted(item: PlacedFilter, placed: Sequence[PlacedFilter], strategy: Strategy | None) -> None:
    """Refuse filters and strategies that need weights which the server can read."""
    others = [other for other in placed if other is not item]
    for other in others:
        name = type(other.filter).__name__
        if isinstance(other.filter, (EncodingFilter, HomomorphicCKKS)) or other.at in ("server_in", "server_out"):
            raise refuse(
                f"{name} at {other.at} needs weights that the server can read, but HomomorphicCKKS encrypts them",
                f"leave out {name} or HomomorphicCKKS",
            )
    if strategy is not None and not strategy.linear:
        raise refuse(
            f"{type(strategy).__name__} needs the updates themselves, but HomomorphicCKKS lets the server compute only "
            "their weighted mean",
            "use the strategy fedavg without arguments (for equal weights, add the filter Examples), or leave "
            "HomomorphicCKKS out",
        )


def check_extras(item: Any) -> None:
    """Refuse a filter that does not cover the extras of an update, when the job sends extras.

    Args:
        item: A filter.

    Raises:
        ConfigError: If optimizer moments or control variates would leave the site unfiltered.
    """
    if hasattr(item, "open") or isinstance(item, (ExcludeVars, HomomorphicCKKS)):
        raise refuse(
            f"{type(item).__name__} does not cover the arrays that leave the site beside the weights: the optimizer's "
            'moments with optimizer_state="average", or the control variates of scaffold',
            'use optimizer_state="keep" or "reset", and a strategy other than scaffold',
        )


def check_repeatable(filters: Iterable[Settings]) -> None:
    """Refuse filters with unseeded randomness, with which `exact_restart` cannot give the same bits.

    Args:
        filters: Settings of the job's filters.

    Raises:
        ConfigError: If there is such a filter.
    """
    for item in map(place_filter, filters):
        if isinstance(item.filter, (GaussianDP, SVTPrivacy, HomomorphicCKKS)):
            raise refuse(
                f"{type(item.filter).__name__} uses the operating system's randomness, so a restarted run cannot end "
                "with the same bits, as exact_restart promises",
                "leave out exact_restart or the filter",
            )


def encodings(filters: Iterable[Any]) -> list[EncodingFilter]:
    """Return the filters that change the encoding of tensors, in order.

    Args:
        filters: Filters that were made from their settings.

    Returns:
        Those that `decode` has to undo. `ExcludeVars` is not one of them.
    """
    return [item for item in filters if isinstance(item, EncodingFilter) and not isinstance(item, ExcludeVars)]


def _all_points(at: object) -> str:
    return "" if at in get_args(Point) else f" (all points: {', '.join(get_args(Point))})"


_MISSING = fields(ExcludeVars)[0].default
