"""One tensor-parallel rank of two, in a process of its own: python -m kvstore.testing.vllm_rank RANK RENDEZVOUS_FILE.

For models of each number of heads it brings CHUNKS chunks together; the second of them is not there on the last rank.
The first rank prints, as JSON, for every chunk its bytes in hex, null for one that is not whole.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed

from kvstore.connectors.vllm.paged import HeadShare, Staging
from kvstore.connectors.vllm.ranks import HeadExchange
from kvstore.spec import KVSpec
from kvstore.testing.chunks import sample_kv, sample_spec

RANKS = 2
HEADS = (1, 2, 4)
CHUNKS = 3
LOST = 1
TOKENS = 8
TIMEOUT_SECONDS = 60.0
CPU = torch.device("cpu")


def spec_of(heads: int) -> KVSpec:
    """Geometry of a model with so many heads."""
    return sample_spec(layers=2, kv_heads=heads, dim=4)


def exchange(rank: int, heads: int) -> list[str | None]:
    """One rank's part in bringing all chunks of a model together."""
    spec = spec_of(heads)
    share = HeadShare.of(heads, RANKS, rank)
    ranks = HeadExchange(range(RANKS), rank, spec, TOKENS, TIMEOUT_SECONDS)
    whole = []
    for index in range(CHUNKS):
        known = spec.arrays(sample_kv(spec, TOKENS, seed=index), TOKENS)
        own = spec if ranks.leads else sample_spec(layers=2, kv_heads=share.stop - share.start, dim=4)
        staging = Staging(own, TOKENS, CPU)
        mine = slice(share.start, share.stop) if ranks.leads else slice(None)
        for (keys, values), (all_keys, all_values) in zip(staging.arrays, known, strict=True):
            keys[mine], values[mine] = all_keys[share.start : share.stop], all_values[share.start : share.stop]
        if not ranks.leads:
            ranks.send(None if index == LOST else staging)
        else:
            whole.append(bytes(staging.host.numpy()).hex() if ranks.receive(staging) else None)
    return whole


def main() -> None:
    """Run one rank."""
    rank = int(sys.argv[1])
    torch.distributed.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=RANKS)
    print(json.dumps([exchange(rank, heads) for heads in HEADS]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
