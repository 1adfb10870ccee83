"""The contract suite every connector passes: subclass, say how to run a prompt, run pytest.

    class TestTransformersConnector(ConnectorContract):
        def run(self, client, tokens, *, load_deadline_ms=PATIENT_MS): ...
        def without_store(self, tokens): ...

A prompt of PROMPT_TOKENS tokens is three full chunks and a rest, at CHUNK_TOKENS tokens a chunk.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import pytest

from kvstore.client import Client
from kvstore.connector import ReuseReport
from kvstore.outcome import Reason
from kvstore.testing.memory_client import FaultyClient, flip_bit

CHUNK_TOKENS = 16
PROMPT_TOKENS = 3 * CHUNK_TOKENS + 7

PATIENT_MS = 60_000.0
HASTY_MS = 500.0

Logits = npt.NDArray[np.float32]


class ConnectorContract(ABC):
    """What `kvstore.connector` promises. The engine under it is the same model with the same weights on every call."""

    tolerance = 1e-4
    """Largest difference of logits that counts as equal."""

    @abstractmethod
    def run(
        self, client: Client, tokens: list[int], *, load_deadline_ms: float = PATIENT_MS
    ) -> tuple[Logits, ReuseReport]:
        """Logits of a prompt's last token, and the report, from a new connector on `client`.

        The model is in fp32 and the codec is "raw", so that the suite can damage KV without its being noticed.
        """

    @abstractmethod
    def without_store(self, tokens: list[int]) -> Logits:
        """Logits of the last token of a prompt from the engine alone."""

    @pytest.fixture
    def tokens(self) -> list[int]:
        return [int(token) for token in np.random.default_rng(5).integers(3, 100, PROMPT_TOKENS)]

    @pytest.fixture
    def client(self, tokens: list[int]) -> FaultyClient:
        """A store that holds the three full chunks of `tokens`."""
        client = FaultyClient()
        logits, report = self.run(client, tokens)
        self.check_logits(logits, tokens)
        assert (report.reused_tokens, report.computed_tokens, report.stored_chunks) == (0, PROMPT_TOKENS, 3)
        assert [miss.reason for miss in report.misses.values()] == [Reason.ABSENT, *[Reason.PARENT_ABSENT] * 2]
        return client

    def check_logits(self, logits: Logits, tokens: list[int]) -> None:
        np.testing.assert_allclose(logits, self.without_store(tokens), rtol=0, atol=self.tolerance)

    def check_recovers(
        self,
        client: FaultyClient,
        tokens: list[int],
        chunks: int,
        reason: Reason | None,
        load_deadline_ms: float = PATIENT_MS,
    ) -> ReuseReport:
        """The prompt runs right with that many chunks reused, and every chunk behind them has a reason."""
        logits, report = self.run(client, tokens, load_deadline_ms=load_deadline_ms)
        self.check_logits(logits, tokens)
        assert report.loaded_chunks == chunks
        assert report.reused_tokens == chunks * CHUNK_TOKENS
        assert report.reused_tokens + report.computed_tokens == report.prompt_tokens == len(tokens)
        assert list(report.misses) == list(range(chunks, len(tokens) // CHUNK_TOKENS))
        assert (report.stop.reason if report.stop else None) == reason
        if report.stop is not None:
            assert report.misses[chunks] == report.stop
        return report

    def test_a_known_prefix_is_reused(self, client: FaultyClient, tokens: list[int]) -> None:
        report = self.check_recovers(client, tokens, 3, None)
        assert report.stored_chunks == 0
        assert report.loaded_bytes == sum(map(len, client.chunks.values()))

    def test_a_flipped_bit_is_recomputed(self, client: FaultyClient, tokens: list[int]) -> None:
        key = list(client.chunks)[1]
        client.chunks[key] = flip_bit(client.chunks[key], keep_hashes=True)
        self.check_recovers(client, tokens, 1, Reason.CORRUPT)

    def test_a_truncated_chunk_is_recomputed(self, client: FaultyClient, tokens: list[int]) -> None:
        key = list(client.chunks)[2]
        client.chunks[key] = client.chunks[key][:-1]
        self.check_recovers(client, tokens, 2, Reason.TRUNCATED)

    def test_bytes_of_another_chunk_are_recomputed(self, client: FaultyClient, tokens: list[int]) -> None:
        first, second, _ = client.chunks
        client.chunks[second] = client.chunks[first]
        self.check_recovers(client, tokens, 1, Reason.WRONG_KEY)

    def test_a_hole_ends_the_prefix(self, client: FaultyClient, tokens: list[int]) -> None:
        del client.chunks[list(client.chunks)[1]]
        report = self.check_recovers(client, tokens, 1, Reason.ABSENT)
        assert report.misses[2].reason == Reason.PARENT_ABSENT
        assert (report.stored_chunks, report.existing_chunks) == (1, 1)
        self.check_recovers(client, tokens, 3, None)

    @pytest.mark.parametrize("reason", [Reason.IO_ERROR, Reason.DEADLINE, Reason.BUSY, Reason.UNKNOWN_PROFILE])
    def test_a_miss_in_the_middle_keeps_what_came_before(
        self, client: FaultyClient, tokens: list[int], reason: Reason
    ) -> None:
        client.miss[list(client.chunks)[2]] = reason
        self.check_recovers(client, tokens, 2, reason)

    @pytest.mark.parametrize("verb", ["lookup", "fetch"])
    def test_a_store_that_raises_is_gone_around(self, client: FaultyClient, tokens: list[int], verb: str) -> None:
        client.before[verb] = _raise
        report = self.check_recovers(client, tokens, 0, Reason.UNAVAILABLE)
        assert report.stop is not None
        assert "on demand" in report.stop.detail

    def test_a_store_that_raises_in_the_middle_keeps_what_came_before(
        self, client: FaultyClient, tokens: list[int]
    ) -> None:
        client.before_part = lambda index: _raise() if index == 1 else None
        self.check_recovers(client, tokens, 1, Reason.UNAVAILABLE)

    def test_a_late_load_stops_at_the_deadline(self, client: FaultyClient, tokens: list[int]) -> None:
        client.before_part = lambda index: time.sleep(1.5 * HASTY_MS / 1e3) if index == 1 else None
        self.check_recovers(client, tokens, 2, Reason.DEADLINE, HASTY_MS)

    def test_a_lookup_that_takes_the_whole_deadline_loads_nothing(
        self, client: FaultyClient, tokens: list[int]
    ) -> None:
        client.before["lookup"] = lambda: time.sleep(1.5 * HASTY_MS / 1e3)
        self.check_recovers(client, tokens, 0, Reason.DEADLINE, HASTY_MS)
        assert client.calls[-2:] == ["lookup", "put"]

    def test_a_store_that_takes_nothing_is_counted(self, tokens: list[int]) -> None:
        client = FaultyClient()
        client.refuse = Reason.FULL
        report = self.check_recovers(client, tokens, 0, Reason.ABSENT)
        assert (report.stored_chunks, report.store_failures, report.store_detail) == (0, {Reason.FULL: 3}, "on demand")

    def test_a_put_that_raises_is_counted(self, tokens: list[int]) -> None:
        client = FaultyClient()
        client.before["put"] = _raise
        report = self.check_recovers(client, tokens, 0, Reason.ABSENT)
        assert report.store_failures == {Reason.UNAVAILABLE: 3}
        assert "on demand" in report.store_detail

    def test_a_prompt_of_full_chunks_computes_its_last_token(self, client: FaultyClient, tokens: list[int]) -> None:
        logits, report = self.run(client, tokens[: 2 * CHUNK_TOKENS])
        self.check_logits(logits, tokens[: 2 * CHUNK_TOKENS])
        assert (report.reused_tokens, report.computed_tokens) == (2 * CHUNK_TOKENS - 1, 1)
        assert (report.loaded_chunks, report.misses, report.stored_chunks) == (2, {}, 0)

    def test_a_prompt_shorter_than_a_chunk_does_not_ask_the_store(self, tokens: list[int]) -> None:
        client = FaultyClient()
        short = tokens[: CHUNK_TOKENS - 1]
        logits, report = self.run(client, short)
        self.check_logits(logits, short)
        assert client.calls == []
        assert (report.stop, report.misses, report.stored_chunks) == (None, {}, 0)

    def test_prompts_share_their_beginning_only(self, client: FaultyClient, tokens: list[int]) -> None:
        other = [*tokens[: 2 * CHUNK_TOKENS + 3], *reversed(tokens)]
        report = self.check_recovers(client, other, 2, Reason.ABSENT)
        assert report.stored_chunks == len(other) // CHUNK_TOKENS - 2

    def test_wrong_numbers_would_be_seen(self, client: FaultyClient, tokens: list[int]) -> None:
        """The control: KV that is wrong although every hash is right must change the logits of these tests."""
        for key, container in client.chunks.items():
            client.chunks[key] = flip_bit(container, keep_hashes=False)
        logits, report = self.run(client, tokens)
        assert report.loaded_chunks == 3
        assert not np.allclose(logits, self.without_store(tokens), rtol=0, atol=10 * self.tolerance)


def _raise() -> None:
    raise RuntimeError("on demand")
