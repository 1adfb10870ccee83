"""Profiles: one content, one id; damage and lies are refused; files and stores carry them."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvstore
from kvstore import kernels
from kvstore.client import PutChunk
from kvstore.codecs import profiles
from kvstore.codecs.profile import Profile, pack_profile, parse_profile
from kvstore.connectors.profile_exchange import obtain, publish
from kvstore.container import PART_KV, ContainerWriter, container_bytes_max
from kvstore.errors import ContainerError, SpecError
from kvstore.keys import ROOT
from kvstore.outcome import Miss, Reason
from kvstore.testing.codec import GEOMETRIES, meta_of

ATTRIBUTES = {"ladder": {"format": 1, "numbers": [1, 2.5, None, True]}, "text": "café"}
ARRAYS: dict[str, npt.NDArray[Any]] = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(5, dtype=np.uint8),
    "empty": np.zeros((3, 0), dtype=np.int16),
    "half": np.linspace(0, 1, 7).astype(np.float16),
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "_known", {})
    monkeypatch.delenv(profiles.DIRECTORIES_VARIABLE, raising=False)


def sample() -> bytes:
    return pack_profile(ATTRIBUTES, ARRAYS)


def rehashed(blob: bytes | bytearray) -> bytes:
    return bytes(blob[:-8]) + struct.pack("<Q", kernels.xxh3(blob[:-8]))


def forged(header: object) -> bytes:
    text = msgspec.json.encode(header)
    return rehashed(struct.pack("<4sHHI", b"KVP1", 1, 0, len(text)) + text + bytes(8))


def reason_of(blob: bytes) -> Reason:
    with pytest.raises(ContainerError) as caught:
        parse_profile(blob)
    return caught.value.reason


class TestBlob:
    def test_what_is_packed_is_parsed(self) -> None:
        profile = parse_profile(sample())
        assert profile.attributes == ATTRIBUTES
        assert profile.id == hashlib.sha256(sample()).digest()
        assert sorted(profile.arrays) == sorted(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(profile.arrays[name], array)
            assert profile.arrays[name].dtype == array.dtype
            assert not profile.arrays[name].flags.writeable

    def test_equal_content_has_one_id_whatever_the_order_and_strides(self) -> None:
        shuffled = dict(reversed(ARRAYS.items())) | {"b": np.asfortranarray(ARRAYS["b"])}
        assert pack_profile(dict(reversed(ATTRIBUTES.items())), shuffled) == sample()

    def test_every_array_is_aligned(self) -> None:
        profile = parse_profile(sample())
        whole = np.frombuffer(profile.blob, dtype=np.uint8).ctypes.data
        assert all((array.ctypes.data - whole) % 64 == 0 for array in profile.arrays.values() if array.size)

    def test_an_array_is_asked_for_by_name_dtype_and_shape(self) -> None:
        profile = parse_profile(sample())
        assert profile.array("b", "float32", 2, None).shape == (2, 3)
        for name, dtype, shape in (("c", "float32", (2, 3)), ("b", "float16", (2, 3)), ("b", "float32", (3, None))):
            with pytest.raises(ContainerError, match="malformed"):
                profile.array(name, dtype, *shape)

    @pytest.mark.parametrize("arrays", [{"x": np.zeros(1, dtype=object)}, {"x": np.zeros(1, "c8")}, {"": np.zeros(1)}])
    def test_what_a_profile_cannot_hold_is_refused(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        with pytest.raises(SpecError, match="not a profile"):
            pack_profile({}, arrays)

    def test_attributes_must_be_json(self) -> None:
        with pytest.raises(SpecError, match="not a profile"):
            pack_profile({"x": object()}, {})


class TestDamage:
    def test_any_changed_byte_is_refused(self) -> None:
        blob = sample()
        for at in range(len(blob)):
            bad = bytearray(blob)
            bad[at] ^= 1 << at % 8
            assert reason_of(bytes(bad)) in (
                Reason.CORRUPT, Reason.MALFORMED, Reason.UNKNOWN_VERSION, Reason.TRUNCATED
            )  # fmt: skip

    def test_any_truncation_is_refused(self) -> None:
        blob = sample()
        for length in range(len(blob)):
            assert reason_of(blob[:length]) in (Reason.CORRUPT, Reason.TRUNCATED)
            if length > 24:
                assert reason_of(rehashed(blob[:length])) in (Reason.MALFORMED, Reason.TRUNCATED)

    def test_another_id_is_refused(self) -> None:
        with pytest.raises(ContainerError, match="wrong_key"):
            parse_profile(sample(), profile_id=bytes(32))

    @pytest.mark.parametrize(
        "arrays",
        [
            [{"name": "a", "dtype": "float32", "shape": [1 << 40, 1 << 40]}],
            [{"name": "a", "dtype": "float32", "shape": [0, 1 << 40, 1 << 40]}],
            [{"name": "a", "dtype": "float32", "shape": [-1]}],
            [{"name": "a", "dtype": "object", "shape": [1]}],
            [{"name": "a", "dtype": "uint8", "shape": [1] * 9}],
            [{"name": "a", "dtype": "uint8", "shape": [0]}, {"name": "a", "dtype": "uint8", "shape": [0]}],
            [{"name": "a", "dtype": "uint8", "shape": [0], "more": 1}],
            [{"name": "a", "dtype": "uint8", "shape": [0]}] * 5000,
        ],
    )
    def test_lies_behind_a_right_checksum_are_malformed(self, arrays: list[object]) -> None:
        assert reason_of(forged({"attributes": {}, "arrays": arrays})) == Reason.MALFORMED

    def test_deep_json_is_malformed(self) -> None:
        text = b'{"attributes":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b',"arrays":[]}'
        blob = struct.pack("<4sHHI", b"KVP1", 1, 0, len(text)) + text + bytes(8)
        assert reason_of(rehashed(blob)) == Reason.MALFORMED

    @given(st.data())
    def test_mutated_blobs_with_right_checksums_parse_or_are_refused(self, data: st.DataObject) -> None:
        blob = bytearray(sample())
        for _ in range(data.draw(st.integers(1, 4))):
            blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(blob)))
        try:
            profile = parse_profile(rehashed(blob[:cut]) if cut >= 8 else bytes(blob[:cut]))
        except ContainerError:
            return
        assert sum(array.nbytes for array in profile.arrays.values()) <= len(blob)


class TestRegistry:
    def test_an_unknown_profile_is_said_to_be_so(self) -> None:
        with pytest.raises(ContainerError, match="unknown_profile"):
            profiles.get(bytes(32))

    def test_saved_profiles_are_found_through_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = profiles.save(sample(), tmp_path / "new")
        monkeypatch.setenv(profiles.DIRECTORIES_VARIABLE, f"{tmp_path}/nowhere:{path.parent}")
        wanted = hashlib.sha256(sample()).digest()
        found = profiles.get(wanted)
        assert found.attributes == ATTRIBUTES
        path.unlink()
        assert profiles.get(wanted) is found

    def test_a_file_of_another_profile_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(profiles.DIRECTORIES_VARIABLE, str(tmp_path))
        (tmp_path / f"{bytes(32).hex()}{profiles.SUFFIX}").write_bytes(sample())
        with pytest.raises(ContainerError, match="wrong_key"):
            profiles.get(bytes(32))

    def test_empty_and_missing_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        for name, reason in (("empty", "truncated"), ("missing", "io_error")):
            with pytest.raises(ContainerError, match=reason):
                profiles.load(tmp_path / name)

    def test_the_number_of_known_profiles_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(profiles, "KNOWN_MAX", 1)
        one, other = (parse_profile(pack_profile({"n": n}, {})) for n in range(2))
        profiles.add(one)
        profiles.add(one)
        with pytest.raises(ContainerError, match="full"):
            profiles.add(other)


class TestExchange:
    @pytest.fixture
    def client(self) -> kvstore.Client:
        return kvstore.connect("embedded:?dram=8MiB")

    def test_a_published_profile_is_obtained_and_known(self, client: kvstore.Client) -> None:
        profile = parse_profile(sample())
        with client:
            missing = obtain(client, profile.id)
            assert isinstance(missing, Miss)
            assert missing.reason == Reason.ABSENT
            assert publish(client, profile).stored
            found = obtain(client, profile.id)
        assert isinstance(found, Profile)
        assert found.attributes == ATTRIBUTES
        assert profiles.get(profile.id) is found

    def test_bytes_of_another_profile_never_become_known(self, client: kvstore.Client) -> None:
        blob = sample()
        wanted = bytes(31) + b"\1"

        def write(buffer: memoryview) -> int:
            meta = msgspec.structs.replace(meta_of(GEOMETRIES["tiny"], 1), key=wanted, parent=ROOT)
            writer = ContainerWriter(buffer, meta, codec="profile", segment_count=1, profile=wanted)
            writer.tail(0)[: len(blob)] = blob
            writer.commit(level=0, part=PART_KV, layers=(0, 1), nbytes=len(blob), xxh3=kernels.xxh3(blob))
            return writer.finish()

        with client:
            room = container_bytes_max(GEOMETRIES["tiny"], [(0, len(blob))])
            assert client.put([PutChunk(wanted, room, write)])[0].stored
            found = obtain(client, wanted)
        assert isinstance(found, Miss)
        assert found.reason == Reason.WRONG_KEY
        with pytest.raises(ContainerError, match="unknown_profile"):
            profiles.get(wanted)
