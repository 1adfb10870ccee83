"""The yardsticks of the codec benchmark: the error, the comparison at equal error, and the rivals."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.bench import codec_deltas, codec_lmcache
from kvstore.bench.attention_error import Point, attention_error, bits_at, bits_ratio
from kvstore.bench.codec_baselines import Kvtc, KvtcBasis, Lloyd, container_overhead
from kvstore.bench.codec_rate import lossless_bits
from kvstore.bench.kv_samples import Samples, float_parts, synthetic
from kvstore.codecs.floats import from_float32
from kvstore.spec import KVArrays

CURVE = [Point(4.0, 0.1), Point(2.0, 0.4), Point(6.0, 0.025), Point(5.0, 0.3)]
"""Halving the error costs a bit; the last point is beaten by the first."""


@pytest.fixture(scope="module")
def samples() -> Samples:
    return synthetic(quick=True)


@pytest.fixture(scope="module")
def basis(samples: Samples) -> KvtcBasis:
    return KvtcBasis(samples)


def squared_error(samples: Samples, decoded: KVArrays) -> float:
    """Mean over K and V of |x - x'|^2 / |x|^2 of the first chunk."""
    pairs = zip(float_parts(samples.chunks[0].arrays, samples.spec), float_parts(decoded, samples.spec), strict=True)
    return float(np.mean([np.square(a - b).sum() / np.square(a).sum() for a, b in pairs]))


class TestCurves:
    @pytest.mark.parametrize(("error", "bits"), [(0.4, 2.0), (0.2, 3.0), (0.1, 4.0), (0.05, 5.0), (0.025, 6.0)])
    def test_bits_are_linear_in_log_error_along_the_front(self, error: float, bits: float) -> None:
        assert bits_at(CURVE, error) == pytest.approx(bits)

    @pytest.mark.parametrize("error", [0.5, 0.02])
    def test_nothing_is_said_beyond_the_ends(self, error: float) -> None:
        assert bits_at(CURVE, error) is None

    def test_ratios_are_at_equal_error(self) -> None:
        twice = [Point(2 * point.bits, point.error) for point in CURVE]
        assert bits_ratio(CURVE, twice) == pytest.approx(0.5)
        assert bits_ratio(CURVE, [Point(6.0, 0.2)]) == pytest.approx(0.5)
        assert bits_ratio(CURVE, [Point(1.0, 0.9), Point(2.0, 0.8)]) is None


class TestError:
    def test_the_same_bits_have_none(self, samples: Samples) -> None:
        chunk = samples.chunks[0]
        assert attention_error(chunk, chunk.arrays, samples.spec) == 0.0

    def test_values_scaled_by_a_tenth_err_by_that(self, samples: Samples) -> None:
        chunk = samples.chunks[0]
        keys, values = float_parts(chunk.arrays, samples.spec)
        scaled = from_float32(values * np.float32(0.9), samples.spec.dtype)
        decoded = [(pair[0], own) for pair, own in zip(chunk.arrays, scaled, strict=True)]
        assert keys.shape == values.shape
        assert attention_error(chunk, decoded, samples.spec) == pytest.approx(0.1, abs=0.01)

    def test_lossless_codecs_are_checked_for_having_none(self, samples: Samples) -> None:
        assert 10 < lossless_bits(samples, "lossless_dense") < 11.2


class TestRivals:
    @pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1175), (3, 0.0346), (4, 0.0095)])
    def test_lloyd_has_the_distortion_of_the_textbook(self, samples: Samples, bits: int, distortion: float) -> None:
        result = Lloyd(samples.spec, bits).run(samples.chunks[1].arrays, 256)
        elements = samples.elements
        assert result.nbytes == elements * bits // 8 + 2 * elements // 64 + container_overhead(samples.spec)
        pairs = zip(
            float_parts(samples.chunks[1].arrays, samples.spec), float_parts(result.arrays, samples.spec), strict=True
        )
        values = [float(np.square(a - b).sum() / np.square(a).sum()) for a, b in pairs]
        assert np.mean(values) == pytest.approx(distortion, rel=0.25)

    def test_more_bits_of_kvtc_err_less_and_stay_near_the_target(self, samples: Samples, basis: KvtcBasis) -> None:
        chunk = samples.chunks[0]
        errors = []
        for bits in (1.0, 2.0, 4.0):
            result = Kvtc(samples, basis, bits).run(chunk.arrays, 0)
            exact = 4 * samples.spec.token_bytes + container_overhead(samples.spec)
            assert (result.nbytes - exact) * 8 / samples.elements <= bits * 1.02
            errors.append(squared_error(samples, result.arrays))
            for before, after in zip(chunk.arrays, result.arrays, strict=True):
                np.testing.assert_array_equal(before[0][:, :4], after[0][:, :4])
        assert errors == sorted(errors, reverse=True)


def test_samples_are_the_same_every_time(samples: Samples) -> None:
    again = synthetic(quick=True)
    for one, other in zip(samples.chunks, again.chunks, strict=True):
        np.testing.assert_array_equal(one.queries, other.queries)
        np.testing.assert_array_equal(one.arrays[0][0], other.arrays[0][0])


def test_the_experiment_on_deltas_reports_both_ways(samples: Samples) -> None:
    found = codec_deltas.measure(samples)
    assert found["deltas.mean_removed_bits"] < found["deltas.delta_bits"]
    assert found["deltas.unrotated_delta_variance_vs_mean_removed"] > 1


def test_lmcache_is_left_out_with_a_reason(
    samples: Samples, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(codec_lmcache.INTERPRETER_VARIABLE, raising=False)
    assert codec_lmcache.measure(samples) == {}
    assert codec_lmcache.INTERPRETER_VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(codec_lmcache.INTERPRETER_VARIABLE, "/no/such/python")
    assert codec_lmcache.measure(samples) == {}
    assert "not measured" in capsys.readouterr().err
