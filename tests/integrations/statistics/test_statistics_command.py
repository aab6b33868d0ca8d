"""The command `fl-adapters stats`: files, functions, simulated sites, JSON, and the page in a browser."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fl_adapters.statistics import Statistics, describe
from fl_adapters.statistics.page import page


def stats(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fl_adapters", "stats", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def people(rows: int, seed: int) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame({"age": draw.integers(18, 95, rows), "dose": draw.lognormal(0, 2, rows)})
    frame["sex"] = draw.choice(["f", "m"], rows)
    frame.loc[:4, "dose"] = np.nan
    return frame


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("a", "b")):
        people(300 + 100 * number, number).to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "load.py").write_text(
        "import pandas as pd\n\ndef table(site):\n    return pd.read_csv('a.csv')[site.index :: site.count]\n"
    )
    return tmp_path


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_site_for_each_file_is_simulated(folder: Path) -> None:
    done = stats("--data", "north=a.csv,south=b.csv", "--json", folder=folder)
    found = last_line(done)
    frame = pd.concat([pd.read_csv(folder / name) for name in ("a.csv", "b.csv")])
    assert found["sites"] == ["north", "south"] and found["rows"] == 700
    assert found["features"]["age"]["mean"] == pytest.approx(frame["age"].mean())
    assert found["features"]["sex"]["categories"] == dict(frame["sex"].value_counts())
    assert found["per_site"]["north"]["rows"] == 300
    [run] = (folder / "runs").iterdir()
    assert json.loads((run / "statistics.json").read_text()) == found
    assert "<svg" in (run / "statistics.html").read_text() and "north" in done.stderr


def test_a_function_is_called_at_each_site_and_its_sums_may_be_masked(folder: Path) -> None:
    chosen = ["--features", "age,sex", "--bins", "0,50,100", "--secure-sum"]
    found = last_line(stats("load.py:table", "--sites", "3", *chosen, "--json", folder=folder))
    [run] = (folder / "runs").iterdir()
    updates = [event for event in map(json.loads, (run / "events.jsonl").open()) if event["kind"] == "update"]
    assert updates and all(event["data"]["filters"][-1]["name"] == "SecureSum" for event in updates)
    assert (found["rows"], len(found["sites"]), list(found["features"])) == (300, 3, ["age", "sex"])
    counts = np.histogram(pd.read_csv(folder / "a.csv")["age"], [0, 50, 100])[0]
    assert found["features"]["age"]["histogram"]["counts"] == counts.tolist()


def test_one_file_is_described_and_its_result_shown_again(folder: Path) -> None:
    done = stats("a.csv", "--html", "page.html", "--json", folder=folder)
    found = last_line(done)
    assert found["rows"] == 300 and not (folder / "runs").exists()
    (folder / "saved.json").write_text(json.dumps(found))
    again = stats("saved.json", "--html", "again.html", folder=folder)
    assert again.returncode == 0 and "300 rows" in again.stdout
    assert (folder / "again.html").read_text() == (folder / "page.html").read_text()


def test_folders_of_images_are_described_at_each_site(folder: Path) -> None:
    draw, scans = np.random.default_rng(5), []
    for place in ("north/1", "north/2", "south"):
        (folder / "scans" / place).mkdir(parents=True)
        for number in range(3):
            scans.append(draw.integers(-100, 300, (4 + number, 5, 6)))
            np.save(folder / "scans" / place / f"{number}.npy", scans[-1])
    (folder / "scans" / "north" / "notes.txt").write_text("no image")
    chosen = ["--images", "--intensities=-100:300:50", "--bins", "3", "--secure-sum", "--json"]
    found = last_line(stats("--data", "north=scans/north,south=scans/south", *chosen, folder=folder))
    assert found["rows"] == 9 and found["per_site"]["north"]["rows"] == 6
    pixels = np.concatenate([scan.reshape(-1) for scan in scans])
    counts, edges = np.histogram(pixels, np.arange(-100, 301, 50))
    told = found["features"]["intensity"]
    assert told["histogram"]["counts"] == counts.tolist() and told["histogram"]["edges"] == edges.tolist()
    assert (told["mean"], told["std"]) == pytest.approx((pixels.mean(), pixels.std(ddof=1)))
    assert found["features"]["size 1"]["mean"] == pytest.approx(np.mean([len(scan) for scan in scans]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "scans/*.png"], "there is no image in scans/*.png"),
        (["--images", ".", "--features", "age"], "--features is about tables"),
        (["a.csv", "--intensities", "0:10:1"], "--intensities is about images"),
        (["nowhere.csv"], "there is no file nowhere.csv"),
        ([], "there is nothing to describe"),
        (["load.py:nothing"], "load.py has no function nothing"),
        (["--data", "a.csv"], "does not say whose data they are"),
        (["load.py"], "no file of a known kind"),
        (["a.csv", "--secure-sum"], "--secure-sum is about simulated sites"),
        (["a.csv", "--features", "agee"], "did you mean age?"),
    ],
)
def test_mistakes_end_without_a_traceback(folder: Path, arguments: list[str], message: str) -> None:
    done = stats(*arguments, folder=folder)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_parquet_is_read_in_batches(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = people(500, 5)
    frame.to_parquet(folder / "a.parquet")
    from fl_adapters.statistics.sources import open_source

    assert describe(open_source(str(folder / "a.parquet"))).to_json() == describe(frame).to_json()


def test_a_document_is_read_again(folder: Path) -> None:
    found = describe(people(100, 1))
    assert Statistics.from_json(found.to_json()) == found


def test_the_page_shows_names_as_text_alone(folder: Path) -> None:
    frame = pd.DataFrame({"<script>alert(1)</script>": ["<b>bold</b>", "</svg><img src=x onerror=alert(1)>"]})
    tags: list[str] = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    reader.feed(page(describe(frame)))
    assert "svg" in tags and not {"script", "img", "b"} & set(tags)
