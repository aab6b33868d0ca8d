"""Unmodified MONAI bundles as participants: find the trainer in a bundle's config, and attach the handler to it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from fl_adapters.participant.kit import Kit, current_kit
from fl_adapters.participant.outputs import claimed_path, placed
from fl_adapters.participant.registry import open_session
from fl_runtime.errors import ConfigError

from .names import channels_of

HANDLER, SITE = "federated_handler", "federated_site"
"""Ids added to a bundle's config. Its expressions may use them, and the command line may override their parts."""

_CONFIGS = [
    f"{folder}{name}.{ending}"
    for folder in ("configs/", "")
    for name in ("train", "training")
    for ending in ("json", "yaml", "yml")
]
_RUNS = ("run", "training")
_TRAINERS = ("train#trainer", "trainer")
_TARGET = "fl_adapters.monai.FederatedHandler"
_FOLDERS = ("save_dir", "log_dir", "output_dir")


def config_files(bundle: Path, given: Any = None) -> list[str]:
    """Files of the bundle's training configuration, or the given ones, which may be relative to the bundle.

    Raises ConfigError, with the places that were searched, if there is none.
    """
    if given is not None:
        names = [given] if isinstance(given, str) else list(given)
        return [name if Path(name).is_file() else str(bundle / name) for name in names]
    if bundle.is_file():
        return [str(bundle)]
    files = [str(bundle / name) for name in _CONFIGS if (bundle / name).is_file()]
    if not files:
        raise ConfigError(
            f"there is no training configuration in this bundle; looked for {', '.join(_CONFIGS)}",
            where=str(bundle),
            fix="check the folder, or name the file: --config_file FILE",
        )
    return files[:1]


def root_of(bundle: Path) -> Path:
    """The bundle's folder, given the folder or one of its configurations."""
    folder = bundle.parent if bundle.is_file() else bundle
    return folder.parent if folder.name == "configs" else folder


def find_run(parser: ConfigParser, given: str | None, where: str) -> str:
    """Id of what the bundle runs. Raises ConfigError, with the ids that were tried, if there is none."""
    candidates = _RUNS if given is None else (given,)
    for name in candidates:
        if name in parser:
            return name
    raise ConfigError(
        f"this bundle has no entry to run; looked for {' and '.join(repr(name) for name in candidates)}",
        where=where,
        fix="name the entry: --run_id ID. At the top of the configuration are: "
        + ", ".join(name for name in parser.get() if not name.startswith(("_", HANDLER, SITE))),
    )


def find_trainer(parser: ConfigParser, given: str | None, where: str) -> str:
    """Id of the bundle's trainer: `train#trainer`, `trainer`, or the only component whose class is called a trainer.

    Raises ConfigError, with the ids that were tried, if there is none.
    """
    for name in _TRAINERS if given is None else (given,):
        if _makes_something(parser.get(name)):
            return name
    others = [] if given is not None else [i for i, c in _components(parser.get()) if _name_of(c).endswith("Trainer")]
    if len(others) == 1:
        return others[0]
    looked = f"{given!r}" if given else "'train#trainer', 'trainer', and a component whose _target_ ends in 'Trainer'"
    raise ConfigError(
        f"no trainer was found in this bundle; looked for {looked}"
        + (f", and there are several: {', '.join(others)}" if others else ""),
        where=where,
        fix="run a training configuration (--config_file FILE), or name the trainer: --trainer_id ID",
    )


def add_handler(parser: ConfigParser, run_id: str, trainer_id: str) -> None:
    """Let the bundle attach the handler to its trainer, right before the first step of its run that uses the trainer.

    The list of handlers would be the wrong place: bundles cut and filter it. An earlier step would be wrong too: the
    trainer must be made when the bundle makes it, with the random state of that moment.
    """
    steps = parser[run_id]
    steps = list(steps) if isinstance(steps, list) else [steps]
    name = re.compile(r"@" + re.escape(trainer_id).replace(r"\#", "#").replace("#", r"(?:#|::)") + r"(?!\w)")
    uses = [i for i, step in enumerate(steps) if name.search(str(step))]
    steps.insert(uses[0] if uses else max(len(steps) - 1, 0), f"$@{HANDLER}.attach(@{trainer_id})")
    parser[run_id] = steps


def has_handler(parser: ConfigParser) -> bool:
    """Whether the bundle names the handler in its own configuration."""
    return any(component["_target_"] == _TARGET and i != HANDLER for i, component in _components(parser.get()))


def compare_channels(parser: ConfigParser) -> None:
    """Let every handler of the bundle compare what the metadata says of channels, unless it says what to compare."""
    channels = channels_of(parser)
    # a text that begins so would be evaluated or looked up
    texts = {name: names for name, names in channels.items() if not any(text[:1] in ("$", "@", "%") for text in names)}
    for name, component in list(_components(parser.get())):
        if texts and component["_target_"] == _TARGET and "agree" not in component:
            parser[f"{name}#agree"] = texts


def set_epochs(parser: ConfigParser, trainer_id: str, overridden: Mapping[str, Any]) -> None:
    """Set the bundle's own number of epochs, whatever its id, to that of the federation.

    What the bundle computes from it then fits all rounds, such as the length of a learning-rate schedule. Only for
    rounds counted in epochs, and on one process.
    """
    refers = re.fullmatch(r"\$?@([\w#:]+)", str(parser.get(f"{trainer_id}#max_epochs")))
    if refers is None or refers[1] in overridden or refers[1] not in parser or _several_processes():
        return
    session = open_session(parser.get_parsed_content(HANDLER).options, framework="monai", fresh=True)
    if session is not None and session.settings.rounds and session.settings.every.epochs:
        parser[refers[1]] = session.settings.rounds * session.settings.every.epochs


def place_outputs(parser: ConfigParser, root: Path, kit: Kit | None) -> None:
    """In a simulation, move the output folders of handlers and transforms below the site's own.

    Moves folders within the bundle and within the working directory. Comes before anything is made from the config.
    """
    if kit is None or not kit.run:
        return
    for name, component in list(_components(parser.get())):
        for key in _FOLDERS:
            if key not in component:
                continue
            try:
                folder = parser.get_parsed_content(f"{name}#{key}")
            except Exception:  # it needs what only `initialize` gives; the handler moves what it can
                continue
            if isinstance(folder, str | os.PathLike):
                parser[f"{name}#{key}"] = _place(kit, root, os.fspath(folder))


def workflow_of(bundle: Path, override: Mapping[str, Any], **given: Any) -> ConfigWorkflow:
    """The bundle as MONAI's own workflow, ready to be initialised, with the handler attached to its trainer.

    Args:
        bundle: Folder of the bundle, or one of its configurations.
        override: Parts of the configuration to override, by id.
        **given: `run_id`, `init_id`, `final_id`, `meta_file`, `config_file`, `logging_file`, `tracking` as MONAI takes
            them, and `trainer_id`. Each may be None.

    Raises:
        ConfigError: If the bundle has no training configuration, nothing to run, or no trainer.
    """
    trainer_id, run_id = given.pop("trainer_id", None), given.pop("run_id", None)
    files = config_files(bundle, given.pop("config_file", None))
    where, root = ", ".join(files), root_of(bundle).resolve()
    sys.path.insert(0, str(root))  # where MONAI expects the bundle's own modules
    known = ConfigParser.load_config_files(files)
    added = {HANDLER: {"_target_": _TARGET}, SITE: "$__import__('fl_adapters').site()"}
    if "bundle_root" in known:
        added["bundle_root"] = str(root)
    options = {name: value for name, value in given.items() if value is not None}
    workflow = ConfigWorkflow(config_file=files, workflow_type="train", **options, **{**added, **override})
    workflow.parser.parse()  # resolves references to other files and places ("%")
    workflow.run_id = find_run(workflow.parser, run_id, where)
    trainer = find_trainer(workflow.parser, trainer_id, where)
    if not has_handler(workflow.parser):
        add_handler(workflow.parser, workflow.run_id, trainer)
        compare_channels(workflow.parser)  # before the session is opened
        set_epochs(workflow.parser, trainer, override)
    else:
        compare_channels(workflow.parser)
    place_outputs(workflow.parser, root, current_kit())
    return workflow


def _components(config: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Id and config of every component, that is of everything with a `_target_`."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    if isinstance(config, dict) and isinstance(config.get("_target_"), str):
        yield name, config
    for key, value in items:
        yield from _components(value, f"{name}#{key}" if name else str(key))


def _makes_something(config: Any) -> bool:
    if isinstance(config, dict):
        return "_target_" in config
    return isinstance(config, str) and config.startswith(("$", "@"))


def _name_of(component: Mapping[str, Any]) -> str:
    return str(component["_target_"]).rpartition(".")[2]


def _several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _place(kit: Kit, root: Path, folder: str) -> str:
    absolute = Path(folder).resolve()
    if absolute.is_relative_to(root) and "://" not in folder:
        return claimed_path(Path(kit.run).resolve(), kit.site, os.path.relpath(absolute, root))
    return placed(kit, folder)
