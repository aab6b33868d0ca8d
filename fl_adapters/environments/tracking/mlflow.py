"""Sends a run to MLflow: to a tracking server, or to a database on this machine."""

from __future__ import annotations

import os
import re
import ssl
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from fl_adapters.environments.tracking.files import artifacts
from fl_adapters.environments.tracking.flavours import save_as_mlflow_model
from fl_adapters.environments.tracking.records import Begin, End, Metrics, Point, Record
from fl_runtime.errors import ConfigError, ConnectionLostError
from fl_runtime.text import printable

_TAG = "fl_adapters.run"
_STATES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
_METRICS_PER_CALL, _PARAMS_PER_CALL, _PARAM_CHARS = 1000, 100, 6000  # limits of MLflow's server
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_ANSWER_S = 10.0


class MlflowTracker:
    """Tracker that has one MLflow run for each run, in the experiment of `MLFLOW_EXPERIMENT_NAME` or "fl-adapters".

    A run that is resumed is found again by its tag `fl_adapters.run`. MLflow's own settings hold, such as
    `MLFLOW_TRACKING_TOKEN`.

    Args:
        uri: Address of the tracking server, or a store such as `sqlite:///mlflow.db`.

    Raises:
        ConfigError: The package is missing, or MLflow does not know such an address.
    """

    def __init__(self, uri: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # or it calls its makers, once it is imported
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"tracking by MLflow needs the package mlflow, which is not installed ({error})",
                where=f"track: mlflow:{uri}",
                fix="pip install 'fl-adapters[mlflow]'",
            ) from None
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is the command's own
        self._uri = uri
        self._runs: dict[str, str] = {}
        self._client_of: Any = MlflowClient
        self._client: Any = None
        if urlsplit(uri).scheme.partition("+")[0] in _DATABASES:
            self._check_database()  # no more than that: opening one takes seconds
            return
        try:
            self._client = MlflowClient(tracking_uri=uri)
        except MlflowException as error:
            raise ConfigError(
                f"MLflow cannot track at {uri[:200]!r}: {printable(str(error), 300)}",
                where="track",
                fix="name a tracking server, mlflow:http://HOST:PORT, or a database, mlflow:sqlite:///mlflow.db",
            ) from None

    def __call__(self, record: Record) -> None:
        """Log a record; see `Tracker`."""
        with _errors():
            self._client = self._client or self._client_of(tracking_uri=self._uri)
            match record:
                case Begin():
                    self._begin(record)
                case Metrics(points=points):
                    self._log(self._runs[record.run.name], points)
                case End():
                    self._end(self._runs[record.run.name], record)

    def check_answer(self) -> None:
        """Ask the tracking server for anything, so that a wrong address is noticed before a run begins.

        Raises:
            ConfigError: Nobody answers at its address.
        """
        if urlsplit(self._uri).scheme not in ("http", "https"):
            return
        try:
            urlopen(self._uri, timeout=_ANSWER_S).close()
        except HTTPError:  # an answer, such as that it wants to know who asks
            return
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, ssl.SSLError):  # MLflow has its own settings for certificates
                return
            raise ConfigError(
                f"no MLflow server answers at {self._uri}: {reason}",
                where=f"track: mlflow:{self._uri}",
                fix="correct the address, or start the server, such as by `mlflow server --port 5000`",
            ) from None

    def _check_database(self) -> None:
        missing = [name for name in ("sqlalchemy", "alembic") if find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"MLflow needs the packages sqlalchemy and alembic for a database; missing: {', '.join(missing)}",
                where=f"track: mlflow:{self._uri}",
                fix="pip install sqlalchemy alembic, or name a tracking server: mlflow:http://HOST:PORT",
            )

    def _begin(self, record: Begin) -> None:
        client, experiment = self._client, self._experiment()
        found = client.search_runs([experiment], f"tags.`{_TAG}` = '{record.run.identity}'", max_results=1)
        if found:
            self._runs[record.run.name] = found[0].info.run_id
            client.update_run(found[0].info.run_id, status="RUNNING")
            return
        run = client.create_run(experiment, run_name=record.run.name, tags={_TAG: record.run.identity})
        from mlflow.entities import Param

        params = [Param(_key(name), value[:_PARAM_CHARS]) for name, value in record.params.items()]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            client.log_batch(run.info.run_id, params=params[start : start + _PARAMS_PER_CALL])
        self._runs[record.run.name] = run.info.run_id

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fl-adapters")
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def _log(self, run: str, points: tuple[Point, ...]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(_key(p.name), p.value, int(p.time * 1000), p.round) for p in points]
        for start in range(0, len(metrics), _METRICS_PER_CALL):
            self._client.log_batch(run, metrics=metrics[start : start + _METRICS_PER_CALL])

    def _end(self, run: str, record: End) -> None:
        files, models = artifacts(record.folder)
        for file in files:
            self._client.log_artifact(run, str(file))
        for folder in models:
            with tempfile.TemporaryDirectory(prefix="fl-adapters-model-") as temporary:
                packed = save_as_mlflow_model(folder, Path(temporary) / folder.name) or folder
                self._client.log_artifacts(run, str(packed), folder.name)
        self._client.set_terminated(run, _STATES[record.state], int(time.time() * 1000))


def _key(name: str) -> str:
    """A name as MLflow accepts it: other characters become "_"."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


@contextmanager
def _errors() -> Iterator[None]:
    """Tell a server that is away, which is tried again, from a record that MLflow refuses."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST"):
            raise
        raise ConnectionLostError(str(error)) from error
