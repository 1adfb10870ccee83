"""Bringing the heads of all tensor-parallel ranks together, so that chunks hold every head whoever wrote them.

Each rank saves the same chunks in the same order. For each of them, every rank but the first sends its heads to the
first, or word that it has none; the first encodes and stores the chunk. The messages go through a gloo group of our
own, in the background, and work across hosts. A rank that hears nothing for `timeout_seconds` gives up saving for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import msgspec
import torch
import torch.distributed

from kvstore.connectors.vllm.paged import HeadShare, Staging
from kvstore.spec import KVSpec


class HeadExchange:
    """One rank's end of the exchange. Every rank of the group has to make one, at the same time.

    Args:
        ranks: global ranks of the tensor-parallel group, in order.
        rank: this one's position in it.
        spec: geometry of the model's KV, all heads.
        tokens: tokens of a chunk.
        timeout_seconds: longest wait for another rank.
    """

    def __init__(self, ranks: Sequence[int], rank: int, spec: KVSpec, tokens: int, timeout_seconds: float) -> None:
        self._ranks = list(ranks)
        self._group = torch.distributed.new_group(
            self._ranks,
            timeout=timedelta(seconds=timeout_seconds),
            backend="gloo",
            use_local_synchronization=True,
        )
        self._shares = [HeadShare.of(spec.kv_heads, len(ranks), position) for position in range(len(ranks))]
        self._tokens = tokens
        self._share_spec = msgspec.structs.replace(spec, kv_heads=self._shares[0].stop - self._shares[0].start)
        self.leads = rank == 0
        self._sends = self._shares[rank].first
        self._landing = torch.empty(self._share_spec.chunk_bytes(tokens), dtype=torch.uint8)

    def send(self, part: Staging | None) -> None:
        """Send this rank's heads of a chunk to the first rank, None if it cannot. Raises RuntimeError on a timeout."""
        if not self._sends:
            return
        torch.distributed.send(torch.tensor([part is not None]), self._ranks[0], group=self._group)
        if part is not None:
            torch.distributed.send(part.host, self._ranks[0], group=self._group)

    def receive(self, into: Staging) -> bool:
        """Fill in all other ranks' heads of a chunk; False if one has none. Raises RuntimeError on a timeout."""
        whole = True
        for rank, share in zip(self._ranks[1:], self._shares[1:], strict=True):
            if not share.first:
                continue
            there = torch.tensor([False])
            torch.distributed.recv(there, rank, group=self._group)
            if not there.item():
                whole = False
                continue
            torch.distributed.recv(self._landing, rank, group=self._group)
            heads = slice(share.start, share.stop)
            part = self._share_spec.arrays(self._landing.numpy(), self._tokens)
            for (keys, values), (part_keys, part_values) in zip(into.arrays, part, strict=True):
                keys[heads] = part_keys
                values[heads] = part_values
        return whole
