"""`evaluate`: scores of given models on the rows of all sites.

Example:
    ```python
    import numpy as np

    from fl_adapters.evaluation import evaluate

    truth = np.array([0, 1, 1, 0])
    print(evaluate(truth, {"old": np.array([0.2, 0.7, 0.4, 0.3]), "new": np.array([0.1, 0.9, 0.6, 0.2])}))
    ```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import fl_adapters
from fl_adapters.loop.federation import Federation, of_same_sites
from fl_adapters.participant.identity import Site
from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.outputs import own_folder
from fl_adapters.participant.policy_gate.own_policy import own_policy
from fl_runtime.errors import ConfigError

from .agreement import SiteRules, absences, agree
from .classification import Classes, score_classes
from .inputs import Question, Rows, make_question, read_rows
from .regression import score_numbers
from .result import FILE, Evaluation, ModelScores, Scores


def evaluate(
    truth: Any,
    predictions: Any,
    *,
    task: Literal["classification", "regression"] = "classification",
    scores: Literal["probability", "decision"] = "probability",
    labels: Sequence[Any] | None = None,
    positive: Any = None,
    threshold: float | None = None,
    groups: Mapping[str, Any] | None = None,
    smallest_cell: int = 1,
    per_site: bool = True,
    bins: int = 10,
    kit: str | None = None,
    required: bool = False,
    federation: Any = None,
) -> Evaluation:
    """Score models on the rows of all sites, without training. Sites send sums and counts.

    All sites call it with the same arguments, and with predictions of the same models on rows of their own. It leaves
    `evaluation.json` in the folder of a simulation, and elsewhere in each site's own folder of the job.

    Args:
        truth: True values of this site's rows: labels, or numbers for a regression. Borrowed for the call.
        predictions: Predictions of one model, or name -> predictions of each. For classes: floats [rows], the scores of
            the positive class; floats [rows, classes]; or predicted labels, as integers or texts. For a regression:
            numbers. Borrowed for the call.
        task: "classification" or "regression".
        scores: "probability" for scores from 0 to 1; "decision" for scores of any size, which have no calibration.
        labels: The classes, in the order of the columns of scores. Default: the labels of all sites, sorted.
        positive: The positive one of two classes. Default: the last label.
        threshold: Score from which on the positive class is predicted. Default: 0.5; 0 for "decision".
        groups: Name of a column -> subgroup of each row, such as {"sex": [...]}, for scores by subgroup.
        smallest_cell: Fewest rows behind any number of a subgroup that leaves this site, except 0. Subgroups with fewer
            are put together into "(other)". A site with fewer rows takes no part. A higher one in the site's policy
            holds.
        per_site: Whether the others may see the scores on this site's rows alone. The site's policy may forbid it.
        bins: Number of bins of the reliability table.
        kit: Folder of the site's startup kit. Default: `$FL_ADAPTERS_KIT`. Without one, the site's own rows are scored.
        required: Whether a missing startup kit is an error.
        federation: An open block of `fl_adapters.sums`, to be used in place of a run of its own.

    Returns:
        The scores, equal at all sites.

    Raises:
        ConfigError: The rows or arguments cannot be evaluated, or no site takes part.
        HandshakeError: The sites ask for different things.
        QuorumError: A site left before the end.

    Example:
        ```python
        import numpy as np

        from fl_adapters.evaluation import evaluate

        sex = np.array(["f", "m", "f", "m"])
        found = evaluate(np.array([0, 1, 1, 0]), np.array([0.2, 0.7, 0.6, 0.3]), groups={"sex": sex})
        print(found.models["model"].groups["sex"]["f"].metrics["accuracy"])
        ```
    """
    if isinstance(smallest_cell, bool) or not isinstance(smallest_cell, int) or smallest_cell < 1:
        raise ConfigError(
            f"smallest_cell={smallest_cell!r} is no number of rows", where="evaluate", fix="give a whole number from 1"
        )
    question = make_question(task, scores, labels, positive, threshold, bins)
    rows = read_rows(truth, predictions, groups, question)
    rules = _rules(kit, SiteRules(smallest_cell, per_site))
    if federation is not None:
        return _over(of_same_sites(federation), rows, rules, question)
    with fl_adapters.sums(kit=kit, required=required) as block:
        found = _over(of_same_sites(block), rows, rules, question)
        _leave(found, kit, block.site)
    return found


def _over(federation: Federation, rows: Rows, rules: SiteRules, question: Question) -> Evaluation:
    cards, labels = agree(federation, rows, rules, question)
    if any(card.reason for card in cards if card.index == federation.site.index):
        rows = _without_rows(rows)
    least = rules.smallest_cell
    if question.task == "regression":
        segments, found = score_numbers(federation, rows, cards, least)
    else:
        segments, found = score_classes(federation, rows, question, labels, cards, least)
    models = {}
    for name, by_segment in found.items():
        overall, *rest = by_segment
        groups: dict[str, dict[str, Scores]] = {column: {} for column in rows.groups}
        for (column, value), group in zip(segments.groups, rest, strict=False):
            groups[column][value] = group
        sites = {card.name: one for card, one in zip(segments.sites, rest[len(segments.groups) :], strict=True)}
        models[name] = ModelScores(overall, groups, sites)
    return Evaluation(
        question.task,
        next(iter(models.values())).overall.rows,
        tuple(card.name for card in cards if not card.reason),
        tuple(labels),
        labels[Classes.of(labels, question).positive] if len(labels) == 2 else "",
        models,
        absences(cards, federation.site.count),
    )


def _rules(folder: str | None, asked: SiteRules) -> SiteRules:
    """What the site's policy leaves of the rules that its script asks for."""
    policy = own_policy(current_kit(folder))
    if policy is None:
        return asked
    return SiteRules(
        max(asked.smallest_cell, policy.evaluation.smallest_cell),
        asked.per_site and policy.site_metrics,
        policy.min_cohort,
        "" if policy.evaluation.allowed else "its policy says evaluation: false",
    )


def _without_rows(rows: Rows) -> Rows:
    """The rows of a site that stays out: none, of the same models and columns."""
    predictions = {name: replace(p, values=p.values[:0]) for name, p in rows.predictions.items()}
    return Rows(rows.truth[:0], predictions, {name: texts[:0] for name, texts in rows.groups.items()})


def _leave(found: Evaluation, folder: str | None, site: Site) -> None:
    """Write the result where the run leaves its results: once in a simulation, elsewhere at each site."""
    kit = current_kit(folder)
    if kit is None:
        return
    kit = kit.of_training(site.training)
    if kit.simulated and site.index == 0:
        found.save(Path(kit.run, FILE))
    elif not kit.simulated:
        found.save(Path(own_folder(kit, site.job), FILE))
