"""The table of who may import whom, and what no source file may do. Sources are read, not imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from source_tree import INTEGRATIONS, SOURCES, imports

# Part of fl_runtime -> the parts that it may import besides itself. A new part must be given its place here.
GROUND = {"types", "errors", "version", "capabilities", "trainings", "text", "yaml_files"}
RUNTIME = {
    "types": set[str](),
    "errors": {"text"},
    "text": set[str](),
    "capabilities": set[str](),
    "trainings": set[str](),
    "version": {"errors"},
    "yaml_files": {"errors"},
    "wire": GROUND,
    "filters": GROUND,
    "aggregation": GROUND,
    "trust": GROUND,
    "secure_sum": GROUND,
    "transport": GROUND | {"wire"},
    "store": GROUND | {"wire"},
    "server": GROUND | {"wire", "filters", "aggregation", "trust", "secure_sum", "transport", "store"},
    "client": GROUND | {"wire", "filters", "aggregation", "trust", "secure_sum", "transport", "store"},
}

# Third-party module -> the start of the names of those who may import it. `*` stands for any integration.
FRAMEWORKS = ("torch", "peft", "transformers", "accelerate", "trl", "datasets", "tensorflow", "keras", "jax", "flax")
FRAMEWORKS += ("lightning", "pytorch_lightning", "monai", "ignite", "fire", "xgboost", "sklearn")
OWNERS = dict.fromkeys(FRAMEWORKS, ("*",)) | {
    "torch": ("fl_adapters.torch.", "*"),
    "peft": ("fl_adapters.torch.", "*"),
    "grpc": ("fl_runtime.transport",),
    "cryptography": ("fl_runtime.trust", "fl_runtime.secure_sum"),
    "pyzipper": ("fl_runtime.trust",),
    "dp_accounting": ("fl_runtime.filters",),
    "opacus": ("fl_adapters.torch.",),
    "tenseal": ("fl_runtime.filters",),
    "psycopg": ("fl_runtime.store",),
    "fsspec": ("fl_runtime.store",),
}

# Ours, that nothing else of ours may stand on: the commands at the top, and what only tests use.
TOP = {
    "fl_adapters.cli": ("fl_adapters.cli", "fl_adapters.__main__"),
    "fl_adapters.testing": ("fl_adapters.testing",),
}

# Modules and calls that run or unpickle what they are given.
FORBIDDEN_MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "builtins.eval", "builtins.exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def integration_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] in ("fl_adapters", "integrations") and parts[1:2] and parts[1] in INTEGRATIONS else None


def import_fault(importer: str, target: str) -> str | None:
    """Return why `importer` may not import `target`, or None if it may."""
    top, _, rest = target.partition(".")
    if top in FORBIDDEN_MODULES:
        return "runs or unpickles what it is given"
    if top in OWNERS:
        mine = integration_of(importer)
        allowed = any(importer.startswith(owner) or (owner == "*" and mine) for owner in OWNERS[top])
        return None if allowed else f"belongs to {' and '.join(OWNERS[top]).replace('*', 'the integrations')}"
    for above, users in TOP.items():
        if f"{target}.".startswith(f"{above}.") and not importer.startswith(users):
            return "stands above it"
    if importer.startswith("fl_runtime"):
        if top in ("fl_adapters", "integrations"):
            return "runs back up"
        part, other = importer.split(".")[1:2], rest.split(".")[0]
        if top != "fl_runtime" or [other] == part:
            return None
        if not part:
            return "fl_runtime/__init__.py imports nothing"
        return None if other in RUNTIME.get(part[0], ()) else f"fl_runtime.{part[0]} does not stand on {other}"
    if top == "integrations":
        return "has the name fl_adapters.<integration>"
    mine, theirs = integration_of(importer), integration_of(target)
    return "is an integration" if theirs is not None and theirs != mine else None


def call_faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in FORBIDDEN_CALLS:
            yield node.lineno, f"{name}() runs what it is given"
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load() without weights_only=True unpickles"
        if keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, f"{name}(allow_pickle=...) unpickles"


def faults(source: str, module: str, *, is_package: bool = False) -> list[str]:
    tree = ast.parse(source)
    found = [
        f"{module}:{line} imports {target}, which {reason}"
        for line, target in imports(tree, module, is_package=is_package)
        if (reason := import_fault(module, target))
    ]
    return found + [f"{module}:{line} {reason}" for line, reason in call_faults(tree)]


@pytest.mark.parametrize("module", SOURCES)
def test_source_keeps_to_its_floor(module: str) -> None:
    path = SOURCES[module]
    assert faults(path.read_text("utf-8"), module, is_package=path.name == "__init__.py") == []


def test_every_part_of_the_runtime_has_a_place() -> None:
    assert {name.split(".")[1] for name in SOURCES if name.startswith("fl_runtime.")} <= set(RUNTIME)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fl_runtime.types", "from fl_runtime.errors import FederationError"),
        ("fl_runtime.wire.manifest", "from ..store import blobs"),
        ("fl_runtime.store.journal", "import fl_runtime.transport.base"),
        ("fl_runtime.client", "from fl_runtime import server"),
        ("fl_runtime.server.run", "def f():\n    from fl_adapters.job import Job"),
        ("fl_runtime.server.run", "import grpc"),
        ("fl_runtime.aggregation.fedavg", "import torch"),
        ("fl_adapters.participant.session", "import torch.distributed"),
        ("fl_adapters.participant.session", "from fl_adapters.hf import FederatedCallback"),
        ("fl_adapters.participant.session", "from integrations.hf import FederatedCallback"),
        ("fl_adapters.participant.session", "import pickle"),
        ("fl_adapters.job", "from fl_adapters.cli.output import reported"),
        ("fl_adapters.job", "from fl_adapters import testing"),
        ("fl_adapters.torch.state", "torch.load(path)"),
        ("fl_adapters.torch.state", "np.load(path, allow_pickle=True)"),
        ("fl_adapters.job", "eval('1')"),
        ("fl_adapters.job", "yaml.load(text)"),
    ],
)
def test_breaking_a_rule_is_noticed(module: str, source: str) -> None:
    assert faults(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fl_runtime.transport.grpc", "import grpc"),
        ("fl_runtime.server.run", "from fl_runtime.store import journal"),
        ("fl_adapters.torch.state", "import torch; torch.load(path, weights_only=True)"),
        ("fl_adapters.hf.callback", "import torch\nfrom ..session import open_session\nfrom . import state"),
        (
            "fl_adapters.participant.session",
            "from fl_runtime.client import Client\nimport re\nre.compile('x'); model.eval()",
        ),
    ],
)
def test_keeping_the_rules_is_not(module: str, source: str) -> None:
    assert faults(source, module) == []
