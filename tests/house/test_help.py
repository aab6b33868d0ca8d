"""The help of every command says what it is for, gives examples that parse, and tells the default of each option."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from shown_commands import check

from fl_adapters.cli.app import app
from fl_adapters.cli.pages.manual import Command, commands, roff

ROOT: Any = typer.main.get_command(app)
COMMANDS = list(commands(ROOT))
every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.page)


@every_command
def test_help_begins_with_the_purpose_and_has_an_example_that_parses(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    sentence = re.match(r"[A-Z][a-z]+,? .*?\.(?= |$)", command.paragraphs[0])
    assert sentence, f"{command.paragraphs[0]!r} is no sentence"
    shown = " ".join(command.help.split())
    assert shown.lower().startswith(f"usage: {command.name} ") and sentence[0] in shown
    assert any(line.startswith(command.name) for line in command.examples), "there is no example of this command"
    for line in command.examples:
        typed = re.split(r"\s{3,}", line)[0]  # what follows is a remark
        try:
            check(typed, re.findall(r"(--\w+) goes to the script", line))
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{typed}: {getattr(error, 'message', error)}") from error


@every_command
def test_every_option_has_help_with_its_default(command: Command) -> None:
    for term, text in command.options:
        assert text, f"{term} has no help"
        switch = re.fullmatch(r"(-\w, )?--?[\w-]+", term)  # without a value: off, unless it is given
        if term.startswith("-") and not switch:
            assert re.search(r"Default: |\[.*(default: |required)", text), f"{term}: {text}"
        assert not re.search(r"Default: .*default: ", text), f"{term} tells two defaults: {text}"


def test_an_option_without_a_default_is_noticed() -> None:
    bare = Command("fl-adapters x", "", ("Do it.",), (("--port <int>", "A port."),), (), (), "")
    with pytest.raises(AssertionError, match="--port"):
        test_every_option_has_help_with_its_default(bare)


def test_every_command_has_a_manual_page_with_what_its_help_says(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "fl_adapters", "manual", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert f"{len(COMMANDS)} pages" in done.stdout, done.stderr
    assert {path.stem for path in (tmp_path / "man1").iterdir()} == {command.page for command in COMMANDS}
    for command in COMMANDS:
        text = (tmp_path / "man1" / f"{command.page}.1").read_text("utf-8")
        assert text == roff(command)


def test_groff_sets_every_page_without_a_warning_and_readers_see_the_words_of_the_help(tmp_path: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff, which sets manual pages, is not installed")
    pages = []
    for command in COMMANDS:
        pages.append(tmp_path / f"{command.page}.1")
        pages[-1].write_text(roff(command), encoding="utf-8")
    settings = ["-man", "-Tutf8", "-ww", "-P-cbou", "-rLL=500n", "-rHY=0"]  # plain text, in lines that are not broken
    done = subprocess.run(["groff", *settings, *map(str, pages)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    shown = " ".join(done.stdout.split())
    for command in COMMANDS:
        texts = [*command.paragraphs, *(text for option in command.options for text in option), *command.examples]
        for text in texts:
            assert " ".join(text.replace("`", "").split()) in shown, (command.name, text)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("si", {"simulate", "site"}),
        ("job su", {"submit"}),
        ("simulate train.py --lr 1 --best", {"--best-metric", "--best-mode"}),
        ("privacy ", {"show", "plan", "report"}),
    ],
)
def test_the_tab_key_completes_in_bash(typed: str, offered: set[str], tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    program = tmp_path / "fl-adapters"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fl_adapters "$@"\n')
    program.chmod(0o755)
    script = f"""
        PATH="{tmp_path}:$PATH"
        source <(_FL_ADAPTERS_COMPLETE=source_bash fl-adapters)
        IFS=' ' read -ra COMP_WORDS <<< "fl-adapters {typed}"
        [[ "{typed}" == *' ' ]] && COMP_WORDS+=('')
        COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
        $(complete -p fl-adapters | sed -E 's/.*-F (\\S+) .*/\\1/') fl-adapters
        echo "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (set(done.stdout.split()), done.stderr) == (offered, "")
