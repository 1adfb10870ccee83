"""How the command ends: by a signal, by output that cannot be written, by a mistake that is found before the work."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore import cli
from kvstore.testing.serving import ServerThread, small_store

COMMAND = [sys.executable, "-m", "kvstore.cli"]

LONG_BENCHMARK = """
import signal, sys, threading, types
from kvstore import cli
from kvstore.bench import cli as bench

# Whoever runs the tests in the background may have SIGINT ignored, which is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)

def measure(directory, quick):
    print("measuring", flush=True)
    threading.Event().wait(60)

sys.modules["long"] = types.ModuleType("long")
sys.modules["long"].measure = measure
bench.SUITES["engine"] = (("long",), "")
sys.exit(cli.main(["bench", "engine"]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_benchmark_that_is_ended_takes_its_files_away(tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", LONG_BENCHMARK]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"measuring\n"
        assert list(tmp_path.glob(".kvstore-bench-*"))
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "config", "show"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "kvstore: [Errno 28] No space left on device\n"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with subprocess.Popen(
        [*COMMAND, "config", "show"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_file_that_cannot_be_written_is_said_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("/nowhere/bench.json", "/"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "engine", "--json", target])
        assert stop.value.code == 2
        assert f"--json {target}: name a file" in capsys.readouterr().err


def test_a_flag_is_named_as_it_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stats", "unix:/none", "--token-file", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("kvstore: --token-file ")
    with ServerThread(small_store(tmp_path, nvme="")) as server:
        assert cli.main(["events", "--url", server.unix_url, "--tier", "dran", "--seconds", "1"]) == 2
    assert "unknown tier 'dran'; did you mean 'dram'?" in capsys.readouterr().err
