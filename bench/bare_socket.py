"""The anchor of the service benchmark: a process that does nothing but write the same bytes to a socket.

Run as `python -m kvstore.bench.bare_socket FD NBYTES sendfile|send`: accepts one connection on the listening socket
FD and answers every byte it receives with NBYTES bytes of memory.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
from typing import Literal, Self

SECONDS_MAX = 30.0
BLOCK_BYTES = 1 << 20


class BareSocket:
    """A connection to such a process of its own. A context manager.

    Args:
        nbytes: bytes of one answer.
        how: the system call that sends them.
    """

    def __init__(self, nbytes: int, how: Literal["sendfile", "send"]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvstore.bench.bare_socket", str(listener.fileno()), str(nbytes), how],
                pass_fds=[listener.fileno()],
            )
            self._socket = socket.create_connection(listener.getsockname(), SECONDS_MAX)

    def receive(self, target: memoryview) -> None:
        """Ask for one answer and fill `target` with it."""
        self._socket.sendall(b"?")
        done = 0
        while done < len(target):
            count = self._socket.recv_into(target[done:])
            if not count:
                raise ConnectionError("the bare socket's process has gone")
            done += count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()
        self._process.wait(SECONDS_MAX)


def answer(listener: socket.socket, nbytes: int, how: str) -> None:
    """Serve one connection until it closes."""
    memory = os.memfd_create("kvstore-bench")
    os.ftruncate(memory, nbytes)
    mapped = mmap.mmap(memory, nbytes)
    block = os.urandom(BLOCK_BYTES)
    for start in range(0, nbytes, BLOCK_BYTES):
        mapped[start : start + BLOCK_BYTES] = block[: nbytes - start]
    peer, _ = listener.accept()
    while peer.recv(1):
        if how == "send":
            peer.sendall(mapped)
            continue
        done = 0
        while done < nbytes:
            done += os.sendfile(peer.fileno(), memory, done, nbytes - done)


if __name__ == "__main__":
    answer(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
