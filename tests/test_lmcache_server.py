"""A real `lmcache server` over a kvstore daemon: what one server stored, the next one has."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from kvstore.bench.daemon import Daemon
from kvstore.bench.peers_lmcache import environment
from kvstore.bench.peers_lmcache_server import CHUNKS, free_port, lmcache_bench, lmcache_server
from kvstore.connect import connect
from kvstore.testing import lmcache as stand_in

COMMAND = Path(sys.executable).with_name("lmcache")
SEQUENCES = 2


@pytest.mark.skipif(
    not stand_in.installed() or not COMMAND.exists(), reason="needs LMCache; `make test-lmcache` runs this with it"
)
def test_a_second_server_finds_what_the_first_one_stored(tmp_path: Path) -> None:
    with Daemon(tmp_path, dram="512MiB", nvme="1GiB") as daemon:
        daemon.start().close()
        adapter = {
            "type": "plugin",
            "module_path": "kvstore.connectors.lmcache",
            "class_name": "KVStoreL2Adapter",
            "adapter_params": {"url": daemon.url},
        }
        found: list[list[str]] = []
        for _ in range(2):
            rpc, web = free_port(), free_port()
            with lmcache_server(COMMAND, tmp_path, environment(), rpc, web, json.dumps(adapter)):
                output = lmcache_bench(COMMAND, environment(), rpc, web, SEQUENCES)
            found.append(re.findall(r"cold\] LOOKUP: (\d+)/", output))
            with connect(daemon.url) as client:
                assert client.flush()
        assert found == [["0"] * SEQUENCES, [str(CHUNKS)] * SEQUENCES]
        with connect(daemon.url) as client:
            assert client.stats()["tiers"]["nvme"]["usage"]["entries"] == SEQUENCES * CHUNKS
