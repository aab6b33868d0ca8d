"""What users get: the wheel built from this tree, its files and metadata, and the cost of importing it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("fl_runtime", "fl_adapters", "integrations")
HELD = {"torch"}  # at one release everywhere: constraints/newest.txt
MODULES = {"grpcio": "grpc", "protobuf": "google", "pyyaml": "yaml"}  # package -> module, where they differ
HEAVY = (
    "grpc",
    "cryptography",
    "pyzipper",
    "google.protobuf",
    "pydantic",
    "typer",
    "rich",
    "sqlite3",
    "torch",
    "transformers",
    "tensorflow",
    "keras",
    "lightning",
    "jax",
    "xgboost",
    "monai",
    "sklearn",
    "narwhals",
)


def in_wheel(path: Path) -> str:
    """Return where a source file belongs in the wheel."""
    return path.relative_to(ROOT).as_posix().replace("integrations/", "fl_adapters/", 1)


def is_template(path: Path) -> bool:
    """Whether this is a file that `fl-adapters new` writes."""
    return path.is_file() and path.parent.parent.name == "templates"


def shipped_sources() -> set[str]:
    found = [path for top in SOURCES for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts]
    return {
        in_wheel(path)
        for path in found
        if path.suffix in (".py", ".pyi", ".proto", ".css", ".js") or path.name == "py.typed" or is_template(path)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a source distribution of a copy of the tree, so that no earlier build gets in."""
    tree = tmp_path_factory.mktemp("tree")
    for top in SOURCES:
        shutil.copytree(ROOT / top, tree / top, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"], cwd=tree, capture_output=True, text=True
    )
    assert build.returncode == 0, build.stdout + build.stderr
    return next((tree / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    return target


def python(code: str, *, path: Path, cwd: Path) -> str:
    """Return the output of `code` in a fresh interpreter that finds our packages in `path`."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == shipped_sources()


def test_every_package_is_listed_and_typed(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    inits = [path for top in SOURCES for path in (ROOT / top).rglob("__init__.py")]
    in_tree = {in_wheel(path.parent).replace("/", ".") for path in inits if path.parent != ROOT / "integrations"}
    assert set(project["packages"]) == in_tree

    integrations = sorted(path.parent.name for path in (ROOT / "integrations").glob("*/__init__.py"))
    assert project["package-dir"] == {f"fl_adapters.{name}": f"integrations/{name}" for name in integrations}
    with zipfile.ZipFile(wheel) as archive:
        typed = {name for name in archive.namelist() if name.endswith("/py.typed")}
    expected = ["fl_runtime", "fl_adapters", *(f"fl_adapters/{name}" for name in integrations)]
    assert typed == {f"{package}/py.typed" for package in expected}


def test_metadata(wheel: Path, installed: Path, tmp_path: Path) -> None:
    found = metadata(wheel)
    version = python("import fl_adapters; print(fl_adapters.__version__)", path=installed, cwd=tmp_path)
    assert (found["Name"], found["Version"], found["License-Expression"]) == ("fl-adapters", version, "Apache-2.0")
    assert found["Requires-Python"] == ">=3.11"
    integrations = {path.parent.name for path in (ROOT / "integrations").glob("*/__init__.py")}
    assert integrations <= set(found.get_all("Provides-Extra"))


def test_the_description_is_the_readme_without_pictures_that_the_package_lacks(wheel: Path) -> None:
    description, readme = str(metadata(wheel).get_payload()), (ROOT / "README.md").read_text("utf-8")
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", readme, re.MULTILINE)
    assert pictures and "![" not in description
    assert [path for path in pictures if not (ROOT / path).is_file()] == []
    kept = [line for line in readme.splitlines() if line and not line.startswith("![")]
    assert [line for line in description.splitlines() if line] == kept


def test_the_extra_all_brings_every_framework_and_all_that_protects_data() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (every,) = extras.pop("all")
    brought = set(Requirement(every).extras)
    left_out = {
        "xgboost-cpu",
        "ray",
        "failover",
        "dashboard",
        "metrics",
        "mlflow",
        "wandb",
        "examples",
        "dev",
    }  # a twin; servers'; tools of tracking; ours
    assert brought == set(extras) - left_out
    assert {path.parent.name for path in (ROOT / "integrations").glob("*/__init__.py")} <= brought


def test_oldest_constraints_are_the_floors(wheel: Path) -> None:
    lines = (ROOT / "constraints" / "oldest.txt").read_text("utf-8").splitlines()
    pins = {r.name: Version(next(iter(r.specifier)).version) for r in map(Requirement, filter(is_pin, lines))}
    floors = {}
    for requirement in map(Requirement, metadata(wheel).get_all("Requires-Dist")):
        in_dev_alone = requirement.marker is not None and 'extra == "dev"' in str(requirement.marker)
        for part in requirement.specifier:
            if part.operator == ">=" and requirement.name not in HELD and not in_dev_alone:
                floors[requirement.name] = Version(part.version)
    assert {name: pins.get(name) for name in floors} == floors


def test_base_dependencies_are_those_that_are_imported(wheel: Path) -> None:
    """No dependency is missing or unused, and docs/install.md says why each is there."""
    imported = set[str]()
    for path in [*(ROOT / "fl_runtime").rglob("*.py"), *(ROOT / "fl_adapters").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
    imported -= {*sys.stdlib_module_names, "fl_runtime", "fl_adapters"}
    imported -= {"torch", "peft"}  # torch_*.py alone
    imported -= {
        "cryptography",
        "dp_accounting",
        "fsspec",
        "mlflow",
        "opacus",
        "prometheus_client",
        "psycopg",
        "pyzipper",
        "ray",
        "safetensors",
        "starlette",
        "tenseal",
        "uvicorn",
        "wandb",
    }  # extras bring them, where they are asked for
    imported -= {"IPython", "matplotlib", "pandas"}  # for notebooks and the heat map, where they are installed

    requirements = map(Requirement, metadata(wheel).get_all("Requires-Dist"))
    base = {requirement.name for requirement in requirements if requirement.marker is None}
    assert {MODULES.get(name.lower(), name) for name in base} == imported
    rows = [line for line in (ROOT / "docs" / "install.md").read_text("utf-8").splitlines() if line.startswith("|")]
    assert [name for name in base if not any(name in row for row in rows)] == []


def is_pin(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#")


def test_installed_wheel_imports(installed: Path, tmp_path: Path) -> None:
    code = "import fl_adapters, fl_adapters.hf as hf; print(fl_adapters.__file__, hf.__file__)"
    package = installed / "fl_adapters"
    expected = f"{package / '__init__.py'} {package / 'hf' / '__init__.py'}"
    assert python(code, path=installed, cwd=tmp_path) == expected


def test_source_checkout_imports(tmp_path: Path) -> None:
    code = "import fl_adapters.hf as hf; print(hf.__name__, hf.__file__)"
    expected = f"fl_adapters.hf {ROOT / 'integrations' / 'hf' / '__init__.py'}"
    assert python(code, path=ROOT, cwd=tmp_path) == expected


def test_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, installed / "bin" / "fl-adapters", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "simulate" in done.stdout


def test_import_is_light(installed: Path, tmp_path: Path) -> None:
    code = f"import sys, json, fl_adapters; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert json.loads(python(code, path=installed, cwd=tmp_path)) == []


def test_import_takes_at_most_twice_as_long_as_numpy(installed: Path, tmp_path: Path) -> None:
    def seconds(module: str) -> float:
        code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
        return float(python(code, path=installed, cwd=tmp_path))

    pairs = [(seconds("numpy"), seconds("fl_adapters")) for _ in range(9)]
    numpy_s, ours_s = median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)
    assert ours_s <= 2 * numpy_s


def test_the_recording_in_the_readme_moves_without_a_script_and_names_no_machine() -> None:
    recording = ROOT / "docs/pictures/terminal.svg"
    svg = recording.read_text("utf-8")
    kinds = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
    assert kinds <= {"svg", "style", "defs", "clipPath", "rect", "text", "g", "circle"}
    assert svg.count("translateY(") >= 10 and "@keyframes" in svg
    assert not re.search(r"\bon\w+=|href|url\((?!#)|@import|/(tmp|home|root|work|usr)\b", svg)
    assert len(svg) < 300_000
