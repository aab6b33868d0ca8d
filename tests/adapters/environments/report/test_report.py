"""The pages about runs: what they say is what the events say, and nothing in them can be a script."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_adapters.environments.report import heatmap, write_comparison, write_report
from fl_adapters.environments.report.charts import ticks
from fl_adapters.environments.report.comparison import different_settings
from fl_adapters.environments.report.loading import loading_line
from fl_adapters.environments.report.notebook import NotebookView
from fl_runtime.errors import ConfigError
from fl_runtime.server.records.history import History

HOSTILE = '</svg></style><script>alert(1)</script><img src="http://elsewhere" onerror=alert(2)>"\x1b[31m\u202e'


class Page(HTMLParser):
    """Elements, attributes and texts of a page, as a browser's parser finds them."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        if path is not None:
            self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def has(self, text: str) -> bool:
        return any(text in found for found in self.texts)


class Run:
    """Writes the events of a run as a server does."""

    def __init__(self, folder: Path, sites: Sequence[str], **job: Any) -> None:
        folder.mkdir(parents=True)
        self.folder, self.sites, self._time = folder, sites, 1.8e9
        (folder / "job.yml").write_text("\n".join(f"{field}: {json.dumps(value)}" for field, value in job.items()))
        for site in sites:
            self.event("registered", site=site, evaluates=True, info={"framework": "transformers"})
        self.event("started", rounds=9, sites=list(sites))

    def event(self, kind: str, round: int = 0, site: str = "", **data: Any) -> None:
        self._time += 1
        line = json.dumps({"kind": kind, "time": self._time, "round": round, "site": site, "data": data})
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    def round(
        self, number: int, loss: float, *, metric: str = "loss", filters: Sequence[Any] = (), **update: Any
    ) -> None:
        for site in self.sites:
            self.event("task_sent", number, site, task="train", bytes=500)
        for at, site in enumerate(self.sites):
            fields = {"num_examples": 100 * (at + 1), "local_steps": 5, "seconds": 2.0 + at, "filters": list(filters)}
            fields |= {"status": "used", "metrics": {}, "bytes_up": 1000, "bytes_down": 500, **update}
            self.event("update", number, site, **fields)
        self.event(
            "round_finished",
            number,
            seconds=4.0,
            metrics={},
            sites=list(self.sites),
            missing=[],
            bytes_up=2,
            bytes_down=2,
        )
        for at, site in enumerate(self.sites):
            self.event("report", number, site, metrics={metric: loss + at}, num_examples=9)
        self.event("scored", number, metrics={metric: loss}, best_round=1, best_metric=metric)

    def finish(self, *, rounds: int = 9) -> None:
        self.event("finished", rounds=rounds, best_round=1, no_best="")


def test_the_page_says_what_the_events_say(tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "study", ("north", "south"), name="study", app="train.py", rounds=2)
    started = {"args": ["--lr", "0.1"], "module": False, "sites": run.sites, "directory": str(tmp_path)}
    (run.folder / "simulation.json").write_text(json.dumps(started))
    (run.folder / "best").mkdir()
    (run.folder / "best" / "adapter_config.json").write_text("{}")
    noise = {"name": "GaussianDP", "noise_multiplier": 1.5}
    run.round(1, 0.5, filters=[noise | {"spent": 0.75}])
    run.round(2, 0.625, filters=[noise | {"spent": 1.25}])
    run.event("cross_site", 2, matrix={"global": {"north": {"loss": 0.1}, "south": {"loss": 0.3}}})
    run.event("warning", text="both sites have the same data")
    run.finish()
    page = Page(write_report(run.folder))
    for text in (
        *("Finished.", "2 of 9", "transformers", "all sites, round 2: 0.625", "north, round 1: 0.5"),
        *("south, round 2: 1.625", "33.3%", "66.7%", "2 of 2", "GaussianDP", "noise_multiplier=1.5", "1.25"),
        *("both sites have the same data", "PeftModel.from_pretrained(base, 'best')", "app: train.py"),
        *("In the folder of the run:", "best round: 1"),
        "fl-adapters simulate train.py --job runs/study/job.yml --name study-again --sites north,south -- --lr 0.1",
    ):
        assert page.has(text), text
    # the updates arrive 2 and 3 s into a round of 4 s: one site waits for a second, both for the model
    for text in ("training and exchange: 2.5 s", "waiting for other sites: 0.5 s", "aggregation: 1 s"):
        assert page.has(f"round 1, {text}"), text
    assert page.has("round 1, to the server: 0.002 MB") and page.has("round 1, to the sites: 0.001 MB")


@pytest.mark.parametrize(
    ("low", "high"), [(0.23, 1.33), (0, 1), (1, 100), (0, 2.7e-5), (-3e6, 5e6), (0.6, 0.86), (1, 3)]
)
def test_an_axis_has_three_to_eight_round_numbers(low: float, high: float) -> None:
    found = list(ticks(low, high))
    assert 3 <= len(found) <= 8 and low - 1e-9 <= min(found) and max(found) <= high + 1e-9
    steps = {f"{step:.6e}".partition("e")[0] for step in np.diff(found)}
    assert len(steps) == 1 and steps < {"1.000000", "2.000000", "5.000000"}


def test_time_goes_into_training_exchange_and_waiting_where_sites_tell(tmp_path: Path) -> None:
    run = Run(tmp_path / "study", ("north", "south"))
    run.round(1, 0.5, train_s=1.5)  # the updates arrive 2 and 3 s into a round of 4 s
    page = Page(write_report(run.folder))
    for text in ("training: 1.5 s", "exchange: 1 s", "waiting for other sites: 0.5 s", "aggregation: 1 s"):
        assert page.has(f"round 1, {text}"), text
    table = page.texts[page.texts.index("updates used") :]
    assert table[table.index("south") :][4:7] == ["1.5", "1.5", "0"]  # its own 3 s; nobody is slower
    run.round(2, 0.5, train_s=1e9)  # no site trains for longer than the server has waited for it
    assert Page(write_report(run.folder)).has("round 2, training: 2.5 s")
    run.round(3, 0.5)  # as of a site with an earlier version
    assert Page(write_report(run.folder)).has("round 3, training and exchange: 2.5 s")


def test_the_page_of_a_cross_validation_has_mean_and_deviation_of_its_trainings(tmp_path: Path) -> None:
    losses = (0.5, 0.7, 0.6)
    for number, loss in enumerate(losses, 1):
        run = Run(tmp_path / "study" / (str(number) if number > 1 else ""), ("north",), name="study", app="train.py")
        run.round(1, loss)
        run.finish()
    page = Page(write_report(tmp_path / "study"))
    assert page.has("The script trains 3 times.") and page.has("study/3, round 1: 0.6")
    row = page.texts.index("study: mean of 3 trainings")
    assert page.texts[row + 1] == f"{np.mean(losses):.4g} \N{PLUS-MINUS SIGN} {np.std(losses, ddof=1):.4g}"
    later = Page(write_report(tmp_path / "study" / "2"))
    assert later.has("app: train.py") and not later.has("The script trains")


def test_sums_before_a_training_have_no_examples_and_no_mean(tmp_path: Path) -> None:
    """As of a pipeline whose scaler takes sums, and whose model trains."""
    sums = Run(tmp_path / "study", ("north", "south"), name="study", app="train.py")
    sums.event("started", rounds=0, sites=["north", "south"])
    sums.round(1, 0.5, num_examples=1, metric="tunnel_bytes")
    sums.finish(rounds=0)
    training = Run(tmp_path / "study" / "2", ("north", "south"))
    training.event("registered", site="north", info={"framework": "xgboost"})
    training.round(1, 0.5)
    training.finish()
    page = Page(write_report(tmp_path / "study"))
    assert not {"examples", "share"} & set(page.texts)
    assert "tunnel_bytes" not in page.texts[: page.texts.index("Metrics by round")]  # only one training has it
    assert not page.has("mean of 2 trainings") and page.has("such as 2/report.html")
    row = page.texts.index("study/2")
    assert page.texts[row + 1 : row + 3] == ["transformers, xgboost", "0.5"]


def test_nothing_in_a_page_can_be_a_script_or_load_anything(tmp_path: Path) -> None:
    for name, text in (("plain", "x"), ("hostile", HOSTILE)):
        run = Run(tmp_path / name, (text, "south"), name=text, app=text)
        started = {"args": ["--lr", text], "sites": [text, "south"], "directory": text, "engine": text}
        (run.folder / "simulation.json").write_text(json.dumps(started))
        run.event("registered", site=text, evaluates=True, info={"framework": text})
        run.round(1, 0.5, metric=text, filters=[{"name": text, "spent": 1, text: text}])
        run.event("cross_site", 1, matrix={text: {text: {text: 0.5}}})
        run.event("warning", text=text)
        run.event("failed", error={"what": text})
    plain, hostile = (Page(write_report(tmp_path / name)) for name in ("plain", "hostile"))
    assert hostile.elements == plain.elements  # the same page but for its texts
    page, _ = write_comparison([tmp_path / "plain", tmp_path / "hostile"], tmp_path / "both.html")
    for found in (hostile, Page(page)):
        assert not {"script", "img", "link", "iframe", "object", "a"} & set(found.elements)
        assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href")]
        assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
        assert not re.search(
            "[\x1b\u202e]", "".join(found.texts) + "".join(value or "" for _, value in found.attributes)
        )
    cell = Page()
    cell.feed(Result(tmp_path / "hostile")._repr_html_() or "")
    assert cell.elements == ["iframe"] and ("sandbox", "") in cell.attributes and cell.texts == []


def test_names_that_look_like_formulas_are_drawn_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = "$\\frac{1$ _x"
    run = Run(tmp_path / "study", (name,))
    run.round(1, 0.5, metric=name)
    (run.folder / "cross_site.json").write_text(json.dumps({name: {name: {name: 0.5}}}))
    assert heatmap.draw(run.folder) == run.folder / "cross_site.png"
    Result(run.folder).plot().savefig(tmp_path / "plot.png")


def test_a_run_under_way_and_one_that_failed_have_a_page_too(tmp_path: Path) -> None:
    run = Run(tmp_path / "study", ("north",))
    assert Page(write_report(run.folder)).has("Not finished.")
    run.round(1, 0.5)
    page = Page(write_report(run.folder))
    assert page.has("Not finished.") and page.has("1 of 9")
    run.event("failed", error={"what": "too few sites are left", "code": "quorum"})
    assert Page(write_report(run.folder)).has("Failed: too few sites are left")


def test_lines_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    run = Run(tmp_path / "study", ("north",))
    run.round(1, 0.5)
    with (run.folder / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "update"}\n[]\n{"kind": "scored", "round": "x", "site": 0, "time": 0, "data": {}}\n')
        file.write(
            b'{"kind": "failed", "time": 1, "round": 0, "site": "", "data": {"error": 3}}\n\xff\xfe\n{"kind": "rou'
        )
    (run.folder / "job.yml").write_text("a: [")
    assert Page(write_report(run.folder)).has("all sites, round 1: 0.5")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run in"):
        write_report(tmp_path)


def test_the_page_of_many_sites_and_rounds_stays_small(tmp_path: Path) -> None:
    run = Run(tmp_path / "study", [f"site-{number}" for number in range(300)])
    for number in range(1, 21):
        run.round(number, 1 / number)
    run.finish()
    page = write_report(run.folder)
    assert page.stat().st_size < 500_000
    assert Page(page).has("middle site, and lowest to highest")


def test_a_page_stays_below_2_mb_whatever_a_run_has(tmp_path: Path) -> None:
    names = [f"{'a-site-with-a-long-name-' * 3}{number}" for number in range(100)]
    run = Run(tmp_path / "study", names[:8])
    metrics = {f"{'long' * 20}{number}": 0.5 for number in range(60)}
    for number in range(1, 41):
        run.event("round_finished", number, seconds=4.0, metrics=metrics, sites=names[:8], missing=[])
        for site in names[:8]:
            filters = [{"name": "x" * 300, "value": "y" * 2000, "round": number}]
            run.event("update", number, site, status="used", metrics=metrics, seconds=1.0, filters=filters)
        run.event("warning", number, text="z" * 5000)
        run.event("warning", number, text="z" * 5000)
    run.event("cross_site", 40, matrix={model: {site: {"loss": 0.5, "auc": 1} for site in names} for model in names})
    run.finish()
    written = write_report(run.folder)
    page = Page(written)
    assert written.stat().st_size < 2_000_000
    for text in ("44 further metrics can be found in history.csv.", "30 more are in events.jsonl.", "100 models"):
        assert page.has(text), text


def test_runs_that_differ_in_the_seed_are_one_curve_with_a_band(tmp_path: Path) -> None:
    losses = {1: [0.5, 0.25], 2: [0.7, 0.5], 3: [0.6, 0.3]}
    for seed, values in losses.items():
        run = Run(tmp_path / f"seed-{seed}", ("north",), name=f"seed-{seed}", app="train.py", seed=seed)
        for number, loss in enumerate(values, 1):
            run.round(number, loss)
        run.finish()
    other = Run(tmp_path / "prox", ("north",), name="prox", app="train.py", strategy="fedprox:mu=0.1")
    other.round(1, 0.9)
    other.finish()
    folders = [*(tmp_path / f"seed-{seed}" for seed in losses), tmp_path / "prox"]
    written, runs = write_comparison(folders, tmp_path / "out" / "comparison.html")
    page = Page(written)
    means = np.mean(list(losses.values()), axis=0)
    for number, value in enumerate(means, 1):
        assert page.has(f"seed-1 and 2 more seeds, round {number}: {value:.4g}")
    assert page.has("prox, round 1: 0.9") and page.has("fedprox:mu=0.1")
    assert [run.best["loss"] for run in runs] == [0.5, 0.7, 0.6, 0.9]  # of round 1, the best
    bands = re.findall(r'<polygon points="([^"]+)"', written.read_text())
    upper, lower = [float(point.split(",")[1]) for point in (bands[0].split()[0], bands[0].split()[-1])]
    dots = [float(y) for y in re.findall(r'<circle cx="[^"]+" cy="([^"]+)"', written.read_text())]
    spread = np.std([values[0] for values in losses.values()], ddof=1)
    per_unit = (dots[1] - dots[0]) / (means[0] - means[1])  # picture's units: both means are on it, y grows downward
    assert (lower - upper) / 2 == pytest.approx(spread * per_unit, abs=0.2)
    row = page.texts.index("seed-1: mean of 3 seeds")
    assert page.texts[row + 1] == f"0.6 \N{PLUS-MINUS SIGN} {spread:.4g}"


def test_runs_differ_in_options_of_the_script_and_in_sites_too(tmp_path: Path) -> None:
    started = {"a": ["--seed", "1", "--lr=0.1", "x.csv"], "b": ["--seed", "2", "--lr=0.1", "x.csv"], "c": ["--amp"]}
    for name, args in started.items():
        run = Run(tmp_path / name, ("site-1", "site-2"), app="train.py")
        sites = ["site-1", "site-2"] if name != "c" else ["north", "south"]
        (run.folder / "simulation.json").write_text(json.dumps({"args": args, "sites": sites}))
        run.round(1, 0.5)
    page, runs = write_comparison([tmp_path / name for name in started], tmp_path / "all.html")
    assert different_settings(runs) == {
        "sites": ["2", "2", "north,south"],
        "--seed": ["1", "2", ""],
        "--lr": ["0.1", "0.1", ""],
        "arguments": ["x.csv", "x.csv", ""],
        "--amp": ["", "", "yes"],
    }
    assert Page(page).has("a and 1 more seed, round 1: 0.5") and Page(page).has("c, round 1: 0.5")


class Result(NotebookView):
    def __init__(self, folder: Path) -> None:
        self.folder = folder


def test_a_notebook_shows_a_result_as_report_table_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    run = Run(tmp_path / "study", ("north", "south"))
    for number in (1, 2, 3):
        run.round(number, 1 / number)
    History(run.folder).close()  # makes history.csv from the events
    result = Result(run.folder)
    frame = result.history
    assert frame[frame.site == "south"].loss.tolist() == pytest.approx([2, 1.5, 4 / 3])
    figure = result.plot(["loss"])
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["all sites"] == [[1, 1], [2, 0.5], [3, pytest.approx(1 / 3)]]
    assert set(lines) == {"north", "south", "all sites"}
    with pytest.raises(ConfigError, match="no metric 'auc'"):
        result.plot(["auc"])
    [(_, frame_html)] = [item for item in shown(result._repr_html_()) if item[0] == "srcdoc"]
    assert frame_html == write_report(run.folder).read_text()
    assert Result(tmp_path)._repr_html_() is None


def shown(html: str | None) -> list[tuple[str, str | None]]:
    page = Page()
    page.feed(html or "")
    return page.attributes


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"config.json": '{"architectures": ["BertModel"]}'}, "transformers.BertModel.from_pretrained('m')"),
        (
            {"config.json": '{"architectures": ["os.system(1)"]}', "model.keras": ""},
            "keras.saving.load_model('m/model.keras')",
        ),
        ({"model.ubj": ""}, "xgboost.Booster(model_file='m/model.ubj')"),
        ({"model.ckpt": "", "model.safetensors": ""}, "YourModule.load_from_checkpoint('m/model.ckpt')"),
        (
            {"model.safetensors": ""},
            "safetensors.numpy.load_file('m/model.safetensors')  # PyTorch: safetensors.torch.load_model(model, file)",
        ),
        ({"notes.txt": ""}, ""),
    ],
)
def test_the_line_that_opens_a_model(files: dict[str, str], line: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert loading_line(tmp_path, Path("m")) == line
