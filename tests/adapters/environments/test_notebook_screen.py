"""The screen of a run in a real notebook: one output, updated in place."""

from __future__ import annotations

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

CELL = """
import threading
from fl_adapters.environments.progress.notebook import progress_listener
from fl_runtime.types import Event

listener = progress_listener()

def tell(kind, round=0, site="", **data):
    listener(Event(kind, 0.0, round, site, data))

def run():
    tell("starting", job="tumour", folder="runs/tumour", sites=["north", "south"], command="python train.py")
    tell("started", rounds=4, sites=["north", "south"])
    for number in range(1, 5):
        tell("round_started", number, sites=["north", "south"])
        tell("task_sent", number, "north", bytes=1000)
        tell("steps", number, "north", done=3, total=12, train_s=1.5)
        tell("warning", number, text="<script>alert(1)</script> is odd")
        tell("round_finished", number, seconds=2.0, metrics={"loss": 1 / number}, sites=["north", "south"])
    tell("finished")

thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


def test_a_notebook_has_one_output_that_is_updated_in_place() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(notebook, timeout=60, startup_timeout=60).execute()
    (output,) = notebook.cells[0].outputs
    page = output["data"]["text/html"]
    assert output["output_type"] == "display_data"
    for shown in (
        "tumour",
        "round 4/4",
        "100%",
        "3/12",
        "loss",
        "0.25",
        "&lt;script&gt;alert(1)&lt;/script&gt; is",
    ):
        assert shown in page, page
    assert "<script" not in page
