"""Do deltas between tokens pay once the channel's mean is gone?

CacheGen codes differences from an anchor every ten tokens, because they vary 2.4 to 2.9 times less than the values. But
much of what a difference removes is the channel's mean, which costs nothing to remove by itself. Here the same values
are quantised with the same step, so with the same error, in two ways: as CacheGen does, and less the channel's mean
over the chunk. The bits are the entropies of the integers, pooled over channels of about the same spread as a coder
pools them; side information (scales, means) is counted for neither. K once as cached and once with the rotary embedding
undone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.bench.kv_samples import Samples, float_parts
from kvstore.codecs.cachegen_classes import (
    ANCHORS_LOWEST,
    CLASSES,
    DELTAS_LOWEST,
    centre,
    class_of,
    step_of,
)
from kvstore.codecs.cachegen_part import deltas_of, quantise_anchors
from kvstore.codecs.rotary import Rotation, rotated_part

Float32 = npt.NDArray[np.float32]
_SYMBOLS = 1 << 16


def measure(samples: Samples) -> dict[str, float]:
    """`deltas.*`: bits an element of both ways at scaling 1, and variances against the mean-free values."""
    cached = [float_parts(chunk.arrays, samples.spec) for chunk in samples.chunks]
    metrics = {f"deltas.{name}": value for name, value in _compare(cached, samples).items()}
    rotated = rotated_part(samples.spec)
    if rotated is None:
        return metrics
    for chunk, parts in zip(samples.chunks, cached, strict=True):
        Rotation.consecutive(samples.spec.rope, chunk.first_position, parts[0].shape[2]).undo(parts[rotated])
    return metrics | {f"deltas.unrotated_{name}": value for name, value in _compare(cached, samples).items()}


def _compare(chunks: list[tuple[Float32, Float32]], samples: Samples) -> dict[str, float]:
    delta_bits, mean_bits, delta_power, mean_power, raw_power = [], [], [], [], []
    for parts in chunks:
        for part in parts:
            for layer, values in enumerate(part):
                anchors = quantise_anchors(values)
                deltas = deltas_of(values, anchors)
                spread = np.sqrt(np.square(deltas).mean(axis=1))
                step = step_of(spread, 1.0, layer, samples.spec.layers)
                centred = values - values.mean(axis=1, keepdims=True)
                mean = np.rint(anchors.values.mean(axis=1)).astype(np.int32)
                whole = centre(anchors.values, mean)
                bits = _bits(np.rint(deltas / step), class_of(spread / step, DELTAS_LOWEST))
                bits += _bits(whole.astype(np.float32), class_of(anchors.values.std(axis=1), ANCHORS_LOWEST))
                delta_bits.append(bits / values.size)
                plain = class_of(centred.std(axis=1) / step, DELTAS_LOWEST)
                mean_bits.append(_bits(np.rint(centred / step), plain) / values.size)
                delta_power.append(float(np.square(deltas).mean()))
                mean_power.append(float(np.square(centred).mean()))
                raw_power.append(float(np.square(values).mean()))
    return {
        "delta_bits": float(np.mean(delta_bits)),
        "mean_removed_bits": float(np.mean(mean_bits)),
        "delta_variance_vs_mean_removed": sum(delta_power) / sum(mean_power),
        "delta_variance_vs_values": sum(delta_power) / sum(raw_power),
    }


def _bits(integers: Float32, classes: npt.NDArray[np.uint8]) -> float:
    """Entropy of integers (heads, tokens, dim) in the classes (heads, dim) of their channels, bits in all."""
    shifted = np.clip(integers.astype(np.int64) + _SYMBOLS // 2, 0, _SYMBOLS - 1)
    total = 0.0
    for own in range(CLASSES):
        chosen = shifted.transpose(0, 2, 1)[classes == own].reshape(-1)
        if chosen.size:
            counts = np.bincount(chosen)
            counts = counts[counts > 0]
            total += float((counts * np.log2(chosen.size / counts)).sum())
    return total
