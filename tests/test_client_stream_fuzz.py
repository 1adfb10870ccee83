"""Frames from a broken or hostile peer: a stream is either read as it was meant, or ends in misses; nothing else."""

from __future__ import annotations

import http.client
import io

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.chunk import decode_chunk
from kvstore.codecs import registry
from kvstore.connectors.remote_stream import Buffers, FrameSource, PartReader
from kvstore.container import parse
from kvstore.errors import ContainerError, ServiceError
from kvstore.outcome import Miss, Reason
from kvstore.protocol import Frame, encode_frame
from kvstore.testing.chunks import sample_container, sample_keys, sample_spec

SPEC = sample_spec()
KEYS = sample_keys(3)
CONTAINERS = [sample_container(key) for key in KEYS]
BUFFERS = Buffers()


class _Canned:
    """What http.client needs of a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(io.BytesIO(self._data))


def chunk_stream() -> bytes:
    """Two chunks whole, one miss."""
    stream = encode_frame(Frame(kind="open", fetch=1))
    for index in (0, 2):
        frame = Frame(kind="chunk", index=index, payload_bytes=len(CONTAINERS[index]))
        stream += encode_frame(frame) + CONTAINERS[index]
    return (
        stream + encode_frame(Frame(kind="miss", index=1, miss=Miss(Reason.ABSENT))) + encode_frame(Frame(kind="end"))
    )


def layer_stream() -> bytes:
    """Two chunks layer group by layer group, one miss."""
    stream = encode_frame(Frame(kind="open"))
    for index in (0, 2):
        header = parse(memoryview(CONTAINERS[index]))
        for group, segments in enumerate(header.groups()):
            head = CONTAINERS[index][: header.header_bytes] if not group else b""
            body = head + b"".join(CONTAINERS[index][s.offset : s.offset + s.length] for s in segments)
            frame = Frame(
                kind="layers", index=index, group=group, groups=1, header_bytes=len(head), payload_bytes=len(body)
            )
            stream += encode_frame(frame) + body
    return (
        stream + encode_frame(Frame(kind="miss", index=1, miss=Miss(Reason.ABSENT))) + encode_frame(Frame(kind="end"))
    )


STREAMS = [chunk_stream(), layer_stream()]


def read(stream: bytes) -> tuple[dict[int, bytes], set[int]]:
    """The chunks decoded whole, as canonical KV bytes, and those that missed."""
    answer = http.client.HTTPResponse(_Canned(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(stream) + stream))  # type: ignore[arg-type]
    answer.begin()
    reader = PartReader(FrameSource(answer), KEYS, BUFFERS, None)
    targets: dict[int, bytearray] = {}
    missed: set[int] = set()
    try:
        for part in reader.parts():
            if part.miss is not None:
                missed.add(part.index)
                continue
            assert part.header is not None
            spec, tokens = part.header.meta.spec, part.header.meta.tokens
            target = targets.setdefault(part.index, bytearray(spec.chunk_bytes(tokens)))
            try:
                for group in part.groups:
                    registry.get(part.header.codec, part.header.profile).decode(
                        group, spec.arrays(target, tokens), spec
                    )
            except ContainerError:
                missed.add(part.index)
    except (ServiceError, OSError, http.client.HTTPException):
        pass
    missed |= set(reader.unfinished)
    return {index: bytes(target) for index, target in targets.items() if index not in missed}, missed


def expected(index: int) -> bytes:
    target = bytearray(SPEC.chunk_bytes(16))
    decode_chunk(memoryview(CONTAINERS[index]), SPEC.arrays(target, 16), registry.get)
    return bytes(target)


EXPECTED = {index: expected(index) for index in range(3)}


def test_a_good_stream_is_read_whole() -> None:
    for stream in STREAMS:
        good, missed = read(stream)
        assert good == {0: EXPECTED[0], 2: EXPECTED[2]}
        assert missed == {1}


def test_a_last_layer_with_more_bytes_than_it_has_is_no_delivery() -> None:
    header = parse(memoryview(CONTAINERS[0]))
    stream, groups = encode_frame(Frame(kind="open")), list(header.groups())
    for group, segments in enumerate(groups):
        head = CONTAINERS[0][: header.header_bytes] if not group else b""
        body = head + b"".join(CONTAINERS[0][s.offset : s.offset + s.length] for s in segments)
        body += b"x" * (group == len(groups) - 1)
        frame = Frame(kind="layers", index=0, group=group, groups=1, header_bytes=len(head), payload_bytes=len(body))
        stream += encode_frame(frame) + body
    good, missed = read(stream)
    assert good == {}
    assert missed == {0, 1, 2}


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(range(len(STREAMS))),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    st.floats(0, 1),
    st.booleans(),
)
def test_damaged_streams_never_give_wrong_bytes(
    stream: int, changes: list[tuple[float, int]], cut: float, cutting: bool
) -> None:
    data = bytearray(STREAMS[stream])
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    good, missed = read(bytes(data[: int(cut * len(data))] if cutting else data))
    for index, kv in good.items():
        assert kv == EXPECTED[index]
    assert good.keys() | missed == {0, 1, 2}


FRAMES = st.builds(
    Frame,
    kind=st.sampled_from(["open", "chunk", "layers", "miss", "end"]),
    fetch=st.integers(-1, 2**64 - 1),
    index=st.integers(-3, 5),
    payload_bytes=st.one_of(st.integers(-5, 500), st.just(2**62)),
    header_bytes=st.integers(-5, 500),
    group=st.integers(-2, 5),
    groups=st.integers(-2, 5),
    offset=st.integers(-1, 2**62),
    nbytes=st.integers(-1, 2**62),
    expires_at=st.floats(allow_nan=False, allow_infinity=False),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(FRAMES.map(encode_frame), st.binary(max_size=200), st.just(CONTAINERS[0])), max_size=8))
def test_arbitrary_frames_never_give_wrong_bytes(pieces: list[bytes]) -> None:
    good, missed = read(encode_frame(Frame(kind="open")) + b"".join(pieces))
    assert good.keys() | missed == {0, 1, 2}
    for index, kv in good.items():
        assert kv == EXPECTED[index]


@given(st.binary(max_size=300))
def test_frame_headers_are_frames_or_errors(data: bytes) -> None:
    stream = len(data).to_bytes(4, "little") + data
    answer = http.client.HTTPResponse(_Canned(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(stream) + stream))  # type: ignore[arg-type]
    answer.begin()
    try:
        frame = FrameSource(answer).next()
    except ServiceError:
        return
    assert msgspec.json.decode(msgspec.json.encode(frame), type=Frame) == frame
