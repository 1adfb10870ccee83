"""Clients that send what no client should: each is answered in one line, and nobody else waits for it."""

from __future__ import annotations

import gzip
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.config import ServiceConfig
from kvstore.service import bodies
from kvstore.testing.serving import ServerThread, small_store

TOKEN = "a-token-of-many-characters"


@pytest.fixture
def server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[ServerThread]:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    config = ServiceConfig(inflight_max=1, token_file=str(token_file))
    with ServerThread(small_store(tmp_path, nvme=""), config) as running:
        yield running
    assert not [record for record in caplog.get_records("call") if record.levelname == "ERROR"]


def send(server: ServerThread, head: str, body: bytes = b"", *, token: bytes = TOKEN.encode()) -> tuple[int, bytes]:
    """Status and body of the answer to bytes as they are."""
    with socket.create_connection(("127.0.0.1", server.server.port), timeout=30) as connection:
        start, _, headers = head.partition("\n")
        lines = [start, "Host: 127.0.0.1", "Connection: close", *filter(None, headers.split("\n"))]
        request = "\r\n".join(lines).encode() + b"\r\nAuthorization: Bearer " + token + b"\r\n\r\n" + body
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.read()


def test_a_token_that_is_no_text_is_a_wrong_token(server: ServerThread) -> None:
    for token in (b"\xff\xfe", b"\xc3\xa9", b"", b"x" * 4000):
        status, body = send(server, "GET /v1/stats HTTP/1.1", token=token)
        assert (status, b"unauthorised" in body) == (401, True)
    assert send(server, "GET /v1/stats HTTP/1.1")[0] == 200


@pytest.mark.parametrize("path", ["POST /v1/lookup", f"PUT /v1/chunks/{'ab' * 32}"])
def test_a_compressed_body_is_refused_unread(server: ServerThread, path: str) -> None:
    for data in (gzip.compress(bytes(8 << 20)), b"not compressed at all"):
        head = f"{path} HTTP/1.1\nContent-Encoding: gzip\nContent-Length: {len(data)}"
        status, body = send(server, head, data)
        assert (status, b"Content-Encoding" in body) == (415, True)


def test_a_body_that_is_announced_as_too_large_is_refused_before_it_comes(server: ServerThread) -> None:
    status, body = send(server, f"POST /v1/lookup HTTP/1.1\nContent-Length: {1 << 40}", b"{")
    assert (status, b"too_large" in body) == (413, True)


def test_a_body_that_does_not_come_does_not_keep_others_out(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS_MAX", 0.2)
    status, body = send(server, "POST /v1/lookup HTTP/1.1\nContent-Length: 100", b"{")
    assert (status, b"did not come" in body) == (504, True)
    assert send(server, "POST /v1/lookup HTTP/1.1\nContent-Length: 2", b"{}")[0] == 400
