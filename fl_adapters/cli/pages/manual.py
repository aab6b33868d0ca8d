"""Command `fl-adapters manual`: pages for `man`, made from the help of the commands."""

from __future__ import annotations

import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.cli.pages.stats import command_parser as stats_parser
from fl_runtime.errors import ConfigError
from fl_runtime.version import VERSION

_BESIDE_THE_COMMAND = Path(sysconfig.get_path("data"), "share", "man")


@dataclass(frozen=True)
class Command:
    """A command with its help, as its manual page needs it.

    Attributes:
        name: All its words, such as "fl-adapters job submit".
        usage: What follows the name: options and arguments.
        paragraphs: What it does, first in one sentence.
        options: Each option and argument with its help and its default.
        commands: Each command below it, with what that is for.
        examples: Lines of examples.
        help: The whole text of `--help`.
    """

    name: str
    usage: str
    paragraphs: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    commands: tuple[tuple[str, str], ...]
    examples: tuple[str, ...]
    help: str

    @property
    def page(self) -> str:
        """Name of the manual page, such as "fl-adapters-job-submit"."""
        return self.name.replace(" ", "-")


def run(root: Any, folder: Path | None, as_json: bool) -> int:
    """Write a page for every command into `folder`/man1. Returns the exit status.

    Args:
        root: The whole command line, as a click command.
        folder: Folder of manual pages. None: the one that `man` looks into for programs beside `fl-adapters`.
        as_json: Print one JSON object.
    """
    with report_errors(as_json):
        pages = (folder or _BESIDE_THE_COMMAND) / "man1"
        names = []
        try:
            pages.mkdir(parents=True, exist_ok=True)
            for command in commands(root):
                (pages / f"{command.page}.1").write_text(roff(command), encoding="utf-8")
                names.append(command.page)
        except OSError as error:
            raise ConfigError(
                f"the pages cannot be written: {error.strerror}",
                where=str(pages),
                fix="name another folder with --out, such as ~/.local/share/man",
            ) from None
        if as_json:
            show_json({"folder": str(pages), "pages": names})
        else:
            console = console_for(as_json)
            console.print(f"{len(names)} pages in {pages}", highlight=False, soft_wrap=True)
            console.print("read the first with: man fl-adapters", highlight=False)
    return 0


def commands(command: Any, name: str = "fl-adapters", above: Any = None) -> Iterator[Command]:
    """Yield a command and all below it, as `--help` describes them, in its order.

    Args:
        command: A click command.
        name: All its words.
        above: Context of the group that it belongs to.
    """
    context = command.context_class(command, info_name=name.rpartition(" ")[2], parent=above, max_content_width=100)
    parts = command.list_commands(context) if hasattr(command, "list_commands") else []
    below = [(part, found) for part in parts if not (found := command.get_command(context, part)).hidden]
    parser = stats_parser() if name == "fl-adapters stats" else None
    if parser is not None:
        yield _of_parser(name, parser)
    else:
        records = (param.get_help_record(context) for param in command.get_params(context))
        yield Command(
            name=name,
            usage=" ".join(command.collect_usage_pieces(context)),
            paragraphs=_paragraphs(command.help or ""),
            options=tuple((term, " ".join(text.split())) for term, text in filter(None, records)),
            commands=tuple((part, found.get_short_help_str(limit=200)) for part, found in below),
            examples=_examples(command.epilog or ""),
            help=command.get_help(context),
        )
    for part, found in below:
        yield from commands(found, f"{name} {part}", context)


def _of_parser(name: str, parser: Any) -> Command:
    """A command whose options are those of argparse."""
    options = tuple(
        (
            ", ".join(action.option_strings or [action.metavar])
            + (f" {action.metavar or action.dest.upper()}" * takes),
            action.help,
        )
        for action in parser._actions
        for takes in [bool(action.option_strings) and action.nargs != 0]
    )
    usage = " ".join(parser.format_usage().split()).partition(name)[2].strip()
    return Command(
        name, usage, (parser.description,), options, (), _examples(parser.epilog or ""), parser.format_help()
    )


def _paragraphs(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(text)) if part.strip())


def _examples(epilog: str) -> tuple[str, ...]:
    after = re.split(r"(?i)^\s*examples?:\n", epilog.replace("\b", ""), maxsplit=1, flags=re.MULTILINE)
    return tuple(line.strip() for line in after[1].splitlines() if line.strip()) if len(after) > 1 else ()


def roff(command: Command) -> str:
    """Return the manual page of a command in the language of `man`: roff with the macros man(7).

    Args:
        command: The command.

    Returns:
        The text of the page.
    """
    first, *more = command.paragraphs
    lines = [
        f'.TH "{_plain(command.page.upper())}" "1" "" "{_plain(f"fl-adapters {VERSION}")}" "fl\\-adapters"',
        *(".SH NAME", f"{_plain(command.page)} \\- {_plain(first.rstrip('.'))}"),
        *(".SH SYNOPSIS", f".B {_plain(command.name)}", _plain(command.usage)),
        *(".SH DESCRIPTION", _text(first)),
        *(line for part in more for line in (".PP", _text(part))),
        *_listed("OPTIONS AND ARGUMENTS", command.options),
        *_listed("COMMANDS", ((f"{command.name} {part}", text) for part, text in command.commands)),
    ]
    if command.examples:
        lines += [".SH EXAMPLES", ".nf", *map(_text, command.examples), ".fi"]
    others = [f"{command.page}-{part}" for part, _ in command.commands]
    if " " in command.name:
        others.insert(0, command.name.rpartition(" ")[0].replace(" ", "-"))
    lines += [".SH SEE ALSO", ",\n".join(f"\\fB{_plain(other)}\\fP(1)" for other in others)]
    return "\n".join(lines) + "\n"


def _listed(heading: str, entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    found = [line for term, text in entries for line in (".TP", f".B {_plain(term)}", _text(text))]
    if found:
        yield from (f".SH {heading}", *found)


def _text(words: str) -> str:
    """Words with what stands between backticks in bold."""
    return re.sub(r"`([^`]+)`", r"\\fB\1\\fP", _plain(words))


def _plain(words: str) -> str:
    """Words as roff prints them: no character of theirs is one of its own."""
    plain = (
        words.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("^", "\\(ha").replace("~", "\\(ti")
    )
    return f"\\&{plain}" if plain.startswith(".") else plain
