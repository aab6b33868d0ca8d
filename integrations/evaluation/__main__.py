"""`python -m fl_adapters.evaluation FILE`: score the predictions in this site's file together with the other sites.

It is the script that `fl-adapters evaluate` runs at every site, and that a site's policy may name as an app.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import fl_adapters
from fl_runtime.errors import FederationError

from .federated import evaluate
from .files import labels, numbers, predictions, read_columns, subgroups
from .inputs import label_text
from .result import Evaluation


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m fl_adapters.evaluation", description=__doc__)
    parser.add_argument("file", help="CSV file with a heading; {site} stands for the name of the site")
    parser.add_argument("--truth", required=True, help="column of the true values")
    parser.add_argument("--prediction", required=True, action="append", help="column of a model's predictions")
    parser.add_argument("--group", default=[], action="append", help="column of subgroups")
    parser.add_argument("--task", default="classification", choices=["classification", "regression"])
    parser.add_argument("--scores", default="probability", choices=["probability", "decision"])
    parser.add_argument("--positive", help="the positive one of two classes")
    parser.add_argument("--threshold", type=float, help="score from which on the positive class is predicted")
    parser.add_argument("--smallest-cell", type=int, default=1, help="fewest rows behind any number of a subgroup")
    parser.add_argument("--bins", type=int, default=10, help="bins of the reliability table")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    return parser


def evaluated(given: argparse.Namespace) -> Evaluation:
    """Score the predictions in a site's file.

    Args:
        given: The command line.

    Returns:
        The scores over all sites.

    Raises:
        FederationError: The file cannot be read, or its rows cannot be evaluated.
    """
    path = Path(given.file.replace("{site}", fl_adapters.site().name))
    columns = read_columns(path, [given.truth, *given.prediction, *given.group])
    regression = given.task == "regression"
    truth = columns[given.truth]
    predicted = {name: columns[name] for name in given.prediction}
    return evaluate(
        numbers(given.truth, truth) if regression else labels(truth),
        {name: numbers(name, texts) if regression else predictions(texts) for name, texts in predicted.items()},
        task=given.task,
        scores=given.scores,
        positive=None if given.positive is None else label_text(given.positive),
        threshold=given.threshold,
        groups={name: subgroups(columns[name]) for name in given.group},
        smallest_cell=given.smallest_cell,
        bins=given.bins,
    )


def main() -> int:
    """Run the command. Returns the exit status."""
    given = arguments().parse_args()
    try:
        found = evaluated(given)
    except FederationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(found.to_json() if given.json else found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
