"""What every policy promises: the prefix rule, holds, bounded memory, the same answers for the same history."""

from __future__ import annotations

import random

import pytest

from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.tiers.policies.ghosts import GhostList, VisitTable
from kvstore.tiers.policies.registry import ADMISSIONS, EVICTIONS, open_policy
from kvstore.tiers.policy import CachePolicy, Chunk

COMBINATIONS = [("adaptive", ""), *((eviction, admission) for eviction in EVICTIONS for admission in ADMISSIONS[1:])]


def key(number: int) -> bytes:
    return random.Random(number).randbytes(32)


class Workload:
    """A tier of `capacity_bytes` under a policy, with random prompts that share prefixes; checks the rules."""

    def __init__(self, policy: CachePolicy, capacity_bytes: int, seed: int) -> None:
        self.policy = policy
        self.capacity_bytes = capacity_bytes
        self.draw = random.Random(seed)
        self.chunks: dict[bytes, Chunk] = {}
        self.held: list[bytes] = []
        self.log: list[bytes] = []

    def run(self, prompts: int) -> list[bytes]:
        """The victims, in order."""
        for _ in range(prompts):
            self.prompt([1000 * self.draw.randrange(12) + depth for depth in range(self.draw.randrange(1, 9))])
            self.hold_or_release()
        return self.log

    def prompt(self, numbers: list[int]) -> None:
        keys = [key(number) for number in numbers]
        hits = next((depth for depth, name in enumerate(keys) if name not in self.chunks), len(keys))
        for name in reversed(keys[:hits]):
            self.policy.access(name)
        parent = keys[hits - 1] if hits else ROOT
        for name in keys[hits:]:
            if name not in self.chunks:
                self.offer(Chunk(name, parent, self.draw.randrange(1, 5), self.draw.random()))
            parent = name

    def offer(self, chunk: Chunk) -> None:
        full = self.used_bytes + chunk.nbytes > self.capacity_bytes
        if not self.policy.admits(chunk, full=full):
            return
        assert chunk.parent == ROOT or chunk.parent in self.chunks, "admitted behind a chunk that is not there"
        self.policy.hold(chunk.parent)
        while self.used_bytes + chunk.nbytes > self.capacity_bytes and (victim := self.policy.victim()):
            assert victim in self.chunks
            assert victim not in self.held
            assert victim != chunk.parent
            assert all(other.parent != victim for other in self.chunks.values()), "a parent left before its child"
            self.log.append(victim)
            del self.chunks[victim]
            self.policy.remove(victim)
        self.policy.release(chunk.parent)
        if self.used_bytes + chunk.nbytes <= self.capacity_bytes:
            self.chunks[chunk.key] = chunk
            self.policy.insert(chunk)

    def hold_or_release(self) -> None:
        if self.chunks and self.draw.random() < 0.2:
            self.held.append(self.draw.choice(sorted(self.chunks)))
            self.policy.hold(self.held[-1])
        if self.held and self.draw.random() < 0.3:
            self.policy.release(self.held.pop(0))

    @property
    def used_bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks.values())


@pytest.mark.parametrize(("eviction", "admission"), COMBINATIONS)
def test_a_policy_respects_prefixes_and_holds_and_repeats_itself(eviction: str, admission: str) -> None:
    logs = []
    for _ in range(2):
        policy = open_policy(eviction, admission, capacity_bytes=40, seed=3, read_bytes_per_second=10.0)
        logs.append(Workload(policy, 40, seed=7).run(600))
    assert logs[0] == logs[1]
    assert logs[0], "the workload is to make it evict"


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_chunk_removed_from_under_its_children_is_found_again_as_their_parent(eviction: str) -> None:
    policy = open_policy(eviction, capacity_bytes=100)
    policy.insert(Chunk(key(1)))
    policy.insert(Chunk(key(2), key(1)))
    policy.remove(key(1), evicted=False)
    policy.insert(Chunk(key(1)))
    assert policy.victim() == key(2)
    policy.hold(key(2))
    assert policy.victim() is None, "what is held protects the chain before it"
    policy.release(key(2))
    policy.remove(key(2))
    assert policy.victim() == key(1)


def test_a_chunk_enters_once_and_what_is_not_there_cannot_be_used() -> None:
    policy = open_policy(capacity_bytes=10)
    policy.insert(Chunk(key(1)))
    with pytest.raises(ValueError, match="in the tier already"):
        policy.insert(Chunk(key(1)))
    with pytest.raises(ValueError, match="its own parent"):
        policy.insert(Chunk(key(2), key(2)))
    with pytest.raises(KeyError):
        policy.access(key(3))
    with pytest.raises(KeyError):
        policy.remove(key(3))


def test_names_that_do_not_exist_get_the_nearest_that_do() -> None:
    with pytest.raises(ConfigError, match="unknown eviction policy 's3fif'; did you mean 's3fifo'"):
        open_policy("s3fif", capacity_bytes=1)
    with pytest.raises(ConfigError, match="unknown admission policy 'x'; use one of adaptive, always"):
        open_policy("lru", "x", capacity_bytes=1)
    with pytest.raises(ConfigError, match="needs eviction policy 'adaptive'"):
        open_policy("lru", "adaptive", capacity_bytes=1)
    with pytest.raises(ConfigError, match="capacity_bytes is 0"):
        open_policy(capacity_bytes=0)
    with pytest.raises(ConfigError, match="read_bytes_per_second"):
        open_policy("lru", "cost", capacity_bytes=1, read_bytes_per_second=0)


def test_second_touch_admits_what_is_remembered_and_cost_what_pays() -> None:
    policy = open_policy("lru", "second_touch", capacity_bytes=100)
    chunk = Chunk(key(1), nbytes=10, cost=2.0)
    assert [policy.admits(chunk, full=False) for _ in range(3)] == [False, True, True]
    assert not open_policy("lru", "cost", capacity_bytes=1, read_bytes_per_second=5).admits(chunk, full=False)
    assert open_policy("lru", "cost", capacity_bytes=1, read_bytes_per_second=6).admits(chunk, full=False)


def test_a_visit_table_agrees_with_lists_of_four() -> None:
    draw = random.Random(1)
    table = VisitTable(64)
    sets: dict[int, list[tuple[bytes, int]]] = {}
    for _ in range(5000):
        name = key(draw.randrange(200))
        members = sets.setdefault(name[0] % 16, [])
        expected = dict(members).get(name, 0)
        assert table.get(name) == expected
        table.put(name, expected + 1)
        sets[name[0] % 16] = [(name, min(expected + 1, 255)), *(pair for pair in members if pair[0] != name)][:4]


def test_a_visit_table_that_grows_forgets_nothing_it_still_has_room_for() -> None:
    table = VisitTable(64)
    before = {}
    for number in range(64):
        table.put(key(number), number + 1)
    before = {number: table.get(key(number)) for number in range(64)}
    table.reserve(1000)
    assert table.chunks == 1024
    assert {number: table.get(key(number)) for number in range(64)} == before
    assert sum(map(bool, before.values())) > 40


def test_a_ghost_list_stays_within_its_bytes() -> None:
    ghosts = GhostList()
    for number in range(100):
        ghosts.add(key(number % 7), number % 7 + 1)
        ghosts.trim(12)
        assert ghosts.nbytes <= 12
    assert ghosts.pop(key(1)) == 2
    assert ghosts.pop(key(1)) == 0
