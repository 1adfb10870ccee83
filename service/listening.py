"""Sockets to listen on, or one clear line why not."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from kvstore.errors import ConfigError, ServiceError

_log = logging.getLogger(__name__)

BACKLOG = 128
UNIX_PATH_BYTES_MAX = 107
PROBE_SECONDS = 1.0


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ServiceError if the address cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise ServiceError(f"service.host {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServiceError(f"service.port {port} on {host} is in use; stop what uses it or set another") from error
        raise ServiceError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


class UnixListener:
    """A listening UNIX socket that only its owner can connect to; `close` removes its file.

    Args:
        path: where. A file left behind by a daemon that died is removed.
        kind: socket.SOCK_STREAM or socket.SOCK_SEQPACKET.

    Raises:
        ConfigError: the path cannot be a socket.
        ServiceError: a live daemon listens there, or the directory cannot be written.
    """

    def __init__(self, path: str, kind: socket.SocketKind) -> None:
        if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
            raise ConfigError(
                f"service.socket {path} is longer than {UNIX_PATH_BYTES_MAX} bytes; choose a shorter path"
            )
        self.path = path
        _remove_stale(path, kind)
        self.socket = socket.socket(socket.AF_UNIX, kind)
        try:
            self.socket.bind(path)
            # Nobody can connect before listen(), so there is no moment with looser permissions.
            os.chmod(path, 0o600)
            self._identity = _identity(path)
            self.socket.listen(BACKLOG)
        except OSError as error:
            self.socket.close()
            raise ServiceError(f"service.socket {path}: cannot create it: {error.strerror}") from error
        self.socket.setblocking(False)

    def close(self) -> None:
        """Stop listening and remove the file, unless another daemon has put its own there."""
        self.socket.close()
        with suppress(OSError):
            if _identity(self.path) == self._identity:
                os.unlink(self.path)


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        if not Path(path).parent.is_dir():
            raise ConfigError(f"service.socket {path}: the directory does not exist; create it") from None
        return
    except OSError as error:
        raise ServiceError(f"service.socket {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"service.socket {path} exists and is not a socket; choose another path")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            _log.warning("removing %s, left behind by a daemon that is gone", path)
            with suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as error:
            raise ServiceError(f"service.socket {path}: cannot tell whether a daemon is alive: {error}") from error
        else:
            raise ServiceError(
                f"service.socket {path}: another daemon is listening there; stop it or choose another path"
            )
