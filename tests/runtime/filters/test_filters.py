"""Each filter by itself against NumPy, and the settings that it accepts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fl_runtime.errors import ConfigError, UpdateRefusedError
from fl_runtime.filters import check_filters, known_filters, make_filter
from fl_runtime.filters.base import Facts, FilterHost, layout_of, work_layout
from fl_runtime.filters.noise import gaussian, laplace, random_subset, store_rounded
from fl_runtime.filters.quantize import Quantize
from fl_runtime.filters.site import SiteFilters
from fl_runtime.filters.svt import SVTPrivacy
from fl_runtime.filters.topk import TopK
from fl_runtime.types import Array, Arrays, Report, Settings, Summary, Task, Update

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def model(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "layer.w": rng.normal(size=(37, 51)).astype(np.float32),
        "layer.b": rng.normal(size=51).astype(np.float64),
        "head.w": rng.normal(size=(51, 9)).astype(BFLOAT16),
        "scale": np.array(rng.normal(), np.float32),
        "none": np.zeros((0, 4), np.float32),
        "steps": np.array(17, np.int64),
    }


def trained(base: Arrays, seed: int = 1, size: float = 0.1) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        n: np.asarray(a + rng.normal(size=a.shape) * size).astype(a.dtype)
        if a.dtype.kind in "fV"
        else np.asarray(a + 5)
        for n, a in base.items()
    }


def train_task(arrays: Arrays, round: int = 1) -> Task:
    return Task("job", round, "", "train", round - 1, arrays)


def update(arrays: Arrays, round: int = 1, **fields: Any) -> Update:
    return Update("job", round, "", "site-1", 1, round - 1, arrays, **{"num_examples": 10, **fields})


def opened(*filters: Settings, base: Arrays, home: FilterHost = FilterHost()) -> SiteFilters:  # noqa: B008
    site = SiteFilters(filters, (), home)
    site.agree(base)
    return site


def sent(site: SiteFilters, base: Arrays, arrays: Arrays, round: int = 1, **fields: Any) -> Update:
    task = site.received(train_task(base, round))
    return site.outgoing(update(arrays, round, **fields), task)


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"name": "Noise"}, "there is no filter 'Noise'"),
        ({"kind": "Quantize"}, "is not a filter"),
        ("Quantize", "is not a filter"),
        ({"name": "Quantize", "bits": 8}, "Quantize has no argument 'bits'"),
        ({"name": "Quantize", "to": "int3"}, "to is 'int3'"),
        ({"name": "Quantize", "block": 4}, "block is 4"),
        ({"name": "Quantize", "at": "server_in"}, "cannot run at 'server_in'"),
        ({"name": "Quantize", "at": "nowhere"}, "all points: site_out, server_in, server_out, site_in"),
        ({"name": "TopK", "ratio": 0}, "ratio is 0"),
        ({"name": "TopK", "ratio": "a few"}, "ratio is 'a few'"),
        ({"name": "ExcludeVars"}, "ExcludeVars needs names"),
        ({"name": "ExcludeVars", "names": [3]}, "names is"),
        ({"name": "PercentilePrivacy", "percentile": 100}, "percentile is 100"),
        ({"name": "PercentilePrivacy", "gamma": float("nan")}, "gamma is nan"),
        ({"name": "SVTPrivacy", "epsilon": 0}, "epsilon is 0"),
        ({"name": "SVTPrivacy", "tau": 1.0}, "tau=1 is above gamma"),
        ({"name": "AllowMetrics", "names": "loss"}, "names is 'loss'"),
        ({"name": "Examples", "least": 5, "most": 4}, "most is 4"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_filters([settings])
    assert text in str(caught.value)
    assert caught.value.where == "filters" and caught.value.fix


def test_every_filter_has_its_mathematics_and_comes_back_from_its_settings() -> None:
    needed: dict[str, dict[str, Any]] = {"ExcludeVars": {"names": ["a"]}, "GaussianDP": {"epsilon": 8.0}}
    for name in known_filters():
        made = make_filter({"name": name, **needed.get(name, {})})
        assert made == make_filter(made.settings())
        assert len(type(made).__doc__) > 150


def test_moments_of_the_optimizer_do_not_slip_past_a_filter_of_values() -> None:
    with pytest.raises(ConfigError, match="moments"):
        check_filters([{"name": "SVTPrivacy"}], "average")
    check_filters([{"name": "Quantize"}], "average")
    base = model()
    with pytest.raises(UpdateRefusedError, match="moments"):
        sent(opened({"name": "PercentilePrivacy"}, base=base), base, base, extras={"m": np.zeros(3)})


def test_only_what_leaves_can_be_filtered_by_a_policy() -> None:
    with pytest.raises(ConfigError, match="leave `at` out"):
        SiteFilters((), [{"name": "Quantize", "at": "server_out"}], FilterHost())


def test_trees_have_no_differences() -> None:
    site = SiteFilters([{"name": "TopK"}], (), FilterHost())
    with pytest.raises(ConfigError, match="works on weights"):
        site.agree({"trees": np.zeros(3, np.uint8)}, weights=False)
    SiteFilters([{"name": "RoundMetrics"}], (), FilterHost()).agree({"trees": np.zeros(3, np.uint8)}, weights=False)


# -- the pipeline of a site ----------------------------------------------------------------------------------


def test_without_filters_nothing_is_touched_or_copied() -> None:
    base, weights = model(), trained(model())
    leaving = update(weights)
    site = opened(base=base)
    task = train_task(base)
    assert site.received(task).arrays is base
    assert site.outgoing(leaving, task) is leaving


def test_the_sites_own_filters_run_after_the_jobs_and_encodings_last() -> None:
    base = model()
    job = [{"name": "Quantize", "to": "fp16"}, {"name": "PercentilePrivacy", "gamma": 0.5}]
    site = SiteFilters(job, [{"name": "PercentilePrivacy", "gamma": 0.25}, {"name": "AllowMetrics"}], FilterHost())
    site.agree(base)
    task = site.received(train_task(base))
    leaves = site.outgoing(update(trained(base), metrics={"loss": 1.0}), task)
    ran = [(s["name"], s.get("gamma"), s.get("site", False)) for s in json.loads(leaves.encoding)]
    assert ran == [
        ("PercentilePrivacy", 0.5, False),
        ("PercentilePrivacy", 0.25, True),
        ("AllowMetrics", None, True),
        ("Quantize", None, False),
    ]
    assert leaves.metrics == {} and leaves.content == "encoded"
    assert "PercentilePrivacy(gamma=0.25) (site)" in site.described()


def test_a_policy_that_changes_holds_from_the_next_update_and_what_was_learnt_stays() -> None:
    base, weights = model(), trained(model())
    site = opened({"name": "TopK"}, base=base)
    first = sent(site, base, weights, 1)
    site.set_policy_filters([{"name": "ExcludeVars", "names": ["head.*"]}])
    second = sent(site, base, weights, 2)
    assert "head.w" in first.arrays and "head.w" not in second.arrays
    assert not np.array_equal(first.arrays["layer.w"], second.arrays["layer.w"])  # with what was not sent before


def test_the_users_own_arrays_are_left_alone_and_may_be_written_over() -> None:
    base, weights = model(), trained(model())
    kept = {n: a.copy() for n, a in weights.items()}
    site = opened({"name": "PercentilePrivacy"}, {"name": "Quantize"}, base=base)
    task = site.received(train_task({n: a.copy() for n, a in base.items()}))
    for array in task.arrays.values():
        array[...] = 0  # a loop may train in the arrays of its task
    site.outgoing(update(weights), task)
    assert all(np.array_equal(weights[n], kept[n]) for n in weights)


def test_names_that_an_encoding_needs_are_refused_in_a_model() -> None:
    with pytest.raises(ConfigError, match="w.scale"):
        opened({"name": "Quantize"}, base={"w": np.zeros(4, np.float32), "w|scale": np.zeros(4, np.float32)})


# -- values --------------------------------------------------------------------------------------------------


def test_percentile_against_numpy() -> None:
    base, weights = model(), trained(model())
    leaves = sent(opened({"name": "PercentilePrivacy", "percentile": 30, "gamma": 0.08}, base=base), base, weights)
    real = [n for n in base if base[n].dtype.kind in "fV"]
    difference = {n: weights[n].astype(np.float64) - base[n].astype(np.float64) for n in real}
    cut = np.percentile(np.concatenate([np.abs(d).reshape(-1) for d in difference.values()]), 30)
    for name in real:
        d = difference[name]
        clear = np.abs(np.abs(d) - cut) > 1e-6
        expected = np.where(np.abs(d) < cut, 0, np.clip(d, -0.08, 0.08))
        rtol = 0.01 if base[name].dtype == BFLOAT16 else 1e-5
        np.testing.assert_allclose(leaves.arrays[name].astype(np.float64)[clear], expected[clear], rtol=rtol, atol=1e-6)
        assert leaves.arrays[name].dtype == base[name].dtype
    assert leaves.content == "delta" and leaves.arrays["steps"] == 22


def test_svt_sends_few_bounded_values_and_says_what_that_costs() -> None:
    base = {"w": np.zeros(100_000, np.float32), "n": np.array(3, np.int64)}
    settings = {"name": "SVTPrivacy", "fraction": 0.001, "gamma": 0.01, "epsilon": 2.0}
    leaves = sent(opened(settings, base=base), base, {"w": np.full(100_000, 5, np.float32), "n": np.array(9)})
    (ran,) = json.loads(leaves.encoding)
    values = leaves.arrays["w"][leaves.arrays["w"] != 0]
    assert ran["epsilon"] == 2.0 and len(values) == ran["sent"] == 100
    assert np.abs(values).max() <= np.float32(0.01)
    assert leaves.arrays["n"] == 3  # a counter says how much data there is


def test_svt_keeps_the_budget_of_algorithm_7() -> None:
    made = SVTPrivacy(epsilon=6.0)
    for count in (1, 10, 10_000):
        first, second, third = made.split(count)
        assert first + second + third == pytest.approx(6.0) and third == 3.0
        assert second / first == pytest.approx((2 * count) ** (2 / 3))


def test_svt_finds_what_is_large_where_the_budget_allows_it() -> None:
    base = {"w": np.zeros(50, np.float32)}
    weights = {"w": np.zeros(50, np.float32)}
    weights["w"][7] = 1.0
    site = opened({"name": "SVTPrivacy", "fraction": 0.02, "gamma": 1.0, "tau": 0.5, "epsilon": 4000.0}, base=base)
    leaves = sent(site, base, weights)
    assert np.flatnonzero(leaves.arrays["w"]).tolist() == [7] and leaves.arrays["w"][7] == pytest.approx(1, abs=0.05)


def test_excluded_tensors_do_not_leave() -> None:
    base = model()
    leaves = sent(opened({"name": "ExcludeVars", "names": ["head.*", "steps"]}, base=base), base, trained(base))
    assert list(leaves.arrays) == ["layer.w", "layer.b", "scale", "none"] and leaves.content == "weights"


def test_what_site_in_excludes_stays_as_the_site_has_it() -> None:
    base, weights = model(0), model(9)
    site = SiteFilters([{"name": "ExcludeVars", "names": ["head.*"], "at": "site_in"}], (), FilterHost())
    site.agree(weights)
    task = site.received(train_task({n: a.copy() for n, a in base.items()}))
    assert np.array_equal(task.arrays["head.w"], weights["head.w"])
    assert np.array_equal(task.arrays["layer.w"], base["layer.w"])


# -- encodings -----------------------------------------------------------------------------------------------


def real_arrays() -> dict[str, Array]:
    return {n: a.astype(np.float32) if a.dtype.kind == "V" else a for n, a in model().items()}


@pytest.mark.parametrize("to", ["fp16", "bf16", "int8", "int4"])
def test_quantize_against_numpy(to: str) -> None:
    arrays, item = real_arrays(), Quantize(to=to, block=16)  # type: ignore[arg-type]
    encoded = item.encode(arrays)
    assert layout_of(encoded) == item.layout(layout_of(arrays))
    back = item.decode(encoded, layout_of(arrays))
    assert layout_of({n: back[n] for n in back}) == layout_of(arrays)
    assert back["steps"] == 17
    for name in ("layer.w", "layer.b", "scale"):
        flat = arrays[name].reshape(-1).astype(np.float32)
        if to in ("fp16", "bf16"):
            expected = flat.astype(np.float16 if to == "fp16" else BFLOAT16).astype(np.float32)
        else:
            blocks = [flat[i : i + 16] for i in range(0, len(flat), 16)]
            levels = np.float32(127 if to == "int8" else 7)
            expected = np.concatenate(
                [np.rint(b / (np.abs(b).max() / levels)) * (np.abs(b).max() / levels) for b in blocks]
            )
            assert np.abs(expected - flat).max() <= max(np.abs(b).max() for b in blocks) / levels / 2 * 1.001
        np.testing.assert_allclose(back[name].reshape(-1), expected, rtol=1e-6)


def test_quantize_of_zeros_and_of_huge_numbers() -> None:
    for to in ("fp16", "int8", "int4"):
        item = Quantize(to=to, block=8)  # type: ignore[arg-type]
        arrays = {"w": np.array([0.0] * 8 + [3e38, -1.0], np.float32)}
        back = item.decode(item.encode(arrays), layout_of(arrays))["w"]
        assert np.isfinite(back).all() and (back[:8] == 0).all()


def test_bytes_of_4_bit_numbers() -> None:
    encoded = Quantize(to="int4").encode({"w": np.ones(1024, np.float32)})
    assert sum(a.nbytes for a in encoded.values()) == 512 + 4 * 4


def test_topk_against_numpy() -> None:
    arrays, item = real_arrays(), TopK(ratio=0.1, small=100)
    encoded = item.encode(arrays)
    assert layout_of(encoded) == item.layout(layout_of(arrays))
    back = item.decode(encoded, layout_of(arrays))
    for name in ("layer.w", "head.w"):
        flat = arrays[name].reshape(-1)
        kept = int(np.ceil(0.1 * len(flat)))
        actual = back[name].reshape(-1)
        sent = actual != 0
        assert np.array_equal(actual[sent], flat[sent])
        largest = np.sort(np.abs(flat))[-kept:]  # of some that are equal, any may have been taken
        assert np.array_equal(np.sort(np.abs(actual))[-kept:], largest) and sent.sum() <= kept
    assert np.array_equal(back["layer.b"], arrays["layer.b"]) and back["steps"] == 17


@pytest.mark.parametrize("index", [[0, 0], [5, 1], [3, 2000]])
def test_topk_takes_no_indices_that_lie(index: list[int]) -> None:
    item = TopK(ratio=0.002, small=0)
    arrays = {"w": np.zeros(1000, np.float32)}
    encoded = {"w": np.ones(2, np.float32), "w|index": np.array(index, np.uint32)}
    with pytest.raises(UpdateRefusedError, match="ascending"):
        _ = item.decode(encoded, layout_of(arrays))["w"]


@pytest.mark.parametrize("chain", [[{"name": "Quantize", "to": "int4"}], [{"name": "TopK"}, {"name": "Quantize"}]])
def test_what_an_encoding_loses_comes_later(chain: list[Settings]) -> None:
    """With error feedback, all decoded updates add up to all differences, minus what is still held back."""
    from fl_runtime.filters.server import decoded

    base = {"w": np.zeros(4000, np.float32)}
    rng = np.random.default_rng(3)
    site = opened(*chain, base=base)
    plain = opened(*({**item, "error_feedback": False} for item in chain), base=base)
    total, actual, without = np.zeros(4000), np.zeros(4000), np.zeros(4000)
    direction = rng.normal(size=4000) * 0.01
    for number in range(1, 201):
        weights = {"w": direction.astype(np.float32)}
        total += weights["w"]
        actual += decoded(sent(site, base, weights, number), base).arrays["w"]
        without += decoded(sent(plain, base, weights, number), base).arrays["w"]
    assert np.linalg.norm(actual - total) < 0.5 * np.linalg.norm(without - total)
    assert np.linalg.norm(actual - total) < (0.5 if len(chain) > 1 else 0.002) * np.linalg.norm(total)


def test_what_was_lost_survives_a_restart_of_the_site(tmp_path: Path) -> None:
    base, home = model(), FilterHost("site-1", "job", tmp_path)

    def rounds(site: SiteFilters, *numbers: int) -> bytes:
        for number in numbers:
            last = sent(site, base, trained(base, number), number)
        return b"".join(a.tobytes() for a in last.arrays.values())

    chain = ({"name": "TopK", "ratio": 0.05}, {"name": "Quantize"})
    expected = rounds(opened(*chain, base=base), 1, 2, 3, 4)
    rounds(opened(*chain, base=base, home=home), 1, 2, 3)  # killed after it answered round 3, before it knew
    assert rounds(opened(*chain, base=base, home=home), 3, 4) == expected
    assert len(list(tmp_path.iterdir())) == 2
    rounds(opened(*chain, base={"v": np.ones(9, np.float32)} | base, home=home), 5)  # other tensors: begins anew


# -- what leaves beside the tensors --------------------------------------------------------------------------


def test_facts() -> None:
    pooled = Summary("auc", 0.876, 117.0, {0: (50.0, 67.0)})
    facts = Facts({"loss": 1.23456, "eval_acc": 0.5, "auc": pooled, "none": float("nan")}, 117, 40)
    plain = {"loss": 1.23456, "eval_acc": 0.5, "auc": 0.876, "none": facts.metrics["none"]}
    home = FilterHost()

    def after(**settings: Any) -> Facts:
        actual: Facts = make_filter(settings).facts(facts, home)
        return actual

    assert list(after(name="AllowMetrics", names=["eval_*"]).metrics) == ["eval_acc"]
    assert after(name="AllowMetrics").metrics == {}
    rounded = dict(after(name="RoundMetrics", decimals=1).metrics)
    assert np.isnan(rounded.pop("none")) and rounded == {"loss": 1.2, "eval_acc": 0.5, "auc": 0.9}
    assert after(name="Examples", equal=True) == replace(facts, metrics=plain, num_examples=1, local_steps=0)
    assert after(name="Examples", multiple=50).num_examples == 150
    assert after(name="Examples", most=100).num_examples == 100
    assert after(name="Examples", least=200).num_examples == 200


def test_reports_are_filtered_too() -> None:
    site = SiteFilters([{"name": "RoundMetrics", "decimals": 1}], [{"name": "Examples", "equal": True}], FilterHost())
    report = site.report(Report("job", 3, "site-1", {"loss": 0.123}, 77))
    assert report.metrics == {"loss": 0.1} and report.num_examples == 1


# -- noise ---------------------------------------------------------------------------------------------------


def test_noise_has_the_moments_that_it_should_have_and_never_repeats() -> None:
    count = 400_000
    normal, double = gaussian(count), laplace(count)
    assert abs(normal.mean()) < 5 / count**0.5
    assert normal.var() == pytest.approx(1, abs=5 * (2 / count) ** 0.5)
    assert (normal**4).mean() == pytest.approx(3, abs=5 * (96 / count) ** 0.5)
    assert np.mean(normal > 1.959964) == pytest.approx(0.025, abs=5 * (0.025 / count) ** 0.5)
    assert abs(double.mean()) < 5 * (2 / count) ** 0.5
    assert double.var() == pytest.approx(2, abs=5 * (20 / count) ** 0.5)
    np.random.seed(0)
    again = gaussian(count)
    assert abs(np.corrcoef(normal, again)[0, 1]) < 5 / count**0.5
    assert not np.array_equal(gaussian(4), gaussian(4))


def test_choice_is_uniform() -> None:
    counts = np.bincount(np.concatenate([random_subset(3, 10) for _ in range(4000)]), minlength=10)
    assert np.abs(counts - 1200).max() < 5 * (4000 * 0.3 * 0.7) ** 0.5
    assert random_subset(9, 4).tolist() == [0, 1, 2, 3]


def test_values_are_rounded_once_and_stay_finite() -> None:
    target = np.zeros(3, np.float16)
    store_rounded(target, np.array([1e9, -1e9, 0.1]))
    assert target.tolist() == [65504, -65504, float(np.float16(0.1))]


def test_the_layout_of_differences_is_wide() -> None:
    wide = {n: d.name for n, (d, _) in work_layout(layout_of(model())).items()}
    assert wide["head.w"] == "float32" and wide["layer.b"] == "float64" and wide["steps"] == "int64"
