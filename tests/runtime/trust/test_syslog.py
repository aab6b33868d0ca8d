"""Lines of the audit log at a syslog server: RFC 5424 over UDP, TCP and TLS. A server that is away stops nobody."""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from study import Study, project, until

from fl_runtime.errors import ConfigError
from fl_runtime.trust.audit import AuditLog, entries
from fl_runtime.trust.audit import syslog as module
from fl_runtime.trust.audit.syslog import SyslogAddress, SyslogSender
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit

# RFC 5424, 6: HEADER SP STRUCTURED-DATA SP MSG
FORM = re.compile(
    r"<(?P<priority>\d{1,3})>1 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 "
    r"[!-~]{1,255} fl-adapters \d+ audit - (?P<text>.*)"
)
COUNT = 20


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditLog]:
    authority = Authority.create(tmp_path / "authority", project())
    write_kit(tmp_path / "north", authority, authority.project.participant("north"))
    log = AuditLog(tmp_path / "north", tmp_path / "north")
    yield log
    log.close()


def text_of(message: bytes) -> tuple[int, dict[str, object]]:
    match = FORM.fullmatch(message.decode("ascii"))
    assert match, message
    return int(match["priority"]), json.loads(match["text"])


def frames(connection: socket.socket, count: int) -> list[bytes]:
    """Read messages with octet counting (RFC 6587, 3.4.1): MSG-LEN SP SYSLOG-MSG."""
    messages = []
    with connection, connection.makefile("rb") as file:
        for _ in range(count):
            digits = b""
            while (byte := file.read(1)) != b" ":
                digits += byte
            messages.append(file.read(int(digits)))
    return messages


def listener(kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[socket.socket, int]:
    server = socket.socket(socket.AF_INET, kind)
    server.settimeout(20)
    server.bind(("127.0.0.1", 0))
    if kind == socket.SOCK_STREAM:
        server.listen()
    return server, server.getsockname()[1]


def write_some(log: AuditLog) -> None:
    for number in range(COUNT):
        log.write("update", round=number, names=["ä\n"])
    log.write("join", rule="none", error="no")


def check_messages(messages: list[bytes], folder: Path) -> None:
    found = [text_of(message) for message in messages]
    assert [text for _, text in found] == entries(folder)
    assert [priority for priority, _ in found] == [13 * 8 + 5] * COUNT + [13 * 8 + 4]


def test_lines_are_sent_in_datagrams(log: AuditLog, tmp_path: Path) -> None:
    server, port = listener(socket.SOCK_DGRAM)
    with server:
        log.ship_to(f"udp://127.0.0.1:{port}")
        write_some(log)
        check_messages([server.recv(65536) for _ in range(COUNT + 1)], tmp_path / "north")


def test_lines_are_sent_over_tcp_and_again_over_a_new_connection(log: AuditLog, tmp_path: Path) -> None:
    server, port = listener()
    with server, ThreadPoolExecutor(1) as pool:
        log.ship_to(f"tcp://127.0.0.1:{port}")
        first = pool.submit(lambda: frames(server.accept()[0], 1))  # and closes the connection
        log.write("update", round=0)
        assert text_of(first.result(20)[0])[1]["round"] == 0
        second = pool.submit(lambda: frames(server.accept()[0], 1))
        log.write("update", round=1)
        assert text_of(second.result(20)[0])[1]["round"] == 1


def test_lines_are_sent_over_tls_to_a_server_of_the_named_authority(log: AuditLog, tmp_path: Path) -> None:
    key, certificate = certificate_for_localhost(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server, port = listener()
    with server, ThreadPoolExecutor(1) as pool:
        log.ship_to(f"tls://localhost:{port}?ca={certificate}")
        messages = pool.submit(lambda: frames(context.wrap_socket(server.accept()[0], server_side=True), COUNT + 1))
        write_some(log)
        check_messages(messages.result(20), tmp_path / "north")


def certificate_for_localhost(folder: Path) -> tuple[Path, Path]:
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    from fl_runtime.trust.certificates import key_pem, new_key

    key, now = new_key(), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    )
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (folder / "logs.key").write_bytes(key_pem(key))
    (folder / "logs.pem").write_bytes(pem)
    return folder / "logs.key", folder / "logs.pem"


def test_a_server_that_is_away_stops_nobody_and_the_log_counts_what_it_missed(
    log: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_QUEUE_LINES", 5)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]  # nobody listens there
    log.ship_to(f"tcp://127.0.0.1:{port}")
    began = time.process_time()
    write_some(log)
    assert time.process_time() - began < 5
    server = socket.create_server(("127.0.0.1", port))
    server.settimeout(30)
    with server, ThreadPoolExecutor(1) as pool:
        messages = pool.submit(lambda: frames(server.accept()[0], 6))
        missed = until(lambda: unsent(tmp_path / "north"), "the line about lost lines")
        assert missed["lines"] >= COUNT + 1 - 6
        assert f"tcp://127.0.0.1:{port}" in missed["reason"]
        assert text_of(messages.result(30)[0])[1]["number"] == 1


def unsent(folder: Path) -> dict[str, object] | None:
    found = [entry for entry in entries(folder) if entry["action"] == "lines not sent to syslog"]
    return found[0] if found else None


def test_lines_that_were_never_sent_are_counted_at_the_end(log: AuditLog, tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        log.ship_to(f"tcp://127.0.0.1:{reserved.getsockname()[1]}")
        write_some(log)
        log.close()
    missed = unsent(tmp_path / "north")
    assert missed is not None and missed["lines"] == COUNT + 1
    assert "refused" in str(missed["reason"])


@pytest.mark.parametrize(
    "url",
    ["logs", "http://logs", "udp://", "udp://h:99999", "tcp://h:x", "udp://h/path", "tcp://h?ca=x", "tls://h?x=1", ":"],
)
def test_what_is_no_address_of_a_syslog_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a syslog server"):
        SyslogSender(url, lambda lines, reason: None)


def test_addresses_have_the_ports_of_their_standards() -> None:
    assert [SyslogAddress.parse(f"{scheme}://h").port for scheme in ("udp", "tcp", "tls")] == [514, 601, 6514]
    assert SyslogAddress.parse("tcp://[::1]:7").host == "::1"


def test_the_server_of_a_federation_sends_its_log(tmp_path: Path) -> None:
    server, port = listener(socket.SOCK_DGRAM)
    with server, Study(tmp_path) as study:
        study.server._audit.log.ship_to(f"udp://127.0.0.1:{port}")
        study.job()
        actions = set()
        while "job started" not in actions:
            actions.add(text_of(server.recv(65536))[1]["action"])
    assert "called SubmitJob" in actions
