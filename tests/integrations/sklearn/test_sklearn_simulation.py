"""A simulation of real processes: pipelines in a run for each fit, and in one run for all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fl_adapters import HandshakeError, Job, Simulation


def fit_twice() -> None:
    import os
    import pickle
    from pathlib import Path

    from sklearn.datasets import load_breast_cancer
    from sklearn.pipeline import make_pipeline

    import fl_adapters
    from fl_adapters.sklearn import LogisticRegression, StandardScaler, over

    here, (X, y) = fl_adapters.site(), load_breast_cancer(return_X_y=True)
    X, y = X[here.index :: here.count], y[here.index :: here.count]
    apart = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
    with fl_adapters.sums() as federation, over(federation):
        together = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
    folder = Path(os.environ["MODELS"])
    for name, model in (("apart", apart), ("together", together)):
        (folder / f"{here.name}-{name}").write_bytes(pickle.dumps(model))


def disagree() -> None:
    import numpy as np

    import fl_adapters
    from fl_adapters.sklearn import StandardScaler

    StandardScaler(with_std=fl_adapters.site().index == 0).fit(np.eye(3))


def test_sites_of_a_simulation_fit_the_central_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.setenv("MODELS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = Job(app="fit_twice").run(Simulation(sites=3, script=fit_twice, folder=tmp_path / "runs", quiet=True))
    assert len(result.trainings) == 3  # a run for each of two fits, and one for both
    X, y = load_breast_cancer(return_X_y=True)
    plain = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky", tol=1e-12)).fit(X, y)
    saved = [(tmp_path / f"site-{n}-{kind}").read_bytes() for n in (1, 2, 3) for kind in ("apart", "together")]
    assert len(set(saved)) == 1 and b"fl_adapters" not in saved[0]
    model = pickle.loads(saved[0])
    np.testing.assert_allclose(model[1].coef_, plain[1].coef_, atol=1e-6)
    assert type(model[0]) is StandardScaler and os.environ["MODELS"] == str(tmp_path)


def test_arguments_that_differ_are_refused_before_the_first_sum(tmp_path: Path) -> None:
    with pytest.raises(HandshakeError) as caught:
        Job(app="disagree").run(Simulation(sites=2, script=disagree, folder=tmp_path / "runs", quiet=True))
    assert "argument with_std: True != False" in str(caught.value)
