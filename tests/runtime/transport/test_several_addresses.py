"""A kit may name several addresses: sites and admins find the one where the server answers, also after it has moved."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from federation_bench import Site, serving
from study import Study, project

from fl_adapters.cli.doctor import kit_checks
from fl_adapters.participant import kit as script_kit
from fl_runtime.errors import ConfigError, ConnectionLostError
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import read_kit, write_kit
from fl_runtime.trust.project import Project, ServerEntry, read_project

TWO = ("127.0.0.1:8443", "127.0.0.1:8444")


@pytest.fixture
def dead() -> Iterator[str]:
    """An address at which nobody listens; the port stays reserved."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


def _moved(before: Project, *addresses: str) -> Project:
    return Project(**{**before.model_dump(), "server": {"address": addresses}})


def test_a_run_goes_on_when_the_server_is_started_at_another_address(tmp_path: Path, dead: str) -> None:
    start = {"w": np.zeros(3)}
    with serving(tmp_path, 1, rounds=2) as bench:
        first = bench.address
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        site = Site("site-1", GrpcTransport([dead, first, f"127.0.0.1:{port}"], "secret of site-1"))
        site.join()
        site.register(start)
        site.submit(site.start(start), {"w": np.ones(3)})
        bench.server.close()
        with serving(tmp_path, 1, rounds=2, port=port) as moved:
            site.submit(site.client.next_task(), {"w": np.full(3, 2.0)})
            assert site.client.next_task().arrays["w"].tolist() == [2, 2, 2]
            assert moved.address != first
            site.vanish()


def test_nobody_answers_at_any_address(dead: str) -> None:
    site = Site("site-1", GrpcTransport([dead, dead.replace("127.0.0.1", "127.0.0.2")], "token"), patience_s=0.2)
    with pytest.raises(ConnectionLostError, match="does not answer"):
        site.join()


def test_each_address_of_a_project_gets_a_server_kit_and_everybody_knows_all(tmp_path: Path) -> None:
    file = tmp_path / "project.yml"
    file.write_text(
        f"federation: study\nserver: {{address: [{TWO[0]}, {TWO[1]}]}}\nsites: [{{name: north, organisation: n}}]\n"
    )
    authority = Authority.create(tmp_path / "authority", read_project(file))
    for identity in authority.project.participants():
        write_kit(tmp_path / identity.name, authority, identity)
    servers = [read_kit(tmp_path / name, kind="server") for name in ("server", "server-2")]
    assert [(kit.address, kit.listen) for kit in servers] == [(TWO[0], "0.0.0.0:8443"), (TWO[1], "0.0.0.0:8444")]
    assert read_kit(tmp_path / "north").addresses == script_kit.read_kit(tmp_path / "north").addresses == TWO
    with pytest.raises(ConfigError, match="listed twice"):
        Project(**{**authority.project.model_dump(), "server": {"address": (TWO[0], TWO[0])}})
    file.write_text(file.read_text().replace(f"[{TWO[0]}, {TWO[1]}]", "[]"))
    with pytest.raises(ConfigError, match=r"server.address: is empty"):
        read_project(file)


def test_kits_with_one_address_are_as_before(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "authority", project())
    write_kit(tmp_path / "north", authority, authority.project.participant("north"))
    assert '"servers"' not in (tmp_path / "north" / "kit.json").read_text()
    kit = script_kit.read_kit(tmp_path / "north")
    assert (kit.servers, kit.addresses) == ((), ("127.0.0.1:8443",))
    assert ServerEntry(address="127.0.0.1:8443").names == ("server",)


def test_an_admin_and_the_doctor_find_the_server_behind_a_dead_address(tmp_path: Path, dead: str) -> None:
    with Study(tmp_path) as study:
        study.authority.project = _moved(study.authority.project, dead, study.address)
        folder = tmp_path / "moved"
        write_kit(folder, study.authority, study.authority.project.participant("ada"))
        from fl_adapters.cli.federation.connection import connected

        kit = read_kit(folder)
        with connected(kit) as control:
            assert control.ask("Status")["federation"] == "study"
        checks = list(kit_checks.kit_checks(folder))
        assert [check.name for check in checks if check.status == "problem"] == []
        assert any(check.status == "note" and dead.rpartition(":")[2] in check.detail for check in checks)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_a_server_listens_on_all_addresses_of_ipv4_and_ipv6(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.start("[::]:0")
    with ExitStack() as things:
        things.callback(study.server.close)
        host, _, port = study.address.rpartition(":")
        assert host == "[::]"
        socket.create_connection(("::1", int(port)), 10).close()
        study.address = f"127.0.0.1:{port}"  # the address in the certificate
        things.callback(study._things.close)
        assert study.admin().ask("Status")["federation"] == "study"
