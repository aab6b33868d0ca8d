"""The commands of a provisioned federation, and their options. What they do is in modules of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fl_adapters.participant.kit import KIT_VARIABLE

_Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
_Kit = Annotated[Path, typer.Option("--kit", envvar=KIT_VARIABLE, help="Folder of a startup kit.")]
_Authority = Annotated[Path, typer.Option("--authority", help="Folder of the certificate authority.")]
_Days = Annotated[float | None, typer.Option(help="Lifetime of the certificate. Default: the project's.")]

cert = typer.Typer(
    name="cert", help="Certificates over their life.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)
audit = typer.Typer(
    name="audit", help="The audit log.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for command, epilog in _COMMANDS:
        app.command(epilog=f"\b\nExamples:\n{epilog}")(command)
    app.command(
        epilog="\b\nExamples:\n"
        "  fl-adapters run --kit kits/north -- python train_federated.py --epochs 3\n"
        "  fl-adapters run --kit kits/north          the policy's command for the job's app",
        context_settings={"allow_interspersed_args": False},
    )(run)
    for name, command, epilog in _CERT_COMMANDS:
        cert.command(name=name, epilog=f"\b\nExamples:\n{epilog}")(command)
    audit.command(name="verify", epilog="\b\nExamples:\n  fl-adapters audit verify kits/server --kit kits/server")(
        audit_verify
    )
    app.add_typer(cert)
    app.add_typer(audit)


def provision(
    project: Annotated[Path, typer.Argument(metavar="PROJECT.yml", help="Who takes part.")],
    out: Annotated[Path, typer.Option(help="Where the kits go.")] = Path("kits"),
    as_zip: Annotated[bool, typer.Option("--zip", help="An encrypted zip (AES-256) for each kit.")] = False,
    password: Annotated[
        str, typer.Option(envvar="FL_ADAPTERS_PASSWORD", help="Of the zips. Default: a fresh one for each.")
    ] = "",
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Participants make their own keys with `cert request`.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Make the certificate authority and one startup kit per participant.

    Run again after adding somebody to the project: kits that are there stay as they are.
    """
    from fl_adapters.cli.federation import provision as command

    sys.exit(command.provision(project, out, as_zip, password, without_keys, as_json))


def unpack(
    archive: Annotated[Path, typer.Argument(metavar="KIT.zip", help="A kit that came by mail.")],
    out: Annotated[Path | None, typer.Option(help="The kit's folder. Default: the zip's name.")] = None,
    password: Annotated[
        str, typer.Option(envvar="FL_ADAPTERS_PASSWORD", prompt=True, hide_input=True, help="Of the zip.")
    ] = "",
    as_json: _Json = False,
) -> None:
    """Unpack a kit that `provision --zip` has made. 7-Zip and WinZip open it too."""
    from fl_adapters.cli.federation import provision as command

    sys.exit(command.unpack(archive, out, password, as_json))


def server(
    kit: _Kit,
    folder: Annotated[Path, typer.Option(help="Where runs go; the audit log is in the kit.")] = Path("runs"),
    listen: Annotated[str, typer.Option(help="host:port to bind. Default: the kit's.")] = "",
    job: Annotated[Path | None, typer.Option(help="Run this job (YAML) and end. Default: wait for jobs.")] = None,
    as_json: _Json = False,
) -> None:
    """The server of a federation: one port, mutual TLS. SIGTERM and Ctrl-C stop it; a job goes on when it is back."""
    from fl_adapters.cli.federation import server as command

    sys.exit(command.run(kit, folder, listen, job, as_json))


def run(
    kit: _Kit,
    command: Annotated[list[str] | None, typer.Argument(metavar="-- COMMAND", help="Any training command.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder for the framework's own output and model, as in a simulation.")
    ] = None,
    patience_s: Annotated[float, typer.Option(help="How long a server that is not there is waited for.")] = 3600.0,
    as_json: _Json = False,
) -> None:
    """Wait for a job and run COMMAND for it, as a participant. The site opens no port.

    The site's policy (policy.yml in the kit) decides whether it takes part and what leaves. Exit status: the
    command's.
    """
    from fl_adapters.cli.federation import run as module

    sys.exit(module.run(kit, tuple(command or ()), results, patience_s, as_json))


def status(kit: _Kit, as_json: _Json = False) -> None:
    """What the federation's server is doing: job, round, sites."""
    from fl_adapters.cli.federation import status as command

    sys.exit(command.run(kit, as_json))


def cert_request(kit: _Kit, as_json: _Json = False) -> None:
    """Make a new private key in the kit, which stays there, and a request to have it signed."""
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.request(kit, as_json))


def cert_sign(
    request: Annotated[Path, typer.Argument(metavar="REQUEST.pem")],
    authority: _Authority,
    out: Annotated[Path | None, typer.Option(help="The certificate. Default: NAME.pem beside the request.")] = None,
    days: _Days = None,
    as_json: _Json = False,
) -> None:
    """Sign a request, if it comes from somebody in the project."""
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.sign(request, authority, out, days, as_json))


def cert_install(
    certificate: Annotated[Path, typer.Argument(metavar="CERTIFICATE.pem")], kit: _Kit, as_json: _Json = False
) -> None:
    """Put a signed or renewed certificate into its kit. What is running takes it up by itself."""
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.install(certificate, kit, as_json))


def cert_renew(
    authority: _Authority,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Default: all that end soon.")] = None,
    out: Annotated[Path, typer.Option(help="Where the certificates go.")] = Path("renewed"),
    days: _Days = None,
    as_json: _Json = False,
) -> None:
    """New certificates for the same keys. Send them out; `cert install` puts them in force without stopping a run."""
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.renew(names or (), authority, out, days, as_json))


def cert_revoke(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    authority: _Authority,
    kit: Annotated[Path | None, typer.Option(help="A project admin's kit: the server is told at once.")] = None,
    as_json: _Json = False,
) -> None:
    """Make all certificates of NAME worthless, on open connections too."""
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.revoke(name, authority, kit, as_json))


def cert_list(authority: _Authority, as_json: _Json = False) -> None:
    """Every certificate, until when it is valid, and what has become of it."""
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.listing(authority, as_json))


def audit_verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="That holds audit.jsonl.")],
    kit: Annotated[Path | None, typer.Option(help="The kit that must have signed it.")] = None,
    as_json: _Json = False,
) -> None:
    """Find lines of the audit log that were edited, removed or moved. Exit status 1 if there are any."""
    from fl_adapters.cli.federation import cert as command

    sys.exit(command.verify(folder, kit, as_json))


_COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (
        provision,
        "  fl-adapters provision project.yml --out kits\n  fl-adapters provision project.yml --zip",
    ),
    (unpack, "  fl-adapters unpack north.zip"),
    (
        server,
        "  fl-adapters server --kit kits/server\n  fl-adapters server --kit kits/server --job job.yml --json",
    ),
    (status, "  fl-adapters status --kit kits/ada"),
)
_CERT_COMMANDS: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("request", cert_request, "  fl-adapters cert request --kit north"),
    ("sign", cert_sign, "  fl-adapters cert sign request.pem --authority kits/authority"),
    ("install", cert_install, "  fl-adapters cert install north.pem --kit north"),
    (
        "renew",
        cert_renew,
        "  fl-adapters cert renew --authority kits/authority\n"
        "  fl-adapters cert renew north --authority kits/authority --days 30",
    ),
    ("revoke", cert_revoke, "  fl-adapters cert revoke north --authority kits/authority --kit kits/ada"),
    ("list", cert_list, "  fl-adapters cert list --authority kits/authority"),
)
