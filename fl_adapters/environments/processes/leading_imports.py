"""What a script imports before it does anything else, as far as all its processes may share the work.

An import is a pair: the module, and the names that are taken from it.
"""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

Imports: TypeAlias = list[tuple[str, list[str]]]

# Importing these touches no GPU, and starts no thread that a fork would lose. TensorFlow and JAX start some, and Keras
# and MONAI load them where they are installed.
_SHARED = frozenset(
    "accelerate datasets fl_adapters fl_runtime lightning matplotlib ml_dtypes nibabel numpy pandas peft polars "
    "pyarrow pytorch_lightning safetensors scipy sentence_transformers sklearn tokenizers torch torchmetrics "
    "torchvision tqdm transformers trl xgboost yaml".split()
)
_OWN_ALONE = ("fl_adapters.keras", "fl_adapters.monai")
_JOINING = ("fl_adapters.loop", "fl_runtime.transport.grpc")  # what every site loads when it joins


def of_script(path: Path) -> Imports:
    """Return the imports that a script begins with.

    They end before the first statement that is no import, and before the first module that is neither of the standard
    library nor one of the known packages: a script that sets an environment variable, or imports a module of its own,
    may change what the next import does.

    Args:
        path: The script.

    Returns:
        The imports in their order; none if nothing in them takes long, or the script cannot be read.
    """
    try:
        statements = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):  # the script's own process says so
        return []
    found: Imports = []
    for number, statement in enumerate(statements):
        if number == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        imports = _imports(statement)
        if not imports or not all(_may_share(module, names) for module, names in imports):
            break
        found.extend(imports)
    packages = {_package(module) for module, _ in found}
    if packages.isdisjoint(_SHARED):
        return []
    return [*found, *((name, []) for name in _JOINING if "fl_adapters" in packages)]


def of_module(name: str) -> Imports:
    """Return the imports that `python -m name` begins with; none for any module but our own."""
    if _package(name) != "fl_adapters" or not _may_share(name, []):
        return []
    spec = find_spec(name)
    folders = spec.submodule_search_locations if spec is not None else None
    return [(name, []), *of_script(Path(folders[0], "__main__.py"))] if folders else []


def _imports(statement: ast.stmt) -> Imports:
    """The imports of a statement; none if it is no import, or one of the script's own package."""
    if isinstance(statement, ast.Import):
        return [(alias.name, []) for alias in statement.names]
    if isinstance(statement, ast.ImportFrom) and not statement.level and statement.module is not None:
        return [(statement.module, [alias.name for alias in statement.names if alias.name != "*"])]
    return []


def _may_share(module: str, names: list[str]) -> bool:
    if any(name.startswith(_OWN_ALONE) for name in (module, *(f"{module}.{name}" for name in names))):
        return False
    return _package(module) in _SHARED or _package(module) in sys.stdlib_module_names


def _package(module: str) -> str:
    return module.partition(".")[0]
