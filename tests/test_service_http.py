"""The daemon's HTTP face: verbs, refusals, limits, and what it says about itself."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore import protocol
from kvstore.config import ServiceConfig
from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.outcome import Lookup, Miss, PutStatus
from kvstore.service import app as service_app
from kvstore.service import metrics
from kvstore.service.auth import Gate, read_token
from kvstore.service.bodies import decode_body
from kvstore.service.refusal import RefusalError
from kvstore.sse import EventBody
from kvstore.testing.chunks import sample_container, sample_key, sample_spec
from kvstore.testing.serving import ServerThread, small_store

PROJECT = Path(__file__).resolve().parents[1]
TOKEN = "a-token-of-many-characters"


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    def code(self) -> str:
        error = self.json()["error"]
        assert set(error) <= {"code", "message", "field"}
        return str(error["code"])


@pytest.fixture(autouse=True)
def nothing_goes_wrong_unnoticed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing a client does may be an error of the daemon's."""
    yield
    errors = [
        record for when in ("setup", "call") for record in caplog.get_records(when) if record.levelname == "ERROR"
    ]
    assert not errors, [record.getMessage() for record in errors]


def ask(
    server: ServerThread, method: str, path: str, body: object = None, *, headers: dict[str, str] | None = None
) -> Answer:
    """One request over TCP."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server.port, timeout=20)
    try:
        data = body if isinstance(body, bytes) or body is None else msgspec.json.encode(body)
        connection.request(method, path, data, headers or {})
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.headers), answer.read())
    finally:
        connection.close()


def chunk_path(number: int) -> str:
    return f"/v1/chunks/{sample_key(number).hex()}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    config = ServiceConfig(request_bytes_max="1MiB", request_keys_max=100, inflight_max=4)
    with ServerThread(small_store(tmp_path, nvme=""), config) as running:
        yield running


def test_a_chunk_is_put_verified_read_in_ranges_and_deleted(server: ServerThread) -> None:
    data = sample_container(sample_key(1))
    put = ask(server, "PUT", f"{chunk_path(1)}?parent={ROOT.hex()}&durable=0", data)
    assert put.json()["statuses"][0]["stored"]
    assert ask(server, "PUT", chunk_path(1), data).json()["statuses"][0]["existed"]

    whole = ask(server, "GET", chunk_path(1))
    assert whole.status == 200
    assert whole.body == data
    assert whole.headers["Content-Type"] == protocol.CHUNK_TYPE
    for asked, expected in (("0-9", data[:10]), ("100-", data[100:]), ("-7", data[-7:]), ("5-5", data[5:6])):
        part = ask(server, "GET", chunk_path(1), headers={"Range": f"bytes={asked}"})
        assert part.status == 206
        assert part.body == expected
        assert part.headers["Content-Range"].endswith(f"/{len(data)}")
    for bad in ("bytes=9-3", f"bytes={len(data)}-", "lines=1-2"):
        assert ask(server, "GET", chunk_path(1), headers={"Range": bad}).status == 416

    head = ask(server, "HEAD", chunk_path(1))
    assert head.headers["Content-Length"] == str(len(data))
    assert head.headers["X-KVStore-Tiers"] == "dram"
    assert ask(server, "DELETE", chunk_path(1)).json() == {"found": [True]}
    gone = ask(server, "GET", chunk_path(1))
    assert (gone.status, gone.code()) == (404, "absent")
    assert ask(server, "HEAD", chunk_path(1)).status == 404


@pytest.mark.parametrize("damage", ["flip", "cut", "other_key", "garbage"])
def test_what_does_not_verify_is_never_stored(server: ServerThread, damage: str) -> None:
    data = bytearray(sample_container(sample_key(1)))
    if damage == "flip":
        data[-1] ^= 1
    elif damage == "cut":
        del data[-100:]
    elif damage == "other_key":
        data = bytearray(sample_container(sample_key(2)))
    else:
        data[:] = bytes(len(data))
    (status,) = ask(server, "PUT", chunk_path(1), bytes(data)).json()["statuses"]
    assert not status["stored"]
    assert status["reason"] in ("corrupt", "truncated", "wrong_key", "malformed")
    assert ask(server, "GET", chunk_path(1)).status == 404
    assert server.store.stats()["tiers"]["dram"]["usage"]["used_bytes"] == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/lookup", b"{", 400, "invalid"),
        ("POST", "/v1/lookup", b"\xff\xfe", 400, "invalid"),
        ("POST", "/v1/lookup", b"[" * 100_000, 400, "invalid"),
        ("POST", "/v1/lookup", {}, 400, "invalid"),
        ("POST", "/v1/lookup", {"keys": ["ab"]}, 400, "invalid"),
        ("POST", "/v1/lookup", {"keys": ["zz" * 32]}, 400, "invalid"),
        ("POST", "/v1/lookup", {"keys": [" " + "ab" * 31 + " "]}, 400, "invalid"),
        ("POST", "/v1/lookup", {"keys": ["ab" * 32] * 101}, 413, "too_large"),
        ("POST", "/v1/lookup", b" " * (2 << 20), 413, "too_large"),
        ("POST", "/v1/fetch", {"keys": [], "order": "sideways"}, 400, "invalid"),
        ("POST", "/v1/fetch", {"keys": [], "deadline_ms": -1}, 400, "invalid"),
        ("POST", "/v1/fetch", {"keys": [], "deadline_ms": 1e12}, 400, "invalid"),
        ("POST", "/v1/fetch", {"keys": [], "transport": "shm"}, 409, "no_session"),
        ("POST", "/v1/put", {"chunks": [{"key": "ab" * 32, "nbytes": 9}]}, 409, "no_session"),
        ("POST", "/v1/pin", {"keys": [], "ttl_seconds": 0}, 400, "invalid"),
        ("PUT", "/v1/chunks/..%2f..%2fetc%2fpasswd", b"x", 400, "invalid"),
        ("PUT", chunk_path(1), b"short", 400, "truncated"),
        ("PUT", chunk_path(1), b"x" * (2 << 20), 413, "too_large"),
        ("PUT", chunk_path(1) + "?durably=1", b"x" * 300, 400, "invalid"),
        ("PUT", chunk_path(1) + "?durable=yes", b"x" * 300, 400, "invalid"),
        ("PUT", chunk_path(1) + "?deadline_ms=soon", b"x" * 300, 400, "invalid"),
        ("PUT", chunk_path(1) + "?deadline_ms=nan", b"x" * 300, 400, "invalid"),
        ("GET", "/v1/nothing", None, 404, "http"),
        ("GET", "/v1/lookup", None, 405, "http"),
    ],
)
def test_bad_requests_get_one_clear_line(
    server: ServerThread, method: str, path: str, body: object, status: int, code: str
) -> None:
    answer = ask(server, method, path, body)
    assert (answer.status, answer.code()) == (status, code)
    assert "\n" not in answer.json()["error"]["message"]
    assert ask(server, "GET", "/health").json() == {"live": True, "ready": True}


def test_an_unknown_field_is_refused_with_the_nearest_one(server: ServerThread) -> None:
    answer = ask(server, "POST", "/v1/fetch", {"keys": [], "dedline_ms": 3})
    assert answer.status == 400
    assert answer.json()["error"]["field"] == "dedline_ms"
    assert "did you mean 'deadline_ms'?" in answer.json()["error"]["message"]


def test_long_lists_of_keys_are_answered_too(tmp_path: Path) -> None:
    keys = [sample_key(1).hex()] * 5000
    with ServerThread(small_store(tmp_path, nvme="")) as server:
        ask(server, "PUT", chunk_path(1), sample_container(sample_key(1)))
        assert len(ask(server, "POST", "/v1/lookup", {"keys": keys}).json()["tiers"]) == 5000
        assert len(ask(server, "POST", "/v1/head", {"keys": keys}).json()["chunks"]) == 5000


def test_a_put_without_a_length_is_refused(server: ServerThread) -> None:
    with socket.create_connection(("127.0.0.1", server.server.port), 20) as raw:
        raw.sendall(
            f"PUT {chunk_path(1)} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode()
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 411")


def test_a_put_whose_sender_leaves_gives_its_place_back(server: ServerThread) -> None:
    data = sample_container(sample_key(1))
    with socket.create_connection(("127.0.0.1", server.server.port), 20) as raw:
        raw.sendall(f"PUT {chunk_path(1)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode())
        raw.sendall(data[:1000])
        wait_until(lambda: usage(server)["used_bytes"] > 0)
    wait_until(lambda: usage(server)["used_bytes"] == 0)
    assert ask(server, "PUT", chunk_path(1), data).json()["statuses"][0]["stored"]


def test_garbage_instead_of_http_harms_nobody(server: ServerThread) -> None:
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/lookup HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.server.port), 20) as raw:
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
            assert not (answer := raw.recv(4096)) or b" 400 " in answer or b" 505 " in answer
    assert ask(server, "GET", "/health").status == 200


def test_more_requests_than_allowed_are_refused_at_once(server: ServerThread) -> None:
    data = sample_container(sample_key(1))
    slow = []
    try:
        for number in range(4):
            raw = socket.create_connection(("127.0.0.1", server.server.port), 20)
            head = f"PUT {chunk_path(10 + number)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
            raw.sendall(head.encode())
            slow.append(raw)
        wait_until(lambda: server.server.daemon.inflight.requests == 4)
        refused = ask(server, "POST", "/v1/lookup", {"keys": []})
        assert (refused.status, refused.code()) == (503, "busy")
        assert refused.headers["Retry-After"] == "1"
        assert ask(server, "GET", "/health").status == 200
        assert "kvstore_requests_inflight 4.0" in ask(server, "GET", "/metrics").body.decode()
    finally:
        for raw in slow:
            raw.close()
    wait_until(lambda: server.server.daemon.inflight.requests == 0)
    assert ask(server, "POST", "/v1/lookup", {"keys": []}).status == 200


def test_a_reader_that_takes_nothing_loses_the_connection_and_its_lease(tmp_path: Path) -> None:
    config = ServiceConfig(lease_ttl_seconds=0.3)
    with ServerThread(small_store(tmp_path, dram="64MiB", nvme=""), config) as server:
        spec_bytes = big_container()
        key = sample_key(1)
        assert ask(server, "PUT", chunk_path(1), spec_bytes).json()["statuses"][0]["stored"]
        for request in (
            f"GET {chunk_path(1)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
            fetch_request([key] * 3),
        ):
            with socket.create_connection(("127.0.0.1", server.server.port), 20) as raw:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                raw.sendall(request)
                wait_until(lambda: usage(server)["pinned_bytes"] > 0)
                wait_until(lambda: usage(server)["pinned_bytes"] == 0)


def test_a_stopping_daemon_says_so(server: ServerThread) -> None:
    server.server.daemon.inflight.draining = True
    health = ask(server, "GET", "/health")
    assert (health.status, health.json()) == (503, {"live": True, "ready": False})
    assert ask(server, "POST", "/v1/lookup", {"keys": []}).code() == "unavailable"


def test_a_token_is_needed_on_tcp_only(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n")
    token_file.chmod(0o600)
    with ServerThread(small_store(tmp_path, nvme=""), ServiceConfig(token_file=str(token_file))) as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": "Bearer"},
        ):
            refused = ask(server, "POST", "/v1/lookup", {"keys": []}, headers=headers)
            assert (refused.status, refused.code()) == (401, "unauthorised")
            assert ask(server, "GET", "/metrics", headers=headers).status == 401
        assert ask(server, "GET", "/health").status == 200
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert ask(server, "POST", "/v1/lookup", {"keys": []}, headers=right).status == 200
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(20)
            raw.connect(server.socket_path)
            raw.sendall(b"GET /v1/stats HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 200")


def test_a_request_for_another_host_is_refused(server: ServerThread) -> None:
    for host, status in (
        ("evil.example", 403),
        ("evil.example:80", 403),
        ("localhost:1", 200),
        ("[::1]:1", 200),
        ("", 403),
    ):
        assert ask(server, "GET", "/health", headers={"Host": host}).status == status, host


def test_token_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match=r"service\.token_file .*No such file"):
        read_token(path)
    path.write_text(TOKEN)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others; run: chmod 600"):
        read_token(path)
    path.chmod(0o600)
    assert read_token(path) == TOKEN
    for bad in ("short", "", "two words of some length", "\u00e9" * 20):
        path.write_text(bad)
        with pytest.raises(ConfigError, match=r"service\.token_file"):
            read_token(path)


def test_other_machines_are_let_in_with_a_token_only() -> None:
    with pytest.raises(ConfigError, match=r"set service\.token_file"):
        Gate(None, "0.0.0.0")
    Gate(TOKEN, "0.0.0.0")
    Gate(None, "::1")


def test_every_request_struct_refuses_unknown_fields() -> None:
    for kind in protocol.Request.__subclasses__():
        with pytest.raises(RefusalError, match="unknown field"):
            decode_body(b'{"surprise": 1}', kind)


def test_metrics_are_those_documented(server: ServerThread) -> None:
    ask(server, "PUT", chunk_path(1), sample_container(sample_key(1)))
    ask(server, "POST", "/v1/lookup", {"keys": [sample_key(1).hex()]})
    ask(server, "POST", "/v1/fetch", {"keys": [sample_key(1).hex(), sample_key(2).hex()]})
    text = ask(server, "GET", "/metrics").body.decode()
    exposed = set(re.findall(r"^# TYPE (\S+) (?:counter|gauge|histogram)", text, re.MULTILINE))
    exposed = {name for name in exposed if not name.endswith("_created")}
    documented = set(re.findall(r"^\| `(kvstore_\w+)` \|", (PROJECT / "docs/service.md").read_text(), re.MULTILINE))
    assert exposed == documented
    assert 'kvstore_misses_total{reason="absent"} 1.0' in text
    assert 'kvstore_puts_total{outcome="stored"} 1.0' in text
    assert 'kvstore_tier_read_only{tier="dram"} 0.0' in text
    assert 'kvstore_request_seconds_count{verb="lookup"} 1.0' in text
    assert 'kvstore_requests_total{status="200",verb="chunk_put"} 1.0' in text


def test_every_counter_of_the_store_is_a_metric() -> None:
    counted = set()
    for path in (PROJECT / "kvstore").glob("*.py"):
        counted |= set(re.findall(r"counters\.add\(\s*\"(\w+)\"", path.read_text()))
    assert counted == set(metrics.COUNTERS)


def test_the_openapi_document_is_what_is_served(server: ServerThread) -> None:
    text = ask(server, "GET", "/openapi.yaml").body
    document = pytest.importorskip("yaml").safe_load(text)
    described = {
        (method.upper(), path)
        for path, methods in document["paths"].items()
        for method in methods
        if method in ("get", "head", "put", "post", "delete")
    }
    assert described == {(route.method, route.path) for route in service_app.ROUTES}
    schemas = document["components"]["schemas"]
    structs: list[type[msgspec.Struct]] = [*protocol.Request.__subclasses__(), protocol.HeadEntry, protocol.HeadReply]
    structs += [protocol.StatusesReply, protocol.FoundReply, protocol.FlushReply, protocol.InfoReply, PutStatus, Miss]
    structs += [Lookup, protocol.PromptLookup, protocol.HexBytes, protocol.ExplainEntry, protocol.ExplainReply]
    structs += [EventBody, protocol.PinReply]
    for struct in structs:
        schema = schemas[struct.__name__]
        assert set(schema["properties"]) == set(struct.__struct_fields__), struct.__name__
        if issubclass(struct, protocol.Request):
            required = {field.name for field in msgspec.structs.fields(struct) if field.required}
            assert set(schema.get("required", [])) == required
            assert schema["additionalProperties"] is False


def test_the_documentation_names_every_verb() -> None:
    text = (PROJECT / "docs/service.md").read_text()
    for route in service_app.ROUTES:
        assert route.path in text, route.path


def usage(server: ServerThread) -> dict[str, int]:
    answer: dict[str, int] = server.store.stats()["tiers"]["dram"]["usage"]
    return answer


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never happened"
        threading.Event().wait(0.01)


def big_container() -> bytes:
    data = sample_container(sample_key(1), spec=sample_spec(layers=16, kv_heads=8, dim=128), tokens=256)
    assert len(data) > 16 << 20
    return data


def fetch_request(keys: list[bytes]) -> bytes:
    body = msgspec.json.encode({"keys": [key.hex() for key in keys]})
    return b"POST /v1/fetch HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
