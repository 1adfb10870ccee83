"""The arena: nobody but its owner can write to it or shrink it, and nothing of it is left behind."""

from __future__ import annotations

import gc
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvstore.connect import connect
from kvstore.embedded import EmbeddedClient
from kvstore.errors import ConfigError, TierError
from kvstore.tiers.arena import Arena, ReaderArena
from kvstore.tiers.dram import DramTier

CAPACITY_BYTES = 1 << 20

ATTACKS = """
import ctypes, mmap, os, socket, sys
from kvstore.tiers.arena import ReaderArena

channel = socket.socket(fileno=int(sys.argv[1]))
message, (fd,), _, _ = socket.recv_fds(channel, 64, 1)
size = int(message)
arena = ReaderArena(fd, size)
print("read", bytes(arena.view(4096, 5)).decode())

def attempt(name, act):
    try:
        act()
    except (OSError, PermissionError) as error:
        print(name, "refused")
    else:
        print(name, "DONE")

attempt("map", lambda: mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE))
attempt("write", lambda: os.pwrite(fd, b"evil", 0))
attempt("shrink", lambda: os.ftruncate(fd, 0))
attempt("grow", lambda: os.ftruncate(fd, 2 * size))
reopened = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
attempt("reopen", lambda: mmap.mmap(reopened, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE))

def protect():
    libc = ctypes.CDLL(None, use_errno=True)
    mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    address = [int(line.split("-")[0], 16) for line in open("/proc/self/maps") if "kvstore-dram" in line][0]
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")

attempt("protect", protect)
"""


def kvstore_mappings() -> int:
    """How many mappings of arenas this process has, without those that only garbage holds."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("kvstore-dram")


def open_descriptors() -> int:
    """How many descriptors of arenas this process has."""
    names = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{entry}"))
        except FileNotFoundError:  # the one listdir itself had open
            continue
    return sum("kvstore-dram" in name for name in names)


def test_a_process_that_is_sent_the_descriptor_can_only_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-c", ATTACKS, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        arena = Arena(CAPACITY_BYTES)
        arena.view(4096, 5)[:] = b"hello"
        socket.send_fds(ours, [b"%d" % CAPACITY_BYTES], [arena.fd])
        output, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    refused = ["map", "write", "shrink", "grow", "reopen", "protect"]
    assert output.splitlines() == ["read hello"] + [f"{name} refused" for name in refused]
    arena.view(0, 4)[:] = b"mine"  # the owner still writes
    assert bytes(arena.view(4096, 5)) == b"hello"
    arena.close()


def test_the_owner_cannot_truncate_it_either() -> None:
    arena = Arena(CAPACITY_BYTES)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    arena.close()


def test_views_are_bounded() -> None:
    arena = Arena(CAPACITY_BYTES)
    reader = ReaderArena(arena.fd, CAPACITY_BYTES)
    assert reader.view(0, CAPACITY_BYTES).readonly
    for offset, nbytes in ((-1, 1), (0, CAPACITY_BYTES + 1), (CAPACITY_BYTES, 1), (0, -1)):
        for side in (arena, reader):
            with pytest.raises(ValueError, match="outside the arena"):
                side.view(offset, nbytes)
    reader.close()
    arena.close()


@pytest.mark.parametrize("huge_pages", [False, True])
def test_nothing_is_left_after_close(huge_pages: bool) -> None:
    mappings, descriptors = kvstore_mappings(), open_descriptors()
    arena = Arena(4 << 20, huge_pages=huge_pages, prefault=True)
    assert arena.pages in ("base", "transparent", "hugetlb")
    reader = ReaderArena(arena.fd, 4 << 20)
    assert kvstore_mappings() == mappings + 2
    for side in (arena, reader, arena, reader):
        side.close()
    assert (kvstore_mappings(), open_descriptors()) == (mappings, descriptors)
    with pytest.raises(ValueError, match="closed"):
        _ = arena.fd
    with pytest.raises(ValueError, match="released"):
        arena.view(0, 1)


def test_a_view_outlives_close_and_the_mapping_goes_with_it() -> None:
    mappings, descriptors = kvstore_mappings(), open_descriptors()
    arena = Arena(CAPACITY_BYTES)
    arena.view(0, 3)[:] = b"abc"
    array = np.frombuffer(arena.view(0, 3), dtype=np.uint8)
    arena.close()
    assert array.tobytes() == b"abc"
    assert kvstore_mappings() == mappings + 1
    del array
    gc.collect()
    assert (kvstore_mappings(), open_descriptors()) == (mappings, descriptors)


def test_prefault_backs_every_page_and_changes_none() -> None:
    nbytes = 40 << 20
    arena = Arena(nbytes, prefault=True)
    arena.view(nbytes - 3, 3)[:] = b"abc"
    assert arena.wait_prefaulted(60)
    assert os.fstat(arena.fd).st_blocks * 512 == nbytes
    assert bytes(arena.view(nbytes - 3, 3)) == b"abc"
    arena.close()
    assert arena.wait_prefaulted(0)


def test_closing_does_not_wait_for_the_whole_prefault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tiers.arena.PREFAULT_STEP_BYTES", mmap.PAGESIZE)
    arena = Arena(512 << 20, prefault=True)
    fd = os.dup(arena.fd)
    arena.close()
    blocks = os.fstat(fd).st_blocks
    assert blocks * 512 < 512 << 20
    os.close(fd)


def test_an_old_kernel_only_loses_the_prefault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tiers.arena.MADV_POPULATE_WRITE", 9999)
    arena = Arena(CAPACITY_BYTES, prefault=True)
    assert arena.wait_prefaulted(60)
    arena.view(0, 3)[:] = b"abc"
    arena.close()


@pytest.mark.parametrize("capacity_bytes", [0, -1, 1 << 60])
def test_an_impossible_capacity_is_refused(capacity_bytes: int) -> None:
    with pytest.raises(ConfigError, match="dram capacity"):
        Arena(capacity_bytes)


def test_a_kernel_without_memfd_or_seals_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptors = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr("kvstore.tiers.arena.SEALS", 1 << 20)
        with pytest.raises(TierError, match="cannot seal"):
            Arena(CAPACITY_BYTES)
    assert open_descriptors() == descriptors
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(TierError, match="memfd_create"):
        Arena(CAPACITY_BYTES)


def test_a_reader_refuses_what_could_crash_it(tmp_path: Path) -> None:
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, CAPACITY_BYTES)
    with pytest.raises(TierError, match="not sealed"):
        ReaderArena(unsealed, CAPACITY_BYTES)
    os.close(unsealed)
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(CAPACITY_BYTES)
        with pytest.raises(TierError, match="not shared memory"):
            ReaderArena(file.fileno(), CAPACITY_BYTES)
    arena = Arena(CAPACITY_BYTES)
    for nbytes in (0, CAPACITY_BYTES + 4096):
        with pytest.raises(TierError, match="announced"):
            ReaderArena(arena.fd, nbytes)
    arena.close()


def test_memory_that_is_not_shared_has_no_descriptor_and_is_a_childs_own() -> None:
    arena = Arena(CAPACITY_BYTES, shared=False, huge_pages=True)
    assert arena.pages in ("transparent", "base")
    with pytest.raises(ValueError, match="not shared"):
        _ = arena.fd
    view = arena.view(0, 4)
    view[:] = b"mine"
    child = os.fork()
    if not child:
        view[:] = b"his "
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(view) == b"mine"
    view.release()
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        _ = arena.fd


def test_an_embedded_store_shares_its_memory_with_nobody() -> None:
    client = connect("embedded:?dram=1MiB")
    try:
        assert isinstance(client, EmbeddedClient)
        memory = client.store.memory
        assert isinstance(memory, DramTier)
        with pytest.raises(ValueError, match="not shared"):
            _ = memory.arena.fd
    finally:
        client.close()
