"""Options of the commands `fl-adapters authority ...`. Their code is in authority.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fl_adapters.participant.kit import KIT_VARIABLE

PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        envvar="FL_ADAPTERS_AUTHORITY_PASSPHRASE_FILE",
        help="File with the passphrase of the authority's key. Default: $FL_ADAPTERS_AUTHORITY_PASSPHRASE, else a "
        "prompt.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
_Authority = Annotated[Path, typer.Option("--authority", help="Folder of the certificate authority.")]

_Admin = Annotated[
    Path | None, typer.Option("--kit", help="Kit of a project admin, to reach the server. Default: none.")
]

authority = typer.Typer(
    name="authority",
    help="Look after the certificate authority: its passphrase, and the change to a new root.",
    epilog="\b\nExamples:\n  fl-adapters authority status --authority kits/authority --kit kits/ada\n"
    "  fl-adapters authority rotate --authority kits/authority --kit kits/ada",
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


def rotate(folder: _Authority, kit: _Admin = None, file: PassphraseFile = None, as_json: _Json = False) -> None:
    """Begin to change to a new root, or go on with a rotation that has begun.

    Everybody gets a certificate under the new root, and takes it up through the server; runs go on. Until `finish`,
    both roots count.
    """
    from fl_adapters.cli.federation import authority as command

    sys.exit(command.rotate(folder, kit, file, as_json))


def finish(
    folder: _Authority,
    kit: _Admin = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="NAME", help="Participant to leave behind. Repeatable. Default: none."),
    ] = None,
    file: PassphraseFile = None,
    as_json: _Json = False,
) -> None:
    """End a rotation: the old root does not count any more, and its key is deleted.

    Refused while a participant has not taken up the new root.
    """
    from fl_adapters.cli.federation import authority as command

    sys.exit(command.finish(folder, kit, without or (), file, as_json))


def status(folder: _Authority, kit: _Admin = None, as_json: _Json = False) -> None:
    """Show the trusted roots, and with an admin's kit who has taken up the newest."""
    from fl_adapters.cli.federation import authority as command

    sys.exit(command.status(folder, kit, as_json))


def install(
    package: Annotated[
        Path, typer.Argument(metavar="roots.json", help="File in the authority's folder; also its outside.json.")
    ],
    kit: Annotated[Path, typer.Option("--kit", envvar=KIT_VARIABLE, help="Folder of the startup kit.")],
    as_json: _Json = False,
) -> None:
    """Take up new roots in a kit by hand, or outside authorities. The kit of the server hands new roots out."""
    from fl_adapters.cli.federation import authority as command

    sys.exit(command.install(package, kit, as_json))


for _name, _command, _examples in (
    (
        "passphrase",
        passphrase,
        "  fl-adapters authority passphrase --authority kits/authority\n"
        "  fl-adapters authority passphrase --authority kits/authority --passphrase-file old --new-file new",
    ),
    ("rotate", rotate, "  fl-adapters authority rotate --authority kits/authority --kit kits/ada"),
    ("status", status, "  fl-adapters authority status --authority kits/authority --kit kits/ada"),
    (
        "finish",
        finish,
        "  fl-adapters authority finish --authority kits/authority --kit kits/ada\n"
        "  fl-adapters authority finish --authority kits/authority --kit kits/ada --without west",
    ),
    ("install", install, "  fl-adapters authority install roots.json --kit north"),
):
    authority.command(name=_name, epilog=f"\b\nExamples:\n{_examples}")(_command)
