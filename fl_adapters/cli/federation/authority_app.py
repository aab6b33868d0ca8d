"""Options of the commands `fl-adapters authority ...`. Their code is in authority.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        envvar="FL_ADAPTERS_AUTHORITY_PASSPHRASE_FILE",
        help="File with the passphrase of the authority's key. Else: $FL_ADAPTERS_AUTHORITY_PASSPHRASE, or a prompt.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
_Authority = Annotated[Path, typer.Option("--authority", help="Folder of the certificate authority.")]

authority = typer.Typer(
    name="authority",
    help="Look after the certificate authority.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


def passphrase(
    folder: _Authority,
    file: PassphraseFile = None,
    new_file: Annotated[
        Path | None, typer.Option("--new-file", help="File with the new passphrase. Default: a prompt.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Keep the key without encryption.")] = False,
    as_json: _Json = False,
) -> None:
    """Set, change or remove the passphrase of the authority's key. Key and certificates stay the same."""
    from fl_adapters.cli.federation import authority as command

    sys.exit(command.passphrase(folder, file, new_file, remove, as_json))


for _name, _command, _examples in (
    (
        "passphrase",
        passphrase,
        "  fl-adapters authority passphrase --authority kits/authority\n"
        "  fl-adapters authority passphrase --authority kits/authority --passphrase-file old --new-file new",
    ),
):
    authority.command(name=_name, epilog=f"\b\nExamples:\n{_examples}")(_command)
