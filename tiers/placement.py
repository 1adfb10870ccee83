"""Where an arena's memory lies: on which NUMA node, and whether a GPU may copy from it on its own.

A CXL memory expander is a NUMA node without processors, so a node is all there is to name. Both are for the kernel and
the driver to do; this module asks them, and says clearly when they cannot.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from pathlib import Path

from kvstore.errors import ConfigError, TierError

_log = logging.getLogger(__name__)

NODES = Path("/sys/devices/system/node/has_memory")
"""Nodes with memory, as in "0-1,4"."""

_MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call; the C library has no function for it."""

_MPOL_BIND = 2
_MASK_BITS = 1024

_REGISTER_PORTABLE = 1
_REGISTER_READ_ONLY = 8


def nodes_with_memory() -> list[int]:
    """Numbers of the NUMA nodes that have memory; [0] where the kernel does not tell."""
    try:
        text = NODES.read_text().strip()
    except OSError:
        return [0]
    nodes: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        nodes += range(int(first), int(last or first) + 1)
    return nodes


def bind_to_node(address: int, nbytes: int, node: int) -> None:
    """Take the memory at `address`, which must not have been touched yet, from one NUMA node and no other.

    Raises:
        ConfigError: there is no such node, or it has no memory.
        TierError: the kernel refuses.
    """
    nodes = nodes_with_memory()
    if node not in nodes:
        known = ", ".join(map(str, nodes))
        raise ConfigError(f"numa_node is {node}; the nodes with memory on this machine are: {known}")
    number = _MBIND.get(platform.machine())
    if number is None:
        raise ConfigError(f"numa_node is {node}; it is not supported on {platform.machine()}, leave it out")
    words = (ctypes.c_ulong * (_MASK_BITS // (8 * ctypes.sizeof(ctypes.c_ulong))))()
    word, bit = divmod(node, 8 * ctypes.sizeof(ctypes.c_ulong))
    words[word] = 1 << bit
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_long(_MPOL_BIND),
        words,
        ctypes.c_ulong(_MASK_BITS + 1),
        ctypes.c_ulong(0),
    )
    if failed:
        raise TierError(f"cannot take memory from numa_node {node}: {os.strerror(ctypes.get_errno())}")


def register_with_cuda(address: int, nbytes: int, *, read_only: bool) -> bool:
    """Pin memory so that a GPU copies from it directly; False, with a line in the log, where that cannot be."""
    try:
        import torch
    except ImportError:
        _log.warning("memory stays unpinned: torch is not installed")
        return False
    if not torch.cuda.is_available():
        _log.warning("memory stays unpinned: torch finds no CUDA")
        return False
    flags = _REGISTER_PORTABLE | (_REGISTER_READ_ONLY if read_only else 0)
    error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, flags))  # type: ignore[no-untyped-call]
    if error:
        _log.warning("memory stays unpinned: cudaHostRegister of %d bytes failed with error %d", nbytes, error)
    return not error


def unregister_from_cuda(address: int) -> None:
    """Undo `register_with_cuda`."""
    import torch

    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
