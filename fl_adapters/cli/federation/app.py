"""Commands of a provisioned federation and their options. Each command's code is in its own module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fl_adapters.cli.federation.authority_app import PassphraseFile, authority
from fl_adapters.cli.federation.server_app import server
from fl_adapters.cli.output import report_errors
from fl_adapters.participant.kit import KIT_VARIABLE

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
_Kit = Annotated[Path, typer.Option("--kit", envvar=KIT_VARIABLE, help="Folder of the startup kit.")]
_Authority = Annotated[Path, typer.Option("--authority", help="Folder of the certificate authority.")]
_Days = Annotated[
    float | None, typer.Option(help="Lifetime of the certificate in days. Default: that of the project file.")
]

_PasswordFile = Annotated[
    Path | None,
    typer.Option("--password-file", help="File with the password, of mode 0600. Default: $FL_ADAPTERS_PASSWORD."),
]
_NoPassword = Annotated[str, typer.Option("--password", hidden=True)]

cert = typer.Typer(
    name="cert",
    help="Request, sign, install, renew, revoke and list certificates; sign the revocation list.",
    epilog="\b\nExamples:\n  fl-adapters cert list --authority kits/authority\n"
    "  fl-adapters cert renew --authority kits/authority",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)
audit = typer.Typer(
    name="audit",
    help="Check an audit log: nobody has edited, removed or moved its lines.",
    epilog="\b\nExamples:\n  fl-adapters audit verify kits/server --kit kits/server",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for command, epilog in _COMMANDS:
        app.command(epilog=f"\b\nExamples:\n{epilog}")(command)
    # `run` is not in _COMMANDS: options that follow the training command belong to that command
    app.command(
        epilog="\b\nExamples:\n"
        "  fl-adapters run --kit kits/north -- python train_federated.py --epochs 3\n"
        "  fl-adapters run --kit kits/north          the policy's command for the job's app",
        context_settings={"allow_interspersed_args": False},
    )(run)
    for name, command, epilog in _CERT_COMMANDS:
        cert.command(name=name, epilog=f"\b\nExamples:\n{epilog}")(command)
    audit.command(
        name="verify",
        epilog="\b\nExamples:\n  fl-adapters audit verify kits/server --kit kits/server\n"
        "  fl-adapters audit verify copies/server --authority kits/ada/ca.pem --witness kits/north",
    )(audit_verify)
    app.add_typer(server)
    app.add_typer(cert)
    app.add_typer(authority)
    app.add_typer(audit)


def provision(
    project: Annotated[Path, typer.Argument(metavar="PROJECT.yml", help="Project file, which lists the participants.")],
    out: Annotated[Path, typer.Option(help="Folder for the kits and the certificate authority.")] = Path("kits"),
    as_zip: Annotated[bool, typer.Option("--zip", help="Make an encrypted zip (AES-256) of each kit.")] = False,
    password_file: _PasswordFile = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Make no keys: participants make theirs with `cert request`.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    again: Annotated[
        list[str] | None,
        typer.Option(
            "--again",
            metavar="NAME",
            help="Make a second kit of this participant, and revoke its certificates. Repeatable. Default: of nobody.",
        ),
    ] = None,
    kit: Annotated[
        Path | None,
        typer.Option(
            "--kit", help="Project admin's kit, to send the list of members to the server. Default: not sent."
        ),
    ] = None,
    as_json: _Json = False,
    password: _NoPassword = "",
) -> None:
    """Make a certificate authority and one startup kit per participant.

    Run it again after adding participants to the project file: existing kits stay as they are, and nobody who has a
    certificate gets a second one. The server learns who takes part now, without a restart.

    The passwords of zips are random, unless a file or $FL_ADAPTERS_PASSWORD has one. With a passphrase from a file or
    the environment, a new authority's key is encrypted.
    """
    from fl_adapters.cli.federation import provision as command
    from fl_adapters.cli.passwords import given_password

    with report_errors(as_json):
        shared = given_password(password, password_file, command.PASSWORD_VARIABLE)
    sys.exit(command.provision(project, out, as_zip, shared, without_keys, again or (), passphrase_file, kit, as_json))


def unpack(
    archive: Annotated[Path, typer.Argument(metavar="KIT.zip", help="Kit that `provision --zip` made.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the kit. Default: the zip's name.")] = None,
    password_file: _PasswordFile = None,
    as_json: _Json = False,
    password: _NoPassword = "",
) -> None:
    """Unpack a startup kit from an encrypted zip. 7-Zip and WinZip can open it too.

    It asks for the password, unless a file or $FL_ADAPTERS_PASSWORD has it.
    """
    from fl_adapters.cli.federation import provision as command
    from fl_adapters.cli.passwords import ask_password, given_password

    with report_errors(as_json):
        secret = given_password(password, password_file, command.PASSWORD_VARIABLE)
        secret = secret or ask_password(f"Password of {archive.name}", command.PASSWORD_VARIABLE)
    sys.exit(command.unpack(archive, out, secret, as_json))


def run(
    kit: _Kit,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND", help="Training command. Default: that of the policy."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the framework's output and model, as in a simulation. Default: where the command puts it."
        ),
    ] = None,
    patience_s: Annotated[
        float | None,
        typer.Option(help="Seconds to wait for a server that does not answer. Default: the job's, else the project's."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Wait for a job and run COMMAND as a participant. The site opens no port.

    The site's policy (policy.yml in the kit) decides whether it takes part and what may leave. The exit status is that
    of COMMAND.
    """
    from fl_adapters.cli.federation import run as module

    sys.exit(module.run(kit, tuple(command or ()), results, patience_s, as_json))


def status(kit: _Kit, as_json: _Json = False) -> None:
    """Show what the federation's server is doing: its job, round and sites."""
    from fl_adapters.cli.federation import status as command

    sys.exit(command.run(kit, as_json))


def cert_request(kit: _Kit, as_json: _Json = False) -> None:
    """Make a new private key in the kit, where it stays, and a request to have it signed."""
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.request(kit, as_json))


def cert_sign(
    request: Annotated[Path, typer.Argument(metavar="REQUEST.pem", help="Request of a participant.")],
    authority: _Authority,
    out: Annotated[
        Path | None, typer.Option(help="File for the certificate. Default: NAME.pem beside the request.")
    ] = None,
    days: _Days = None,
    passphrase_file: PassphraseFile = None,
    fingerprint: Annotated[
        str, typer.Option(help="Fingerprint of the key, as its owner has read it out. Default: ask at the terminal.")
    ] = "",
    keep_earlier: Annotated[
        bool, typer.Option("--keep-earlier", help="Let certificates of the participant's earlier keys count, too.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Sign the request of a participant of the project, after comparing the fingerprint of its key.

    Its earlier certificates, for another key, are revoked.
    """
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.sign(request, authority, out, days, fingerprint, keep_earlier, passphrase_file, as_json))


def cert_install(
    certificate: Annotated[
        Path, typer.Argument(metavar="CERTIFICATE.pem", help="Certificate from `cert sign` or `cert renew`.")
    ],
    kit: _Kit,
    key: Annotated[
        Path | None,
        typer.Option(help="Its private key, if made elsewhere, such as by `step ca certificate`. Default: the kit's."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Install a signed or renewed certificate into its kit. Running processes start to use it by themselves.

    A certificate of an outside authority must be one that the project file maps to this participant.
    """
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.install(certificate, kit, key, as_json))


def cert_renew(
    authority: _Authority,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Participants. Default: all that expire soon."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the certificates.")] = Path("renewed"),
    days: _Days = None,
    passphrase_file: PassphraseFile = None,
    as_json: _Json = False,
) -> None:
    """Make new certificates for the same keys.

    Send them to the participants: `cert install` puts them to use without stopping a run.
    """
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.renew(names or (), authority, out, days, passphrase_file, as_json))


def cert_revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Participant.")],
    authority: _Authority,
    kit: Annotated[
        Path | None, typer.Option(help="Kit of a project admin, to tell the server at once. Default: none.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Revoke this certificate of an outside authority. Default: all of ours.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: _Json = False,
) -> None:
    """Revoke all certificates of a participant, also for open connections.

    It can be run again, for example if the server could not be reached.
    """
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.revoke(name, authority, kit, certificate, passphrase_file, as_json))


def cert_crl(
    authority: _Authority,
    kit: Annotated[
        Path | None, typer.Option(help="Kit of a project admin, to send the list to the server. Default: none.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: _Json = False,
) -> None:
    """Sign the revocation list again, before it ends, and send it to the server.

    The list counts for the project file's `crl_days`. The server takes no jobs once it has ended.
    """
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.crl(authority, kit, passphrase_file, as_json))


def cert_list(authority: _Authority, as_json: _Json = False) -> None:
    """List all certificates, first those that count: state, end, serial number and the fingerprint of the key."""
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.listing(authority, as_json))


def audit_verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with audit.jsonl.")],
    kit: Annotated[Path | None, typer.Option(help="Startup kit that must have signed the log. Default: none.")] = None,
    authority: Annotated[
        Path | None,
        typer.Option(help="Certificate of the authority whose participant must have signed: ca.pem. Default: none."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Public key or certificate of the signer, in PEM. Default: none.")
    ] = None,
    witness: Annotated[
        list[Path] | None,
        typer.Option(
            help="Audit log of another participant, which noted lines of this one. Repeatable. Default: none."
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Find lines of the audit log that were edited, removed, added or moved. The exit status is 1 if there are any.

    Name one signer that you trust: --kit, --authority or --key. Anyone can write a log that is consistent in itself.
    """
    from fl_adapters.cli.federation import audit as command

    sys.exit(command.verify(folder, kit, authority, key, witness or [], as_json))


_COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (
        provision,
        "  fl-adapters provision project.yml --out kits\n  fl-adapters provision project.yml --zip\n"
        "  fl-adapters provision project.yml --kit kits/ada     after a change; the server learns of it",
    ),
    (unpack, "  fl-adapters unpack north.zip"),
    (status, "  fl-adapters status --kit kits/ada"),
)
_CERT_COMMANDS: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("request", cert_request, "  fl-adapters cert request --kit north"),
    (
        "sign",
        cert_sign,
        "  fl-adapters cert sign request.pem --authority kits/authority\n"
        "  fl-adapters cert sign request.pem --authority kits/authority --fingerprint 5f1c...",
    ),
    ("install", cert_install, "  fl-adapters cert install north.pem --kit north"),
    (
        "renew",
        cert_renew,
        "  fl-adapters cert renew --authority kits/authority\n"
        "  fl-adapters cert renew north --authority kits/authority --days 30",
    ),
    ("revoke", cert_revoke, "  fl-adapters cert revoke north --authority kits/authority --kit kits/ada"),
    ("crl", cert_crl, "  fl-adapters cert crl --authority kits/authority --kit kits/ada"),
    ("list", cert_list, "  fl-adapters cert list --authority kits/authority"),
)
