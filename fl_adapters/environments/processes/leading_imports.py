"""What a script imports before it does anything else, as far as all its processes may share the work."""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path

# Importing these touches no GPU, and starts no thread that a fork would lose. TensorFlow and JAX start some, and Keras
# and MONAI load them where they are installed.
_SHARED = frozenset(
    "accelerate datasets fl_adapters fl_runtime lightning matplotlib ml_dtypes nibabel numpy pandas peft polars "
    "pyarrow pytorch_lightning safetensors scipy sentence_transformers sklearn tokenizers torch torchmetrics "
    "torchvision tqdm transformers trl xgboost yaml".split()
)
_OWN_ALONE = ("fl_adapters.keras", "fl_adapters.monai")
_JOINING = ("fl_adapters.loop", "fl_runtime.transport.grpc")  # what every site loads when it joins


def of_script(path: Path) -> str:
    """Return the import statements that a script begins with.

    They end before the first statement that is no import, and before the first module that is neither of the standard
    library nor one of the known packages: a script that sets an environment variable, or imports a module of its own,
    may change what the next import does.

    Args:
        path: The script.

    Returns:
        The statements as source; "" if there is nothing in them that takes long, or the script cannot be read.
    """
    try:
        statements = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):  # the script's own process says so
        return ""
    leading: list[ast.stmt] = []
    for number, statement in enumerate(statements):
        if number == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        if not isinstance(statement, (ast.Import, ast.ImportFrom)) or not all(map(_may_share, _modules(statement))):
            break
        if not (isinstance(statement, ast.ImportFrom) and statement.module == "__future__"):
            leading.append(statement)
    packages = {_package(name) for statement in leading for name in _modules(statement)}
    if packages.isdisjoint(_SHARED):
        return ""
    joining = [f"import {name}" for name in _JOINING if "fl_adapters" in packages]
    return "\n".join([*map(ast.unparse, leading), *joining])


def of_module(name: str) -> str:
    """Return the import statements that `python -m name` begins with; "" for any module but our own."""
    if _package(name) != "fl_adapters" or not _may_share(name):
        return ""
    spec = find_spec(name)
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        return ""
    return "\n".join([f"import {name}", of_script(Path(folders[0], "__main__.py"))])


def _modules(statement: ast.stmt) -> list[str]:
    """Modules that an import statement may load. A relative import is "", which belongs to no package."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if not isinstance(statement, ast.ImportFrom) or statement.level or statement.module is None:
        return [""]
    return [statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)]


def _may_share(module: str) -> bool:
    if module.startswith(_OWN_ALONE):
        return False
    return _package(module) in _SHARED or _package(module) in sys.stdlib_module_names


def _package(module: str) -> str:
    return module.partition(".")[0]
