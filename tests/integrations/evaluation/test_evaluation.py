"""`evaluate` over a federation of threads, beside scikit-learn on the rows of all sites together."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk
from threaded_federation import run_sites

from fl_adapters.evaluation import Evaluation, Scores, evaluate
from fl_runtime.errors import ConfigError, HandshakeError

SITES = 3


def parts(rows: int, seed: int = 0) -> list[np.ndarray]:
    """The rows of three uneven sites."""
    order = np.random.default_rng(seed).permutation(rows)
    return np.split(order, [int(rows * 0.6), int(rows * 0.9)])


def at_sites(truth: Any, predictions: dict[str, Any], *, groups: Any = None, **arguments: Any) -> list[Evaluation]:
    """What each site gets. Argument values that are lists of `SITES` tuples differ by site."""
    split = parts(len(truth))

    def work(federation: Any) -> Evaluation:
        rows = split[federation.site.index]
        own = {name: v[federation.site.index] if isinstance(v, tuple) else v for name, v in arguments.items()}
        chosen = {name: values[rows] for name, values in predictions.items()}
        columns = {name: values[rows] for name, values in (groups or {}).items()}
        return evaluate(truth[rows], chosen, groups=columns, federation=federation, **own)

    return run_sites(SITES, work)


def over_sites(*given: Any, **arguments: Any) -> Evaluation:
    found = at_sites(*given, **arguments)
    assert len({one.to_json() for one in found}) == 1  # the same document everywhere
    return found[0]


def within(scores: Scores, name: str, exact: float) -> None:
    value, error = scores.metrics[name], scores.errors.get(name, 0.0)
    assert value is not None and abs(value - exact) <= error + 1e-9, (name, value, exact, error)


def two_classes(rows: int = 4000, seed: int = 1) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=rows)
    truth = (signal + rng.normal(size=rows) > 0.8).astype(int)
    probability = 1 / (1 + np.exp(-(1.6 * signal - 1.2)))
    return truth, probability, rng.choice(["f", "m", "x"], rows, p=[0.5, 0.48, 0.02])


def check_two_classes(scores: Scores, truth: Any, probability: Any) -> None:
    predicted = (probability >= 0.5).astype(int)
    assert scores.rows == len(truth)
    assert scores.confusion == tuple(map(tuple, sk.confusion_matrix(truth, predicted, labels=[0, 1]).tolist()))
    within(scores, "accuracy", sk.accuracy_score(truth, predicted))
    within(scores, "balanced_accuracy", sk.balanced_accuracy_score(truth, predicted))
    within(scores, "precision", sk.precision_score(truth, predicted))
    within(scores, "recall", sk.recall_score(truth, predicted))
    within(scores, "f1", sk.f1_score(truth, predicted))
    within(scores, "matthews", sk.matthews_corrcoef(truth, predicted))
    within(scores, "log_loss", sk.log_loss(truth, probability, labels=[0, 1]))
    within(scores, "brier", sk.brier_score_loss(truth, probability))
    within(scores, "roc_auc", sk.roc_auc_score(truth, probability))


def calibration_error(hits: Any, score: Any, bins: int) -> float:
    place = np.minimum((score * bins).astype(int), bins - 1)
    return sum(abs((hits - score)[place == b].sum()) for b in range(bins)) / len(score)


def test_two_classes_equal_scikit_learn_on_the_pooled_rows() -> None:
    truth, probability, sex = two_classes()
    rounded = np.round(probability, 1)  # many ties
    found = over_sites(truth, {"a": probability, "b": rounded}, groups={"sex": sex})
    assert (found.rows, found.labels, found.positive, found.absences) == (4000, ("0", "1"), "1", ())
    for name, scores in (("a", probability), ("b", rounded)):
        model = found.models[name]
        check_two_classes(model.overall, truth, scores)
        assert model.overall.errors.get("roc_auc", 0.0) < 2e-3
        for value in ("f", "m", "x"):
            check_two_classes(model.groups["sex"][value], truth[sex == value], scores[sex == value])
        for number, rows in enumerate(parts(4000)):
            check_two_classes(model.per_site[f"site-{number + 1}"], truth[rows], scores[rows])
        within(model.overall, "ece", calibration_error(truth, scores, 10))
    assert "roc_auc" not in found.models["b"].overall.errors  # ties are exact
    shares, means = _sklearn_calibration(truth, probability)
    table = found.models["a"].overall.reliability
    np.testing.assert_allclose([b.share for b in table], shares)
    np.testing.assert_allclose([b.mean_score for b in table], means)


def _sklearn_calibration(truth: Any, probability: Any) -> Any:
    from sklearn.calibration import calibration_curve

    return calibration_curve(truth, probability, n_bins=10)


def test_points_of_the_roc_curve_are_those_of_their_thresholds() -> None:
    truth, probability, _ = two_classes(2000)
    for point in over_sites(truth, {"a": probability}).models["a"].overall.roc:
        chosen = probability >= point.threshold
        assert point.true_positive_rate == pytest.approx(chosen[truth == 1].mean())
        assert point.false_positive_rate == pytest.approx(chosen[truth == 0].mean())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_decision_scores_of_any_size_have_an_area_within_its_error(scale: float) -> None:
    truth, probability, _ = two_classes(3000)
    decision = scale * np.log(probability / (1 - probability)).astype(np.float32)
    found = over_sites(truth, {"a": decision}, scores="decision", positive=1).models["a"].overall
    within(found, "roc_auc", sk.roc_auc_score(truth, decision))
    assert found.errors.get("roc_auc", 0.0) < 5e-3
    assert "log_loss" not in found.metrics and found.reliability == ()
    within(found, "accuracy", sk.accuracy_score(truth, decision >= 0))


def test_extreme_and_rare_probabilities_keep_a_small_error() -> None:
    rng = np.random.default_rng(3)
    truth = (rng.random(6000) < 0.01).astype(int)
    probability = np.clip(10.0 ** rng.normal(-5 + truth, 1), 0, 1)
    probability[:5], probability[5:9] = 0.0, 1.0
    found = over_sites(truth, {"a": probability}).models["a"].overall
    within(found, "roc_auc", sk.roc_auc_score(truth, probability))
    within(found, "log_loss", sk.log_loss(truth, probability))
    assert found.errors.get("roc_auc", 0.0) < 5e-3


def test_several_classes_equal_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    truth = rng.choice(["ant", "bee", "cow", "dog"], 2500, p=[0.4, 0.3, 0.25, 0.05])
    names = np.array(["ant", "bee", "cow", "dog"])
    logits = rng.normal(size=(2500, 4)) + 1.5 * (truth[:, None] == names)
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = names[probability.argmax(axis=1)]
    found = over_sites(truth, {"p": probability, "only labels": predicted}).models
    for name in ("p", "only labels"):
        scores = found[name].overall
        assert scores.confusion == tuple(map(tuple, sk.confusion_matrix(truth, predicted).tolist()))
        within(scores, "macro_f1", sk.f1_score(truth, predicted, average="macro"))
        within(scores, "weighted_f1", sk.f1_score(truth, predicted, average="weighted"))
        within(scores, "balanced_accuracy", sk.balanced_accuracy_score(truth, predicted))
        expected = sk.precision_recall_fscore_support(truth, predicted)
        for number, label in enumerate(names):
            own = [scores.classes[str(label)][part] for part in ("precision", "recall", "f1", "support")]
            np.testing.assert_allclose(own, [column[number] for column in expected])
    overall = found["p"].overall
    within(overall, "log_loss", sk.log_loss(truth, probability))
    within(overall, "roc_auc", sk.roc_auc_score(truth, probability, multi_class="ovr"))
    within(overall, "brier", ((probability - (truth[:, None] == names)) ** 2).sum(axis=1).mean())
    within(overall, "ece", calibration_error(truth == predicted, probability.max(axis=1), 10))


def test_numbers_equal_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    truth = 1e6 + rng.normal(size=900)
    predicted, region = truth + rng.normal(0.1, 0.5, 900), rng.choice(["a", "b"], 900)
    found = over_sites(truth, {"m": predicted}, groups={"region": region}, task="regression").models["m"]
    for scores, rows in ((found.overall, region != ""), (found.groups["region"]["a"], region == "a")):
        assert scores.metrics["mae"] == pytest.approx(sk.mean_absolute_error(truth[rows], predicted[rows]))
        assert scores.metrics["mse"] == pytest.approx(sk.mean_squared_error(truth[rows], predicted[rows]))
        assert scores.metrics["r2"] == pytest.approx(sk.r2_score(truth[rows], predicted[rows]))
        assert scores.metrics["mean_error"] == pytest.approx((predicted - truth)[rows].mean())


# -- the smallest cell ----------------------------------------------------------------------------------------------


def test_small_subgroups_are_put_together_and_cannot_be_found_by_subtracting() -> None:
    truth, probability, sex = two_classes()
    found = over_sites(truth, {"a": probability}, groups={"sex": sex}, smallest_cell=10).models["a"]
    groups = found.groups["sex"]
    assert "x" not in groups and "(other)" in groups
    for scores in groups.values():
        for row in scores.confusion:
            assert all(cell == 0 or cell >= 10 for cell in row)
    # nothing is lost, and what is left without the shown groups is no small cell either
    total = sum(np.array(scores.confusion) for scores in groups.values())
    assert total.tolist() == np.array(found.overall.confusion).tolist()
    check_two_classes(found.overall, truth, probability)  # the errors stated hold with the tiles of scores, too
    for name in groups:
        within(groups[name], "roc_auc", groups[name].metrics["roc_auc"] or 0.0)


def test_areas_of_subgroups_stay_within_their_error_with_a_smallest_cell() -> None:
    truth, probability, sex = two_classes()
    sex[sex == "x"] = "m"
    found = over_sites(truth, {"a": probability}, groups={"sex": sex}, smallest_cell=25).models["a"]
    for value in ("f", "m"):
        rows = sex == value
        within(found.groups["sex"][value], "roc_auc", sk.roc_auc_score(truth[rows], probability[rows]))
    within(found.overall, "ece", calibration_error(truth, probability, 10))


def test_no_histogram_of_a_site_holds_a_small_tile() -> None:
    """What a site sends of its scores, seen on the wire."""
    truth, probability, sex = two_classes(600)
    sent: list[Any] = []

    def work(federation: Any) -> None:
        rows = parts(600)[federation.site.index]

        class Spy:
            site = federation.site
            union = staticmethod(federation.union)

            @staticmethod
            def sum(arrays: Any) -> Any:
                sent.append(dict(arrays))
                return federation.sum(arrays)

        evaluate(truth[rows], probability[rows], groups={"sex": sex[rows]}, smallest_cell=8, federation=Spy())

    run_sites(SITES, work)
    counts = [array for arrays in sent for name, array in arrays.items() if name.endswith("ranking")]
    assert len(counts) == SITES
    for array in counts:
        in_groups = array[:, 1:-SITES]
        assert ((in_groups == 0) | (in_groups >= 8)).all()
    bins = [array[0, 0] for arrays in sent for name, array in arrays.items() if name.endswith("reliability")]
    assert all(((rows == 0) | (rows >= 8)).all() for rows in bins)


def test_a_site_with_few_rows_stays_out_and_is_named() -> None:
    truth, probability, _ = two_classes(200)
    found = over_sites(truth, {"a": probability}, smallest_cell=(1, 1, 30))
    assert found.sites == ("site-1", "site-2")
    assert [(a.site, a.reason) for a in found.absences] == [("site-3", "it has fewer than 30 rows")]
    rows = np.concatenate(parts(200)[:2])
    check_two_classes(found.models["a"].overall, truth[rows], probability[rows])
    assert "without site-3: it has fewer than 30 rows" in str(found)


def test_a_site_may_keep_its_own_scores_to_itself() -> None:
    truth, probability, _ = two_classes(500)
    found = over_sites(truth, {"a": probability}, per_site=(True, False, True))
    assert list(found.models["a"].per_site) == ["site-1", "site-3"]
    check_two_classes(found.models["a"].overall, truth, probability)


# -- mistakes -------------------------------------------------------------------------------------------------------


def test_sites_that_ask_for_different_things_are_told() -> None:
    truth, probability, _ = two_classes(100)
    with pytest.raises(HandshakeError, match="do not agree on threshold"):
        at_sites(truth, {"a": probability}, threshold=(0.5, 0.4, 0.5))


@pytest.mark.parametrize(
    ("truth", "predictions", "arguments", "message"),
    [
        ([0, 1], [0.2, 1.4], {}, "no probabilities"),
        ([0, 1], [0.2, np.nan], {}, "1 values that are not finite"),
        ([0, 1], [0.2], {}, "has 1 rows and the truth 2"),
        ([0, 0], [0.2, 0.3], {}, "for 2 classes, and the sites have 1"),
        ([0, 1], [0.2, 0.3], {"positive": 2}, "positive='2' is not one of two labels"),
        ([0, 1], [0.2, 0.3], {"labels": ["0", "a"]}, "has the label '1'"),
        ([0, None], [0.2, 0.3], {}, "no value in row 1"),
        ([0, 1], ["f", "m"], {}, "'model' predicts f, m, and the truth is 0, 1"),
        ([0, 1], {}, {}, "0 of a model"),
        ([0, 1], [0.2, 0.3], {"task": "ranking"}, "task='ranking'"),
        ([0, 1], [0.2, 0.3], {"smallest_cell": 0}, "smallest_cell=0"),
        ([], [], {}, "no site takes part: local: it has no rows"),
        (np.arange(300), np.arange(300), {}, 'task="regression"'),
    ],
)
def test_mistakes_are_named(truth: Any, predictions: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(truth, predictions, **arguments)
    assert message in str(caught.value)


def test_alone_it_scores_the_own_rows_and_prints_tables() -> None:
    truth, probability, sex = two_classes(300)
    found = evaluate(truth.astype(bool), {"new": probability}, groups={"sex": sex})
    check_two_classes(found.models["new"].overall, truth, probability)
    text = str(found)
    assert text.startswith("300 rows of 1 sites: local") and "new, by sex" in text and "roc_auc" in text
    document: dict[str, Any] = json.loads(found.to_json())
    assert document["format"] == 1 and document["models"]["new"]["overall"]["rows"] == 300
