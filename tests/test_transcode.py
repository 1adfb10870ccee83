"""Codecs of tiers: what goes down in which codec, what stays as it is and why, and decoding in the store."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import container, gate
from kvstore.chunk import encoded_bytes_max
from kvstore.codecs import registry
from kvstore.container import FLAG_FROM_LOSSY, FLAG_LOSSY_ALLOWED
from kvstore.counters import Counters
from kvstore.errors import ConfigError, ContainerError
from kvstore.loan import TransientPool
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.lossy_chunks import SPEC, TOKENS, arrays_in, chunk_in, passes, same
from kvstore.transcode import Recipe, Transcoder, parse_recipe, truncate

MIB = 1 << 20


class Bench:
    """A transcoder and what it counted."""

    def __init__(self, recipe: str, *gates: gate.GateRecord, room: int = 64 * MIB) -> None:
        self.counters = Counters()
        self.pool = TransientPool(room)
        parsed = parse_recipe(recipe, "tiers.nvme.codec", registry)
        assert parsed is not None
        self.transcoder = Transcoder(
            parsed, registry, gates=gates, limits=gate.STANDARD, transient=self.pool, counters=self.counters
        )

    def __call__(self, data: bytes) -> tuple[bytes | None, str]:
        """The new container, or None, and the outcome that was counted ("" for nothing)."""
        before = self.outcomes()
        loan = self.transcoder.recode(memoryview(data))
        changed = [name for name, count in self.outcomes().items() if count != before.get(name)]
        result = None
        if loan is not None:
            with loan:
                result = bytes(loan.view)
        assert self.pool.used_bytes == 0
        return result, changed[0] if changed else ""

    def outcomes(self) -> dict[str, int]:
        return dict(self.counters.snapshot().get("transcodes", {}))


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_recipes_are_written_as_codec_or_codec_and_level() -> None:
    assert parse_recipe("", "f", registry) is None
    assert parse_recipe("as_is", "f", registry) is None
    assert parse_recipe("lossless_dense", "f", registry) == Recipe("lossless_dense")
    assert parse_recipe("ladder@2", "f", registry) == Recipe("ladder", 2)


@pytest.mark.parametrize(
    "text", ["laddder", "ladder@", "ladder@x", "ladder@-1", "ladder@4", "ladder@999", "int8@1", "lossless@1", "@2"]
)
def test_a_wrong_recipe_is_an_error_that_names_the_field(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^tiers\.nvme\.codec is "):
        parse_recipe(text, "tiers.nvme.codec", registry)


# -- one chunk ---------------------------------------------------------------------------------------------------------


def test_an_exact_codec_replaces_an_exact_one_bit_for_bit() -> None:
    source = chunk_in("raw")
    result, outcome = Bench("lossless_dense")(source)
    assert result is not None
    assert outcome == "done"
    assert len(result) < len(source)
    header = container.verify(memoryview(result), key=sample_key(0))
    assert header.codec == "lossless_dense"
    assert header.meta == container.parse(memoryview(source)).meta
    assert same(arrays_in(result), arrays_in(source))


def test_what_is_in_the_tiers_codec_already_stays() -> None:
    assert Bench("lossless")(chunk_in("lossless")) == (None, "")
    assert Bench("ladder@3", passes("ladder", 3))(chunk_in("ladder", flags=FLAG_LOSSY_ALLOWED)) == (None, "")


def test_what_does_not_get_smaller_stays() -> None:
    assert Bench("raw")(chunk_in("lossless_dense")) == (None, "no_smaller")


def test_a_lossy_codec_needs_permission_and_a_pass() -> None:
    allowed, kept = chunk_in("lossless", flags=FLAG_LOSSY_ALLOWED), chunk_in("lossless")
    record = passes("ladder", 0, 1, 2, 3)
    assert Bench("ladder@2", record)(kept) == (None, "exact_wanted")
    assert Bench("ladder@2")(allowed) == (None, "ungated")
    assert Bench("ladder@2", passes("ladder", 2, kl_nats=1.0))(allowed) == (None, "ungated")
    assert Bench("ladder@2", passes("ladder", 1))(allowed) == (None, "ungated")
    assert Bench("ladder@2", passes("ladder", 2, fingerprint=bytes(32)))(allowed) == (None, "ungated")
    result, outcome = Bench("ladder@2", record)(allowed)
    assert result is not None
    assert outcome == "done"
    header = container.verify(memoryview(result), key=sample_key(0))
    assert (header.codec, header.levels) == ("ladder", 3)
    assert same(arrays_in(result), arrays_in(chunk_in("ladder"), level_max=2))


def test_a_lossy_chunk_loses_levels_without_being_decoded() -> None:
    source = chunk_in("ladder", flags=FLAG_LOSSY_ALLOWED)
    result, outcome = Bench("ladder@1", passes("ladder", 1))(source)
    assert result is not None
    assert outcome == "truncated"
    header = container.verify(memoryview(result))
    assert header.levels == 2
    assert same(arrays_in(result), arrays_in(source, level_max=1))


def test_lossy_numbers_are_never_coded_a_second_time() -> None:
    gates = passes("ladder", 1), passes("int8", 0)
    assert Bench("ladder@1", *gates)(chunk_in("int8", flags=FLAG_LOSSY_ALLOWED)) == (None, "lossy_already")
    assert Bench("ladder@1", *gates)(chunk_in("raw", flags=FLAG_LOSSY_ALLOWED | FLAG_FROM_LOSSY)) == (
        None,
        "lossy_already",
    )
    # An exact codec may hold them, and says that they are not what was computed.
    result, _ = Bench("lossless_dense")(chunk_in("raw", flags=FLAG_FROM_LOSSY))
    assert result is not None
    assert container.parse(memoryview(result)).meta.flags & FLAG_FROM_LOSSY


def test_a_container_that_holds_no_kv_stays() -> None:
    data = bytearray(chunk_in("raw"))
    header = container.parse(memoryview(data))
    data[: header.header_bytes] = container.pack_header(msgspec.structs.replace(header, codec="profile"))
    assert Bench("lossless_dense")(bytes(data)) == (None, "")


def test_without_room_a_chunk_goes_down_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.transcode.ROOM_SECONDS", 0.0)
    assert Bench("lossless_dense", room=4096)(chunk_in("raw")) == (None, "no_room")
    target_only = encoded_bytes_max(registry.get("lossless_dense"), SPEC, TOKENS) + 8192
    assert Bench("lossless_dense", room=target_only)(chunk_in("raw")) == (None, "no_room")


@given(at=st.integers(0, 2**32), bit=st.integers(0, 7), source=st.sampled_from(["raw", "lossless", "ladder"]))
def test_a_damaged_chunk_is_never_given_new_hashes(at: int, bit: int, source: str) -> None:
    good = chunk_in(source, flags=FLAG_LOSSY_ALLOWED)
    data = bytearray(good)
    data[at % len(data)] ^= 1 << bit
    bench = Bench("ladder@0" if source == "ladder" else "lossless_dense", passes("ladder", 0))
    result, _ = bench(bytes(data))
    if result is not None:  # the flipped bit lay in padding, or in a level that was left out
        assert same(arrays_in(result), arrays_in(good, level_max=0 if source == "ladder" else None))


def test_a_truncated_container_is_checked_on_the_way() -> None:
    source = bytearray(chunk_in("ladder"))
    header = container.parse(memoryview(source))
    source[header.segments[0].offset] ^= 1
    with pytest.raises(ContainerError, match="segment level 0"):
        truncate(memoryview(source), memoryview(bytearray(len(source))), 1)


def test_containers_of_the_contract_suites_are_exact() -> None:
    assert registry.is_exact(container.parse(memoryview(sample_container(sample_key(0)))).codec)
    assert registry.is_exact("ladder") is False
    assert registry.is_exact("nothing") is None
