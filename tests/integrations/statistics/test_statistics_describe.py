"""Statistics over all sites equal those of pandas on all rows together."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from threaded_federation import ThreadedFederation, run_sites

from fl_adapters.statistics import Categorical, Numeric, Statistics, describe
from fl_runtime.errors import ConfigError, HandshakeError

ROWS = (900, 400, 150, 3)


def table(seed: int = 0, rows: int = sum(ROWS)) -> pd.DataFrame:
    """Rows of patients: numbers of very different sizes, with and without gaps, texts, booleans and codes."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": rng.integers(18, 95, rows),
            "time": 1.7e9 + rng.normal(0, 1e3, rows),
            "dose": rng.lognormal(0, 3, rows),
            "sex": rng.choice(["f", "m", "d"], rows, p=[0.5, 0.48, 0.02]),
            "smoker": rng.random(rows) < 0.2,
            "code": rng.integers(1, 5, rows),
            "one": np.full(rows, 0.1),
        }
    )
    frame.loc[rng.random(rows) < 0.15, "dose"] = np.nan
    frame.loc[rng.random(rows) < 0.1, "sex"] = None
    frame["pressure"] = frame["age"] * 0.5 + rng.normal(120, 10, rows)
    return frame


def shares(frame: pd.DataFrame, rows: tuple[int, ...] = ROWS) -> list[pd.DataFrame]:
    ends = np.cumsum((0, *rows))
    return [frame.iloc[a:b].reset_index(drop=True) for a, b in pairwise(ends)]


def described(parts: list[Any], **arguments: Any) -> list[Statistics]:
    """Describe a table at each site of a federation, and return what each has found."""

    def site(federation: ThreadedFederation) -> Statistics:
        return describe(parts[federation.site.index], federation=federation, **arguments)

    return run_sites(len(parts), site)


def assert_equals_pandas(found: Statistics, frame: pd.DataFrame, categorical: tuple[str, ...] = ()) -> None:
    assert found.rows == len(frame)
    assert list(found.features) == list(frame.columns)
    for name, feature in found.features.items():
        column = frame[name]
        assert (feature.count, feature.missing) == (column.count(), column.isna().sum()), name
        if isinstance(feature, Categorical):
            expected = {str(text): count for text, count in column.value_counts().items()}
            assert feature.categories == expected and feature.other == 0, name
            continue
        values = column.dropna().astype(float)
        np.testing.assert_allclose(
            [feature.mean, feature.min, feature.max], [values.mean(), values.min(), values.max()], rtol=1e-12
        )
        np.testing.assert_allclose(feature.std, values.std(), rtol=1e-9, atol=1e-15)
        quantiles = values.quantile(list(feature.quantiles))
        np.testing.assert_allclose(list(feature.quantiles.values()), quantiles, rtol=1e-12, err_msg=name)
        assert feature.rank_error == 0 and set(feature.value_error.values()) == {0.0}
        assert feature.histogram is not None
        counts, edges = np.histogram(values, bins=20)
        np.testing.assert_allclose(feature.histogram.edges, edges, rtol=1e-12)
        assert feature.histogram.counts == tuple(counts) and feature.histogram.uncertain == 0, name
    numeric = frame.drop(columns=list(categorical)).select_dtypes("number")
    expected = numeric.corr()
    for one, row in found.correlations.items():
        for other, value in row.items():
            if "one" in (one, other):
                assert value is None  # a constant has no correlation
            else:
                assert value == pytest.approx(expected.loc[one, other], abs=1e-9), (one, other)


def test_sites_find_what_pandas_finds_on_all_rows() -> None:
    frame = table()
    results = described(shares(frame), categorical=["code"])
    assert len({result.to_json() for result in results}) == 1
    assert_equals_pandas(results[0], frame, ("code",))
    assert results[0].sites == ("site-1", "site-2", "site-3", "site-4") and results[0].absences == ()


def test_a_script_without_a_federation_describes_its_own_table(capfd: pytest.CaptureFixture[str]) -> None:
    frame = table(rows=200)
    assert_equals_pandas(describe(frame, categorical=["code"]), frame, ("code",))


def test_chunks_of_any_size_and_other_libraries_give_the_same() -> None:
    import pyarrow as pa

    frame = table(rows=500)
    whole = describe(frame, categorical=["code"])
    chunks = (frame.iloc[start : start + 70] for start in range(0, len(frame), 70))
    arrow = pa.Table.from_pandas(frame)
    forms = [chunks, arrow, arrow.to_batches(max_chunksize=90)]
    try:
        import polars
    except ImportError:
        pass
    else:
        forms.append(polars.from_arrow(arrow))
    for data in forms:
        found = describe(data, categorical=["code"])
        assert found.rows == whole.rows
        for name, feature in whole.features.items():
            other = found.features[name]
            if isinstance(feature, Numeric):
                assert isinstance(other, Numeric)
                assert (other.count, other.min, other.quantiles) == (feature.count, feature.min, feature.quantiles)
                assert other.std == pytest.approx(feature.std, rel=1e-9)
                assert other.histogram == feature.histogram
            else:
                assert other == feature


def test_each_site_is_described_with_the_bins_of_all() -> None:
    frame = table()
    parts = shares(frame)
    result = described(parts, bins={"age": [0, 40, 65, 120]})[2]
    assert list(result.per_site) == ["site-1", "site-2", "site-3", "site-4"]
    for part, own in zip(parts, result.per_site.values(), strict=True):
        assert own.rows == len(part)
        age, sex, dose = own.features["age"], own.features["sex"], own.features["dose"]
        assert isinstance(age, Numeric) and isinstance(dose, Numeric) and isinstance(sex, Categorical)
        assert age.histogram is not None and age.histogram.edges == (0, 40, 65, 120)
        assert age.histogram.counts == tuple(np.histogram(part["age"], [0, 40, 65, 120])[0])
        assert age.mean == pytest.approx(part["age"].mean()) and dose.max == part["dose"].max()
        assert sex.categories == dict(part["sex"].value_counts())
        total = result.features["dose"]
        assert isinstance(total, Numeric) and total.histogram and dose.histogram
        assert dose.histogram.edges == total.histogram.edges


def test_many_different_values_give_quantiles_within_the_stated_error() -> None:
    rng = np.random.default_rng(1)
    parts = [pd.DataFrame({"x": rng.normal(50, 20, 120_000)}), pd.DataFrame({"x": rng.normal(-1, 1e-3, 1000)})]
    levels = [0.001, 0.01, 0.25, 0.5, 0.9, 0.999]
    found = described(parts, quantiles=levels)[0].features["x"]
    values = np.concatenate([part["x"] for part in parts])
    assert isinstance(found, Numeric) and found.histogram is not None
    assert (found.min, found.max) == (values.min(), values.max())
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    for level, value in found.quantiles.items():
        assert 0 < found.value_error[level] < 0.1
        assert value == pytest.approx(np.quantile(values, level), abs=found.value_error[level])
    counts = np.histogram(values, found.histogram.edges)[0]
    assert np.abs(counts - found.histogram.counts).sum() <= 2 * found.histogram.uncertain < 0.02 * len(values)


def test_no_number_stands_for_fewer_rows_than_the_smallest_count() -> None:
    frame = table(rows=1450)
    least = 12
    result = described(shares(frame), smallest_count=least)[0]
    assert [(absence.site, absence.feature) for absence in result.absences] == [("site-4", "")]
    assert "fewer than 12 rows" in result.absences[0].reason
    assert result.sites == ("site-1", "site-2", "site-3")
    for own in result.per_site.values():
        for name, feature in own.features.items():
            cells = feature.categories.values() if isinstance(feature, Categorical) else feature.histogram.counts
            assert all(count >= least for count in cells if count), name
            other = feature.other if isinstance(feature, Categorical) else feature.histogram.other
            assert other == 0 or other >= least, name
            assert sum(cells) + other == feature.count, name
    age, dose = result.features["age"], result.features["dose"]
    assert age.mean == pytest.approx(frame["age"].mean())
    values = frame["dose"].dropna().to_numpy()
    assert dose.min > values.min() and dose.max < values.max()  # those are single rows
    for level, value in dose.quantiles.items():
        low, high = np.quantile(values, np.clip([level - dose.rank_error, level + dose.rank_error], 0, 1))
        assert 0 < dose.rank_error < 0.06 and low <= value <= high


def test_a_few_rows_without_a_value_do_not_show_through_products() -> None:
    rng = np.random.default_rng(2)
    frame = pd.DataFrame(rng.normal(size=(100, 3)), columns=list("abc"))
    frame.loc[0, "a"] = np.nan  # a's products with b over 99 rows, less b's over 100, would be row 0
    found = describe(frame, smallest_count=5)
    assert found.correlations["a"]["b"] is None
    assert found.correlations["b"]["c"] == pytest.approx(frame["b"].corr(frame["c"]))


def test_sites_without_a_column_are_named() -> None:
    frame = table()
    parts = shares(frame)
    parts[1] = parts[1].drop(columns="dose")
    result = described(parts)[3]
    assert [(a.site, a.feature) for a in result.absences] == [("site-2", "dose")]
    values = pd.concat([parts[0], parts[2], parts[3]])["dose"]
    dose = result.features["dose"]
    assert isinstance(dose, Numeric) and (dose.count, dose.sites) == (values.count(), 3)
    assert dose.mean == pytest.approx(values.mean())
    assert result.correlations["dose"]["age"] == pytest.approx(
        pd.concat([parts[0], parts[2], parts[3]])[["dose", "age"]].corr().iloc[0, 1]
    )


def test_the_document_is_json_without_nan() -> None:
    frame = pd.DataFrame({"x": [np.nan, np.inf, -np.inf], "t": [None, None, None], "one": [4.0, 4.0, 4.0]})
    found = describe(frame)
    document = json.loads(found.to_json())
    assert document["format"] == 1 and document["features"]["x"]["mean"] is None
    assert document["features"]["x"]["missing"] == 3 and document["features"]["one"]["std"] == 0
    assert list(found.to_pandas().index) == ["x", "t", "one"]


def test_a_column_without_statistics_is_named() -> None:
    found = describe(pd.DataFrame({"x": [1.0, 2.0], "when": pd.to_datetime(["2026-01-01", "2026-01-02"])}))
    assert list(found.features) == ["x"]
    assert [(a.feature, a.reason.partition("(")[0]) for a in found.absences] == [
        ("when", "the column has the type Datetime")
    ]


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ([1, 2, 3], {}, "no table"),
        ("data.csv", {}, "no table"),
        (pd.DataFrame({"age": [1]}), {"features": ["agee"]}, "no site has a column 'agee'"),
        (pd.DataFrame({"age": [1]}), {"features": "age"}, "no list of names"),
        (pd.DataFrame({"age": [1]}), {"bins": 0}, "neither a number of bins nor edges"),
        (pd.DataFrame({"age": [1]}), {"bins": [3, 2]}, "neither a number of bins nor edges"),
        (pd.DataFrame({"age": [1]}), {"quantiles": [50]}, "are no levels"),
        (pd.DataFrame({"when": pd.to_datetime(["2026-01-01"])}), {"features": ["when"]}, "has no statistics here"),
        (pd.DataFrame({"x": [[1], [2]]}), {}, "no texts, numbers or booleans"),
    ],
)
def test_mistakes_are_told(data: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        describe(data, **arguments)
    assert error.value.fix


def test_sites_that_hold_other_kinds_of_values_are_named() -> None:
    with pytest.raises(HandshakeError, match="'x' holds numbers at site-1, and something else at site-2"):
        described([pd.DataFrame({"x": [1.0]}), pd.DataFrame({"x": ["high"]})])


def test_sites_that_ask_something_else_are_told() -> None:
    def site(federation: ThreadedFederation) -> Statistics:
        return describe(pd.DataFrame({"x": [1.0]}), bins=federation.site.index + 5, federation=federation)

    with pytest.raises(HandshakeError, match="the sites do not agree on bins: .* at another site"):
        run_sites(2, site)
