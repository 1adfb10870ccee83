"""Mark&Predict's bounds, for any hints and for right ones, against the optimum."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.tiers.policies.predictive import PredictivePolicy
from kvstore.tiers.policy import Chunk

REQUESTS = st.lists(st.integers(0, 9), max_size=150)


def key(number: int) -> bytes:
    return (number + 1).to_bytes(32, "little")


def misses_of(requests: list[int], hints: list[bool], chunks: int, seed: int) -> int:
    policy = PredictivePolicy(chunks, seed=seed)
    misses = 0
    for number, returns in zip(requests, hints, strict=True):
        if key(number) in policy:
            policy.access(key(number), returns=returns)
            continue
        misses += 1
        if len(policy) == chunks:
            victim = policy.victim()
            assert victim is not None
            policy.remove(victim)
        policy.insert(Chunk(key(number)), returns=returns)
    return misses


def fewest_misses(requests: list[int], chunks: int) -> int:
    there: set[int] = set()
    misses = 0
    for now, number in enumerate(requests):
        if number not in there:
            misses += 1
            if len(there) == chunks:
                rest = requests[now + 1 :]
                there.remove(max(there, key=lambda other: rest.index(other) if other in rest else len(rest)))
            there.add(number)
    return misses


def phases_of(requests: list[int], chunks: int) -> list[set[int]]:
    """The marking phase of each request: a phase ends before the (chunks + 1)-th different number."""
    phase: set[int] = set()
    phases = []
    for number in requests:
        if number not in phase and len(phase) == chunks:
            phase = set()
        phase.add(number)
        phases.append(phase)
    return phases


@settings(max_examples=200, deadline=None)
@given(requests=REQUESTS, hints=st.randoms(use_true_random=False), chunks=st.integers(1, 6), seed=st.integers(0, 3))
def test_however_bad_the_hints_misses_stay_within_the_marking_bound(
    requests: list[int], hints: object, chunks: int, seed: int
) -> None:
    wrong = [bool(hints.getrandbits(1)) for _ in requests]  # type: ignore[attr-defined]
    best = fewest_misses(requests, chunks)
    for bits in (wrong, [True] * len(requests), [False] * len(requests), lies(requests, chunks)):
        assert misses_of(requests, bits, chunks, seed) <= chunks * best + chunks


@settings(max_examples=200, deadline=None)
@given(requests=REQUESTS, chunks=st.integers(1, 6), seed=st.integers(0, 3))
def test_with_right_hints_misses_are_within_twice_the_optimum(requests: list[int], chunks: int, seed: int) -> None:
    bits = [not lie for lie in lies(requests, chunks)]
    assert misses_of(requests, bits, chunks, seed) <= 2 * fewest_misses(requests, chunks) + chunks


def lies(requests: list[int], chunks: int) -> list[bool]:
    """The opposite of whether each request's number is asked for in the phase after its own."""
    phases = phases_of(requests, chunks)
    wrong = []
    for now, (number, phase) in enumerate(zip(requests, phases, strict=True)):
        following = next((later for later in phases[now:] if later is not phase), set())
        wrong.append(number not in following)
    return wrong
