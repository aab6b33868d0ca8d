"""Every Python block of README and docs/ runs here, or belongs to a test that is named here.

The blocks of a page run in their order and in one namespace, as a reader would type them, in a folder with small files.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from page_blocks import ROOT, Block, blocks

from fl_adapters.environments.local import SimulationResult
from fl_adapters.participant.options import Options
from fl_adapters.testing import adapter_cases, training_cases

BLOCKS = blocks("python")

HF, MONAI, TORCH = "tests/integrations/hf/", "tests/integrations/monai/", "tests/adapters/torch/"
ELSEWHERE = {
    ("corrections.md", "fl_adapters.site().personal"): f"{HF}test_hf_corrections.py::test_the_personal_model_opens",
    (
        "evaluation.md",
        "# score.py",
    ): "tests/integrations/evaluation/test_evaluation_runs.py::test_the_example_of_the_page",
    ("evaluation.md", "import xgboost"): "tests/adapters/environments/test_opening.py::test_",
    ("exchange.md", "FederatedCallback(exchange="): f"{HF}test_hf_rounds.py::test_keep_local_stays_at_the_site",
    ("handshake.md", "FederatedCallback(agree="): f"{HF}test_hf_names.py::test_",
    ("handshake.md", "for task in"): "tests/runtime/server/test_refused_input.py::test_values_that_must_agree",
    ("lightning.md", "from"): "tests/integrations/lightning/test_lightning_conformance.py::test_",
    ("monai.md", "from fl_adapters.monai import FederatedHandler"): f"{MONAI}test_monai_conformance.py::test_",
    ("monai.md", "parts = "): f"{MONAI}test_monai_resume.py::test_",
    ("monai.md", "from fl_adapters.monai import run_client"): f"{MONAI}test_monai_client_algo.py::test_monais_own",
    ("notebooks.md", "EPOCHS = 3"): "tests/end_to_end/test_notebook.py::test_a_function_of_a_cell_is_run_by_every_site",
    ("own-loop.md", "import torch"): f"{TORCH}test_loop.py::test_",
    ("own-loop.md", "for round in loop.rounds(loader):"): f"{TORCH}test_loop.py::test_",
    ("own-loop.md", "checkpoint = "): f"{TORCH}test_loop.py::test_",
    ("own-loop.md", "for layer in"): f"{TORCH}test_loop_fsdp.py::test_",
    ("own-loop.md", "model, optimizer, loader, schedule"): f"{TORCH}test_loop.py::test_",
    ("privacy.md", "from fl_adapters import DPSGD"): f"{HF}test_hf_dp_sgd.py::test_",
    ("production.md", "# train.py"): "tests/end_to_end/test_documented_commands.py::test_eight_commands_lead",
    ("production.md", "from fl_adapters import Job, Prod"): "tests/end_to_end/test_site_daemon.py::test_",
    ("simulation.md", "job = Job("): "tests/end_to_end/test_virtual.py::test_a_fraction_of_the_sites_takes_part",
    (
        "statistics.md",
        "from pathlib",
    ): "tests/integrations/statistics/test_statistics_images.py::test_images_of_all_sites",
    ("tracking.md", "fl.Job("): "tests/adapters/environments/tracking/test_tools.py::test_",
    ("tracking.md", "from fl_adapters"): "tests/adapters/environments/tracking/test_tools.py::test_",
    ("trainings.md", "from sklearn"): "tests/integrations/xgboost/test_xgboost_trainings.py::test_grid_search_over",
    ("transformers.md", "from"): f"{HF}test_hf_conformance.py::test_",
}
"""Blocks that need a framework, a federation or many processes: page, how they begin -> a test of the same calls."""

GIVEN = {
    "corrections.md": "import fl_adapters",
    "data.md": """
import numpy as np, pandas as pd, fl_adapters
from fl_adapters.partition import by_label
""",
    "filters.md": "from fl_adapters import Job",
    "restart.md": """
import numpy as np, fl_adapters as fl
momentum, head, n = {}, np.zeros(2), 10
weights = {"w": np.zeros(3), "head": head}
""",
    "simulation.md": """
import numpy as np, fl_adapters
my_data = lambda index, count: (np.ones((5, 10), np.float32), np.ones(5, np.float32))
fitted = lambda w, x, y: w + 1
loss = lambda w, x, y: 0.5
""",
    "sklearn.md": """
import numpy as np
from fl_adapters.sklearn import StandardScaler
model, X, y = StandardScaler(), np.arange(8.0).reshape(4, 2), np.arange(4)
""",
    "strategies.md": "import fl_adapters",
}
"""What the blocks of a page take as given."""

_TRAIN = """
import numpy as np
import fl_adapters as fl

with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(3)}):
        task.report({"loss": 1 / (1 + task.round)}, num_examples=10)
        task.submit({"w": task.arrays["w"] + 1}, num_examples=10)
"""


def owner_of(block: Block) -> str:
    """File and beginning of the name of the test that has the calls of a block, or "" if the block runs here."""
    found = [test for (page, begin), test in ELSEWHERE.items() if page == block.page and block.text.startswith(begin)]
    return found[0] if found else ""


RUN_HERE = [block for block in BLOCKS if not owner_of(block)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all blocks, with the files that they read."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("all.csv", "north.csv"):
        (folder / name).write_text("age,lab\n" + "".join(f"{40 + row},{row / 7}\n" for row in range(30)))
    (folder / "train.py").write_text(_TRAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("FL_ADAPTERS_KIT", raising=False)
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def run(here: Path) -> SimulationResult:
    """The run of the page of the job, which README and other pages open as runs/first."""
    (block,) = [block for block in BLOCKS if block.page == "job.md"]
    names = dict[str, Any]()
    exec(block.text, names)
    result = names["result"]
    assert isinstance(result, SimulationResult) and result.load()["w"].tolist() == [5, 5, 5]
    (here / "runs" / "first").symlink_to(result.folder.resolve())
    return result


@pytest.fixture(scope="module")
def pocket(here: Path) -> dict[str, Any]:
    """The names that the blocks of the page on adapters define."""
    names: dict[str, Any] = {"__name__": "__main__"}
    run_page("adapters.md", here, names)
    return names


@pytest.mark.parametrize("page", sorted({block.page for block in RUN_HERE} - {"job.md", "adapters.md"}))
def test_the_blocks_of_a_page_run(page: str, here: Path, run: SimulationResult) -> None:
    run_page(page, here, {"__name__": "__main__", "result": run})


def run_page(page: str, folder: Path, names: dict[str, Any]) -> None:
    """Run the blocks of a page in one namespace. Files that they name are written, so that others may import them."""
    exec(GIVEN.get(page, ""), names)
    for block in RUN_HERE:
        if block.page != page or ".run(Simulation(sites=3))" in block.text:
            continue
        found = re.match(r"# (\w+\.py)$", block.first)
        if found and found[1] != "train.py":
            (folder / found[1]).write_text(block.text)
        try:
            exec(compile("\n" * block.line + block.text, page, "exec"), names)
        except Exception as error:
            raise AssertionError(f"{block.place}: {error!r}") from error


@pytest.mark.parametrize("case", [*adapter_cases(), *training_cases()], ids=lambda case: case.__name__)
def test_the_adapter_of_the_page_conforms(case: Any, pocket: dict[str, Any]) -> None:
    pocket["test_state" if case in adapter_cases() else "test_training"](case)


@pytest.mark.parametrize("block", [block for block in BLOCKS if owner_of(block)], ids=lambda block: block.place)
def test_a_block_that_does_not_run_here_has_a_test_and_arguments_that_there_are(block: Block) -> None:
    file, _, name = owner_of(block).partition("::")
    assert f"def {name}" in (ROOT / file).read_text("utf-8")
    shared = {field.name for field in fields(Options)}
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("FederatedCallback", "FederatedHandler"):
            assert {keyword.arg for keyword in node.keywords} <= shared, block.place


@pytest.mark.parametrize("block", blocks("py"), ids=lambda block: block.place)
def test_code_for_another_framework_is_marked_as_py_and_on_its_page(block: Block) -> None:
    """It cannot run here, since the framework is not installed. benchmarks/peers makes the same calls where it is."""
    other = {"from-flare.md": "nvflare", "from-flower.md": "flwr"}[block.page]
    imported = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any(other in ast.unparse(node) for node in imported) and "fl_adapters" not in block.text


def test_every_entry_stands_for_a_block() -> None:
    assert {owner_of(block) for block in BLOCKS} - {""} == set(ELSEWHERE.values())
    for page, begin in ELSEWHERE:
        assert any(block.page == page and block.text.startswith(begin) for block in BLOCKS), (page, begin)


def test_the_events_of_a_run_are_on_the_page_of_results(run: SimulationResult) -> None:
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    told = {
        row[0]: row[1] for row in re.findall(r"^\| (.*?) \|.*\| (.*?) \|$", page.partition("## events.jsonl")[2], re.M)
    }
    for line in (run.folder / "events.jsonl").read_text("utf-8").splitlines():
        event = json.loads(line)
        fields_of = next(named for kinds, named in told.items() if f"`{event['kind']}`" in kinds)
        assert set(event["data"]) <= set(re.findall(r"`(\w+)`", fields_of)), event
