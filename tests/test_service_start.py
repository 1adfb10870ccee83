"""Starting and stopping the daemon: what it listens on, what it refuses to start with, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvstore.bench.daemon import Daemon
from kvstore.client import Client
from kvstore.config import ServiceConfig
from kvstore.connect import connect
from kvstore.errors import ConfigError, KVStoreError, ServiceError
from kvstore.protocol import SESSION_SUFFIX
from kvstore.service.listening import UnixListener, listen_tcp
from kvstore.service.server import Server
from kvstore.testing.chunks import sample_container, sample_key, sample_keys
from kvstore.testing.client_harness import collect, eventually, put_chunk, put_samples
from kvstore.testing.serving import ServerThread, small_store


def start_and_stop(config: ServiceConfig, directory: Path) -> None:
    """Start a server with that configuration; whatever happens, nothing is left running."""
    store = small_store(directory, nvme="")

    async def run() -> None:
        server = Server(store, config)
        await server.start()
        await server.stop()

    try:
        asyncio.run(run())
    finally:
        store.close()


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"service\.port {port} on 127\.0\.0\.1 is in use"):
            start_and_stop(ServiceConfig(port=port, socket=str(tmp_path / "kv.sock")), tmp_path)
    assert not list(tmp_path.glob("*.sock*"))


def test_an_address_that_is_not_this_machine() -> None:
    with pytest.raises(ServiceError, match="cannot listen on"):
        listen_tcp("192.0.2.1", 0)
    with pytest.raises(ServiceError, match=r"service\.host no\.such\.host\.invalid"):
        listen_tcp("no.such.host.invalid", 0)


def test_a_live_daemon_keeps_its_socket(tmp_path: Path) -> None:
    with ServerThread(small_store(tmp_path, nvme="")) as server:
        with pytest.raises(ServiceError, match="another daemon is listening there"):
            start_and_stop(ServiceConfig(port=-1, socket=server.socket_path), tmp_path)
        with connect(server.unix_url) as client:
            put_samples(client, [sample_key(1)])


def test_a_stale_socket_is_removed_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "kv.sock"
    for name, kind in ((path, socket.SOCK_STREAM), (Path(f"{path}{SESSION_SUFFIX}"), socket.SOCK_SEQPACKET)):
        with socket.socket(socket.AF_UNIX, kind) as left_behind:
            left_behind.bind(str(name))
    start_and_stop(ServiceConfig(port=-1, socket=str(path)), tmp_path)
    assert caplog.text.count("left behind by a daemon that is gone") == 2
    assert not list(tmp_path.glob("*.sock*"))


def test_sockets_that_cannot_be(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("precious")
    for path, message in (
        (str(plain), "is not a socket"),
        (str(tmp_path / "missing" / "kv.sock"), "the directory does not exist"),
        (str(tmp_path / ("x" * 200)), "longer than 107 bytes"),
        (str(plain / "kv.sock"), "plain"),
    ):
        with pytest.raises(KVStoreError, match=message) as raised:
            start_and_stop(ServiceConfig(port=-1, socket=path), tmp_path)
        assert "\n" not in str(raised.value)
    assert plain.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root writes everywhere")
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    code = (
        "import socket, sys\n"
        "from kvstore.service.listening import UnixListener\n"
        "from kvstore.errors import ServiceError\n"
        "try: UnixListener(sys.argv[1], socket.SOCK_STREAM)\n"
        "except ServiceError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(closed / "kv.sock")]
    if os.geteuid() == 0:
        for parent in (tmp_path, *tmp_path.parents):
            if parent.stat().st_uid == 0 and parent != Path("/") and parent.name.startswith(("pytest", "test")):
                parent.chmod(0o755)
        command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if result.returncode:
        pytest.skip(f"another user cannot run this interpreter: {result.stderr[-200:]}")
    assert "cannot create it: Permission denied" in result.stdout


def test_nothing_to_listen_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set one of them"):
        start_and_stop(ServiceConfig(port=-1), tmp_path)


def test_a_token_file_that_others_can_read(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-many-characters")
    token.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        start_and_stop(ServiceConfig(port=0, token_file=str(token)), tmp_path)


def test_a_certificate_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "cert").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"service\.tls_cert"):
        start_and_stop(ServiceConfig(port=0, tls_cert=str(tmp_path / "cert"), tls_key=str(tmp_path / "none")), tmp_path)


def test_only_the_owner_can_connect_to_the_sockets(tmp_path: Path) -> None:
    with ServerThread(small_store(tmp_path, nvme="")) as server:
        for path in (server.socket_path, server.socket_path + SESSION_SUFFIX):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_socket_that_somebody_else_has_taken_over_is_not_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "kv.sock")
    first = UnixListener(path, socket.SOCK_STREAM)
    os.unlink(path)
    second = UnixListener(path, socket.SOCK_STREAM)
    first.close()
    assert os.path.exists(path)
    second.close()
    assert not os.path.exists(path)


def test_what_was_answered_before_a_graceful_stop_is_there_after_it(tmp_path: Path) -> None:
    keys = sample_keys(400)
    containers = {key: sample_container(key) for key in keys}
    stored: list[bytes] = []

    def put_all(client: Client) -> None:
        for key in keys:
            (status,) = client.put([put_chunk(key, containers[key])])
            if status.stored:
                stored.append(key)

    with Daemon(tmp_path, dram="16MiB", nvme="32MiB") as daemon:
        with daemon.start() as client:
            worker = threading.Thread(target=put_all, args=[client])
            worker.start()
            assert eventually(lambda: len(stored) >= 5)
            assert daemon.stop() == 0
            worker.join(60)
        assert 5 <= len(stored) < 400
        assert "Traceback" not in daemon.log.read_text()
        assert not list(tmp_path.glob("kvstore.sock*"))
        with daemon.start() as client:
            assert client.lookup(stored).chunks == len(stored)
            assert set(collect(client.fetch(stored), [containers[key] for key in stored]).values()) == {None}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True, timeout=60)
    config = ServiceConfig(tls_cert=str(cert), tls_key=str(key))
    with ServerThread(small_store(tmp_path, nvme=""), config) as server:
        url = f"https://localhost:{server.server.port}"
        with pytest.raises(ServiceError):
            connect(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        assert ssl.get_default_verify_paths().cafile == str(cert)
        with connect(url) as client:
            keys = sample_keys(4)
            put_samples(client, keys)
            assert client.lookup(keys).chunks == 4
            assert [part.miss for part in client.fetch(keys)] == [None] * 4


def test_serving_imports_no_torch_and_answers_quickly(tmp_path: Path) -> None:
    code = (
        "import sys, kvstore.cli, kvstore.service.server, kvstore.compose, kvstore.tiers.registry, kvstore.tiers.nvme\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
