"""`describe`: statistics of a table over all sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import fl_adapters
from fl_adapters.loop.federation import Federation, of_same_sites
from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.policy_gate.own_policy import statistics_rules
from fl_runtime.types import StatisticsRules

from .agreement import agree
from .columns import Table, read_table
from .noise import with_noise
from .per_site import tell_each_other
from .question import Question, ask
from .result import Statistics
from .totals import Share, add_up

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 20


def describe(
    data: Any,
    *,
    features: Sequence[str] | None = None,
    categorical: Sequence[str] = (),
    bins: int | Sequence[float] | Mapping[str, int | Sequence[float]] = BINS,
    quantiles: Sequence[float] = QUANTILES,
    correlations: bool = True,
    smallest_count: int = 1,
    federation: Any = None,
    kit: str | None = None,
    required: bool = False,
) -> Statistics:
    """Describe the columns of a table over all sites of the federation that this process belongs to.

    The sites add counts and moments; no row leaves a site. Every site gets the same result. Without a startup kit, it
    is that of the table alone.

    Args:
        data: A data frame of pandas, Polars or Arrow, or an iterable of such frames, which is read once and need not
            fit into memory. Columns of numbers, texts and booleans are described. Infinite numbers count as missing.
        features: Names of the columns. Default: all columns of any site.
        categorical: Names of columns of numbers that hold categories, such as codes.
        bins: Number of bins of the histograms, or their edges; or a dict with one of both for each of some columns.
            Bins of a number lie between the smallest and the largest value of all sites.
        quantiles: Levels of the quantiles, from 0 to 1.
        correlations: Whether to correlate the columns of numbers with each other.
        smallest_count: Least number of rows behind any number that leaves this site. A higher one in the site's policy
            wins.
        federation: What `fl_adapters.sums` gives, to stay in its block. Default: a block of its own.
        kit: Folder of the site's startup kit. Default: `$FL_ADAPTERS_KIT`.
        required: Whether a missing startup kit is an error.

    Returns:
        The statistics over all sites that take part, and of each site whose policy allows it.

    Raises:
        ConfigError: An argument cannot work, or the data are no table that can be described.
        HandshakeError: The sites pass different arguments, or hold different kinds of values in a column.

    Example:
        ```python
        import pandas as pd

        from fl_adapters.statistics import describe

        frame = pd.DataFrame({"age": [31, 54, 47], "sex": ["f", "m", "f"]})
        print(describe(frame).to_pandas())
        ```
    """
    question = ask(features, categorical, bins, quantiles, correlations, BINS)
    rules = statistics_rules(current_kit(kit))
    rules = replace(rules, smallest_count=max(rules.smallest_count, smallest_count))
    table = read_table(data, question.features, question.categorical)
    if federation is not None:
        return over(of_same_sites(federation), table, rules, question)
    with fl_adapters.sums(kit=kit, required=required) as block:
        return over(of_same_sites(block), table, rules, question)


def over(federation: Federation, table: Table, rules: StatisticsRules, question: Question) -> Statistics:
    """Describe a table that has been read over all sites.

    Args:
        federation: The federation.
        table: This site's table.
        rules: What this site allows.
        question: The checked arguments of `describe`.

    Returns:
        The statistics, the same at every site.
    """
    table = with_noise(table, rules) if rules.epsilon is not None else table
    plan = agree(federation, table, rules, question)
    own = Share(table, plan, federation.site.name, rules.smallest_count)
    totals = add_up(federation, plan, own, question)
    return Statistics(
        totals.rows,
        plan.sites,
        totals.features,
        totals.correlations,
        plan.absences,
        tell_each_other(federation, plan, own, question, totals),
        plan.noise,
    )
