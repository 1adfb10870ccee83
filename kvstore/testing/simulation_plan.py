"""What happens in a simulated store's lives: drawn from a seed, as plain data that can be printed and cut down."""

from __future__ import annotations

import functools
import random

import msgspec

from kvstore import container
from kvstore.keys import ROOT
from kvstore.testing.chunks import sample_container, sample_key, sample_spec
from kvstore.testing.faults import Fault
from kvstore.tier import IO_ALIGN
from kvstore.tiers.eviction_order import NATIVE
from kvstore.tiers.policies.registry import EVICTIONS

CHAINS = 3
CHAIN_CHUNKS = 4
TOKENS = (10, 30, 60, 100, 130, 20, 75, 45, 90, 15, 120, 50)
SPEC = sample_spec(layers=2, kv_heads=1, dim=16)
CHUNK_PAGES_MAX = 6
"""Of the chunk with the most tokens."""


TENANTS = ("", "a", "b")
"""Who puts: the clients take turns."""
POLICIES = (NATIVE, NATIVE, *EVICTIONS)
"""Of memory and of the durable tier."""


class Chunk(msgspec.Struct, frozen=True):
    """One of the chunks that the clients put and get. `parts` is what its hashes cover: header and segments."""

    key: bytes
    parent: bytes
    data: bytes
    parts: tuple[tuple[int, int], ...]


@functools.cache
def chunks() -> tuple[Chunk, ...]:
    """Chains of chunks of one to six pages, together more than any of the tiers takes."""
    made: list[Chunk] = []
    for number, tokens in enumerate(TOKENS):
        parent = ROOT if number % CHAIN_CHUNKS == 0 else made[-1].key
        key = sample_key(number)
        data = sample_container(key, spec=SPEC, tokens=tokens, parent=parent)
        header = container.parse(memoryview(data))
        parts = [(0, header.header_bytes), *((s.offset, s.offset + s.length) for s in header.segments)]
        made.append(Chunk(key, parent, data, tuple(parts)))
    return tuple(made)


@functools.cache
def by_key() -> dict[bytes, Chunk]:
    """The chunks by their keys."""
    return {chunk.key: chunk for chunk in chunks()}


class Op(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call of a client. What a field means for a verb is in `kvstore.testing.simulation_clients`."""

    verb: str
    chunks: tuple[int, ...] = ()
    durable: bool = False
    deadline_ms: float | None = None
    order: str = "chunk"
    stop_after: int = 1000
    hold_seconds: float = 0.0


class LifePlan(msgspec.Struct, frozen=True):
    """One opening of the store: what its clients do, and how it ends ("close", "kill", "power").

    A life that does not end by closing ends at step `crash_step` of the schedule, or when all clients are done.
    """

    clients: tuple[tuple[Op, ...], ...]
    ending: str
    crash_step: int = 0
    rates: dict[str, float] = {}
    impatient: bool = False


class Plan(msgspec.Struct, frozen=True):
    """Everything about a schedule but the order of its steps, which `seed` decides.

    `tenant_pages` are the quotas in memory and in the durable tier; without any nobody is told apart.
    """

    seed: int
    dram_pages: int
    nvme_pages: int
    disks: int
    policies: tuple[str, str]
    direct_io: bool
    evict_ahead_bytes: int
    queue_pages: int
    batch_pages: int
    window_pages: int
    transient_pages: int
    prefetch_chunks_max: int
    mover_threads: int
    lives: tuple[LifePlan, ...]
    tenant_pages: tuple[dict[str, int], dict[str, int]] = ({}, {})

    def pages(self, field: str) -> int:
        """A size in bytes."""
        return int(getattr(self, f"{field}_pages")) * IO_ALIGN

    def quotas(self, tier: int) -> dict[str, int]:
        """The tenants' quotas in bytes, of memory (0) or of the durable tier (1)."""
        return {tenant: pages * IO_ALIGN for tenant, pages in self.tenant_pages[tier].items()}


VERBS = {
    "put": 30,
    "write": 8,
    "fetch": 30,
    "borrow": 8,
    "look": 6,
    "delete": 8,
    "prefetch": 8,
    "cancel": 2,
    "park": 3,
    "resume": 3,
    "pin": 4,
    "unpin": 2,
    "flush": 4,
    "stats": 4,
    "touch": 2,
    "close": 1,
}
"""Verbs and how often each is drawn."""

RATES: tuple[dict[str, float], ...] = (
    {},
    {},
    {},
    {Fault.FLIP: 0.03, Fault.SHORT: 0.05},
    {Fault.EIO: 0.02},
    {Fault.ENOSPC: 0.03, Fault.SHORT: 0.03},
    {Fault.TORN: 0.02, Fault.FLIP: 0.02},
    {Fault.STALL: 0.02},
    {Fault.ROT: 0.02},
    {Fault.EIO: 0.005, Fault.ENOSPC: 0.005, Fault.SHORT: 0.01, Fault.TORN: 0.005, Fault.FLIP: 0.01, Fault.STALL: 0.005},
)
"""Devices from good to bad; half of the lives have a good one."""


DUELS = 0.1
"""Share of plans in which few clients fight for one chain that lies on the disk alone, so that their calls meet."""


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    plan = _draw(seed)
    rng = random.Random(f"duel {seed}")
    return msgspec.structs.replace(plan, lives=_draw_duel(rng)) if rng.random() < DUELS else plan


def _draw_duel(rng: random.Random) -> tuple[LifePlan, ...]:
    """A life that stores a chain and is closed, and one whose clients read, delete and put that chain at once."""
    first = rng.randrange(CHAINS) * CHAIN_CHUNKS
    chain = tuple(range(first, first + CHAIN_CHUNKS))
    clients = tuple(
        tuple(
            msgspec.structs.replace(
                _draw_op(rng, ["put", "fetch", "delete", "prefetch"]), chunks=chain[: rng.randint(1, 4)]
            )
            for _ in range(rng.randint(1, 3))
        )
        for _ in range(rng.randint(2, 3))
    )
    store = LifePlan(clients=((Op("put", chain, durable=True),),), ending="close", crash_step=0)
    return store, LifePlan(clients=clients, ending="close", crash_step=0)


def _draw(seed: int) -> Plan:
    rng = random.Random(seed)
    return Plan(
        seed=seed,
        dram_pages=rng.choice((8, 12, 16, 24)),
        nvme_pages=rng.choice((18, 20, 24, 34)) if (disks := rng.choice((1, 1, 2))) == 1 else rng.choice((36, 46)),
        disks=disks,
        policies=(rng.choice(POLICIES), rng.choice(POLICIES)),
        direct_io=rng.random() < 0.7,
        evict_ahead_bytes=rng.choice((0, 0, 5 * IO_ALIGN)),
        queue_pages=rng.choice((2, 6, 12)),
        batch_pages=rng.choice((1, 4, 12)),
        window_pages=rng.choice((3, 8, 40)),
        transient_pages=rng.choice((3, 8, 20)),
        prefetch_chunks_max=rng.choice((1, 3)),
        mover_threads=rng.choice((1, 2, 4)),
        lives=tuple(_draw_life(rng) for _ in range(rng.choice((1, 2, 2, 3)))),
        tenant_pages=_draw_quotas(random.Random(f"tenants {seed}")),
    )


def _draw_quotas(rng: random.Random) -> tuple[dict[str, int], dict[str, int]]:
    if rng.random() < 0.5:
        return {}, {}
    limited = [tenant for tenant in TENANTS if tenant]
    return {tenant: rng.choice((0, 3, 6, 9, 24)) for tenant in limited}, {
        tenant: rng.choice((0, 4, 8, 12, 46)) for tenant in limited
    }


def _draw_life(rng: random.Random) -> LifePlan:
    verbs = [verb for verb in VERBS if rng.random() < 0.75 or verb in ("put", "fetch")]
    clients = tuple(tuple(_draw_op(rng, verbs) for _ in range(rng.randint(2, 8))) for _ in range(rng.randint(1, 4)))
    ending = rng.choice(("close", "kill", "power", "power"))
    return LifePlan(
        clients=clients,
        ending=ending,
        crash_step=0 if ending == "close" else int(rng.expovariate(1 / 500)) + 1,
        rates={str(fault): rate for fault, rate in rng.choice(RATES).items()},
        impatient=rng.random() < 0.2,
    )


def _draw_op(rng: random.Random, verbs: list[str]) -> Op:
    (verb,) = rng.choices(verbs, [VERBS[verb] for verb in verbs])
    if rng.random() < 0.6:  # a chain, from its first chunk
        chain = rng.randrange(CHAINS) * CHAIN_CHUNKS
        picked = tuple(range(chain, chain + rng.randint(1, CHAIN_CHUNKS)))
    else:
        picked = tuple(rng.sample(range(len(TOKENS)), rng.randint(1, 3)))
    return Op(
        verb,
        picked,
        durable=rng.random() < 0.5,
        deadline_ms=rng.choice((None, None, None, 0.3, 5.0)),
        order=rng.choice(("chunk", "layer")),
        stop_after=rng.choice((0, 1, 2, 1000, 1000, 1000)),
        hold_seconds=rng.choice((0.0, 0.0, 1e-4, 0.01)),
    )
