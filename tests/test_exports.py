"""The public names of tests/_support/public_names.py: each is importable on its own and documented."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from public_names import PUBLIC

NAMES = [(module, name) for module, names in PUBLIC.items() for name in names.split()]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_these(module: str) -> None:
    assert sorted(getattr(import_module(module), "__all__", [])) == sorted(PUBLIC[module].split())


@pytest.mark.parametrize("module", [name for name in PUBLIC if name != "fl_runtime"])
def test_dir_and_star_import_give_them(module: str) -> None:
    found: dict[str, Any] = {}
    exec(f"from {module} import *", found)
    assert set(PUBLIC[module].split()) <= set(found)
    assert set(PUBLIC[module].split()) <= set(dir(import_module(module)))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = import_module("fl_adapters").no_such_name


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_public_thing_is_documented(module: str, name: str) -> None:
    thing = getattr(import_module(module), name)
    if inspect.isclass(thing) or inspect.isroutine(thing):  # else a string or a type alias: no docstring of its own
        assert list(undocumented(thing, name)) == []


def undocumented(thing: Any, name: str) -> Iterator[str]:
    """Yield the names of `thing` and its public methods without a docstring; a hook may inherit its framework's."""
    written = (thing.__doc__ or "").strip()
    if not written or written.startswith(f"{thing.__name__}("):  # what @dataclass makes up
        yield name
    if inspect.isclass(thing):
        for part, value in vars(thing).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not part.startswith("_") and inspect.isfunction(function) and not inspect.getdoc(getattr(thing, part)):
                yield f"{name}.{part}"


def test_each_name_can_come_first() -> None:
    """Any name may be imported first; an import circle would show here."""
    modules = {f"from {module} import {name}" for module, name in NAMES if module == "fl_adapters"}
    for statement in sorted(modules):
        done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)
        assert done.returncode == 0, f"{statement}\n{done.stderr}"


def test_integrations_come_in_their_own_right() -> None:
    """After `import fl_adapters` alone, `fl_adapters.hf` is not loaded: no framework is imported unasked."""
    code = "import fl_adapters, sys; print('fl_adapters.hf' in sys.modules, hasattr(fl_adapters, 'hf'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_no_module_hides_a_public_name() -> None:
    """Importing `fl_adapters.x` sets the attribute `x` of the package, which would hide a function of that name."""
    import pkgutil

    import fl_adapters

    modules = {found.name for found in pkgutil.iter_modules(fl_adapters.__path__)}
    assert not modules & set(fl_adapters.__all__)
