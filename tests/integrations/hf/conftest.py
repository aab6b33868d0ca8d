"""A real server in the test's process, and sites: here, in a thread beside, or in forked processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))  # for hf_models

from fl_adapters import session as sessions
from fl_adapters.connect import connect
from fl_adapters.kit import Kit
from fl_adapters.torch_state import TorchState
from fl_adapters.torch_state_agreement import agreement
from fl_runtime.server import Server
from fl_runtime.types import Arrays, Event, RunSettings

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
    """A second site without a trainer, in a thread: answers each round with `work(round, arrays)`."""

    def __init__(
        self, kit: str, model: Any, work: Callable[[int, Arrays], Arrays], num_examples: int
    ) -> None:
        super().__init__(daemon=True)
        self._kit, self._work, self._num_examples = kit, work, num_examples
        self._initial = {name: np.copy(array) for name, array in TorchState(model).get_state().items()}
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
                arrays = {name: np.copy(array) for name, array in task.arrays.items()}
                self.received.append(arrays)
                task.submit(self._work(task.round, arrays), num_examples=self._num_examples)
            self.received.append(site.arrays)

    def ended(self) -> None:
        """Wait for the end; raise what went wrong."""
        self.join(TIMEOUT_S)
        assert not self.is_alive(), "the partner did not come to its end"
        if self.error:
            raise self.error


class Federation:
    """A job's server and its kits."""

    def __init__(self, folder: Path, sites: int, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.names = tuple(f"site-{i + 1}" for i in range(sites))
        self.run_settings = RunSettings(**{"name": "job", "sites": self.names, "min_sites": sites, **settings})
        self._events: list[Event] = []
        tokens = {name: f"token-of-{name}" for name in self.names}
        self.server = Server(self.run_settings, folder / "run", tokens, listeners=[self._events.append])
        address = self.server.start()
        self._kits = {
            name: Kit(self.run_settings.name, name, i, sites, address, tokens[name], run=str(folder / "run"), simulated=True)
            for i, name in enumerate(self.names)
        }
        self._processes: list[SiteProcess] = []
        self._stopped = False

    def kit(self, number: int = 1) -> str:
        name = self.names[number - 1]
        return str(self._kits[name].save(self.folder / "kits" / name))

    def partner(
        self,
        model: Any,
        work: Callable[[int, Arrays], Arrays] = lambda _, arrays: arrays,
        *,
        number: int = 2,
        num_examples: int = 32,
    ) -> Partner:
        """Site `number` in a thread; `model` says what travels and what must agree."""
        return Partner(self.kit(number), model, work, num_examples)

    def fork(self, program: str, values: Any = None, *, number: int | None = 1) -> SiteProcess:
        """Run `program` (source text) in a warm process as site `number`, or outside the federation (None)."""
        name = self.names[number - 1] if number else f"outside-{len(self._processes)}"
        process = SiteProcess(self.folder / name, program, values, self.kit(number) if number else None)
        self._processes.append(process)
        return process

    def ended(self) -> Any:
        """The run's result; raises the error of a run that failed."""
        assert self.server.wait(TIMEOUT_S), "the run did not come to its end"
        result = self.server.result()
        if result.error:
            raise result.error
        return result

    def events_of(self, kind: str, site: str | None = None) -> list[Event]:
        """What happened, in order. Stops the server, so that nothing is still on its way."""
        self._stop()
        return [event for event in self._events if event.kind == kind and site in (None, event.site)]

    def close(self) -> None:
        for process in self._processes:
            process.close()
        sessions.close_sessions("the test is over")
        self._stop()

    def _stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self.server.close()


class SiteProcess:
    def __init__(self, folder: Path, program: str, values: Any, kit: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("program-*.py")))
        self._out, self.log = folder / f"out-{number}", folder / f"log-{number}.txt"
        script = folder / f"program-{number}.py"
        script.write_text(program)
        task = {
            "program": str(script),
            "folder": str(folder),
            "log": str(self.log),
            "out": str(self._out),
            "kit": kit,
            "values": values,
        }
        runner = str(Path(__file__).parent / "run_site.py")
        self.process = _forks.Process(target=runpy.run_path, args=(runner, {"TASK": task}), daemon=False)
        self.process.start()

    def result(self) -> Any:
        """What the program left in RESULT. Fails with its log if it failed."""
        done = self._done()
        assert done["error"] is None, self.log.read_text()
        return done["result"]

    def error(self) -> str:
        """The error that ended the program."""
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


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Federation]]:
    """federation(sites=1, rounds=2, ...): a running server; everything it started ends with the test."""
    made: list[Federation] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)

    def make(sites: int = 1, **settings: Any) -> Federation:
        made.append(Federation(tmp_path / f"federation-{len(made)}", sites, {"rounds": 2, **settings}))
        return made[-1]

    yield make
    for one in made:
        one.close()
