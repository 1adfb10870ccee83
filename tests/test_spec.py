"""KVSpec and the fingerprint."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import SpecError
from kvstore.spec import ITEMSIZE, KVSpec, Rope, fingerprint, layer_groups

ROPE = Rope(kind="llama3", theta=500000.0, dims=64, params={"factor": 8.0, "low_freq_factor": 1.0})
SPEC = KVSpec(layers=4, kv_heads=2, key_dim=64, value_dim=64, dtype="bfloat16", rope=ROPE)
WEIGHTS = b"w" * 32


def changed(**fields: Any) -> KVSpec:
    return msgspec.structs.replace(SPEC, **fields)


def rope(**fields: Any) -> KVSpec:
    return changed(rope=msgspec.structs.replace(ROPE, **fields))


def test_every_field_changes_the_fingerprint() -> None:
    specs = [
        SPEC,
        changed(layers=5),
        changed(kv_heads=3),
        changed(key_dim=65),
        changed(value_dim=63),
        changed(dtype="float16"),
        changed(kv_heads=1, attention="mla"),
        changed(kv_heads=1),
        rope(kind="yarn"),
        rope(theta=10000.0),
        rope(dims=32),
        rope(params={}),
        rope(params={"factor": 8.0}),
        rope(params={"factor": 4.0, "low_freq_factor": 1.0}),
        rope(params={"factor": 8.0, "high_freq_factor": 1.0}),
    ]
    prints = [fingerprint(spec, WEIGHTS) for spec in specs]
    prints += [
        fingerprint(SPEC, b"x" * 32),
        fingerprint(SPEC, WEIGHTS, lora=b"adapter"),
        fingerprint(SPEC, WEIGHTS, quantisation="adapter"),
        fingerprint(SPEC, WEIGHTS, settings={"sliding_window": 4096}),
        fingerprint(SPEC, WEIGHTS, settings={"sliding_window": "4096"}),
        fingerprint(SPEC, WEIGHTS, settings={"sliding_window": None}),
        fingerprint(SPEC, WEIGHTS, settings={"sliding_window": True}),
        fingerprint(SPEC, WEIGHTS, settings={"scale": 0.5}),
    ]
    assert len(set(prints)) == len(prints)
    assert {len(value) for value in prints} == {32}
    tested = {"layers", "kv_heads", "key_dim", "value_dim", "dtype", "rope", "attention"}
    assert {field.name for field in msgspec.structs.fields(KVSpec)} == tested, "a new field must join this test"
    assert {field.name for field in msgspec.structs.fields(Rope)} == {"kind", "theta", "dims", "params"}


def test_equal_models_have_equal_fingerprints() -> None:
    other = KVSpec(
        rope=Rope(params={"low_freq_factor": 1, "factor": 8}, dims=64, theta=500000, kind="llama3"),
        dtype="bfloat16",
        value_dim=64,
        key_dim=64,
        kv_heads=2,
        layers=4,
    )
    assert fingerprint(other, WEIGHTS) == fingerprint(SPEC, WEIGHTS)
    assert fingerprint(SPEC, WEIGHTS, settings={"a": 1, "b": 2}) == fingerprint(
        SPEC, WEIGHTS, settings={"b": 2, "a": 1}
    )
    assert fingerprint(SPEC, WEIGHTS, settings={}) == fingerprint(SPEC, WEIGHTS)


def test_the_fingerprint_is_pinned() -> None:
    assert fingerprint(SPEC, WEIGHTS).hex() == "2301603f1d25a9b116502c9a9e531b9af11d60959bcfb3f00966b4390cc2d70e"
    assert SPEC.to_json() == (
        b'{"attention":"mha","dtype":"bfloat16","key_dim":64,"kv_heads":2,"layers":4,"rope":{"dims":64,"kind":"llama3",'
        b'"params":{"factor":8.0,"low_freq_factor":1.0},"theta":500000.0},"value_dim":64}'
    )


sizes = st.integers(1, 4096)
numbers = st.floats(allow_nan=False, allow_infinity=False)
ropes = st.builds(
    Rope,
    kind=st.just("yarn"),
    theta=numbers,
    dims=sizes,
    params=st.dictionaries(st.text(max_size=5), numbers, max_size=3),
)
specs = st.builds(
    KVSpec,
    layers=sizes,
    kv_heads=sizes,
    key_dim=sizes,
    value_dim=sizes,
    dtype=st.sampled_from(list(ITEMSIZE)),
    rope=ropes,
)


@given(specs)
def test_json_round_trip(spec: KVSpec) -> None:
    again = KVSpec.from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_spec_or_refused(data: bytes) -> None:
    with pytest.raises(SpecError):
        KVSpec.from_json(data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"layers":4', b'"layers":0'),
        (b'"layers":4', b'"layers":4097'),
        (b'"layers":4', b'"layers":4.5'),
        (b'"layers":4', b'"layers":"4"'),
        (b'"layers":4', b'"layers":4,"extra":1'),
        (b'"layers":4,', b""),
        (b'"dtype":"bfloat16"', b'"dtype":"int8"'),
        (b'"kind":"llama3"', b'"kind":"spiral"'),
        (b'"dims":64', b'"dims":-1'),
        (b'"factor":8.0', b'"factor":null'),
        (b'"factor":8.0', b'"factor":1e999'),
        (b'"attention":"mha"', b'"attention":"mla"'),
        (b'"attention":"mha"', b'"attention":"\xff"'),
    ],
)
def test_json_that_breaks_a_rule_is_refused(old: bytes, new: bytes) -> None:
    data = SPEC.to_json()
    assert old in data
    with pytest.raises(SpecError):
        KVSpec.from_json(data.replace(old, new))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, "KVSpec.layers is 0; it must be in 1..4096"),
        ({"kv_heads": -1}, "KVSpec.kv_heads"),
        ({"key_dim": 0}, "KVSpec.key_dim"),
        ({"value_dim": 0}, "KVSpec.value_dim"),
        ({"dtype": "int4"}, "KVSpec.dtype is 'int4'"),
        ({"attention": "mla"}, "latent attention"),
    ],
)
def test_mistakes_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        changed(**fields)


@pytest.mark.parametrize("fields", [{"theta": float("nan")}, {"params": {"factor": float("inf")}}, {"dims": -1}])
def test_rope_numbers_are_finite(fields: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"Rope\."):
        rope(**fields)


def test_latent_attention_may_have_no_second_part() -> None:
    spec = changed(kv_heads=1, attention="mla", key_dim=576, value_dim=0)
    (keys, values), *_ = spec.arrays(bytearray(spec.chunk_bytes(3)), 3)
    assert keys.shape == (1, 3, 576)
    assert values.shape == (1, 3, 0)


@pytest.mark.parametrize("dtype", list(ITEMSIZE))
def test_arrays_are_views_in_canonical_order(dtype: Any) -> None:
    spec, tokens = KVSpec(layers=2, kv_heads=3, key_dim=5, value_dim=4, dtype=dtype, rope=Rope(kind="none")), 7
    flat = np.arange(spec.chunk_bytes(tokens) % 251, spec.chunk_bytes(tokens) % 251 + spec.chunk_bytes(tokens)) % 251
    buffer = flat.astype(np.uint8)
    arrays = spec.arrays(buffer, tokens)
    assert b"".join(array.tobytes() for pair in arrays for array in pair) == buffer.tobytes()
    arrays[1][1][...] = 0
    assert not buffer[-arrays[1][1].nbytes :].any()
    assert spec.chunk_bytes(tokens) == spec.layers * spec.layer_bytes(tokens) == buffer.size
    spec.check_arrays(arrays, tokens)


def test_arrays_that_do_not_fit_are_refused() -> None:
    arrays = SPEC.arrays(bytearray(SPEC.chunk_bytes(4)), 4)
    with pytest.raises(SpecError, match="buffer has 1 bytes"):
        SPEC.arrays(bytearray(1), 4)
    with pytest.raises(SpecError, match="3 layers; the KVSpec has 4"):
        SPEC.check_arrays(arrays[:3], 4)
    with pytest.raises(SpecError, match=r"K of layer 0 is uint16\(2, 4, 64\); expected uint16\(2, 5, 64\)"):
        SPEC.check_arrays(arrays, 5)
    wrong = [*arrays[:3], (arrays[3][0], arrays[3][1].view(np.uint8))]
    with pytest.raises(SpecError, match="V of layer 3 is uint8"):
        SPEC.check_arrays(wrong, 4)


def test_a_weights_digest_has_32_bytes() -> None:
    with pytest.raises(SpecError, match="weights_digest has 5 bytes"):
        fingerprint(SPEC, b"short")


@given(st.integers(1, 200), st.integers(1, 50))
def test_layer_groups_partition_the_layers(layers: int, group: int) -> None:
    groups = list(layer_groups(layers, group))
    assert [layer for start, stop in groups for layer in range(start, stop)] == list(range(layers))
    assert all(stop - start == group for start, stop in groups[:-1])
