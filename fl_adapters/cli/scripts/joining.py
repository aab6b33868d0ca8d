"""The lines that make a training script a participant in a federation, put into its text."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fl_adapters.cli.scripts.script_text import Edit, ScriptText
from fl_adapters.cli.scripts.twins import TWINS
from fl_runtime.errors import ConfigError

_TRAINERS = ("transformers", "trl", "sentence_transformers", "setfit")
_FIT_WORDS = {"epochs", "batch_size", "validation_data", "validation_split", "steps_per_epoch", "callbacks"}
_OWN_LOOP = (
    "with PyTorch: loop = FederatedLoop(model, optimizer), and `for round in loop.rounds(loader)` around the steps "
    "(docs/own-loop.md); else fl_adapters.connect()"
)


@dataclass(frozen=True)
class _Hook:
    """What calls of a framework get.

    Attributes:
        adapter: Name of the adapter.
        keyword: Argument that takes a list.
        name: What is imported from the adapter, and put into the list.
    """

    adapter: str
    keyword: str = "callbacks"
    name: str = "FederatedCallback"

    @property
    def line(self) -> str:
        """The line by which a script imports the name."""
        return f"from fl_adapters.{self.adapter} import {self.name}"


# What of fl_adapters makes a script a participant; `fl_adapters.site()` alone only tells it where its data lies.
_PARTICIPANTS = {"hf", "lightning", "keras", "monai", "xgboost", "torch", "sklearn", "connect", "sums"}
_HF, _LIGHTNING, _KERAS = _Hook("hf"), _Hook("lightning"), _Hook("keras")
_MONAI = _Hook("monai", "train_handlers", "FederatedHandler")


def joined(source: str, where: str) -> str:
    """Return a script with the lines that make it a participant in a federation.

    Args:
        source: The text of the script. It is read, and not run.
        where: Its name, for errors.

    Returns:
        The new text. All else in it stays as it is.

    Raises:
        ConfigError: The text is not Python, takes part already, or has no place where a line can be added.
    """
    try:
        script = ScriptText(source)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"it is not Python: {error.args[0]}", where=where, fix="correct it") from None
    if _takes_part(script):
        fix = "see what else it may lack: fl-adapters doctor SCRIPT"
        raise ConfigError("it takes part in federations already", where=where, fix=fix)
    edits = _hooked(script, where) or _replaced(script)
    if not edits:
        raise ConfigError("it has no trainer of a framework to which a line could be added", where=where, fix=_OWN_LOOP)
    return script.changed(edits)


def _takes_part(script: ScriptText) -> bool:
    used = {script.origin(node) for node in ast.walk(script.tree) if isinstance(node, ast.Attribute)}
    parts = [origin.split(".") for origin in used.union(script.origins.values())]
    return any(part[0] == "fl_adapters" and not _PARTICIPANTS.isdisjoint(part[1:2]) for part in parts)


def _top(origin: str) -> str:
    return origin.partition(".")[0]


# -- a callback in a call ---------------------------------------------------------------------------------------


def _hooked(script: ScriptText, where: str) -> list[Edit]:
    """A callback in every call of the framework's trainer, and its import."""
    calls = [node for node in ast.walk(script.tree) if isinstance(node, ast.Call)]
    trainers = [(hook, call) for call in calls if (hook := _hook_of(call, script))]
    found = trainers or [(_KERAS, call) for call in _fits_of_keras(calls, script)]
    if not found:
        return []
    hook = found[0][0]
    edits = [edit for other, call in found if other == hook for edit in _with_item(script, call, hook, where)]
    return [script.below_imports(hook.line), *edits]


def _hook_of(call: ast.Call, script: ScriptText) -> _Hook | None:
    """The hook of a call that makes a trainer, also one of a class of the script's own."""
    own = {node.name: node.bases for node in ast.walk(script.tree) if isinstance(node, ast.ClassDef)}
    for named in (call.func, *(own.get(call.func.id, []) if isinstance(call.func, ast.Name) else [])):
        origin = script.origin(named)
        last = origin.rpartition(".")[2]
        if _top(origin) in _TRAINERS and last.endswith("Trainer"):
            return _HF
        if _top(origin) in ("lightning", "pytorch_lightning") and last == "Trainer":
            return _LIGHTNING
        if _top(origin) == "monai" and last == "SupervisedTrainer":
            return _MONAI
    return None


def _fits_of_keras(calls: Sequence[ast.Call], script: ScriptText) -> list[ast.Call]:
    """The calls of Keras' `fit`, if the script imports Keras."""
    if not any({"keras", "tensorflow"} & set(origin.split(".")) for origin in script.origins.values()):
        return []
    fits = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "fit"]
    return [call for call in fits if len(fits) == 1 or {word.arg for word in call.keywords} & _FIT_WORDS]


def _with_item(script: ScriptText, call: ast.Call, hook: _Hook, where: str) -> Iterator[Edit]:
    """Put the hook into the list that an argument of a call is, or add that argument."""
    item = f"{hook.name}()"
    given = next((word.value for word in call.keywords if word.arg == hook.keyword), None)
    if given is None:
        yield from script.with_argument(call, f"{hook.keyword}=[{item}]")
    elif isinstance(given, ast.List) and given.elts:
        yield script.after(given.elts[-1], f", {item}")
    elif isinstance(given, ast.List) or (isinstance(given, ast.Constant) and given.value is None):
        yield script.instead(given, f"[{item}]")
    elif isinstance(given, ast.Call):  # a callback, or a function that returns several
        fix = f"add {item} to what line {given.lineno} passes as {hook.keyword}, and `{hook.line}`"
        raise ConfigError(f"{hook.keyword}= is no list in line {given.lineno}", where=where, fix=fix)
    else:
        yield script.before(given, "[*")
        yield script.after(given, f", {item}]")


# -- names of fl_adapters in place of the framework's --------------------------------------------------------------


def _replaced(script: ScriptText) -> list[Edit]:
    """Estimators and functions in place of those of packages that have no callbacks."""
    return [edit for package, twins in TWINS.items() for edit in _with_twins(script, package, twins)]


def _with_twins(script: ScriptText, package: str, twins: Mapping[str, str]) -> Iterator[Edit]:
    """Import them below the others, under the names that the script uses; name them in full where it names modules."""
    nodes = [node for node in ast.walk(script.tree) if isinstance(node, ast.Name | ast.Attribute)]
    used = [(node, script.origin(node).rpartition(".")[2]) for node in nodes if _top(script.origin(node)) == package]
    plain = {node.id: twins[name] for node, name in used if isinstance(node, ast.Name) and name in twins}
    dotted = [(node, twins[name]) for node, name in used if isinstance(node, ast.Attribute) and name in twins]
    if plain:
        names = sorted(name if name == own else f"{name} as {own}" for own, name in plain.items())
        yield script.below_imports(f"from fl_adapters.{package} import {', '.join(names)}")
    if dotted:
        yield script.below_imports(f"import fl_adapters.{package}")
    for node, name in dotted:
        yield script.instead(node, f"fl_adapters.{package}.{name}")
