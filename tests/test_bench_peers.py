"""The comparison with LMCache runs and reports, with a stand-in of LMCache's command that makes its numbers up."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from kvstore.bench import peers_lmcache, peers_lmcache_l2
from kvstore.bench.cli import BenchError

COMMAND = """\
    import json, os, signal, socket, sys
    arguments = sys.argv[1:]
    def flag(name):
        return arguments[arguments.index(name) + 1]
    if arguments[:2] == ["bench", "l2"]:
        kind = json.loads(flag("--l2-adapter"))["type"]
        took = {"plugin": 10.0, "fs": 40.0, "fs_native": 20.0}[kind]
        lost = 1 if os.environ.get("LOSE") else 0
        report = {"duration_p50_ms": took, "total_keys": 32, "total_success": 32 - lost}
        with open(flag("--output"), "w") as file:
            json.dump({"metrics": {"op_0": report}}, file)
    elif arguments[0] == "server":
        listener = socket.create_server(("localhost", int(flag("--http-port"))))
        signal.pause()
    else:
        print("[seq 0/warm] LOOKUP: 2/2 chunks hit (2.0 ms)")
        print("[seq 0/warm] RETRIEVE: retrieved (512 tokens, 40.0 ms, 1 workers)")
        if os.environ.get("MISMATCH"):
            print("checksum MISMATCH")
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter beside the stand-in command, that can import something called lmcache."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "lmcache.py").write_text("")
    for name, start in (("python", ""), ("lmcache", f'"{folder}/command.py" ')):
        script = folder / name
        script.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{folder}" exec "{sys.executable}" {start}"$@"\n')
        script.chmod(0o755)
    (folder / "command.py").write_text(textwrap.dedent(COMMAND))
    monkeypatch.setenv("LMCACHE_PYTHON", str(folder / "python"))
    return folder / "python"


def test_every_ratio_is_reported(python: Path, tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    metrics = peers_lmcache.measure(directory, quick=True)
    assert metrics["engine.l2_load_vs_fs"] == 4
    assert metrics["engine.l2_store_vs_fs_native_direct"] == 2
    assert metrics["engine.l2_load_kvstore_mib_per_s"] == 12800
    assert metrics["engine.retrieve_lmcache_ms"] == 40
    assert metrics["engine.retrieve_vs_lmcache"] == pytest.approx(40 / metrics["engine.retrieve_kvstore_ms"])
    assert metrics["engine.lookup_vs_lmcache"] > 0


@pytest.mark.parametrize(("fault", "says"), [("LOSE", "31 of 32"), ("MISMATCH", "bench server failed")])
def test_a_failed_operation_is_no_number(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, says: str
) -> None:
    monkeypatch.setenv(fault, "1")
    with pytest.raises(BenchError, match=says):
        peers_lmcache.measure(tmp_path, quick=True)


def test_without_lmcache_it_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_PYTHON", str(tmp_path / "python"))
    with pytest.raises(BenchError, match="make test-lmcache"):
        peers_lmcache.measure(tmp_path, quick=True)


def test_dropping_pages_leaves_the_files_alone(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"abc")
    peers_lmcache_l2.drop_from_page_cache(tmp_path)
    assert (tmp_path / "deep" / "file").read_bytes() == b"abc"
