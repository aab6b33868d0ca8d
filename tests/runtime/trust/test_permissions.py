"""Who may make which call, over real sockets; each refusal names identity, action and rule, and is audited."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from federation_bench import started
from study import ADMINS, Study

from fl_runtime.errors import ConfigError, FederationError, PermissionDeniedError, ProtocolError
from fl_runtime.transport.base import CONTROL_METHODS, METHODS
from fl_runtime.trust import permissions
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.permissions import TABLE

W = {"w": np.zeros(2, np.float32)}
WHO = {
    "site": "north",
    "project-admin": "ada",
    "organisation-admin": "olga",
    "lead": "lena",
    "member": "mina",
}


def test_every_call_has_a_rule_and_the_document_is_current() -> None:
    assert set(TABLE) == {*METHODS, *CONTROL_METHODS}
    document = Path(inspect.getfile(permissions)).parents[2] / "docs/permissions.md"
    if not document.exists():
        document = Path(__file__).parents[3] / "docs/permissions.md"  # the tests run against an installed wheel
    assert document.read_text("utf-8") == permissions.as_markdown(), "run `make permissions`"


def error_of(call: Callable[[], object]) -> FederationError | None:
    try:
        call()
    except FederationError as error:
        return error
    return None


@pytest.mark.parametrize("holder", WHO)
def test_each_role_may_call_what_the_table_says_and_nothing_else(study: Study, holder: str) -> None:
    name = WHO[holder]
    transport = study.transport(name)
    for call in TABLE:
        if call in ("Attend", "Assignment", "SubmitJob", "Revoke") and holder in TABLE[call].allowed:
            continue  # these would wait, or do something; others test them
        error = error_of(lambda call=call: list(transport.call(call, b"{}" if call in CONTROL_METHODS else b"")))
        allowed = holder in TABLE[call].allowed
        assert isinstance(error, PermissionDeniedError) != allowed, (call, error)
        if isinstance(error, PermissionDeniedError):
            assert f" {name} of " in error.what
            assert f"rule permissions: {call}" in error.where
    refused = [e for e in study.refusals() if e["rule"].startswith("permissions: ")]
    forbidden = [call for call, rule in TABLE.items() if holder not in rule.allowed]
    assert [entry["action"] for entry in refused] == forbidden
    assert {Identity.from_uri(entry["who"]).name for entry in refused} <= {name}
    assert all(entry["error"] and entry["address"] for entry in refused)


def test_a_lead_aborts_its_own_jobs_an_organisations_admin_those_of_its_organisation(study: Study) -> None:
    study.job(by="lars")  # of the south
    for name in ("lena", "olga"):
        with pytest.raises(PermissionDeniedError, match="may not abort a job") as caught:
            study.admin(name).ask("AbortJob", job="job")
        assert "rule permissions: AbortJob" in caught.value.where
        assert "lead lars of south-hospital" in caught.value.what
    assert [Identity.from_uri(entry["who"]).name for entry in study.refusals()] == ["lena", "olga"]
    study.admin("lars").ask("AbortJob", job="job")
    assert study.server.wait_for_job("job", 10)
    assert "lead lars of south-hospital has aborted the job" in study.server.outcome("job")["error"]["what"]

    study.job("second", by="lena")
    assert study.admin("olga").ask("AbortJob", job="second") == {"job": "second", "ended": True}
    study.job("third", by="lars")  # at once: the answer came when the other had ended
    assert study.admin("ada").ask("AbortJob", job="third")["ended"]


def test_a_member_sees_and_does_nothing_else(study: Study) -> None:
    study.job()
    status = study.admin("mina").ask("Status")
    assert status["running"]["job"] == "job"
    assert status["running"]["sites"] == {"north": "awaited", "south": "awaited"}
    with pytest.raises(PermissionDeniedError, match="member mina of south-hospital may not submit a job"):
        study.job("other", by="mina")


def test_each_name_once(study: Study) -> None:
    study.job()
    with pytest.raises(ConfigError, match="a job job exists already"):
        study.job()
    study.admin("lena").ask("AbortJob", job="job")
    assert study.server.wait_for_job("job", 10)
    with pytest.raises(ConfigError, match="a job job exists already"):
        study.job()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "../../etc"}, "cannot name a folder"),
        ({"sites": ["north", "west"]}, "not in this federation: west"),
        ({"sites": 5}, "the federation has 2"),
        ({"rounds": -1}, "rounds cannot be -1"),
        ({"strategy": "fedyolo"}, "fedyolo"),
        ({"initial": "/etc/passwd"}, "cannot name a file"),
        ({"code": "import os"}, "code is not a field of a job"),
        ({"min_sites": 3}, "min_sites is 3"),
        ({"deadline_s": "soon"}, "deadline_s cannot be 'soon'"),
    ],
)
def test_a_job_that_cannot_work_is_refused_and_leaves_nothing(
    study: Study, fields: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says.replace("'", ".")):
        study.job(**fields)  # type: ignore[arg-type]
    assert {path.name for path in study.runs.iterdir()} <= {"federation.json", ".server"}
    assert study.refusals()[-1]["action"] == "SubmitJob"


@pytest.mark.parametrize("request_", [b"", b"[]", b"{", b"\xff", b'{"job": 3}', b"[" * 100_000, b" " * 2**19])
def test_requests_that_are_no_requests_are_refused(study: Study, request_: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(study.transport("ada").call("SubmitJob", request_))
    assert study.admin().ask("Status")["running"] is None


def test_only_the_sites_of_a_job_take_part(study: Study) -> None:
    study.job(sites=["north"])
    with pytest.raises(PermissionDeniedError, match="south is not a site of the job job") as caught:
        study.site("south").join()
    assert "rule sites: north" in caught.value.where
    assert study.refusals()[-1]["rule"] == "sites: north"
    assert study.site("north").join().site == "north"


def test_no_one_participant_takes_all_calls(study: Study) -> None:
    study.job()
    north, south = study.site("north"), study.site("south")
    tasks = started([north, south], W)
    attempt = north.welcome.attempt
    from fl_runtime.wire.fl.v1 import federation_pb2 as pb

    message = pb.SessionRequest(session=pb.Session(job="job", attempt=attempt)).SerializeToString()
    hoard = [study.transport("north").call("Attend", message) for _ in range(40)]
    refused = [error for call in hoard if (error := error_of(lambda call=call: next(call)))]
    assert 30 < len(refused) < 40
    assert all("rule calls: at most 8" in error.where for error in refused)
    assert south.submit(tasks["south"], W) == "used"
    for call in hoard:
        call.cancel()


def test_roles_are_those_of_the_project() -> None:
    assert {role for _, role in ADMINS.values()} == set(WHO) - {"site"}
