"""Compares estimators of fl_adapters.sklearn over five uneven sites with scikit-learn on all rows in one place.

python benchmarks/sklearn_equality.py [--data FOLDER]

Each row of the table is one estimator on one data set: the score on held-out rows of the central model, of the
federated one, and of the best site alone, and the largest difference of the fitted numbers between central and
federated, relative to the largest of them. The data sets are Adult census income (if its folder is found), handwritten
digits, and a table of loans that this script makes from a seed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline

import fl_adapters.sklearn as federated
from fl_adapters import Job, Simulation

SHARES = (0.45, 0.30, 0.15, 0.07, 0.03)
ADULT = Path(os.environ.get("FL_ADAPTERS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "adult"

Table = tuple[Any, Any, Any, Any]
"""Training rows, their labels, held-out rows, and their labels."""


def adult(folder: Path) -> Table:
    frames = [pd.read_csv(folder / f"adult_{part}.csv.gz", na_values="?") for part in ("train", "test")]
    labels = [(frame.pop("income") == ">50K").to_numpy().astype(int) for frame in frames]
    columns = make_column_transformer(
        (
            make_pipeline(federated.SimpleImputer(strategy="median"), federated.StandardScaler()),
            make_column_selector(dtype_include="number"),
        ),
        (
            make_pipeline(
                federated.SimpleImputer(strategy="most_frequent"),
                federated.OneHotEncoder(min_frequency=20, handle_unknown="infrequent_if_exist", sparse_output=False),
            ),
            make_column_selector(dtype_exclude="number"),
        ),
    )
    columns = federated.as_sklearn(columns).fit(frames[0])
    return columns.transform(frames[0]), labels[0], columns.transform(frames[1]), labels[1]


def loans(_: Path) -> Table:
    """Loans with skewed amounts, an unbalanced outcome, and columns of very different sizes."""
    draw = np.random.default_rng(7)
    rows = 30_000
    income, amount = draw.lognormal(10, 0.6, rows), draw.lognormal(9, 0.9, rows)
    late, years = draw.poisson(0.4, rows), draw.integers(0, 40, rows)
    score = -2.5 + 0.9 * late + 1.5 * np.log(amount / income) - 0.05 * years + draw.normal(0, 1, rows)
    y = (draw.random(rows) < 1 / (1 + np.exp(-score))).astype(int)
    x = np.stack([income / 1e4, amount / 1e4, late, years, amount / income, draw.normal(size=rows)], axis=1)
    return x[:20_000], y[:20_000], x[20_000:], y[20_000:]


def digits(_: Path) -> Table:
    x, y = load_digits(return_X_y=True)
    held_out = np.arange(len(y)) % 4 == 0
    return x[~held_out] / 16, y[~held_out], x[held_out] / 16, y[held_out]


DATA: dict[str, Callable[[Path], Table]] = {"adult": adult, "loans": loans, "digits": digits}

# Arguments of the federated and of the central model. The central ones converge further than by default: scikit-learn's
# own stopping rule leaves larger differences than the federation.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LogisticRegression": ({}, {"solver": "newton-cg", "tol": 1e-10, "max_iter": 10_000}),
    "LinearSVC": ({"C": 0.1}, {"C": 0.1, "dual": False, "tol": 1e-10, "max_iter": 100_000}),
    "Ridge": ({}, {"solver": "cholesky"}),
    "LinearDiscriminantAnalysis": ({}, {}),
    "GaussianNB": ({}, {}),
    "NearestCentroid": ({}, {}),
    "PCA": ({"n_components": 5, "svd_solver": "full"}, {"n_components": 5, "svd_solver": "full"}),
}
FITTED = ("coef_", "intercept_", "theta_", "var_", "centroids_", "components_", "explained_variance_")


def shares(y: Any) -> list[Any]:
    """Row numbers of each site. The sites differ in size and in how often they have each class."""
    order = np.argsort(y + np.random.default_rng(0).normal(0, 2.5 * np.std(y), len(y)), kind="stable")
    return np.split(order, np.floor(np.cumsum(SHARES)[:-1] * len(y)).astype(int))


def plain(name: str, arguments: dict[str, Any]) -> Any:
    return federated.as_sklearn(getattr(federated, name)(**arguments))


def site() -> None:
    """Fit all models at one site of a simulation; the first site saves fitted numbers and scores."""
    import json

    import numpy as np

    import fl_adapters
    import fl_adapters.sklearn as federated

    folder, here = os.environ["SKLEARN_EQUALITY"], fl_adapters.site()
    with open(f"{folder}/settings.json") as file:
        settings = json.load(file)
    own = np.load(f"{folder}/{here.index}.npz")
    with fl_adapters.sums() as federation, federated.over(federation):
        for name, arguments in settings.items():
            model = getattr(federated, name)(**arguments).fit(own["x"], own["y"])
            if here.index == 0:
                numbers = {key: value for key, value in vars(model).items() if np.asarray(value).dtype.kind == "f"}
                score = model.score(own["test"], own["truth"]) if hasattr(model, "predict") else 0.0
                np.savez(f"{folder}/{name}.npz", score=score, **numbers)


def together(table: Table) -> dict[str, dict[str, Any]]:
    """Fit all models over five sites of one simulation; return fitted numbers and score of each by its name."""
    with tempfile.TemporaryDirectory() as folder:
        x, y, test, truth = table
        for number, rows in enumerate(shares(y)):
            np.savez(Path(folder, f"{number}.npz"), x=x[rows], y=y[rows], test=test, truth=truth)
        settings = {name: arguments for name, (arguments, _) in MODELS.items()}
        Path(folder, "settings.json").write_text(json.dumps(settings))
        os.environ["SKLEARN_EQUALITY"] = folder
        simulation = Simulation(sites=len(SHARES), script=site, folder=Path(folder, "runs"), quiet=True)
        Job(app="sklearn-equality").run(simulation)
        return {name: dict(np.load(Path(folder, f"{name}.npz"))) for name in MODELS}


def difference(one: dict[str, Any], other: Any) -> float:
    """Largest difference of what was fitted, relative to the largest number of it."""
    pairs = [(one[name], getattr(other, name)) for name in FITTED if hasattr(other, name)]
    return max(float(np.abs(np.subtract(a, b)).max() / np.abs(b).max()) for a, b in pairs)


def score(model: Any, x: Any, y: Any) -> float:
    """Accuracy or R2 on the held-out rows; of PCA the share of the variance of its own rows."""
    return float(model.explained_variance_ratio_.sum()) if hasattr(model, "components_") else float(model.score(x, y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ADULT, help="folder of adult_train.csv.gz and adult_test.csv.gz")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| data | estimator | central | federated | best site alone | largest difference |")
    print("|---|---|---|---|---|---|")
    for data, load in DATA.items():
        if load is adult and not args.data.is_dir():
            continue
        x, y, test, truth = load(args.data)
        ours = together((x, y, test, truth))
        for name, (_, arguments) in MODELS.items():
            central = plain(name, arguments).fit(x, y)
            alone = [plain(name, arguments).fit(x[rows], y[rows]) for rows in shares(y)]
            best = max(score(model, test, truth) for model in alone)
            found = ours[name]
            ratio = found.get("explained_variance_ratio_") if name == "PCA" else None
            cells = [score(central, test, truth), found["score"] if ratio is None else ratio.sum()]
            shown = [f"{value:.4f}" for value in cells] + ["" if name == "PCA" else f"{best:.4f}"]
            print(f"| {data} | `{name}` | {' | '.join(shown)} | {difference(found, central):.0e} |", flush=True)


if __name__ == "__main__":
    main()
