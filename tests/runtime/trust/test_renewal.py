"""A renewed certificate takes the place of the old one when it is first used, and installing it can be cut off."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from study import Study, asked

from fl_runtime.client.control import ControlClient
from fl_runtime.client.kit_transport import KitTransport
from fl_runtime.errors import PermissionDeniedError
from fl_runtime.server.federation import renewals
from fl_runtime.trust.kits import install, make_request, read_kit


def test_a_renewed_certificate_ends_the_old_one_only_when_it_is_used(study: Study, monkeypatch: Any) -> None:
    monkeypatch.setattr(renewals, "GRACE", timedelta(0))
    kit, old = study.kits / "north", study.folder / "old"
    asked(kit, study.address)
    renewed = study.authority.renew("north")  # and its mail is lost: the site goes on with what it has
    shutil.copytree(kit, old)
    assert asked(old, study.address)

    install(kit, renewed, "a second mail")
    assert asked(kit, study.address)
    with pytest.raises(PermissionDeniedError, match="was replaced by a renewed one") as caught:
        asked(old, study.address)
    assert "cert install" in caught.value.fix
    refusal = study.refusals()[-1]
    assert (refusal["who"], refusal["rule"]) == (read_kit(kit).identity.uri, "certificate: the newest of its key")

    study.server.close()
    study.start()  # what the first one knew is on the disk
    with pytest.raises(PermissionDeniedError, match="was replaced"):
        asked(old, study.address)
    assert asked(kit, study.address)
    assert ControlClient(KitTransport(study.kits / "south", study.address)).ask("Status")


def test_calls_under_way_with_the_old_certificate_are_not_cut_off(study: Study) -> None:
    kit, old = study.kits / "north", study.folder / "old"
    shutil.copytree(kit, old)
    install(kit, study.authority.renew("north"), "mail")
    assert asked(kit, study.address)
    assert asked(old, study.address), "for a minute"


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_an_install_that_is_killed_leaves_a_kit_that_works(study: Study, monkeypatch: Any, writes: int) -> None:
    from fl_runtime.trust import kits

    kit = study.kits / "north"
    make_request(kit)
    _, key = kits_request(kit)
    pem = study.authority.issue(study.authority.project.participant("north"), key)
    real, left = kits.write_file, [writes]

    def killed(path: Path, *args: Any, **options: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kits, "write_file", killed)
        try:
            install(kit, pem, "mail")
        except KeyboardInterrupt:
            assert writes < 2
    assert read_kit(kit)
    assert asked(kit, study.address)
    install(kit, pem, "mail")
    assert read_kit(kit).certificate.pem == pem
    assert asked(kit, study.address)


def kits_request(kit: Path) -> tuple[Any, Any]:
    from fl_runtime.trust.certificates import read_request

    return read_request((kit / "request.pem").read_bytes())
