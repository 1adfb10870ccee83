"""Every policy against a slow, plain one that searches all chunks, over random histories of chains, sizes and holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.keys import ROOT
from kvstore.tiers.policies.arc import ArcPolicy
from kvstore.tiers.policies.chained import ChainedPolicy
from kvstore.tiers.policies.gdsf import GdsfPolicy
from kvstore.tiers.policies.lru import LruPolicy
from kvstore.tiers.policies.s3fifo import S3FifoPolicy
from kvstore.tiers.policy import Chunk

CAPACITY = 40


def key(number: int) -> bytes:
    return (number + 1).to_bytes(32, "little")


class Reference:
    """The chunks of a tier, and the rule of who may leave; a policy adds its order."""

    def __init__(self) -> None:
        self.chunks: dict[bytes, Chunk] = {}
        self.holds: dict[bytes, int] = {}
        self.used: dict[bytes, int] = {}
        self.visits: dict[bytes, int] = {}
        self.time = 0

    def tick(self) -> int:
        self.time += 1
        return self.time

    def insert(self, chunk: Chunk) -> None:
        self.chunks[chunk.key] = chunk
        self.used[chunk.key] = self.tick()
        self.visits[chunk.key] = 1

    def access(self, name: bytes) -> None:
        self.used[name] = self.tick()
        self.visits[name] += 1

    def remove(self, name: bytes, evicted: bool) -> None:
        del self.chunks[name], self.used[name], self.visits[name]
        self.holds.pop(name, None)

    def candidates(self) -> list[bytes]:
        parents = {chunk.parent for chunk in self.chunks.values()}
        return [name for name in self.chunks if name not in parents and not self.holds.get(name)]

    def victim(self) -> bytes | None:
        return min(self.candidates(), key=self.used.__getitem__, default=None)


class GdsfReference(Reference):
    def __init__(self) -> None:
        super().__init__()
        self.age = 0.0
        self.score: dict[bytes, float] = {}

    def rate(self, name: bytes) -> None:
        chunk = self.chunks[name]
        self.score[name] = self.age + self.visits[name] * chunk.cost / chunk.nbytes

    def insert(self, chunk: Chunk) -> None:
        super().insert(chunk)
        self.rate(chunk.key)

    def access(self, name: bytes) -> None:
        super().access(name)
        self.rate(name)

    def remove(self, name: bytes, evicted: bool) -> None:
        super().remove(name, evicted)
        score = self.score.pop(name)
        if evicted:
            self.age = max(self.age, score)

    def victim(self) -> bytes | None:
        return min(self.candidates(), key=lambda name: (self.score[name], self.used[name]), default=None)


def trim(ghosts: list[tuple[bytes, int]], nbytes_max: int) -> None:
    while sum(nbytes for _, nbytes in ghosts) > nbytes_max:
        ghosts.pop(0)


def take(ghosts: list[tuple[bytes, int]], name: bytes) -> bool:
    found = [ghost for ghost in ghosts if ghost[0] == name]
    for ghost in found:
        ghosts.remove(ghost)
    return bool(found)


class S3FifoReference(Reference):
    def __init__(self) -> None:
        super().__init__()
        self.small: list[bytes] = []
        self.main: list[bytes] = []
        self.uses: dict[bytes, int] = {}
        self.ghosts: list[tuple[bytes, int]] = []

    def insert(self, chunk: Chunk) -> None:
        super().insert(chunk)
        (self.main if take(self.ghosts, chunk.key) else self.small).append(chunk.key)
        self.uses[chunk.key] = 0

    def access(self, name: bytes) -> None:
        super().access(name)
        self.uses[name] = min(3, self.uses[name] + 1)

    def remove(self, name: bytes, evicted: bool) -> None:
        if name in self.main:
            self.main.remove(name)
        else:
            self.small.remove(name)
            if evicted:
                self.ghosts.append((name, self.chunks[name].nbytes))
                trim(self.ghosts, CAPACITY)
        super().remove(name, evicted)

    def victim(self) -> bytes | None:
        while True:
            candidates = set(self.candidates())
            small = [name for name in self.small if name in candidates]
            main = [name for name in self.main if name in candidates]
            over = 10 * sum(self.chunks[name].nbytes for name in self.small) > CAPACITY
            order = small[:1] + main[:1] if over else main[:1] + small[:1]
            if not order:
                return None
            name = order[0]
            if name in self.small and self.uses[name] > 1:
                self.small.remove(name)
                self.uses[name] = 0
            elif name in self.main and self.uses[name] > 0:
                self.main.remove(name)
                self.uses[name] -= 1
            else:
                return name
            self.main.append(name)


class ArcReference(Reference):
    def __init__(self) -> None:
        super().__init__()
        self.often: set[bytes] = set()
        self.once_ghosts: list[tuple[bytes, int]] = []
        self.often_ghosts: list[tuple[bytes, int]] = []
        self.target = 0.0

    def nbytes(self, often: bool) -> int:
        return sum(chunk.nbytes for name, chunk in self.chunks.items() if (name in self.often) == often)

    def insert(self, chunk: Chunk) -> None:
        super().insert(chunk)
        once = max(1, sum(nbytes for _, nbytes in self.once_ghosts))
        often = max(1, sum(nbytes for _, nbytes in self.often_ghosts))
        if take(self.once_ghosts, chunk.key):
            self.target = min(CAPACITY, self.target + chunk.nbytes * max(1.0, often / once))
            self.often.add(chunk.key)
        elif take(self.often_ghosts, chunk.key):
            self.target = max(0.0, self.target - chunk.nbytes * max(1.0, once / often))
            self.often.add(chunk.key)

    def access(self, name: bytes) -> None:
        super().access(name)
        self.often.add(name)

    def remove(self, name: bytes, evicted: bool) -> None:
        nbytes, often = self.chunks[name].nbytes, name in self.often
        super().remove(name, evicted)
        self.often.discard(name)
        if evicted:
            (self.often_ghosts if often else self.once_ghosts).append((name, nbytes))
            trim(self.once_ghosts, max(0, CAPACITY - self.nbytes(often=False)))
            once = sum(nbytes for _, nbytes in self.once_ghosts)
            held = sum(chunk.nbytes for chunk in self.chunks.values())
            trim(self.often_ghosts, max(0, 2 * CAPACITY - held - once))

    def victim(self) -> bytes | None:
        by_use = sorted(self.candidates(), key=self.used.__getitem__)
        once = [name for name in by_use if name not in self.often]
        often = [name for name in by_use if name in self.often]
        over = self.nbytes(often=False) > self.target
        return next(iter(once + often if over else often + once), None)


PAIRS = {
    "arc": (ArcPolicy, ArcReference),
    "gdsf": (GdsfPolicy, GdsfReference),
    "lru": (LruPolicy, Reference),
    "s3fifo": (S3FifoPolicy, S3FifoReference),
}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["offer", "offer", "use", "use", "delete", "hold", "release"]),
        st.integers(0, 14),
        st.integers(0, 14),
        st.integers(1, 12),
    ),
    max_size=120,
)


@pytest.mark.parametrize("name", sorted(PAIRS))
@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_a_policy_names_the_victims_that_a_search_of_everything_names(
    name: str, steps: list[tuple[str, int, int, int]]
) -> None:
    make: Callable[[int], ChainedPolicy] = PAIRS[name][0]
    policy, reference = make(CAPACITY), PAIRS[name][1]()
    for verb, number, parent, nbytes in steps:
        step(policy, reference, verb, number, min(parent, number - 1), nbytes)
        assert policy.victim() == reference.victim()
        assert policy.victim() == reference.victim(), "asking twice changes nothing"
        assert set(policy.nodes) == set(reference.chunks)


def step(policy: ChainedPolicy, reference: Reference, verb: str, number: int, parent: int, nbytes: int) -> None:
    name = key(number)
    there = name in reference.chunks
    if verb == "offer" and not there:
        chunk = Chunk(name, key(parent) if parent >= 0 else ROOT, nbytes, cost=float(nbytes % 5))
        used_bytes = nbytes + sum(held.nbytes for held in reference.chunks.values())
        while used_bytes > CAPACITY and (victim := reference.victim()) is not None:
            assert policy.victim() == victim
            used_bytes -= reference.chunks[victim].nbytes
            policy.remove(victim)
            reference.remove(victim, evicted=True)
        policy.insert(chunk)
        reference.insert(chunk)
    elif verb == "use" and there:
        policy.access(name)
        reference.access(name)
    elif verb == "delete" and there:
        policy.remove(name, evicted=False)
        reference.remove(name, evicted=False)
    elif verb == "hold":
        policy.hold(name)
        if there:
            reference.holds[name] = reference.holds.get(name, 0) + 1
    elif verb == "release":
        policy.release(name)
        if reference.holds.get(name):
            reference.holds[name] -= 1
