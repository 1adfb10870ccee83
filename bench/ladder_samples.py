"""Profiles of the ladder and of cachegen fitted to samples, as calibration fits them to a model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.bench.kv_samples import Samples, float_parts
from kvstore.codecs import profiles
from kvstore.codecs.cachegen_fit import Meter
from kvstore.codecs.ladder_fit import Grouping, Moments, TableCounter, fit_transforms
from kvstore.codecs.profile import pack_profile, parse_profile
from kvstore.codecs.rotary import Rotation, rotated_part

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

SINK_TOKENS = 4
HELD_BACK_ONE_IN = 4


def ladder_profile(samples: Samples, grouping: str) -> bytes:
    """Id of a ladder profile fitted to the calibration chunks, known to this process from now on."""
    spec = samples.spec
    moments = Moments(spec, Grouping.parse(grouping, spec.layers))
    held_back = []
    for index, chunk in enumerate(samples.calibration):
        parts = list(float_parts(chunk.arrays, spec))
        rotated = rotated_part(spec)
        if rotated is not None:
            Rotation.consecutive(spec.rope, chunk.first_position, parts[0].shape[2]).undo(parts[rotated])
        exact = SINK_TOKENS if chunk.first_position == 0 else 0
        own = [np.ascontiguousarray(part[:, :, exact:]) for part in parts]
        if index // 2 % HELD_BACK_ONE_IN == 0:  # chunks come in pairs: one from the start of a prompt, one from behind
            held_back.append(own)
        else:
            moments.add(own)
    counter = TableCounter(fit_transforms(moments, [_key_weights(samples), _value_weights(samples)]))
    for own in held_back:
        counter.measure(own)
    for own in held_back:
        counter.add(own)
    return _known(*counter.finish())


def cachegen_profile(samples: Samples) -> bytes:
    """Id of a profile with cachegen's tables, measured on the calibration chunks, known to this process from now on."""
    meter = Meter(samples.spec)
    for chunk in samples.calibration:
        meter.add(float_parts(chunk.arrays, samples.spec))
    return _known({}, meter.arrays())


def _known(attributes: dict[str, object], arrays: dict[str, npt.NDArray[np.generic]]) -> bytes:
    profile = parse_profile(pack_profile(attributes, arrays))
    profiles.add(profile)
    return profile.id


def _key_weights(samples: Samples) -> Float64:
    """Second moments of the queries as keys without rotary embedding meet them, (layers, heads, dim, dim)."""
    spec = samples.spec
    random = np.random.default_rng(0)
    total = np.zeros((spec.layers, spec.kv_heads, spec.key_dim, spec.key_dim))
    for chunk in samples.calibration:
        queries = chunk.queries.copy()
        if rotated_part(spec) == 0:
            met = random.integers(0, chunk.arrays[0][0].shape[1], queries.shape[2], dtype=np.int64)
            Rotation(spec.rope, np.asarray(chunk.first_position + met, dtype=np.int64)).undo(queries)
        own = queries.reshape(spec.layers, spec.kv_heads, -1, spec.key_dim)
        total += own.swapaxes(2, 3) @ own
    return total


def _value_weights(samples: Samples) -> Float64:
    """All directions of V count alike in the output of a head."""
    spec = samples.spec
    return np.broadcast_to(np.eye(spec.value_dim), (spec.layers, spec.kv_heads, spec.value_dim, spec.value_dim)).copy()
