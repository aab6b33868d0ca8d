"""Sites of other versions: what goes to them, what is refused, and what the federation's people see of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Bench, serving, started
from study import Study, until

from fl_runtime.errors import ProtocolError
from fl_runtime.trust import audit
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.software import OWN

W = {"w": np.zeros(3, np.float32)}
OLDER = sorted(OWN.settings - {"cross_site", "fraction", "max_share"})


def joined(bench: Bench, settings: list[str]) -> dict[str, Any]:
    """Join as a site that knows these settings alone, and return the settings that come back."""
    request = pb.JoinRequest(protocol_min=1, protocol_max=1, version="0.1.0", settings=settings)
    (reply,) = bench.site("site-1").transport.call("Join", request.SerializeToString())
    return dict(json.loads(pb.JoinReply.FromString(reply).settings_json))


def test_a_site_gets_the_settings_that_its_version_knows(tmp_path: Path) -> None:
    with serving(tmp_path, 1, max_share=0.5) as bench:  # max_share is the server's business
        assert set(joined(bench, OLDER)) == set(OLDER)
        assert set(joined(bench, [])) == OWN.settings, "a site that does not say gets all"


def test_a_setting_that_a_site_would_ignore_without_a_word_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, 1, fraction=0.5) as bench, pytest.raises(ProtocolError) as refused:
        joined(bench, OLDER)
    assert "the job uses fraction, which fl-adapters 0.1.0 does not know" in refused.value.what
    assert refused.value.fix == f"upgrade site-1 to fl-adapters {OWN.version}, or leave fraction out of the job"


def test_the_server_says_which_protocols_it_speaks(tmp_path: Path) -> None:
    with serving(tmp_path, 1) as bench:
        request = pb.JoinRequest(protocol_min=1, protocol_max=9, version="0.9.0")
        (answer,) = bench.site("site-1").transport.call("Join", request.SerializeToString())
    reply = pb.JoinReply.FromString(answer)
    assert (reply.protocol, reply.protocol_min, reply.protocol_max) == (OWN.highest, OWN.lowest, OWN.highest)
    assert set(reply.features) == OWN.features


class Answers:
    """A transport on which every call is answered with the same message."""

    def __init__(self, reply: pb.JoinReply) -> None:
        self._reply = reply.SerializeToString()

    def call(self, method: str, requests: object) -> Any:
        return _Answer(self._reply)

    def close(self) -> None:
        pass


class _Answer:
    def __init__(self, reply: bytes) -> None:
        self._replies = iter([reply])

    def __iter__(self) -> _Answer:
        return self

    def __next__(self) -> bytes:
        return next(self._replies)

    def when_gone(self, callback: object) -> bool:
        return True

    def cancel(self, *, broken: bool = False) -> None:
        pass


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        (pb.JoinReply(protocol=7, version="0.9.0"), "the site speaks protocol 1, this server 7"),
        (
            pb.JoinReply(protocol=2, protocol_min=1, protocol_max=3),
            "the server has chosen protocol 2; the highest that both speak is 1",
        ),
    ],
)
def test_a_site_refuses_a_protocol_that_it_does_not_speak(reply: pb.JoinReply, what: str) -> None:
    from federation_bench import Site

    with pytest.raises(ProtocolError) as refused:
        Site("north", Answers(reply)).join()  # type: ignore[arg-type]
    assert refused.value.what == what


# -- what people see ---------------------------------------------------------------------------------------------


def ask_for_work(study: Study, site: str, **told: Any) -> Any:
    software = {**OWN.to_json(), **told}
    return study.admin(site).ask("Assignment", patience_s=20, software=software)


def test_versions_of_sites_are_shown_and_survive_the_server(study: Study) -> None:
    study.job()
    for name in study.sites:
        assert ask_for_work(study, name)["settings"]["rounds"] == 2
    sites = {name: study.site(name) for name in study.sites}
    started(sites.values(), W)
    same = dict.fromkeys(study.sites, OWN.version)
    told = study.admin().ask("Status")
    assert told["site_versions"] == same and told["protocols"] == [1, 1] and told["misfits"] == {}
    assert study.admin().ask("ShowJob", job="job")["versions"] == same
    for site in sites.values():
        site.vanish()
    study.server.close()
    study.start()
    until(lambda: study.admin().ask("Status")["site_versions"] == same, "versions of sites that have registered")
    lines = [entry for entry in audit.entries(study.kits / "server") if entry["action"] == "site software"]
    assert [(line["version"], line["protocols"]) for line in lines] == [(OWN.version, "1")] * 2


def test_a_site_that_is_too_old_is_refused_and_shown(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    study.job()
    with pytest.raises(ProtocolError, match="the site speaks protocol 0, this server 1"):
        ask_for_work(study, "north", version="0.0.9", protocols=[0, 0])
    misfits = study.admin().ask("Status")["misfits"]
    assert list(misfits) == ["north"]
    assert misfits["north"].startswith("speaks protocol 0, the server 1: no job can run. Upgrade the site")
    assert "fl-adapters 0.0.9 at north speaks protocol 0" in caplog.text
    assert ask_for_work(study, "north")["job"] == "job", "after its upgrade"
    assert study.admin().ask("Status")["misfits"] == {}


def test_a_job_that_a_site_is_too_old_for_does_not_hold_up_its_others(study: Study) -> None:
    study.job("sampled", min_sites=1, fraction=0.5)
    study.job("plain", min_sites=1, sites=["north"])
    answer = ask_for_work(study, "north", version="0.0.9", settings=OLDER)
    assert answer["job"] == "plain" and set(answer["settings"]) == set(OLDER)
    (sampled,) = [job for job in study.admin().ask("Status")["jobs"] if job["job"] == "sampled"]
    assert "the job uses fraction, which fl-adapters 0.0.9 does not know" in sampled["site_states"]["north"]
