"""Fixtures for HF: a real server in the test's process, and sites in it, in a thread, or in forked processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
os.environ["OMP_NUM_THREADS"] = "1"

import hf_models

from fl_adapters import connect
from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.registry import close_sessions
from fl_adapters.testing import LocalFederation
from fl_adapters.torch.handshake.agreement import agreement
from fl_adapters.torch.state import TorchState
from fl_runtime.server import RunResult
from fl_runtime.types import Arrays, Event

TIMEOUT_S = 120
_PRELOADED = [
    "torch",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "peft",
    "safetensors.torch",
]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(_PRELOADED)


class Partner(threading.Thread):
    """A second site without a trainer, in a thread: answers each round with `work(round, arrays)`.

    `score`, if given, is called for each global model and returns its loss.
    """

    def __init__(
        self,
        kit: str,
        model: Any,
        work: Callable[[int, Arrays], Arrays],
        num_examples: int,
        score: Callable[[], float] | None,
        beside: dict[str, Any] | None,
    ) -> None:
        super().__init__(daemon=True)
        self._kit, self._work, self._num_examples = kit, work, num_examples
        self._score = score
        self._initial = {name: np.copy(array) for name, array in TorchState(model, beside=beside).get_state().items()}
        self._facts = agreement(model, framework="transformers")
        self.received: list[Arrays] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._take_part()
        except BaseException as error:
            self.error = error

    def _take_part(self) -> None:
        with connect(kit=self._kit) as site:
            for task in site.tasks(initial=self._initial, agreement=self._facts):
                if self._score is not None:
                    task.report({"loss": self._score()}, 1)
                arrays = {name: np.copy(array) for name, array in task.arrays.items()}
                self.received.append(arrays)
                task.submit(self._work(task.round, arrays), num_examples=self._num_examples)
            self.received.append(site.arrays)

    def ended(self) -> None:
        """Wait for the end of the thread, and raise its error."""
        self.join(TIMEOUT_S)
        assert not self.is_alive(), "the partner did not come to its end"
        if self.error:
            raise self.error


class Federation:
    """A federation over real gRPC, with its server in this process."""

    def __init__(self, sites: int, settings: dict[str, Any]) -> None:
        self._open = LocalFederation(sites=sites, sockets=True, **settings)
        self._open.__enter__()
        self.folder = self._open.folder
        self._processes: list[SiteProcess] = []
        self._closed = False

    def kit(self, number: int = 1) -> str:
        return self._open.places[number - 1].kit

    def partner(
        self,
        model: Any,
        work: Callable[[int, Arrays], Arrays] = lambda _, arrays: arrays,
        *,
        number: int = 2,
        num_examples: int = 32,
        score: Callable[[], float] | None = None,
        beside: dict[str, Any] | None = None,
    ) -> Partner:
        """Start site `number` in a thread; `model` gives the tensors that travel and what must agree.

        `beside` are further tensors that travel, by name.
        """
        return Partner(self.kit(number), model, work, num_examples, score, beside)

    def fork(self, program: str, values: Any = None, *, number: int | None = 1, kit: str = "") -> SiteProcess:
        """Run `program` (source text) in a warm process as site `number`, or outside the federation for None.

        `kit` is the kit of a site of another federation, in place of `number`.
        """
        folder = self.folder / f"process-{len(self._processes)}"
        process = SiteProcess(folder, program, values, kit or (self.kit(number) if number else None))
        self._processes.append(process)
        return process

    def ended(self) -> RunResult:
        """End the scripts of this process; return the run's result, or raise its error if it failed."""
        for place in self._open.places:
            close_sessions("its script has ended", read_kit(place.kit))
        return self._open.result(TIMEOUT_S)

    def model(self, which: Literal["final", "best"] = "final") -> Arrays:
        """Return the server's final or best global model."""
        return self._open.model(which)

    def events_of(self, kind: str, site: str | None = None) -> list[Event]:
        """Return the events in order, after ending the federation so that none is still on its way."""
        self.close()
        return [event for event in self._open.events if event.kind == kind and site in (None, event.site)]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for process in self._processes:
            process.close()
        self._open.__exit__(None, None, None)


class SiteProcess:
    def __init__(self, folder: Path, program: str, values: Any, kit: str | None) -> None:
        folder.mkdir()
        self._out, self.log, script = folder / "result", folder / "log.txt", folder / "program.py"
        script.write_text(program)
        task = {
            "program": str(script),
            "folder": str(folder),
            "log": str(self.log),
            "out": str(self._out),
            "kit": kit,
            "values": values,
        }
        runner = str(Path(hf_models.__file__).with_name("hf_site_process.py"))
        self.process = _forks.Process(target=runpy.run_path, args=(runner, {"TASK": task}), daemon=False)
        self.process.start()

    def result(self) -> Any:
        """Return what the program left in RESULT, or fail with its log."""
        done = self._done()
        assert done["error"] is None, self.log.read_text()
        return done["result"]

    def error(self) -> str:
        """Return the error that ended the program."""
        done = self._done()
        assert done["error"] is not None, "the program ended well:\n" + self.log.read_text()
        return str(done["error"])

    def _done(self) -> Any:
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode is not None, f"still running:\n{self.log.read_text()}"
        assert self._out.exists(), f"died ({self.process.exitcode}):\n{self.log.read_text()}"
        return pickle.loads(self._out.read_bytes())

    def close(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


@pytest.fixture(autouse=True)
def precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the precision back after each test.

    transformers 4 writes the bf16=True of a TrainingArguments into the environment, where later tests would find it.
    """
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Federation]]:
    """federation(sites=1, rounds=2, ...) starts a server; everything that it started ends with the test."""
    made: list[Federation] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)

    def make(sites: int = 1, **settings: Any) -> Federation:
        made.append(Federation(sites, {"rounds": 2, "folder": tmp_path / f"run-{len(made)}", **settings}))
        return made[-1]

    yield make
    for one in made:
        one.close()
