// R32 steps of digits for AVX-512 (F, BW, VL), 32 lanes at once: what their symbols are is found for all of them by comparison, so
// that nothing is loaded lane by lane.
#if defined(__x86_64__)
#include "r32_avx512_digits.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,popcnt")
#endif

namespace kvstore::r32::avx512 {

namespace {

constexpr size_t kWidth = 16, kGroup = 2 * kWidth;

// 16 bits a lane; lane i of the first register is in the low half of word pair i, of the second in the high half.
struct Found {
    __m512i symbol, frequency, offset;
};

// For each cut, slot - cut counts up from it, and is large (it wraps) before it: the least of them is the slot's place in its symbol,
// the largest says how far the next symbol is.
template <size_t groups>
inline void search(const DigitTables& tables, const __m512i (&slots)[groups], const __m512i (&numbers)[groups], Found (&found)[groups]) {
    const __m512i one = _mm512_set1_epi16(1);
    __m512i least[groups], largest[groups], symbol[groups];
    __mmask32 beyond[groups];
    for (size_t g = 0; g < groups; ++g) {
        least[g] = slots[g];
        largest[g] = _mm512_sub_epi16(slots[g], _mm512_set1_epi16(kSlots));
        symbol[g] = _mm512_setzero_si512();
        beyond[g] = _mm512_cmpge_epu16_mask(numbers[g], _mm512_set1_epi16(2 * kGroup));
    }
#pragma GCC unroll 8
    for (size_t cut = 0; cut < kDigitSymbols - 1; ++cut) {
        const uint16_t* own = tables.cuts[cut];
        const __m512i first = _mm512_load_si512(own), second = _mm512_load_si512(own + kGroup), third = _mm512_load_si512(own + 2 * kGroup);
#pragma GCC unroll 2
        for (size_t g = 0; g < groups; ++g) {
            const __m512i near = _mm512_permutex2var_epi16(first, numbers[g], second);
            const __m512i distance = _mm512_sub_epi16(slots[g], _mm512_mask_permutexvar_epi16(near, beyond[g], numbers[g], third));
            least[g] = _mm512_min_epu16(least[g], distance);
            largest[g] = _mm512_max_epu16(largest[g], distance);
            symbol[g] = _mm512_mask_add_epi16(symbol[g], _mm512_cmplt_epu16_mask(distance, _mm512_set1_epi16(kSlots)), symbol[g], one);
        }
    }
    for (size_t g = 0; g < groups; ++g) found[g] = {symbol[g], _mm512_sub_epi16(least[g], largest[g]), least[g]};
}

// The words that 16 lanes with these bits take, each in its lane; 8 lanes of a tile are half a register.
template <unsigned lanes>
inline __m512i take_words(const uint8_t** words, __mmask16 low) {
    if constexpr (lanes == 8) {
        const unsigned one = low & 0xFF, other = unsigned(low) >> 8;
        const __m256i first = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words[0])));
        const __m256i second = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words[1])));
        words[0] += 2 * __builtin_popcount(one);
        words[1] += 2 * __builtin_popcount(other);
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_expand_epi32(__mmask8(one), first)), _mm256_maskz_expand_epi32(__mmask8(other), second), 1);
    } else {
        const __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words[0])));
        words[0] += 2 * __builtin_popcount(low);
        return _mm512_maskz_expand_epi32(low, word);
    }
}

template <unsigned lanes>
inline void store_symbols(uint8_t* const* symbols, __m512i symbol) {
    const __m128i bytes = _mm512_cvtepi32_epi8(symbol);
    if constexpr (lanes == 8) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(symbols[0]), bytes);
        _mm_storeh_pd(reinterpret_cast<double*>(symbols[1]), _mm_castsi128_pd(bytes));
    } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(symbols[0]), bytes);
    }
}

}  // namespace

template <unsigned lanes, size_t groups>
void decode_digits(DecodeTile* const* tiles, const DigitTables* tables) {
    constexpr size_t count = groups * kGroup / lanes;
    const __m512i slot_mask = _mm512_set1_epi32(kSlots - 1), low_half = _mm512_set1_epi32(0xFFFF), state_min = _mm512_set1_epi32(kStateMin);
    alignas(64) uint32_t stored[groups * kGroup];
    const uint8_t* words[count];
    uint8_t* symbols[count];
    const uint32_t* row[count];
    size_t steps = tiles[0]->steps;
    for (size_t t = 0; t < count; ++t) {
        for (size_t i = 0; i < lanes; ++i) stored[t * lanes + i] = tiles[t]->state[i];
        words[t] = tiles[t]->words;
        symbols[t] = tiles[t]->symbols;
        row[t] = tiles[t]->row;
        if (tiles[t]->steps < steps) steps = tiles[t]->steps;
    }
    __m512i state[2 * groups];
    for (size_t v = 0; v < 2 * groups; ++v) state[v] = _mm512_load_si512(stored + v * kWidth);
    const size_t steps_start = steps;
    // The tile of a register's first lane, and where that lane is in the tile.
    const auto tile_of = [](size_t v) { return v * kWidth / lanes; };
    const auto lane_of = [](size_t v) { return v * kWidth % lanes; };
    bool enough;
    do {
        __m512i slots[groups], numbers[groups];
        Found found[groups];
#pragma GCC unroll 2
        for (size_t g = 0; g < groups; ++g) {
            __m512i base[2];
#pragma GCC unroll 2
            for (size_t h = 0; h < 2; ++h) {
                const size_t t = tile_of(2 * g + h);
                if constexpr (lanes == 8) {
                    const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[t])), other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[t + 1]));
                    base[h] = _mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1);
                } else {
                    base[h] = _mm512_loadu_si512(row[t] + lane_of(2 * g + h));
                }
            }
            numbers[g] = _mm512_or_si512(_mm512_srli_epi32(base[0], kDigitBits), _mm512_srli_epi32(base[1], kDigitBits - 16));
            slots[g] = _mm512_or_si512(_mm512_and_si512(state[2 * g], slot_mask), _mm512_slli_epi32(_mm512_and_si512(state[2 * g + 1], slot_mask), 16));
        }
        search<groups>(*tables, slots, numbers, found);
#pragma GCC unroll 4
        for (size_t v = 0; v < 2 * groups; ++v) {
            const Found& own = found[v / 2];
            const bool second = v % 2 != 0;
            const __m512i frequency = second ? _mm512_srli_epi32(own.frequency, 16) : _mm512_and_si512(own.frequency, low_half);
            const __m512i offset = second ? _mm512_srli_epi32(own.offset, 16) : _mm512_and_si512(own.offset, low_half);
            const __m512i next = _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srli_epi32(state[v], kSlotBits)), offset);
            const __mmask16 low = _mm512_cmplt_epu32_mask(next, state_min);
            const size_t t = tile_of(v);
            state[v] = _mm512_mask_or_epi32(next, low, _mm512_slli_epi32(next, 16), take_words<lanes>(words + t, low));
            uint8_t* to[2] = {symbols[t] + lane_of(v), lanes == 8 ? symbols[t + 1] : nullptr};
            store_symbols<lanes>(to, second ? _mm512_srli_epi32(own.symbol, 16) : own.symbol);
        }
        enough = true;
#pragma GCC unroll 8
        for (size_t t = 0; t < count; ++t) {
            symbols[t] += lanes;
            row[t] += lanes;
            enough &= words[t] <= tiles[t]->limit;
        }
    } while (--steps > 0 && enough);
    for (size_t v = 0; v < 2 * groups; ++v) _mm512_store_si512(stored + v * kWidth, state[v]);
    for (size_t t = 0; t < count; ++t) {
        for (size_t i = 0; i < lanes; ++i) tiles[t]->state[i] = stored[t * lanes + i];
        tiles[t]->words = words[t];
        tiles[t]->symbols = symbols[t];
        tiles[t]->row = row[t];
        tiles[t]->steps -= steps_start - steps;
    }
}

template void decode_digits<8, 1>(DecodeTile* const*, const DigitTables*);
template void decode_digits<8, 2>(DecodeTile* const*, const DigitTables*);
template void decode_digits<16, 1>(DecodeTile* const*, const DigitTables*);
template void decode_digits<16, 2>(DecodeTile* const*, const DigitTables*);
template void decode_digits<32, 1>(DecodeTile* const*, const DigitTables*);
template void decode_digits<32, 2>(DecodeTile* const*, const DigitTables*);

}  // namespace kvstore::r32::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
