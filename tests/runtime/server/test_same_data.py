"""After round 1 a line asks whether each site reads its own data, where all of them look exactly alike."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, ended, serving

from fl_adapters.environments.progress import ProgressLines
from fl_runtime.types import Arrays

WEIGHTS: Arrays = {"w": np.zeros(3, np.float32)}
LOSS = 0.6931471805599453


def hints(folder: Path, each: list[dict[str, Any]], **job: Any) -> list[str]:
    """Run a job of two rounds whose sites submit these fields; return the texts of the warnings."""
    first_sent = threading.Barrier(len(each), timeout=30)
    with serving(folder, len(each), sockets=False, **job) as bench:
        bench.run(lambda name: take_part(bench.site(name), each[bench.names.index(name)], first_sent))
        ended(bench.server)
        bench.server.close()
        lines = io.StringIO()
        printer = ProgressLines(lines)
        for event in bench.watch.events:
            printer(event)
        found = [event.data["text"] for event in bench.watch.all("warning")]
        assert lines.getvalue().count("warning: ") == len(found)
        return found


def take_part(site: Site, fields: dict[str, Any], first_sent: threading.Barrier) -> None:
    site.join()
    site.register(WEIGHTS)
    task = site.start(WEIGHTS)
    while task.kind == "train":
        site.submit(task, {"w": task.arrays["w"] + 1}, **fields)
        if task.round == 1:
            first_sent.wait()  # else a fast site could fill a buffer alone
        task = site.client.next_task()
    site.client.leave("done", early=False)


def test_sites_that_look_exactly_alike_are_asked_once(tmp_path: Path) -> None:
    same = {"num_examples": 120, "metrics": {"train_loss": LOSS, "train_accuracy": 0.5}}
    (text,) = hints(tmp_path, [same, same, same])
    assert "all 3 sites trained on 120 examples, with exactly the same train_loss 0.693147" in text
    assert "does each site read its own data?" in text
    assert "fl_adapters.site()" in text


@pytest.mark.parametrize(
    "each",
    [
        [
            {"num_examples": 120, "metrics": {"train_loss": LOSS}},
            {"num_examples": 121, "metrics": {"train_loss": LOSS}},
        ],
        [{"num_examples": 120, "metrics": {"train_loss": loss}} for loss in (LOSS, float(np.nextafter(LOSS, 1)))],
        [{"num_examples": 1, "metrics": {"train_accuracy": 0.75}}] * 2,  # may be equal by chance
        [{"num_examples": 1}] * 2,
        [{"num_examples": 1, "metrics": {"train_loss": LOSS}}],
    ],
    ids=["rows", "last bit", "few decimals", "no metrics", "one site"],
)
def test_others_are_not_asked(tmp_path: Path, each: list[dict[str, Any]]) -> None:
    assert hints(tmp_path, each) == []


def test_a_buffered_run_asks_too(tmp_path: Path) -> None:
    same = {"num_examples": 120, "metrics": {"train_loss": LOSS}}
    assert len(hints(tmp_path, [same, same], strategy="fedbuff:k=2")) == 1
