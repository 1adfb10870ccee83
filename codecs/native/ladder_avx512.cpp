// Those loops of the ladder that compilers leave slow: over rows too short for the ends of vectors not to matter, and a permutation.
// AVX-512 (F, BW, VL); what they do is said in ladder_loops.h.
#if defined(__x86_64__)
#include "ladder_avx512.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "ladder_plan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl")
#endif

namespace kvstore::ladder::avx512 {

namespace {

constexpr size_t kWidth = 32;

// The lanes of numbers at..count - 1.
inline __mmask32 lanes(size_t at, size_t count) { return count - at >= kWidth ? ~__mmask32{0} : (__mmask32{1} << (count - at)) - 1; }

inline __m512i all(int value) { return _mm512_set1_epi16(short(value)); }

inline __m512i load_bytes(__mmask32 mask, const uint8_t* at) { return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, at)); }

template <unsigned radix>
inline __m512i over(__m512i symbols) {
    using Own = Quotient<radix>;
    return _mm512_srli_epi16(_mm512_mullo_epi16(symbols, all(Own::reciprocal)), Own::shift);
}

// The least significant digit of symbols, less `limit`.
template <unsigned radix>
inline __m512i digit(__m512i symbols, __m512i rest, unsigned limit) {
    return _mm512_sub_epi16(_mm512_sub_epi16(symbols, _mm512_mullo_epi16(rest, all(radix))), all(int(limit)));
}

inline void refine_row(__mmask32 mask, int16_t* at, __m512i digits) {
    const __m512i values = _mm512_maskz_loadu_epi16(mask, at);
    const __m512i sign = _mm512_srai_epi16(values, 15);
    const __m512i mirrored = _mm512_sub_epi16(_mm512_xor_si512(digits, sign), sign);
    _mm512_mask_storeu_epi16(at, mask, _mm512_add_epi16(_mm512_add_epi16(values, values), _mm512_add_epi16(values, mirrored)));
}

}  // namespace

void pair_bases(uint32_t* bases, const uint16_t* rows, const int16_t* one, const int16_t* other, size_t count, unsigned bits) {
    const __m128i shift = _mm_cvtsi32_si128(int(bits));
    for (size_t i = 0; i < count; i += kWidth) {
        const __mmask32 mask = lanes(i, count);
        const __m512i first = _mm512_min_epu16(_mm512_abs_epi16(_mm512_maskz_loadu_epi16(mask, one + i)), all(2));
        const __m512i second = _mm512_min_epu16(_mm512_abs_epi16(_mm512_maskz_loadu_epi16(mask, other + i)), all(2));
        const __m512i threefold = _mm512_add_epi16(_mm512_add_epi16(first, first), first);
        const __m512i ids = _mm512_add_epi16(_mm512_maskz_loadu_epi16(mask, rows + i), _mm512_add_epi16(threefold, second));
        const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(ids)), high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(ids, 1));
        _mm512_mask_storeu_epi32(bases + i, __mmask16(mask), _mm512_sll_epi32(low, shift));
        _mm512_mask_storeu_epi32(bases + i + kWidth / 2, __mmask16(mask >> 16), _mm512_sll_epi32(high, shift));
    }
}

void refine(int16_t* one, int16_t* other, const uint8_t* symbols, size_t count) {
    for (size_t i = 0; i < count; i += kWidth) {
        const __mmask32 mask = lanes(i, count);
        const __m512i own = load_bytes(mask, symbols + i), rest = over<3>(own);
        refine_row(mask, one + i, digit<3>(own, rest, 1));
        refine_row(mask, other + i, digit<3>(rest, over<3>(rest), 1));
    }
}

template <size_t alphabet>
void first(int16_t* const* rows, const uint8_t* symbols, size_t count) {
    constexpr Alphabet own = kAlphabet[alphabet];
    for (size_t i = 0; i < count; i += kWidth) {
        const __mmask32 mask = lanes(i, count);
        __m512i left = load_bytes(mask, symbols + i);
        for (unsigned place = 0; place < own.count && rows[place]; ++place) {
            const __m512i rest = over<own.radix()>(left);
            _mm512_mask_storeu_epi16(rows[place] + i, mask, digit<own.radix()>(left, rest, own.limit));
            left = rest;
        }
    }
}

template void first<0>(int16_t* const*, const uint8_t*, size_t);
template void first<1>(int16_t* const*, const uint8_t*, size_t);
template void first<2>(int16_t* const*, const uint8_t*, size_t);

void refine_packed(int16_t* values, const int8_t* digits, size_t count) {
    for (size_t i = 0; i < count; i += kWidth) {
        const __mmask32 mask = lanes(i, count);
        const __m512i own = _mm512_maskz_loadu_epi16(mask, values + i), digit = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, digits + i));
        _mm512_mask_storeu_epi16(values + i, mask, _mm512_add_epi16(_mm512_add_epi16(own, own), _mm512_add_epi16(own, digit)));
    }
}

void triple(int16_t* values, size_t count) {
    for (size_t i = 0; i < count; i += kWidth) {
        const __mmask32 mask = lanes(i, count);
        const __m512i own = _mm512_maskz_loadu_epi16(mask, values + i);
        _mm512_mask_storeu_epi16(values + i, mask, _mm512_add_epi16(_mm512_add_epi16(own, own), own));
    }
}

namespace {

// (value - sign * centroid) * unit * step; subtracting -centroid is adding it.
inline __m512 dequantised(__m256i values, __m512 centroids, float unit, float step) {
    const __m512i wide = _mm512_cvtepi16_epi32(values), zero = _mm512_setzero_si512();
    __m512 out = _mm512_cvtepi32_ps(wide);
    out = _mm512_mask_sub_ps(out, _mm512_cmpgt_epi32_mask(wide, zero), out, centroids);
    out = _mm512_mask_add_ps(out, _mm512_cmplt_epi32_mask(wide, zero), out, centroids);
    return _mm512_mul_ps(_mm512_mul_ps(out, _mm512_set1_ps(unit)), _mm512_set1_ps(step));
}

constexpr size_t kFloats = 16;

inline __mmask16 floats(size_t at, size_t count) { return count - at >= kFloats ? __mmask16(-1) : __mmask16((1u << (count - at)) - 1); }

inline void store_channels(float* channels, __m256i values, const ChannelScales& scales, size_t at, size_t count, float unit, float step) {
    const __mmask16 mask = floats(at, count);
    const __m512 own = dequantised(values, _mm512_maskz_loadu_ps(mask, scales.centroids + at), unit, step);
    const __m512 gained = _mm512_mul_ps(own, _mm512_maskz_loadu_ps(mask, scales.gains + at));
    _mm512_mask_storeu_ps(channels + at, mask, _mm512_add_ps(gained, _mm512_maskz_loadu_ps(mask, scales.centres + at)));
}

}  // namespace

void dequantise(float* numbers, const int16_t* values, const float* centroids, size_t count, float unit, float step) {
    for (size_t i = 0; i < count; i += kFloats) {
        const __mmask16 mask = floats(i, count);
        const __m512 own = dequantised(_mm256_maskz_loadu_epi16(mask, values + i), _mm512_maskz_loadu_ps(mask, centroids + i), unit, step);
        _mm512_mask_storeu_ps(numbers + i, mask, own);
    }
}

void channels(float* channels, const int16_t* values, const ChannelScales& scales, size_t count, float unit, float step) {
    constexpr size_t registers = 4;
    if (count > registers * kWidth) {
        for (size_t i = 0; i < count; i += kFloats) {
            alignas(32) int16_t own[kFloats] = {};
            for (size_t j = i; j < count && j < i + kFloats; ++j) own[j - i] = values[scales.sources[j]];
            store_channels(channels, _mm256_load_si256(reinterpret_cast<const __m256i*>(own)), scales, i, count, unit, step);
        }
        return;
    }
    __m512i row[registers];
    for (size_t i = 0; i < registers; ++i) {
        row[i] = i * kWidth < count ? _mm512_maskz_loadu_epi16(lanes(i * kWidth, count), values + i * kWidth) : _mm512_setzero_si512();
    }
    for (size_t i = 0; i < count; i += kWidth) {
        const __m512i from = _mm512_maskz_loadu_epi16(lanes(i, count), scales.sources + i);
        const __m512i near = _mm512_permutex2var_epi16(row[0], from, row[1]), far = _mm512_permutex2var_epi16(row[2], from, row[3]);
        const __m512i own = _mm512_mask_blend_epi16(_mm512_cmpge_epu16_mask(from, all(2 * kWidth)), near, far);
        store_channels(channels, _mm512_castsi512_si256(own), scales, i, count, unit, step);
        if (i + kFloats < count) store_channels(channels, _mm512_extracti64x4_epi64(own, 1), scales, i + kFloats, count, unit, step);
    }
}

}  // namespace kvstore::ladder::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
