"""The other backends. Keras has one for the life of a process, so each runs in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import keras
import keras_models as m
import pytest

from fl_adapters.keras import FederatedCallback
from fl_adapters.testing import LocalFederation
from fl_adapters.testing.conformance.adapter import require_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself

HERE = Path(__file__).parent
ON_EACH = (
    *("test_keras_conformance.py", "test_keras_exchange.py", "test_keras_corrections.py", "test_keras_restart.py"),
    *("test_keras_own_train_step.py", "test_keras_preprocessing.py"),
)


@pytest.mark.slow
@pytest.mark.parametrize("file", ON_EACH)  # one at a time, so that each stays far from the time allowed to a test
@pytest.mark.parametrize("backend", [b for b in ("tensorflow", "torch", "jax") if b != keras.backend.backend()])
def test_the_suite_on_another_backend(backend: str, file: str) -> None:
    if not find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    if backend == "jax" and version("jax").startswith(("0.4.", "0.5.")):
        pytest.skip("JAX 0.5 gives wrong weights here and ends with a segmentation fault (docs/keras.md)")
    found_at = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)],
        env=os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": found_at},
        capture_output=True,
        text=True,
        cwd=HERE.parents[2],
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


SITE = """
import keras_models as m
from fl_adapters.keras import FederatedCallback

m.fit(m.compiled(m.classifier(seed=1)), m.rows(1), FederatedCallback(), epochs=9, validation_data=m.rows(9))
"""


@pytest.mark.slow
def test_sites_on_different_backends_train_together() -> None:
    other = "jax" if keras.backend.backend() == "torch" else "torch"
    if not find_spec(other):
        pytest.skip(f"{other} is not installed")
    found_at = os.pathsep.join(path for path in sys.path if path)
    with LocalFederation(sites=2, rounds=2, optimizer_state="average", sockets=True) as federation:
        first, second = federation.places
        environment = os.environ | {"KERAS_BACKEND": other, "PYTHONPATH": found_at, "FL_ADAPTERS_KIT": second.kit}
        process = subprocess.Popen([sys.executable, "-c", SITE], env=environment, stderr=subprocess.PIPE, text=True)
        model = m.compiled(m.classifier())
        m.fit(model, m.rows(0), FederatedCallback(kit=first.kit), epochs=9, validation_data=m.rows(9))
        _, log = process.communicate()
        assert process.returncode == 0, log
        assert [r.sites for r in federation.result().rounds] == [("site-1", "site-2")] * 2
        require_same_bits(m.weights(model), federation.model())


@pytest.mark.slow
def test_mirrored_strategy() -> None:
    if not find_spec("tensorflow"):
        pytest.skip("tensorflow is not installed")
    found_at = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(Path(m.__file__).with_name("keras_mirrored_sites.py"))],
        env=os.environ | {"KERAS_BACKEND": "tensorflow", "PYTHONPATH": found_at},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
