"""Heads of several tensor-parallel ranks become whole chunks on the first, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from kvstore.testing import vllm_rank
from kvstore.testing.chunks import sample_kv

SECONDS_MAX = 200.0


def test_chunks_hold_the_heads_of_every_rank_or_are_known_not_to(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvstore.testing.vllm_rank"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous")], stdout=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(vllm_rank.RANKS)
    ]
    try:
        first, _ = [rank.communicate(timeout=SECONDS_MAX)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for heads, chunks in zip(vllm_rank.HEADS, json.loads(first), strict=True):
        expected: list[str | None] = [
            bytes(sample_kv(vllm_rank.spec_of(heads), vllm_rank.TOKENS, seed=index)).hex()
            for index in range(vllm_rank.CHUNKS)
        ]
        if heads > 1:  # a single head is held, and saved, by the first rank
            expected[vllm_rank.LOST] = None
        assert chunks == expected
