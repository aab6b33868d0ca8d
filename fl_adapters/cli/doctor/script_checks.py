"""Checks of `fl-adapters doctor SCRIPT`: what in a training script would not work in a federation. It is not run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fl_adapters.cli.doctor.checks import Check

# Module of a framework -> its adapter, and the line that makes a script a participant.
_ADAPTERS = {
    "transformers": (
        "hf",
        "from fl_adapters.hf import FederatedCallback; Trainer(..., callbacks=[FederatedCallback()])",
    ),
    "lightning": ("lightning", "from fl_adapters.lightning import FederatedCallback; Trainer(callbacks=[...])"),
    "pytorch_lightning": ("lightning", "from fl_adapters.lightning import FederatedCallback; Trainer(callbacks=[...])"),
    "monai": ("monai", "from fl_adapters.monai import FederatedHandler; SupervisedTrainer(train_handlers=[...])"),
    "keras": ("keras", "from fl_adapters.keras import FederatedCallback; model.fit(callbacks=[FederatedCallback()])"),
    "xgboost": ("xgboost", "from fl_adapters.xgboost import train, in place of xgboost.train"),
    "torch": ("torch", "from fl_adapters.torch import FederatedLoop; for round in loop.rounds(loader)"),
    "sklearn": ("sklearn", "from fl_adapters.sklearn import the estimators that are fitted"),
}
_TRAINS = {"train", "fit", "run"}
_TRAINERS = {
    "transformers": "train",
    "lightning": "fit",
    "pytorch_lightning": "fit",
    "keras": "fit",
    "xgboost": "train",
}
_SPLITS = {"site", "connect", "sums", "partition"}
_REFUSED = {
    "deepspeed": "DeepSpeed keeps master copies, which new global weights would not reach",
    "fsdp": "FSDP1 keeps no names and shapes of weights; FSDP2 works (docs/llm.md)",
    "auto_find_batch_size": "it trains again in the middle of a round",
    "hyperparameter_search": "it trains many models in one training",
    "StochasticWeightAveraging": "it replaces the global weights by an average of its own",
    "WeightAveraging": "it replaces the global weights by an average of its own",
    "SwapEMAWeights": "it replaces the global weights by an average of its own",
}
_SHARDED = re.compile(r"(deepspeed|fsdp)(_|$)")
_ABSOLUTE = re.compile(r"(/(home|data|mnt|srv|Users|tmp|var|opt|root|scratch|media)/|~/|[A-Za-z]:[\\/])\S")


@dataclass
class _Script(ast.NodeVisitor):
    """What stands in a script.

    Attributes:
        modules: Modules that it imports, each as in `fl_adapters.hf`.
        names: Names and attributes that it uses.
        trainings: Lines in which a method of a name in `_TRAINS` is called, and whether that is in a loop.
        paths: Line and text of each absolute path.
        refused: Line and name of each feature that adapters refuse.
        fsdp2: Whether it says which version of FSDP it wants.
    """

    modules: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    trainings: list[tuple[int, str, bool]] = field(default_factory=list)
    paths: list[tuple[int, str]] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    fsdp2: bool = False
    _loops: int = 0

    def visit_Import(self, node: ast.Import) -> None:
        self.modules.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.modules.add(node.module or "")
        self.names.update(alias.name for alias in node.names)

    def visit_For(self, node: ast.For | ast.While) -> None:
        self._loops += 1
        self.generic_visit(node)
        self._loops -= 1

    def visit_While(self, node: ast.While) -> None:
        self.visit_For(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._use(node.id, node.lineno)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._use(node.attr, node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _TRAINS and (node.args or node.keywords or name != "run"):
            mode = (
                name == "train" and len(node.args) == 1 and isinstance(node.args[0], ast.Constant)
            )  # model.train(True)
            if not mode:
                self.trainings.append((node.lineno, name, self._loops > 0))
        for word in node.keywords:
            set_off = isinstance(word.value, ast.Constant) and word.value.value in (None, False, "")
            if word.arg in _REFUSED and not set_off:
                self.refused.append((node.lineno, word.arg))
            text = word.value.value if isinstance(word.value, ast.Constant) else None
            if word.arg == "strategy" and isinstance(text, str) and (found := _SHARDED.match(text)):
                self.refused.append((node.lineno, found[1]))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        self.fsdp2 = self.fsdp2 or node.value == "fsdp_version"
        if isinstance(node.value, str) and "\n" not in node.value and _ABSOLUTE.match(node.value):
            self.paths.append((node.lineno, node.value))

    def _use(self, name: str, line: int) -> None:
        self.names.add(name)
        if name in _REFUSED and name not in ("deepspeed", "fsdp"):  # those may be modules
            self.refused.append((line, name))


def script_checks(path: Path) -> Iterator[Check]:
    """Read a script and say what would not work in a federation.

    Args:
        path: The script. It is read, and not run.

    Yields:
        The checks, in order.
    """
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        yield Check("script", "problem", f"{path}: {error.strerror}", "check the path")
        return
    except (SyntaxError, ValueError) as error:
        place = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        yield Check("script", "problem", f"{path}{place}: it is not Python: {error.args[0]}", "correct it")
        return
    script = _read(tree)
    yield _adapter(script)
    yield _data(script)
    yield _trainings(script)
    if script.paths:
        lines = ", ".join(f"line {line} {text!r}" for line, text in script.paths[:3])
        yield Check("paths", "note", lines, "a path of one machine: read fl_adapters.site().data, or take an argument")
    for line, name in dict.fromkeys(script.refused):
        if name == "fsdp" and script.fsdp2:
            continue
        yield Check("refused", "problem", f"line {line}: {name}; {_REFUSED[name]}", "leave it out")


def missing_adapter(path: Path) -> Check | None:
    """Read a script and say why it would train alone, if that is certain.

    Args:
        path: The script. It is read, and not run.

    Returns:
        The problem; None if the script takes part in federations, cannot be read, or imports a file beside it, which
        may do it.
    """
    try:
        script = _read(ast.parse(path.read_bytes(), str(path)))
    except (OSError, SyntaxError, ValueError):
        return None
    beside = (path.parent / module.partition(".")[0] for module in script.modules if module)
    if "" in script.modules or any(each.is_dir() or each.with_suffix(".py").is_file() for each in beside):
        return None
    check = _adapter(script)
    return check if check.status == "problem" else None


def _read(tree: ast.Module) -> _Script:
    script = _Script()
    script.visit(tree)
    return script


def _adapter(script: _Script) -> Check:
    tops = {module.partition(".")[0] for module in script.modules}
    ours = {module for module in script.modules if module.partition(".")[0] == "fl_adapters"}
    used = {name for name in _ADAPTERS if name in tops}
    adapters = {_ADAPTERS[name][0] for name in _ADAPTERS} & {module.removeprefix("fl_adapters.") for module in ours}
    if adapters:
        return Check("adapter", "ok", f"imports {', '.join(f'fl_adapters.{name}' for name in sorted(adapters))}")
    if script.names & {"connect", "sums"} and ours:
        return Check("adapter", "ok", "a loop of its own, with fl_adapters.connect or fl_adapters.sums")
    for name, (_, line) in _ADAPTERS.items():  # in this order: a script with a trainer imports torch too
        if name in used:
            return Check("adapter", "problem", f"uses {name}, and takes part in no federation", line)
    fix = "with fl_adapters.connect() as site: for task in site.tasks(initial=...)"
    return Check("adapter", "problem", "takes part in no federation", fix)


def _data(script: _Script) -> Check:
    ours = any(module.partition(".")[0] == "fl_adapters" for module in script.modules)
    if ours and (script.names & _SPLITS or "fl_adapters.partition" in script.modules):
        return Check("data", "ok", "asks which site it is")
    fix = "read fl_adapters.site().data, or divide by fl_adapters.partition (docs/data.md)"
    return Check("data", "note", "nothing tells sites apart: every site would train on the same rows", fix)


def _trainings(script: _Script) -> Check:
    method = next((_TRAINERS[name] for name in _TRAINERS if name in {m.partition(".")[0] for m in script.modules}), "")
    found = [(line, looped) for line, name, looped in script.trainings if name == method]
    if len(found) > 1 or any(looped for _, looped in found):
        lines = ", ".join(f"line {line}{' in a loop' if looped else ''}" for line, looped in found)
        fix = "each is a run of its own, and all sites must train as often (docs/trainings.md)"
        return Check("trainings", "note", f"{method}() is called several times: {lines}", fix)
    return Check("trainings", "ok", "one")
