"""The life of certificates: signed without the key leaving its owner, renewed during a run, revoked."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from federation_bench import at_once, started, together
from study import Study, project, until
from typer.testing import CliRunner

from fl_adapters.cli.app import app
from fl_adapters.cli.doctor.kit_checks import kit_checks
from fl_runtime.errors import ConfigError, FederationError, PermissionDeniedError
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import install, make_request, read_kit, write_kit

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

    request = Path(str(ran("cert", "request", "--kit", tmp_path / "north")["request"]))
    assert b"PRIVATE" not in request.read_bytes()
    assert stat.S_IMODE((tmp_path / "north/key.new.pem").stat().st_mode) == 0o600
    signed = ran("cert", "sign", request, "--authority", tmp_path / "authority", "--out", tmp_path / "signed.pem")
    ran("cert", "install", str(signed["certificate"]), "--kit", tmp_path / "north")

    assert read_kit(tmp_path / "north").identity.name == "north"
    assert not (tmp_path / "north/key.new.pem").exists()
    for path in (tmp_path / "authority").rglob("*"):
        assert path.name == "ca.key" or path.is_dir() or b"PRIVATE" not in path.read_bytes()


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
    assert [item["missing"] for item in outcome["rounds"]] == [(), ()]
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
    assert [item["sites"] for item in outcome["rounds"]] == [("north", "south"), ("south",)]
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
    assert study.server.outcome("job")["rounds"][0]["sites"] == ("south",)


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
    install(study.kits / "mina", study.authority.renew("mina", days=0.001), "mail")
    rows = ran("cert", "list", "--authority", study.authority.folder)["certificates"]
    states = [(row["name"], row["state"].partition(" 2")[0]) for row in rows]  # type: ignore[attr-defined]
    assert states.count(("south", "revoked")) == 1
    assert [state for name, state in states if name == "north"] == ["replaced", "valid"]
    with pytest.raises(ConfigError, match="no certificate of south"):
        study.authority.revoke("south")


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
