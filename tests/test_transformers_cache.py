"""The preallocated cache layer does what transformers' own layer does."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from kvstore.connectors.torch_kv import RoomyLayer

ROWS, HEADS, DIM = 2, 3, 4

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.integers(1, 5)),
        st.tuples(st.just("reorder"), st.permutations(range(ROWS))),
        st.just(("reset", 0)),
    ),
    max_size=12,
)


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randn(2, ROWS, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))
    return both[0], both[1]


def roomy(capacity: int, length: int = 0) -> Any:
    keys, values = states(capacity, 99)
    return RoomyLayer(keys, values, length)


@settings(deadline=None, max_examples=200)
@given(capacity=st.integers(0, 30), steps=STEPS)
def test_every_sequence_of_calls_gives_what_transformers_layer_gives(
    capacity: int, steps: list[tuple[str, object]]
) -> None:
    mine: Any = roomy(capacity)
    theirs: Any = DynamicLayer()  # type: ignore[no-untyped-call]
    for number, (verb, argument) in enumerate(steps):
        if verb == "update":
            keys, values = states(int(str(argument)), number)
            for one, two in zip(mine.update(keys, values), theirs.update(keys, values), strict=True):
                assert torch.equal(one, two)
        elif verb == "crop" and theirs.get_seq_length() > int(str(argument)):
            mine.crop(-int(str(argument)))
            theirs.crop(-int(str(argument)))
        elif verb == "reorder":
            order = torch.tensor(argument)
            mine.reorder_cache(order)
            theirs.reorder_cache(order)
        elif verb == "reset":
            mine.reset()
            theirs.reset()
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.get_mask_sizes(3) == theirs.get_mask_sizes(3)


def test_nothing_is_copied_while_there_is_room() -> None:
    keys, values = states(20, 1)
    layer: Any = RoomyLayer(keys, values, 8)
    shown, _ = layer.update(*states(5, 2))
    assert shown.data_ptr() == keys.data_ptr() == layer.keys.data_ptr()
    assert shown.shape[-2] == 13
    layer.update(*states(8, 3))
    assert layer.keys.data_ptr() != keys.data_ptr()
    assert torch.equal(layer.keys[..., :8, :], keys[..., :8, :])


def test_a_copied_cache_is_independent() -> None:
    layer = roomy(10, 4)
    other = copy.deepcopy(layer)
    layer.update(*states(2, 1))
    other.update(*states(2, 2))
    assert not torch.equal(layer.keys, other.keys)
    assert torch.equal(layer.keys[..., :4, :], other.keys[..., :4, :])
