"""Two servers with one store, on a real PostgreSQL: one is killed in every phase of a run, and the other goes on."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from federation_bench import Site, at_once, serving
from postgres import postgres
from study import until
from two_servers import STANDS_BY, STOPPED, TwoServers, two_servers

from fl_runtime.client.control import ControlClient
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust.revocation import read_list
from fl_runtime.types import Arrays, Task

SITES, ROUNDS, WAIT_S = ("north", "south"), 3, 60.0
BIG = 2**21  # of float32: an upload that takes a while


def start_weights() -> Arrays:
    return {"w": np.zeros(BIG, np.float32), "v": np.ones((3, 2))}


def trained(task: Task, site: str) -> Arrays:
    """Return an update that differs for every site and round; sums of the updates are not associative."""
    rng = np.random.default_rng([SITES.index(site), task.round])
    scale = 10.0 ** (SITES.index(site) + 1)
    return {n: (0.5 * a + rng.normal(size=a.shape) * scale).astype(a.dtype) for n, a in task.arrays.items()}


def bits(arrays: Arrays) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


def undisturbed(folder: Path) -> dict[str, bytes]:
    def site(name: str) -> Arrays:
        return bench.site(name).take_part(start_weights(), lambda task: trained(task, name))

    with serving(folder, SITES, sockets=False, rounds=ROUNDS) as bench:
        return bits(bench.run(site)["north"])


def _in_background(work: object) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def _handshake(both: TwoServers, north: Site, south: Site) -> None:
    both.ask("SubmitJob", job={"app": "train", "name": "study", "rounds": ROUNDS})
    both.kill_active()  # the job is queued and nobody has come
    north.join()
    south.join()
    registering = _in_background(lambda: north.register(start_weights()))
    until(lambda: "registered" in _events(both), "north to be registered")
    both.kill_active()  # one of two has registered
    south.register(start_weights())
    registering.join(WAIT_S)
    assert not registering.is_alive(), "north has not got an answer to its registration"


def _events(both: TwoServers) -> str:
    file = both.active.runs / "study" / "events.jsonl"
    return file.read_text() if file.exists() else ""


def _killed_while_uploading(both: TwoServers, site: Site, task: Task) -> None:
    before = both.active
    spool = before.runs / "study" / "server" / "blobs"
    earlier = {file.name for file in spool.glob("upload-*")}
    upload = _in_background(lambda: site.submit(task, trained(task, site.name)))
    until(lambda: {file.name for file in spool.glob("upload-*")} - earlier or not upload.is_alive(), "an upload")
    both.kill_active()
    upload.join(WAIT_S)
    assert not upload.is_alive(), "the upload has not ended"


def _frozen(both: TwoServers, site: Site, task: Task) -> None:
    """The old leader wakes up with a site still connected to it: it can take nothing, and stands by."""
    old = both.active
    thaw = both.freeze_active()
    answers: list[str] = []
    submitting = _in_background(lambda: answers.append(site.submit(task, trained(task, site.name))))
    thaw()
    submitting.join(WAIT_S)
    assert answers == ["used"]
    until(lambda: old.standing == STANDS_BY, "the old leader to stand by")
    assert STOPPED in old.log.read_text()
    assert both.active is not old


def test_killed_in_every_phase_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "oracle")
    with postgres() as url, two_servers(tmp_path, url, SITES) as both:
        north, south = both.site("north"), both.site("south")
        _handshake(both, north, south)
        both.kill_active()  # the initial model is awaited
        tasks = dict(zip(SITES, at_once([north, south], lambda site: site.start(start_weights())), strict=True))
        south.submit(tasks["south"], trained(tasks["south"], "south"))
        both.kill_active()  # one of two updates is acknowledged: it counts, and is not counted again
        assert south.submit(tasks["south"], trained(tasks["south"], "south")) == "duplicate"
        _killed_while_uploading(both, north, tasks["north"])
        task = {site.name: site.client.next_task() for site in (north, south)}
        both.ask("Revoke", crl=_revoked(both))
        both.kill_active()  # between two rounds
        north.submit(task["north"], trained(task["north"], "north"))
        _frozen(both, south, task["south"])
        task = {site.name: site.client.next_task() for site in (north, south)}
        for site in (north, south):
            site.submit(task[site.name], trained(task[site.name], site.name))
        both.kill_active()  # the last round has been closed
        finals = at_once([north, south], lambda site: bits(site.client.next_task().arrays))
        assert finals == [expected, expected]
        for site in (north, south):
            site.client.leave("done", early=False)
        until(lambda: both.ask("ShowJob", job="study")["state"] == "finished", "the job to finish")
        _has_everything_after_another_kill(both, expected)


def _revoked(both: TwoServers) -> str:
    both.authority.revoke_certificates(list(both.authority.counting("mina")))
    return both.authority.crl.decode()


def _has_everything_after_another_kill(both: TwoServers, expected: dict[str, bytes]) -> None:
    both.kill_active()
    shown = both.ask("ShowJob", job="study")
    assert {"model/model.safetensors", "history.csv", "events.jsonl"} <= {file["path"] for file in shown["files"]}
    control = ControlClient(both.transport("ada"))
    model = both.folder / "model.safetensors"
    model.write_bytes(b"".join(control.stream("Download", job="study", file="model/model.safetensors")))
    assert bits(read_tensors(model)) == expected
    events = b"".join(control.stream("Download", job="study", file="events.jsonl")).decode()
    assert events.count('"kind": "round_finished"') == ROUNDS
    kit = both.folder / "kits" / both.active.name
    in_force = read_list((kit / "crl.pem").read_bytes(), (kit / "ca.pem").read_bytes(), "the kit")
    assert in_force.pem == both.authority.crl, "the server that has taken over knows who was revoked"
