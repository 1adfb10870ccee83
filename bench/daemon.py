"""A real daemon in its own process, for the demo, the benchmarks and the tests that kill it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from kvstore.client import Client
from kvstore.connect import connect
from kvstore.errors import KVStoreError, ServiceUnavailableError

START_SECONDS_MAX = 30.0


class DaemonError(KVStoreError):
    """The daemon did not come up; carries the end of its log."""


class Daemon:
    """`kvstore serve` as a child process, listening on a UNIX socket. A context manager: stops it at the end.

    Args:
        directory: holds the log and the nvme tier, which outlives the process.
        dram: capacity of the dram tier, as on the command line.
        nvme: capacity of the nvme tier; "" for none.
        flags: further flags of `kvstore serve`.
    """

    def __init__(self, directory: Path, *, dram: str, nvme: str = "", flags: Sequence[str] = ()) -> None:
        # The system's temporary directory, because the path of a UNIX socket has at most 107 bytes.
        self._socket_directory = tempfile.TemporaryDirectory(prefix="kvstore-")
        self.socket = Path(self._socket_directory.name) / "kvstore.sock"
        self.log = directory / "kvstore.log"
        self._command = [sys.executable, "-m", "kvstore.cli", "serve", "--dram", dram, "--socket", str(self.socket)]
        if nvme:
            self._command += ["--nvme", nvme, "--path", str(directory / "nvme")]
        self._command += flags if any(flag.startswith("--port") for flag in flags) else ["--port", "-1", *flags]
        self._process: subprocess.Popen[bytes] | None = None
        self.start_seconds = 0.0

    @property
    def url(self) -> str:
        """What to give `kvstore.connect`."""
        return f"unix:{self.socket}"

    @property
    def pid(self) -> int:
        """Process id of the running daemon."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Client:
        """Start it and return a connected client. Raises DaemonError if it does not answer."""
        started = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(ServiceUnavailableError):
                client = connect(self.url, timeout_ms=1000)
                self.start_seconds = time.monotonic() - started
                return client
            if self._process.poll() is not None or time.monotonic() - started > START_SECONDS_MAX:
                self.kill()
                raise DaemonError(f"the daemon did not start; the end of {self.log}:\n{self.tail()}")
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9, and wait until it is gone. Nothing is flushed or cleaned up."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> int:
        """Ask it to stop gracefully; answers its exit code."""
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            return self._process.wait(timeout=30)
        finally:
            self.kill()

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        return os.linesep.join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._socket_directory.cleanup()
