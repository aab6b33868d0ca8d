"""YAML files that people write: job, project and policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fl_runtime.errors import ConfigError, did_you_mean

_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file in which no key stands twice.

    YAML itself forbids a key to stand twice in one mapping, but PyYAML takes the last value without a word.

    Args:
        path: The file, in UTF-8.
        what: What the file is, for the error message, such as "the policy".

    Returns:
        Its contents; None for an empty file.

    Raises:
        ConfigError: If it cannot be read, is not valid YAML, or has a key twice.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        for key, first, second in _repeated(loader, node):
            raise ConfigError(
                f"{what} has {key!r} twice, in lines {first} and {second}",
                where=f"{path}, line {second}",
                fix="keep the line that you mean, and delete the other",
            )
        return loader.construct_document(node)
    except OSError as error:
        raise ConfigError(
            f"{what} cannot be read: {error.strerror or error}",
            where=str(path),
            fix="check the path and its permissions",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{what} is not valid YAML: {error}", where=str(path), fix="correct the file at that place"
        ) from None
    except (RecursionError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # nested too deeply; a date, a number or a truth value that cannot be, of which PyYAML makes all of these
        raise ConfigError(
            f"{what} cannot be understood: {error}", where=str(path), fix="write it as in the documentation"
        ) from None


def _repeated(loader: yaml.SafeLoader, root: yaml.Node) -> Iterator[tuple[object, int, int]]:
    """Yield (key, first line, second line) of each key that stands twice in one mapping."""
    todo, seen = [root], set[int]()
    while todo:
        node = todo.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
            continue
        lines: dict[tuple[str, object], int] = {}
        for key, value in node.value:
            todo += (key, value)
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            name = loader.construct_object(key)
            line = key.start_mark.line + 1
            if (key.tag, name) in lines:
                yield name, lines[key.tag, name], line
            lines[key.tag, name] = line


def settings_error(error: ValidationError, known: Iterable[str], what: str) -> ConfigError:
    """Return what pydantic finds wrong with a table of settings as one error that names every wrong field.

    Args:
        error: What pydantic raised.
        known: Names of the fields that there are.
        what: What the settings are of, such as "job".

    Returns:
        The error.
    """
    fields, problems = list(known), dict[str, tuple[object, list[str]]]()
    for item in error.errors(include_url=False):
        field = str(item["loc"][0]) if item["loc"] else what
        texts = problems.setdefault(field, (item.get("input"), []))[1]
        texts.append({"missing": "", "extra_forbidden": ""}.get(item["type"], item["msg"]))
    unknown = [field for field in problems if field not in fields]
    names = f"the fields of a {what} are: " + ", ".join(fields)
    return ConfigError(
        "; ".join(
            _sentence(field, value, texts) if field in fields else f"{field} is not a field of a {what}"
            for field, (value, texts) in problems.items()
        ),
        where=", ".join(problems),
        fix=did_you_mean(unknown[0], fields) + names if unknown else "correct it there",
    )


def _sentence(field: str, value: object, texts: list[str]) -> str:
    if texts == [""]:
        return f"{field} is missing"
    wanted = " or ".join(dict.fromkeys(text.removeprefix("Input should be ") for text in texts))
    return f"{field} cannot be {value!r}: it should be {wanted}"
