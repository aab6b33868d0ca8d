"""YAML files that people write: job, project and policy. What PyYAML would take without a word is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fl_adapters import Job
from fl_runtime.errors import ConfigError
from fl_runtime.trust.policy import PolicyFile, read_policy
from fl_runtime.trust.project import read_project
from fl_runtime.yaml_files import read_yaml

PROJECT = """federation: study
server: {address: "127.0.0.1:8443"}
sites:
  - {name: north, organisation: north-hospital}
  - name: south
    organisation: south-hospital
    name: east
"""


@pytest.mark.parametrize(
    ("read", "text", "key", "lines"),
    [
        (read_policy, "initial: false\ninfo: false\ninitial: true\n", "initial", (1, 3)),
        (read_policy, "privacy:\n  epsilon: 8\n  delta: 1.0e-5\n  epsilon: 80\n", "epsilon", (2, 4)),
        (read_policy, 'filters:\n- {name: Examples, equal: true, "equal": false}\n', "equal", (2, 2)),
        (read_project, PROJECT, "name", (5, 7)),
        (Job.from_file, "app: train\nrounds: 2\nrounds: 20\n", "rounds", (2, 3)),
        (read_policy, "apps: &a {1: x, 0x1: y}\n", 1, (1, 1)),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_lines(
    tmp_path: Path, read: Callable[[Path], Any], text: str, key: object, lines: tuple[int, int]
) -> None:
    path = tmp_path / "file.yml"
    path.write_text(text)
    assert yaml.safe_load(text), "PyYAML reads it without a word"
    with pytest.raises(ConfigError, match=f"has {key!r} twice, in lines {lines[0]} and {lines[1]}") as caught:
        read(path)
    assert caught.value.where == f"{path}, line {lines[1]}"


def test_a_running_site_keeps_to_its_policy_when_a_key_is_doubled(tmp_path: Path) -> None:
    path = tmp_path / "policy.yml"
    path.write_text("initial: false\n")
    policy = PolicyFile(path)
    path.write_text("initial: false\ninitial: true\n")
    for _ in range(2):  # the file stays wrong, so it stays an error
        with pytest.raises(ConfigError, match="'initial' twice"):
            policy.refresh()
    assert policy.current.initial is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "a: 1\n1: 2\n'1': 3\n1.5: 4\n",
        "base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  a: 3\n",
        "x: &x [1, *x]\n",
        "- {a: 1}\n- {a: 2}\n",
        "? [a, b]\n: 1\n",
    ],
)
def test_other_yaml_is_read_as_pyyaml_does(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.yml"
    path.write_text(text)
    try:
        expected = repr(yaml.safe_load(text))
    except yaml.YAMLError:
        with pytest.raises(ConfigError, match="the file is not valid YAML"):
            read_yaml(path, "the file")
        return
    assert repr(read_yaml(path, "the file")) == expected


@pytest.mark.parametrize("text", ["[" * 5_000, "a: 2026-13-45\n", "a: \x00\n", "\xff"])
def test_what_cannot_be_read_is_an_error_of_ours(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.yml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        read_yaml(path, "the file")
    assert caught.value.where == str(path)
