"""The part of the client suite about quality: levels of lossy chunks, decoding in the store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore.chunk import check_coverage, decode_groups
from kvstore.client import QUALITY_EXACT, Client, Order, Origin, Part
from kvstore.codecs import registry
from kvstore.container import check_segment, parse
from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.levels import up_to_level
from kvstore.outcome import Reason
from kvstore.testing.chunks import sample_container, sample_keys
from kvstore.testing.client_harness import ORDERS, ClientHarness, collect, put_chunk, put_samples
from kvstore.testing.lossy_chunks import SPEC, TOKENS, arrays_in, chunk_in, same

REFUSED: list[dict[str, Any]] = [
    {"min_quality": 256},
    {"min_quality": -1},
    {"order": "layer", "decode": True},
    {"max_quality": -1},
    {"max_quality": 255},
    {"min_quality": 2, "max_quality": 1},
    {"max_quality": 1, "decode": True},
]


class QualityContract(ClientHarness):
    """What a client promises about `min_quality`, `max_quality` and `decode`."""

    @pytest.mark.parametrize("order", ["chunk", "layer"])
    def test_exact_chunks_have_every_quality(self, client: Client, order: Order) -> None:
        keys = sample_keys(3)
        containers = put_samples(client, keys)
        parts = client.fetch(keys, order=order, min_quality=QUALITY_EXACT)
        assert collect(parts, containers) == dict.fromkeys(range(3))

    def test_lossy_chunks_are_decoded_by_the_store_on_request(self, client: Client) -> None:
        keys = sample_keys(3)
        lossy = sample_container(keys[1], codec=registry.get("int8"))
        client.put([put_chunk(keys[1], lossy)])
        containers = [put_samples(client, keys[:1])[0], None, put_samples(client, keys[2:])[0]]
        seen = {}
        for part in client.fetch(keys, decode=True):
            assert part.miss is None
            assert part.header is not None
            assert part.header.codec == "raw"
            seen[part.index] = part.origin
            for group in part.groups:
                for segment, view in group:
                    check_segment(segment, view)
                    source = containers[part.index]
                    if source is not None:
                        assert bytes(view) == source[segment.offset : segment.offset + segment.length]
        assert seen == {0: None, 1: Origin(codec="int8", profile=ROOT.hex(), level=0), 2: None}
        ended = collect(client.fetch(keys, min_quality=1), [containers[0], lossy, containers[2]])
        assert ended == {0: None, 1: Reason.LOW_QUALITY, 2: None}

    @pytest.mark.parametrize("options", REFUSED)
    def test_a_fetch_that_cannot_be_is_refused(self, client: Client, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            list(client.fetch(sample_keys(1), **options))

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("level", [0, 1, 3, 7])
    def test_a_chunk_comes_up_to_a_level_and_decodes_like_it(self, client: Client, order: Order, level: int) -> None:
        ladder = [chunk_in("ladder", number) for number in range(3)]
        keys = [parse(memoryview(data)).meta.key for data in ladder]
        client.put([put_chunk(key, data) for key, data in zip(keys, ladder, strict=True)])
        exact = sample_keys(1, 100)
        containers = [*ladder, *put_samples(client, exact)]
        parts: dict[int, list[Part]] = {index: [] for index in range(4)}
        arrays = [SPEC.arrays(np.zeros(SPEC.chunk_bytes(TOKENS), np.uint8), TOKENS) for _ in ladder]
        for part in client.fetch([*keys, *exact], order=order, max_quality=level):
            assert part.miss is None
            assert part.header == up_to_level(parse(memoryview(containers[part.index])), level)
            parts[part.index].append(part)
            for group in part.groups:
                for segment, view in group:
                    assert segment.level <= level
                    check_segment(segment, view)
            if part.index < len(ladder):
                decode_groups(registry.get("ladder"), part.groups, arrays[part.index], SPEC)
        for index, data in enumerate(ladder):
            header = parts[index][0].header
            assert header is not None
            check_coverage(header)
            assert sum(len(part.groups) for part in parts[index]) == len(header.groups())
            assert same(arrays[index], arrays_in(data, level_max=level))
        assert collect(client.fetch([*keys, *exact], order=order), containers) == dict.fromkeys(range(4))
