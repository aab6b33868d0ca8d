"""The files of a run for people: events.jsonl, history.csv, TensorBoard scalars."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_runtime.errors import StoreError
from fl_runtime.server.records.history import History
from fl_runtime.types import Event


def event(kind: str, round: int = 0, site: str = "", **data: Any) -> Event:
    return Event(kind, 1000.0 + round, round, site, data)


def update(round: int, site: str, loss: float, *, status: str = "used", examples: int = 10) -> Event:
    return event(
        "update",
        round,
        site,
        status=status,
        num_examples=examples,
        local_steps=3,
        metrics={"train_loss": loss},
        bytes_up=100,
        bytes_down=90,
        seconds=0.5,
    )


def one_round(number: int, sites: tuple[str, ...] = ("a", "b"), missing: tuple[str, ...] = ()) -> list[Event]:
    """Return a round's events in the server's order: a model's scores come after the next round has begun."""
    everyone = [*sites, *missing]
    return [
        event("round_started", number, sites=everyone),
        *(event("task_sent", number, site, bytes=90) for site in everyone),
        *(update(number, site, 1.0 / number) for site in sites),
        event(
            "round_finished",
            number,
            seconds=0.7,
            metrics={"train_loss": 1.0 / number},
            sites=list(sites),
            missing=list(missing),
            bytes_up=200,
            bytes_down=180,
        ),
    ]


def scores(number: int, loss: float) -> list[Event]:
    return [
        event("report", number, "a", metrics={"loss": loss, "accuracy": 0.5}, num_examples=7),
        event("scored", number, metrics={"train_loss": 1.0 / number, "loss": loss, "accuracy": 0.5}, best_round=number),
    ]


def tell(folder: Path, *events: Event) -> None:
    history = History(folder)
    for item in events:
        history(item)
    history.close()


def rows(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "history.csv").open() as file:
        records = list(csv.DictReader(file))
    keyed = {(row["round"], row["site"]): row for row in records}
    assert len(keyed) == len(records), "a round and site has two rows"
    return keyed


def test_a_row_per_round_and_site_and_one_for_the_federation(tmp_path: Path) -> None:
    tell(tmp_path, *one_round(1), *one_round(2), *scores(1, 0.9), *scores(2, 0.8), event("finished", rounds=2))

    table = rows(tmp_path)
    assert list(table) == [("1", "a"), ("1", "b"), ("1", "global"), ("2", "a"), ("2", "b"), ("2", "global")]
    assert table["1", "a"]["status"] == "used"
    assert table["1", "a"] | {"loss": "0.9", "train_loss": "1.0", "num_examples": "10"} == table["1", "a"]
    assert table["1", "b"]["loss"] == ""
    assert table["2", "global"] | {"bytes_up": "200", "seconds": "0.7", "loss": "0.8"} == table["2", "global"]
    assert table["2", "global"]["num_examples"] == "20"


def test_pandas_reads_it_in_one_line(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    tell(tmp_path, *one_round(1), *one_round(2), *scores(1, 0.9), *scores(2, math.nan))

    frame = pandas.read_csv(tmp_path / "history.csv")
    assert frame[frame.site == "a"]["train_loss"].tolist() == [1.0, 0.5]
    assert frame["loss"].dtype == np.float64
    assert frame[frame.site == "a"]["bytes_up"].sum() == 200


def test_what_is_missing_late_or_sent_twice(tmp_path: Path) -> None:
    tell(
        tmp_path,
        *one_round(1, ("a",), missing=("b",)),
        update(1, "a", 99.0, status="duplicate"),
        event("update", 1, "b", status="late", bytes_up=55),
        *one_round(2, ("a",), missing=("b",)),
        *scores(1, 0.9),
        *one_round(3, ("a", "b")),
        event("update", 1, "c", status="late", bytes_up=66),
    )

    table = rows(tmp_path)
    assert (table["1", "b"]["status"], table["1", "b"]["bytes_up"]) == ("late", "55")
    assert table["1", "a"]["train_loss"] == "1.0"
    assert (table["2", "b"]["status"], table["2", "b"]["bytes_down"]) == ("missing", "90")
    assert table["1", "c"]["status"] == "late"  # its round was written before: the row comes last


def test_rows_are_there_while_the_run_goes_on(tmp_path: Path) -> None:
    history = History(tmp_path)
    for item in [*one_round(1), *one_round(2), *scores(1, 0.9)]:
        history(item)

    assert {number for number, _ in rows(tmp_path)} == {"1"}
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 14
    history.close()
    assert {number for number, _ in rows(tmp_path)} == {"1", "2"}


def test_a_round_that_nobody_scores_is_written_too(tmp_path: Path) -> None:
    history = History(tmp_path)
    for number in (1, 2, 3):
        for item in one_round(number):
            history(item)

    assert {number for number, _ in rows(tmp_path)} == {"1"}
    history.close()


@pytest.mark.parametrize("killed_after", range(1, 20))
def test_a_restarted_server_goes_on_with_the_same_records(tmp_path: Path, killed_after: int) -> None:
    events = [*one_round(1), *scores(1, 0.9), *one_round(2), *scores(2, 0.8), *one_round(3), *scores(3, 0.7)]
    tell(tmp_path / "whole", *events)
    folder = tmp_path / "killed"
    history = History(folder)
    for item in events[:killed_after]:
        history(item)
    history._events.close()  # killed: nothing else is written, and the last line is torn
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "upd')
    tell(folder, *events[killed_after:])

    assert (folder / "history.csv").read_text() == (tmp_path / "whole" / "history.csv").read_text()
    assert (folder / "events.jsonl").read_text() == (tmp_path / "whole" / "events.jsonl").read_text()


@pytest.mark.parametrize("failed_after", range(5, 11))
def test_a_run_that_failed_and_is_resumed_has_the_rows_of_every_round(tmp_path: Path, failed_after: int) -> None:
    whole = [*one_round(1), *one_round(2), *scores(1, 0.9), *scores(2, 0.8), event("finished")]
    tell(tmp_path / "quiet", *whole)
    tell(tmp_path / "failed", *whole[:failed_after], event("failed", error={"what": "too few sites are left"}))
    assert ("1", "a") in rows(tmp_path / "failed")
    tell(tmp_path / "failed", *whole[failed_after:])
    assert rows(tmp_path / "failed") == rows(tmp_path / "quiet")


def test_events_are_json_whatever_the_metrics_are(tmp_path: Path) -> None:
    tell(
        tmp_path,
        event("report", 1, "a", metrics={"loss": math.nan, "x": math.inf, "n": np.float32(0.5)}, num_examples=1),
    )

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "kind": "report",
        "time": 1001.0,
        "round": 1,
        "site": "a",
        "data": {"metrics": {"loss": None, "x": None, "n": 0.5}, "num_examples": 1},
    }
    assert rows(tmp_path)["1", "a"]["loss"] == "nan"


def test_a_metric_cannot_hide_a_column(tmp_path: Path) -> None:
    tell(tmp_path, event("report", 1, "a", metrics={"seconds": 3.0, "round": 9.0}, num_examples=1))

    row = rows(tmp_path)["1", "a"]
    assert (row["metric_seconds"], row["metric_round"], row["seconds"]) == ("3.0", "9.0", "")


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = [*one_round(1), *one_round(2), *scores(1, 0.9), *scores(2, 1e300)]
    tell(tmp_path, *events[:6])
    tell(tmp_path, *events[6:])  # a second file, as after a restart

    accumulator = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert set(accumulator.Tags()["scalars"]) >= {"train_loss/a", "train_loss/global", "loss/a", "round/seconds"}
    assert [(item.step, item.value) for item in accumulator.Scalars("train_loss/b")] == [(1, 1.0), (2, 0.5)]
    assert accumulator.Scalars("loss/global")[0].value == pytest.approx(0.9)
    assert math.isinf(accumulator.Scalars("loss/global")[1].value)
    assert accumulator.Scalars("round/seconds")[1].wall_time == 1002.0


def test_a_disk_that_takes_no_more_is_said_once_and_nothing_is_lost_when_there_is_room_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    history, undisturbed = History(tmp_path / "full"), History(tmp_path / "undisturbed")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    events = [event for number in (1, 2, 3, 4) for event in one_round(number)]
    third = len(events) // 3
    for item in events[:third]:
        history(item)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # bytes of any one file: then EFBIG
    try:
        for item in events[third : 2 * third]:
            history(item)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for item in events[2 * third :]:
        history(item)
    history.close()
    for item in events:
        undisturbed(item)
    undisturbed.close()

    assert capsys.readouterr().err.count("cannot be written") == 1
    for name in ("events.jsonl", "history.csv"):
        assert (tmp_path / "full" / name).read_text() == (tmp_path / "undisturbed" / name).read_text()


def test_a_history_that_cannot_begin_says_so(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StoreError, match="cannot write") as caught:
        History(tmp_path / "taken")
    assert caught.value.where and caught.value.fix
