"""Command `fl-adapters new`: writes a script that runs alone and federated, a job file, a README and a test."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_runtime.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Framework:
    """What the README of a new script says about its framework.

    Attributes:
        title: What is trained.
        columns: What a file of a site has.
        extra: Name of the extra of fl-adapters.
        also: What else `pip` must install, with a space before it.
    """

    title: str
    columns: str
    extra: str
    also: str = ""


_TABLE = "a row of numbers for each example, separated by commas, with the label (0, 1, ...) last"

FRAMEWORKS = {
    "hf": Framework("A text classifier with transformers", "a text and its label in each line, as CSV", "hf"),
    "lightning": Framework("A network with Lightning", _TABLE, "lightning"),
    "keras": Framework("A network with Keras", _TABLE, "keras", " tensorflow"),
    "monai": Framework("A U-Net with MONAI", "images and masks: `numpy.savez(file, images, masks)`", "monai"),
    "xgboost": Framework("Trees with XGBoost", _TABLE, "xgboost"),
    "torch": Framework("A PyTorch loop", _TABLE, "torch"),
    "sklearn": Framework("A pipeline of scikit-learn", _TABLE, "sklearn"),
}
"""Name of each template: what its README says."""


def run(framework: str, folder: Path | None, as_json: bool) -> int:
    """Write a new script. Returns exit status 0."""
    with report_errors(as_json):
        if folder is None:
            fix = f"write fl-adapters new FRAMEWORK DIR, with one of: {', '.join(FRAMEWORKS)}; or --from SCRIPT.py"
            raise ConfigError("a framework and a folder are needed", where="new", fix=fix)
        written = write(framework, folder)
        console = console_for(as_json)
        for file in written:
            console.print(f"wrote {file}", highlight=False, soft_wrap=True)
        here = "" if folder.resolve() == Path.cwd() else f"cd {folder} && "
        console.print(f"next  {here}fl-adapters simulate --job job.yml", highlight=False, soft_wrap=True)
        if as_json:
            show_json({"framework": framework, "folder": str(folder), "files": [str(file) for file in written]})
    return 0


def write(framework: str, folder: Path) -> list[Path]:
    """Write the files of a template.

    Args:
        framework: Name of the template.
        folder: Folder for the files. Made if it does not exist.

    Returns:
        The files.

    Raises:
        ConfigError: There is no such template, or one of the files exists. Nothing was written.
    """
    if framework not in FRAMEWORKS:
        raise ConfigError(
            f"there is no template {framework!r}",
            where="FRAMEWORK",
            fix=f"{did_you_mean(framework, FRAMEWORKS)}use one of: {', '.join(FRAMEWORKS)}",
        )
    texts = _texts(framework, folder)
    for path in texts:
        if path.exists():
            fix = "name another folder, or move the file away"
            raise ConfigError(f"{path.name} exists already", where=str(folder), fix=fix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        where = error.filename or str(folder)
        raise ConfigError(f"cannot write {where}: {error.strerror}", fix="name a folder that can be written") from None
    return list(texts)


def _texts(framework: str, folder: Path) -> dict[Path, str]:
    """The text of each file. Templates of scripts end in .txt, so that they are no modules of this package."""
    templates = files("fl_adapters.cli.scripts") / "templates"
    about = FRAMEWORKS[framework]
    app = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "training"
    readme = Template(_read(templates / "common" / "README.md.txt"))
    said = {"title": about.title, "columns": about.columns, "extra": about.extra, "also": about.also, "app": app}
    return {
        folder / "train.py": _read(templates / framework / "train.py.txt"),
        folder / "job.yml": _read(templates / framework / "job.yml"),
        folder / "test_train.py": _read(templates / "common" / "test_train.py.txt"),
        folder / "README.md": readme.substitute(said),
    }


def _read(file: Traversable) -> str:
    return file.read_text(encoding="utf-8")
