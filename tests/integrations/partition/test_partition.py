"""Ways to divide a data set: every row once, seeds, proportions, all types of data, and what is shown and written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from documented import Page

from fl_adapters.environments.virtual.function import identity
from fl_adapters.participant.kit import KIT_VARIABLE, Kit
from fl_adapters.partition import Partition, by_column, by_feature, by_label, by_quantity, iid
from fl_runtime.errors import ConfigError

ROWS = 600
RANDOM = np.random.default_rng(3)
LABELS = RANDOM.choice(["cat", "dog", "eel"], ROWS, p=[0.6, 0.3, 0.1])
AGES = RANDOM.normal(50, 12, ROWS)
CLINICS = RANDOM.choice(["North clinic", "South", "West"], ROWS)
TABLE = pd.DataFrame({"row": np.arange(ROWS), "label": LABELS, "age": AGES, "clinic": CLINICS})

SPLITS: dict[str, Callable[..., Partition]] = {
    "iid": lambda **given: iid(TABLE, label="label", **given),
    "by_label": lambda **given: by_label(TABLE, "label", **given),
    "by_quantity": lambda **given: by_quantity(TABLE, label="label", **given),
    "by_feature": lambda **given: by_feature(TABLE, "age", label="label", **given),
}


def numbers(parts: Partition) -> list[list[int]]:
    return [part["row"].tolist() for part in parts]


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("sites", [1, 2, 7])
def test_every_row_belongs_to_one_site_and_seeds_decide(name: str, sites: int) -> None:
    split = SPLITS[name]
    found = numbers(split(sites=sites, seed=5))
    assert sorted(row for part in found for row in part) == list(range(ROWS))
    assert len(found) == sites
    assert all(found)
    assert found == numbers(split(sites=sites, seed=5))
    if sites > 1 and name != "by_feature":  # which is random only below strictness 1
        assert found != numbers(split(sites=sites, seed=6))


def test_counts_are_those_of_pandas() -> None:
    parts = by_label(TABLE, "label", sites=["north", "south", "west"], alpha=0.4, seed=1)
    for name in parts.sites:
        expected = parts[name]["label"].value_counts().to_dict()
        assert {label: number for label, number in parts.counts[name].items() if number} == expected


def test_iid_parts_have_equal_sizes_and_the_labels_of_the_whole() -> None:
    parts = iid(TABLE, sites=4, label="label", seed=0)
    assert [len(part) for part in parts] == [150] * 4
    whole = pd.Series(LABELS).value_counts(normalize=True)
    for part in parts:
        found = part["label"].value_counts(normalize=True)
        np.testing.assert_allclose(found[whole.index], whole, atol=0.15)


def skew(alpha: float) -> float:
    """Mean distance of the sites' shares of labels to those of the whole, over seeds."""
    whole = pd.Series(LABELS).value_counts(normalize=True)
    distances = []
    for seed in range(10):
        for part in by_label(TABLE, "label", sites=5, alpha=alpha, seed=seed):
            shares = part["label"].value_counts(normalize=True).reindex(whole.index, fill_value=0)
            distances.append(float((shares - whole).abs().sum()) / 2)
    return float(np.mean(distances))


def test_a_smaller_alpha_makes_the_labels_of_sites_differ_more() -> None:
    far, middle, near = skew(0.1), skew(1.0), skew(1000.0)
    assert far > middle > near
    assert far > 0.3
    assert near < 0.02


def test_the_shares_of_a_label_have_the_variance_of_their_dirichlet_distribution() -> None:
    sites, alpha, label = 4, 2.0, np.zeros(4000, np.int64)
    label[::2] = 1
    shares = [
        part.sum() / 2000
        for seed in range(200)
        for part in (label[rows] for rows in by_label(label, label, sites=sites, alpha=alpha, seed=seed).rows)
    ]
    total = sites * alpha
    expected = alpha * (total - alpha) / (total**2 * (total + 1))  # of a component of a symmetric Dirichlet
    assert np.mean(shares) == pytest.approx(1 / sites)
    assert np.var(shares) == pytest.approx(expected, rel=0.15)


def test_many_sites_have_their_share_though_it_is_less_than_a_row_of_a_label() -> None:
    label = np.arange(900) % 30
    sizes = np.zeros(100)
    for seed in range(20):
        sizes += [len(rows) for rows in by_label(label, label, sites=100, alpha=100.0, seed=seed).rows]
    assert sizes.mean() == 180
    assert sizes.std() < 0.1 * sizes.mean()  # rounding alike in each label would give some sites 3 times as much


def test_sizes_by_quantity_are_the_shares_to_within_a_row() -> None:
    parts = by_quantity(TABLE, sites=3, shares=[7, 2, 2], seed=0)
    sizes = np.array([len(part) for part in parts])
    assert np.abs(sizes - np.array([7, 2, 2]) / 11 * ROWS).max() < 1
    uneven = [len(part) for part in by_quantity(TABLE, sites=5, alpha=0.3, seed=0)]
    assert max(uneven) > 3 * min(uneven)


def test_ranges_of_a_feature_do_not_overlap_at_strictness_one_and_are_those_of_the_whole_at_zero() -> None:
    strict = [part["age"] for part in by_feature(TABLE, "age", sites=4, seed=0)]
    assert all(low.max() <= high.min() for low, high in pairwise(strict))
    means = [part["age"].mean() for part in by_feature(TABLE, "age", sites=4, strictness=0.0, seed=0)]
    np.testing.assert_allclose(means, AGES.mean(), atol=4)
    between = [part["age"].mean() for part in by_feature(TABLE, "age", sites=4, strictness=0.5, seed=0)]
    assert np.ptp(means) < np.ptp(between) < np.ptp([part.mean() for part in strict])


def test_a_column_names_the_sites_and_groups_of_its_values_stay_together() -> None:
    parts = by_column(TABLE, "clinic")
    assert parts.sites == ("North-clinic", "South", "West")
    assert [part["clinic"].unique().tolist() for part in parts] == [["North clinic"], ["South"], ["West"]]
    two = by_column(TABLE, "clinic", sites=2)
    assert sorted(row for part in numbers(two) for row in part) == list(range(ROWS))
    assert sum(part["clinic"].nunique() for part in two) == 3


def test_values_that_make_the_same_name_are_told_apart() -> None:
    assert by_column(np.arange(3), ["a b", "a-b", "a/b"]).sites == ("a-b", "a-b_2", "a-b_3")


# -- types of data ---------------------------------------------------------------------------------------------------


def as_dataset() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_pandas(TABLE)


def as_torch() -> Any:
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.arange(ROWS), torch.as_tensor(AGES))
    data.targets = torch.as_tensor(np.unique(LABELS, return_inverse=True)[1])
    return data


@pytest.mark.parametrize(
    ("data", "label", "rows"),
    [
        (lambda: np.stack([np.arange(ROWS), AGES], axis=1), LABELS, lambda part: part[:, 0]),
        (lambda: (np.arange(ROWS), AGES), LABELS, lambda part: part[0]),
        (lambda: list(range(ROWS)), LABELS.tolist(), lambda part: part),
        (lambda: TABLE, "label", lambda part: part["row"]),
        (as_dataset, "label", lambda part: part["row"]),
        (as_torch, "targets", lambda part: [row.item() for row, _ in part]),
    ],
    ids=["array", "tuple", "list", "pandas", "datasets", "torch"],
)
def test_each_type_of_data_is_divided_alike(data: Any, label: Any, rows: Any) -> None:
    whole = data()
    parts = by_label(whole, label, sites=3, alpha=0.5, seed=2)
    expected = numbers(by_label(TABLE, "label", sites=3, alpha=0.5, seed=2))
    assert [list(map(int, rows(part))) for part in parts] == expected
    if not isinstance(whole, list):
        assert type(parts[0]).__name__ in (type(whole).__name__, "Subset")


def test_a_column_of_an_array_and_a_tensor_of_labels_may_be_named() -> None:
    torch = pytest.importorskip("torch")
    array = np.stack([np.arange(ROWS), AGES], axis=1)
    by_number = by_feature(array, 1, sites=3)
    assert [part[:, 0].tolist() for part in by_number] == numbers(by_feature(TABLE, "age", sites=3))
    tensor = torch.as_tensor(array)
    assert by_feature(tensor, tensor[:, 1], sites=3)[0].tolist() == by_number[0].tolist()


def test_missing_labels_are_a_label_of_their_own() -> None:
    table = pd.DataFrame({"label": pd.array([1, None, 2, None], dtype="Int64")})
    assert iid(table, sites=1, label="label").counts == {"site-1": {"1": 1, "2": 1, "missing": 2}}
    assert iid(np.arange(3), sites=1, label=[1.0, np.nan, np.nan]).counts["site-1"]["missing"] == 2


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "fault", "fix"),
    [
        (lambda: by_label(TABLE, "lable", sites=2), "there is no 'lable'", "label"),
        (lambda: by_label(TABLE, "age", sites=2), "the label has 600 different values", "by_feature"),
        (lambda: by_label(TABLE, LABELS[:9], sites=2), "the label has the shape (9,)", "one label for each row"),
        (lambda: by_label(TABLE, "label", sites=2, alpha=0.0), "alpha cannot be 0", "above 0"),
        (lambda: by_label(TABLE, "label", sites=2, min_rows=400), "fewer than 400 of 600 rows", "smaller min_rows"),
        (lambda: by_feature(TABLE, "label", sites=2), "no finite numbers", "by_column"),
        (lambda: by_feature(TABLE, "age", sites=2, strictness=2), "strictness cannot be 2", "0 to 1"),
        (lambda: by_quantity(TABLE, sites=2, shares=[1]), "shares cannot be [1]", "each of the 2 sites"),
        (lambda: by_column(TABLE, "clinic", sites=9), "3 values for 9 sites", "at most 3"),
        (lambda: by_column(TABLE, "row"), "600 different values", "sites=5"),
        (lambda: iid(TABLE, sites=0), "cannot run with 0 sites", "at least 1"),
        (lambda: iid([1], sites=2), "1 rows cannot be divided among 2", "fewer sites"),
        (lambda: iid({"a": [1]}, sites=1), "dict cannot be divided", "pandas"),
        (lambda: iid((i for i in range(3)), sites=1), "generator cannot be divided", "pandas"),
        (lambda: iid((np.arange(2), np.arange(3)), sites=1), "with 2 and 3 rows", "same length"),
        (lambda: iid(TABLE, sites=2, seed=-1), "seed cannot be -1", "from 0 on"),
        (lambda: iid(TABLE, sites=["north"])["nroth"], "no part for the site 'nroth'", "did you mean north?"),
        (lambda: iid(TABLE, sites=2).write("parts.csv"), "all sites would share", "{site}"),
        (lambda: iid(TABLE, sites=2).write("{site}.npy"), "DataFrame cannot be written", ".parquet"),
        (lambda: iid(TABLE, sites=2).save_picture("a.png"), "a.png is no SVG file", "a.svg"),
    ],
)
def test_a_mistake_is_refused_with_what_to_do(
    call: Callable[[], object], fault: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        call()
    assert fault in caught.value.what
    assert fix in caught.value.fix
    assert not list(tmp_path.rglob("*.*"))


# -- what is shown and written ---------------------------------------------------------------------------------------


def test_the_table_and_the_picture_show_the_counts(tmp_path: Path) -> None:
    parts = by_label(TABLE, "label", sites=["north", "south"], alpha=0.5, seed=4)
    lines = [line.split() for line in str(parts).splitlines()[1:]]
    assert lines[0] == ["site", "rows", "cat", "dog", "eel"]
    assert lines[1] == ["north", str(len(parts["north"])), *map(str, parts.counts["north"].values())]
    assert lines[3][:2] == ["all", str(ROWS)]
    drawn = ElementTree.parse(parts.save_picture(tmp_path / "parts.svg"))
    tips = {tip.text for tip in drawn.iter("{http://www.w3.org/2000/svg}title")}
    for site, counts in parts.counts.items():
        some = {f"{site}, {label}: {number} of {sum(counts.values())}" for label, number in counts.items() if number}
        assert some <= tips


def test_many_labels_and_sites_are_shown_in_short() -> None:
    label = np.arange(900) % 30
    parts = by_label(np.arange(900), label, sites=100, alpha=100.0, seed=0)
    assert len(str(parts).splitlines()[1].split()) == 2 + 9 + 2  # "21 others"
    assert "21 others" in str(parts)
    assert "and 40 more sites" in parts._repr_html_()
    assert "<script" not in iid(TABLE, sites=1, label=["<script>"] * ROWS)._repr_html_()


def test_parts_are_written_and_read_again(tmp_path: Path) -> None:
    for ending in ("csv", "parquet"):
        if ending == "parquet":
            pytest.importorskip("pyarrow")
        files = iid(TABLE, sites=["north", "south"], seed=0).write(tmp_path / "t" / f"{{site}}.{ending}")
        assert list(files) == ["north", "south"]
        read = pd.concat([getattr(pd, f"read_{ending}")(file) for file in files.values()])
        assert sorted(read["row"]) == list(range(ROWS))
    array = iid(np.stack([AGES, AGES]).T, sites=2, seed=0)
    for pattern, load in (("{site}.npy", np.load), ("{site}.csv", lambda file: np.loadtxt(file, delimiter=","))):
        for part, file in zip(array, array.write(tmp_path / pattern).values(), strict=True):
            np.testing.assert_allclose(load(file), part)
    (file,) = iid((AGES, LABELS), sites=1).write(tmp_path / "{site}.npz").values()
    with np.load(file) as arrays:
        assert (arrays["arr_1"] == LABELS).all()
    with pytest.raises(ConfigError, match="Python objects"):
        iid(LABELS.astype(object), sites=1).write(tmp_path / "{site}.npy")


def test_a_data_set_of_datasets_is_written_as_a_folder(tmp_path: Path) -> None:
    files = iid(as_dataset(), sites=2, seed=0).write(tmp_path / "{site}")
    datasets = sys.modules["datasets"]
    assert sum(len(datasets.load_from_disk(str(folder))) for folder in files.values()) == ROWS


def test_the_example_of_the_page_prints_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Page("data.md")
    monkeypatch.chdir(tmp_path)
    exec(page.files("Divide one data set")["parts.py"], {})
    assert capsys.readouterr().out.splitlines() == page.screens("Divide one data set")
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["north.csv", "parts.svg", "south.csv", "west.csv"]


# -- the part of this site -------------------------------------------------------------------------------------------


def kit(folder: Path, **fields: Any) -> str:
    made = Kit("job", "site-2", 1, 3, "127.0.0.1:1", "secret", simulated=True, **fields)
    return str(made.save(folder))


def test_a_site_of_a_simulation_gets_its_part_and_alone_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KIT_VARIABLE, raising=False)
    assert iid(TABLE, seed=1).mine() is TABLE
    expected = numbers(iid(TABLE, sites=3, seed=1))
    monkeypatch.setenv(KIT_VARIABLE, kit(tmp_path))
    assert iid(TABLE, seed=1).mine()["row"].tolist() == expected[1]
    assert iid(TABLE, sites=["a", "b", "site-2"], seed=1).mine()["row"].tolist() == expected[2]
    with pytest.raises(ConfigError, match="divided among 4 sites, the simulation has 3"):
        iid(TABLE, sites=4).mine()
    monkeypatch.delenv(KIT_VARIABLE)
    with identity.standing_at(identity.Site("site-3", 2, 3, "job")):  # a virtual site
        assert iid(TABLE, seed=1).mine()["row"].tolist() == expected[2]


def test_a_site_of_a_federation_divides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KIT_VARIABLE, kit(tmp_path, credentials=str(tmp_path)))
    with pytest.raises(ConfigError, match="divided among the sites of a simulation") as caught:
        iid(TABLE).mine()
    assert "site().data" in caught.value.fix
