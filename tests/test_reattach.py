"""An engine that is killed and started again: it maps the daemon's arena again, and its KV is where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.keys import ROOT
from kvstore.testing.chunks import sample_container, sample_keys, sample_spec
from kvstore.testing.client_harness import eventually
from kvstore.testing.serving import ServerThread, small_store
from kvstore.tier import PutItem
from kvstore.tiers.dram import DramTier
from kvstore.tiers.leases import DramLease

ENGINE = """
import hashlib, json, sys
import numpy as np
import kvstore

def place(view):
    # Where the bytes lie: (inode, offset) of the shared memory that is mapped there, None for memory of our own.
    address = np.frombuffer(view, dtype=np.uint8).ctypes.data
    for line in open("/proc/self/maps"):
        span, permissions, offset, _, inode, *name = line.split()
        start, stop = (int(number, 16) for number in span.split("-"))
        if start <= address < stop:
            shared = name and "kvstore-dram" in name[0] and permissions == "r--s"
            return [int(inode), address - start + int(offset, 16)] if shared else None

client = kvstore.connect(sys.argv[1])
keys = [bytes.fromhex(text) for text in sys.argv[2].split(",")]
for part in client.fetch(keys):
    assert part.miss is None, part.miss
    (segments,) = part.groups
    ((segment, view),) = segments
    print(json.dumps([place(view), segment.offset, hashlib.sha256(view).hexdigest()]), flush=True)
    if part.index == int(sys.argv[3]):
        sys.stdin.read()  # in the middle of using the chunk
client.close()
"""


class Relay:
    """A socket before the daemon's that passes everything on and counts it. Sessions go to the daemon's own."""

    def __init__(self, directory: Path, behind: str) -> None:
        self.path = str(directory / "relay")
        self.nbytes = 0
        self._behind = behind
        os.symlink(behind + ".session", self.path + ".session")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                front, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(front,), daemon=True).start()

    def _serve(self, front: socket.socket) -> None:
        with front, socket.socket(socket.AF_UNIX) as back:
            back.connect(self._behind)
            answering = threading.Thread(target=self._pass_on, args=(back, front), daemon=True)
            answering.start()
            self._pass_on(front, back)
            answering.join(60)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # a killed engine's connection
            while data := source.recv(1 << 16):
                self.nbytes += len(data)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    with ServerThread(small_store(tmp_path, nvme="")) as running:
        yield running


def test_a_restarted_engine_reads_the_same_memory_without_a_copy(server: ServerThread) -> None:
    spec = sample_spec(layers=1, kv_heads=8, dim=128)
    keys = sample_keys(4)
    containers = [sample_container(key, spec=spec, tokens=256) for key in keys]
    items = [PutItem(key, memoryview(data), ROOT) for key, data in zip(keys, containers, strict=True)]
    assert all(status.stored for status in server.store.put(items))
    memory = server.store.memory
    assert isinstance(memory, DramTier)
    relay = Relay(Path(server.socket_path).parent, server.socket_path)
    command = [sys.executable, "-c", ENGINE, f"unix:{relay.path}", ",".join(key.hex() for key in keys)]

    first = subprocess.Popen([*command, "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdin is not None
    seen = [json.loads(first.stdout.readline()) for _ in range(2)]
    assert memory.usage().pinned_bytes >= len(containers[1]), "the engine reads under a lease"
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    first.stdout.close()
    first.stdin.close()
    assert eventually(lambda: memory.usage().pinned_bytes == 0), "a dead engine holds nothing"

    before = relay.nbytes
    second = subprocess.run([*command, "-1"], capture_output=True, timeout=120, check=False)
    assert second.returncode == 0, second.stderr.decode()
    again = [json.loads(line) for line in second.stdout.splitlines()]
    assert again[:2] == seen, "another place, or other bytes"
    arena_inode = os.fstat(memory.arena.fd).st_ino
    for key, data, (place, offset, digest) in zip(keys, containers, again, strict=True):
        lease = memory.lease(key)
        assert isinstance(lease, DramLease)
        with lease:
            assert place == [arena_inode, lease.offset + offset], "not the arena's own bytes"
        assert digest == hashlib.sha256(data[offset:]).hexdigest()
    total_bytes = sum(map(len, containers))
    assert relay.nbytes - before < total_bytes // 100, "bytes of chunks went through the socket"
    relay.close()
