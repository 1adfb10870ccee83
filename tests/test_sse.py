"""Events on the wire: what is written is read back, however the bytes are cut, and nothing else is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import ServiceError
from kvstore.events import Event
from kvstore.sse import BLOCK_BYTES_MAX, Block, BlockReader, encode, encode_position
from kvstore.testing.chunks import sample_key
from kvstore.tier import Removal

numbers = st.integers(0, 2**53)
keys = st.binary(min_size=32, max_size=32)
events = st.one_of(
    st.builds(
        Event,
        seq=numbers,
        kind=st.just("stored"),
        unix_seconds=st.floats(0, 2**40),
        tier=st.text(max_size=20),
        key=keys,
        parent=st.none() | keys,
        nbytes=numbers,
        tokens=st.none() | st.integers(1, 65536),
    ),
    st.builds(
        Event,
        seq=numbers,
        kind=st.just("removed"),
        unix_seconds=st.floats(0, 2**40),
        tier=st.text(max_size=20),
        key=keys,
        nbytes=numbers,
        reason=st.sampled_from(Removal),
        detail=st.text(max_size=200),
    ),
    st.builds(Event, seq=numbers, kind=st.just("lost"), unix_seconds=st.floats(0, 2**40), lost=st.none() | numbers),
)


@given(sent=st.lists(events | numbers, max_size=8), cuts=st.lists(st.integers(1, 400), max_size=20))
def test_blocks_come_out_as_they_went_in(sent: list[Event | int], cuts: list[int]) -> None:
    data = b"".join(encode_position(item) if isinstance(item, int) else encode(item) for item in sent)
    reader = BlockReader()
    blocks: list[Block] = []
    for cut in cuts:
        blocks += reader.feed(data[:cut])
        data = data[cut:]
    blocks += reader.feed(data)
    expected = [Block(item, None) if isinstance(item, int) else Block(item.seq, item) for item in sent]
    assert blocks == expected


@given(st.binary(max_size=600))
def test_any_bytes_are_blocks_or_an_error(data: bytes) -> None:
    reader = BlockReader()
    try:
        blocks = reader.feed(data) + reader.feed(b"\n\n")
    except ServiceError:
        return
    assert all(block.event is None or block.event.kind in ("stored", "removed", "lost") for block in blocks)


@given(st.data())
def test_a_damaged_stream_is_an_error_or_other_events_and_nothing_worse(data: st.DataObject) -> None:
    stream = bytearray(encode(data.draw(events)) * 2)
    for place in data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=5)):
        stream[place] = data.draw(st.integers(0, 255))
    try:
        blocks = BlockReader().feed(bytes(stream))
    except ServiceError:
        return
    for block in blocks:
        if block.event is not None:
            assert len(block.event.key) == (0 if block.event.kind == "lost" else 32)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b"nonsense",
        b'{"seq": 1, "kind": "stored", "unix_seconds": 1}',
        b'{"seq": 1, "kind": "stored", "unix_seconds": 1, "key": "abcd"}',
        b'{"seq": 1, "kind": "stored", "unix_seconds": 1, "key": "zz"}',
        b'{"seq": 1, "kind": "stored", "unix_seconds": 1, "key": "%s", "parent": ""}' % sample_key(1).hex().encode(),
        b'{"seq": 1, "kind": "removed", "unix_seconds": 1, "key": "%s", "reason": "bored"}'
        % sample_key(1).hex().encode(),
        b'{"seq": 1, "kind": "exploded", "unix_seconds": 1}',
    ],
)
def test_what_is_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(ServiceError, match="an event of the stream"):
        BlockReader().feed(b"data: " + body + b"\n\n")


def test_an_endless_block_is_refused_before_it_fills_the_memory() -> None:
    reader = BlockReader()
    for _ in range(BLOCK_BYTES_MAX // 1000):
        reader.feed(b"x" * 1000)
    with pytest.raises(ServiceError, match="longer than"):
        reader.feed(b"x" * 1000)
