"""Events and explanations: a part of `kvstore.testing.client.ClientContract`."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from kvstore.client import Client
from kvstore.testing.chunks import sample_container, sample_key, sample_keys
from kvstore.testing.client_harness import PATIENCE_SECONDS, ClientHarness, put_chunk, put_samples


class EventsContract(ClientHarness):
    """What enters and leaves is told; what is missing is explained."""

    def test_events_tell_what_enters_and_leaves_in_order(self, client: Client) -> None:
        first, second = sample_keys(2)
        with client.events(kinds=["stored", "removed"], deadline_ms=PATIENCE_SECONDS * 1000) as stream:
            client.put([put_chunk(second, sample_container(second, parent=first), first)])
            assert client.flush()
            (info,) = client.head([second])
            assert info is not None
            assert client.delete([first, second]) == [False, True]
            events = [next(stream) for _ in range(2 * len(info.tiers))]
        assert [event.seq for event in events] == list(range(events[0].seq, events[-1].seq + 1))
        assert stream.position == events[-1].seq
        assert {event.key for event in events} == {second}
        assert {event.nbytes for event in events} == {info.nbytes}
        stored, removed = events[: len(info.tiers)], events[len(info.tiers) :]
        assert [(event.kind, event.tier, event.parent, event.tokens) for event in stored] == [
            ("stored", tier, first, 16) for tier in info.tiers
        ]
        assert [(event.kind, event.tier, str(event.reason)) for event in removed] == [
            ("removed", tier, "deleted") for tier in info.tiers
        ]

    def test_events_are_taken_up_where_they_were_left(self, client: Client) -> None:
        tier = next(iter(client.stats()["tiers"]))
        with client.events(deadline_ms=PATIENCE_SECONDS * 1000) as stream:
            pass
        assert list(stream) == []
        put_samples(client, sample_keys(5))
        keys: list[bytes] = []
        position = stream.position
        for _ in range(5):
            with client.events(
                after=position, tiers=[tier], kinds=["stored"], deadline_ms=PATIENCE_SECONDS * 1000
            ) as again:
                keys.append(next(again).key)
                position = again.position
        assert keys == sample_keys(5)

    def test_events_of_an_earlier_life_are_lost_and_all_of_this_one_follow(self, client: Client) -> None:
        put_samples(client, [sample_key(1)])
        with client.events(after=7, deadline_ms=PATIENCE_SECONDS * 1000) as stream:
            lost = next(stream)
            assert (lost.kind, lost.lost) == ("lost", None)
            assert next(stream).key == sample_key(1)

    def test_a_stream_that_waits_is_closed_from_another_thread(self, client: Client) -> None:
        stream = client.events(deadline_ms=PATIENCE_SECONDS * 1000)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: list(stream))
            time.sleep(0.05)
            started = time.monotonic()
            stream.close()
            assert waiting.result(timeout=PATIENCE_SECONDS) == []
            assert time.monotonic() - started < PATIENCE_SECONDS / 2, "the deadline ended it, not the close"
        stream.close()
        assert list(stream) == []

    def test_explain_has_a_reason_for_every_chunk(self, client: Client) -> None:
        keys = sample_keys(4)
        put_samples(client, [keys[0], keys[1], keys[3]])
        assert client.flush()
        client.delete([keys[1]])
        explained = client.explain(keys)
        assert [chunk.key for chunk in explained] == keys
        assert [str(chunk.why) for chunk in explained] == ["present", "deleted", "absent", "parent_absent"]
        info = client.head(keys[:1])[0]
        assert info is not None
        assert (explained[0].tiers, explained[0].nbytes) == (info.tiers, info.nbytes)
        assert explained[1].removed_from == info.tiers[-1]
        assert explained[1].removed_unix_seconds is not None
        assert explained[3].tiers == info.tiers
        assert all(chunk.detail for chunk in explained[1:])
        assert client.explain([]) == []
