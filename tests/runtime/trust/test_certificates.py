"""The life of certificates: signed without the key leaving its owner, renewed during a run, revoked."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import at_once, started, together
from study import Study, project, until
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_adapters.cli.doctor.kit_checks import kit_checks
from fl_runtime.errors import ConfigError, FederationError, PermissionDeniedError
from fl_runtime.trust import kits
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import install, make_request, read_kit, write_kit
from fl_runtime.trust.revocation import read_list

W = {"w": np.zeros(4, np.float32)}


def ran(*args: str | Path) -> dict[str, object]:
    """Run a command that succeeds, and return its JSON."""
    done = CliRunner().invoke(app, [*map(str, args), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_a_private_key_never_leaves_its_owner(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", project())
    write_kit(tmp_path / "north", authority, authority.project.participant("north"), with_key=False)
    assert not (tmp_path / "north/key.pem").exists()
    with pytest.raises(ConfigError, match="no certificate yet"):
        read_kit(tmp_path / "north")

    asked = ran("cert", "request", "--kit", tmp_path / "north")
    request = Path(str(asked["request"]))
    assert b"PRIVATE" not in request.read_bytes()
    assert stat.S_IMODE((tmp_path / "north/key.new.pem").stat().st_mode) == 0o600
    signing = ["cert", "sign", request, "--authority", tmp_path / "authority", "--out", tmp_path / "signed.pem"]
    signed = ran(*signing, "--fingerprint", str(asked["fingerprint"]))
    ran("cert", "install", str(signed["certificate"]), "--kit", tmp_path / "north")

    assert read_kit(tmp_path / "north").identity.name == "north"
    assert not (tmp_path / "north/key.new.pem").exists()
    for path in (tmp_path / "authority").rglob("*"):
        assert path.name == "ca.key" or path.is_dir() or b"PRIVATE" not in path.read_bytes()


def _signing(tmp_path: Path) -> tuple[Authority, Path, str]:
    """Return an authority, a second request of north's, and its fingerprint."""
    authority = Authority.create(tmp_path / "authority", project())
    write_kit(tmp_path / "north", authority, authority.project.participant("north"))
    asked = ran("cert", "request", "--kit", tmp_path / "north")
    return authority, Path(str(asked["request"])), str(asked["fingerprint"])


def test_a_request_is_signed_only_when_its_fingerprint_was_compared(tmp_path: Path) -> None:
    authority, request, fingerprint = _signing(tmp_path)
    signing = ["cert", "sign", str(request), "--authority", str(authority.folder)]
    for options, says in (
        ([], f"nobody has compared the fingerprint of the key in this request: {fingerprint}"),
        (["--fingerprint", "0" * 64], f"the request is for the key {fingerprint}, not for {'0' * 64}"),
        (["--fingerprint", fingerprint[:-1]], "the request is for the key"),
    ):
        done = CliRunner().invoke(app, [*signing, *options])
        assert done.exit_code == 1
        assert says in done.output
    assert len(list(authority.issued())) == 1
    read_out = " : ".join(fingerprint.upper()[at : at + 4] for at in range(0, 64, 4))
    assert ran(*signing, "--fingerprint", read_out)["fingerprint"] == fingerprint


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 1)])
def test_a_person_at_a_terminal_is_asked_to_compare_the_fingerprint(tmp_path: Path, answer: str, status: int) -> None:
    import pty

    authority, request, fingerprint = _signing(tmp_path)
    ours, theirs = pty.openpty()
    words = ["cert", "sign", str(request), "--authority", str(authority.folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(kits.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "fl_adapters.cli", *words], stdin=theirs, stderr=subprocess.PIPE, env=environment
    )
    os.write(ours, f"{answer}\n".encode())
    _, shown = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == status
    assert fingerprint in shown.decode()
    assert len(list(authority.issued())) == (2 if answer == "y" else 1)


def test_a_second_key_revokes_the_first_unless_both_shall_count(tmp_path: Path) -> None:
    authority, request, fingerprint = _signing(tmp_path)
    first = read_kit(tmp_path / "north").certificate
    signing = ["cert", "sign", request, "--authority", authority.folder, "--fingerprint", fingerprint]
    assert ran(*signing, "--keep-earlier")["kept"] == [f"{first.serial:x}"]
    assert len(list(authority.counting("north"))) == 2

    signed = ran(*signing)
    assert signed["revoked"] == [f"{first.serial:x}"]
    assert {item.fingerprint for item in authority.counting("north")} == {fingerprint}
    assert first.serial in read_list(authority.crl, authority.pem, "").serials
    ran("cert", "install", str(signed["certificate"]), "--kit", tmp_path / "north")
    assert read_kit(tmp_path / "north").certificate.fingerprint == fingerprint


def test_what_a_request_asks_for_is_what_the_project_says_or_nothing(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", project())
    other = Authority.create(tmp_path / "other", project(sites=("north", "east")))
    elsewhere = other.project.participant("east")
    write_kit(tmp_path / "east", other, elsewhere, with_key=False)
    done = CliRunner().invoke(
        app, ["cert", "sign", str(make_request(tmp_path / "east")), "--authority", str(authority.folder)]
    )
    assert done.exit_code == 1
    assert "'east' is not in the project" in done.output

    write_kit(tmp_path / "south", authority, authority.project.participant("south"), with_key=False)
    make_request(tmp_path / "south")
    with pytest.raises(ConfigError, match="a key that this kit does not have"):
        install(tmp_path / "south", authority.issue(authority.project.participant("south"), _other_key()), "mail")
    with pytest.raises(ConfigError, match="the certificate is for site north"):
        install(tmp_path / "south", authority.issue(authority.project.participant("north"), _other_key()), "mail")


def _other_key() -> object:
    from fl_runtime.trust.certificates import new_key

    return new_key().public_key()


_SHORT_DAYS = 10 / 86_400  # 10 s: enough to join and start on a busy machine


def test_a_certificate_is_renewed_while_the_run_goes_on(study: Study) -> None:
    """North's and the server's certificates expire within a round; new ones are installed before."""
    for name in ("north", "server"):
        short = study.authority.renew(name, days=_SHORT_DAYS)
        install(study.kits / name, short, "mail")
    study.server.close()
    study.start()
    study.job(rounds=2)
    sites = [study.site(name) for name in study.sites]
    tasks = started(sites, W)
    old = [read_kit(study.kits / name).certificate for name in ("north", "server")]

    ran("cert", "renew", "north", "server", "--authority", study.authority.folder, "--out", study.folder / "new")
    for name in ("north", "server"):
        ran("cert", "install", study.folder / "new" / f"{name}.pem", "--kit", study.kits / name)
    until(lambda: all(each.days_left() < 0 for each in old), "the old certificates to run out")

    def finish(site: object) -> None:
        for number in (1, 2):
            task = tasks[site.name] if number == 1 else site.client.next_task()  # type: ignore[attr-defined]
            assert site.submit(task, W) == "used"  # type: ignore[attr-defined]
        site.client.next_task()  # type: ignore[attr-defined]
        site.client.leave("done", early=False)  # type: ignore[attr-defined]

    at_once(sites, finish)
    assert study.server.wait_for_job("job", 30)
    outcome = study.server.outcome("job")
    assert outcome["error"] is None
    assert [item["missing"] for item in outcome["rounds"]] == [[], []]
    assert read_kit(study.kits / "north").certificate.days_left() > 0
    assert all(site.welcome.attempt == 1 for site in sites), "nobody had to join again"


def test_an_expired_certificate_that_nobody_renewed_ends_open_calls(study: Study) -> None:
    install(study.kits / "north", study.authority.renew("north", days=_SHORT_DAYS), "mail")
    study.job(min_sites=1)
    sites = [study.site("north", patience_s=0.5), study.site("south")]
    tasks = started(sites, W)
    until(lambda: any("expired" in entry["rule"] for entry in study.refusals()), "the calls to be ended")
    with pytest.raises(FederationError):
        sites[0].submit(tasks["north"], W)


def test_revoking_ends_open_connections_at_once_and_the_others_go_on(study: Study) -> None:
    study.job(min_sites=1, rounds=2)
    north, south = study.site("north", patience_s=5), study.site("south")
    tasks = started([north, south], W)
    north.submit(tasks["north"], W)

    def waiting() -> BaseException | None:
        """Wait for the round to close, and return the error that ends the wait."""
        try:
            north.client.next_task()
        except FederationError as error:
            return error
        return None

    def revoke() -> dict[str, object]:
        return ran(
            "cert", "revoke", "north", "--authority", study.authority.folder, "--kit", _at(study, "ada"), "--json"
        )

    error, answer = together(waiting, revoke)
    assert isinstance(error, PermissionDeniedError)
    assert "north" in error.what
    assert "certificate was revoked" in error.what
    assert answer["server"] == {"ended": ["north"]}
    with pytest.raises(PermissionDeniedError, match="revoked"):
        study.site("north").join()

    south.submit(tasks["south"], W)
    task = south.client.next_task()
    south.submit(task, W)
    south.client.next_task()
    south.client.leave("done", early=False)
    assert study.server.wait_for_job("job", 30)
    outcome = study.server.outcome("job")
    assert outcome["error"] is None
    assert [item["sites"] for item in outcome["rounds"]] == [["north", "south"], ["south"]]
    refused = [entry for entry in study.refusals() if entry["rule"] == "certificate: its certificate was revoked"]
    assert refused and all("site/north" in entry["who"] for entry in refused)


def _at(study: Study, name: str) -> Path:
    """Return the kit of `name`, rewritten for the port of the test's server."""
    from study import readdressed

    return readdressed(study, name)


def test_an_update_under_way_when_its_site_is_revoked_does_not_count(study: Study) -> None:
    study.job(min_sites=1, rounds=1)
    north, south = study.site("north", patience_s=1), study.site("south")
    tasks = started([north, south], W)
    _, crl = study.authority.revoke("north")
    study.admin().ask("Revoke", crl=crl.decode())
    with pytest.raises(PermissionDeniedError, match="certificate was revoked"):
        north.submit(tasks["north"], W)
    south.submit(tasks["south"], W)
    south.client.next_task()
    south.client.leave("done", early=False)
    assert study.server.wait_for_job("job", 30)
    assert study.server.outcome("job")["rounds"][0]["sites"] == ["south"]


def test_a_revocation_list_also_counts_as_a_file_and_never_goes_back(study: Study) -> None:
    site = study.site("north")
    before = (study.authority.folder / "crl.pem").read_bytes()
    _, crl = study.authority.revoke("north")
    (study.kits / "server/crl.pem").write_bytes(crl)
    until(lambda: any(entry["action"] == "revocation list read" for entry in study.log()), "the file to be read")
    with pytest.raises(PermissionDeniedError, match="revoked"):
        site.join()
    with pytest.raises(ConfigError, match="older than the one in force"):
        study.admin().ask("Revoke", crl=before.decode())
    forged = Authority.create(study.folder / "forged", project())
    with pytest.raises(ConfigError, match="not a revocation list signed by this federation"):
        study.admin().ask("Revoke", crl=(forged.folder / "crl.pem").read_text())


def test_the_list_shows_what_has_become_of_every_certificate(study: Study) -> None:
    study.authority.revoke("south")
    install(study.kits / "north", study.authority.renew("north"), "mail")
    install(study.kits / "mina", study.authority.renew("mina", days=1 / 86_400), "mail")
    until(lambda: read_kit(study.kits / "mina").certificate.days_left() < 0, "it to end")
    rows: Any = ran("cert", "list", "--authority", study.authority.folder)["certificates"]
    states = [(row["name"], row["state"].partition(" 2")[0], row["counts"]) for row in rows]
    assert states.count(("south", "revoked", False)) == 1
    renewed = "renewed; counts until the renewed one is used"
    assert [state for state in states if state[0] == "north"] == [("north", renewed, True), ("north", "valid", True)]
    assert [state for state in states if state[0] == "mina"] == [("mina", renewed, True), ("mina", "expired", False)]
    counting = {row["serial"]: row["fingerprint"] for row in rows if row["counts"]}
    for name in ("north", "ada"):
        kit = read_kit(study.kits / name).certificate
        assert counting[f"{kit.serial:x}"] == kit.fingerprint
    shown = CliRunner().invoke(app, ["cert", "list", "--authority", str(study.authority.folder)], env={"COLUMNS": "40"})
    for serial, fingerprint in counting.items():
        assert f"serial {serial}, fingerprint {fingerprint}\n" in shown.output


def test_doctor_warns_before_a_certificate_ends_and_says_what_to_do(study: Study) -> None:
    kit = _at(study, "north")
    checks = {check.name: check for check in kit_checks(kit)}
    assert [name for name, check in checks.items() if check.status != "ok"] == []
    assert {"certificate", "policy", "server's port", "TLS", "clock"} <= checks.keys()
    now = read_kit(kit).certificate
    assert not now.expires_soon

    study.server.close()
    checks = {check.name: check for check in kit_checks(kit)}
    assert checks["server's port"].status == "problem"
    assert "start the server" in checks["server's port"].fix


def test_doctor_says_what_is_wrong_with_a_certificate(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", project(days=0.00001))
    write_kit(tmp_path / "north", authority, authority.project.participant("north"))
    until(lambda: read_kit(tmp_path / "north").certificate.days_left() < 0, "it to end")
    check = next(check for check in kit_checks(tmp_path / "north") if check.name == "certificate")
    assert (check.status, "expired" in check.detail, "cert install" in check.fix) == ("problem", True, True)
