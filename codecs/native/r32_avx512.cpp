// R32 steps for AVX-512 (F, BW, DQ, VL): 16 lanes a register.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "r32_avx512_digits.h"
#include "r32_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,popcnt")
#endif

#include "r32_digits.h"

namespace kvstore::r32 {

namespace {

constexpr size_t kWidth = 16;

// Four entries, loaded one by one: faster than vpgatherdd on the processors measured, and not slowed by mitigations for it.
// The indices are loaded in pairs, for the queue of loads is what fills first.
inline __m128i look_up_four(const uint32_t* tables, const uint32_t* index) {
    uint64_t low, high;
    __builtin_memcpy(&low, index, sizeof low);
    __builtin_memcpy(&high, index + 2, sizeof high);
    return _mm_set_epi32(int(tables[high >> 32]), int(tables[uint32_t(high)]), int(tables[low >> 32]), int(tables[uint32_t(low)]));
}

inline __m512i look_up(const uint32_t* tables, const uint32_t* index) {
    __m128i quarter[4];
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) quarter[i] = look_up_four(tables, index + 4 * i);
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter[0]), quarter[1], 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter[2]), quarter[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Entries of digits: the slots of an index are its low 16 bits, its table the high ones.
inline __m512i look_up(const DigitTables* tables, const uint32_t* index) {
    __m128i quarter[4];
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) quarter[i] = digit_entries(tables->rows, index + 4 * i);
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter[0]), quarter[1], 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter[2]), quarter[3], 1);
    return _mm512_add_epi32(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), _mm512_slli_epi32(_mm512_load_si512(index), 20));
}

// Indices reach the loads below through memory, which takes fewer instructions than out of a register; the compiler thinks
// otherwise.
template <typename Indices>
inline void keep_in_memory(Indices& indices) {
    __asm__ volatile("" : "+m"(indices));
}

// Where the states' entries lie in the tables.
inline __m512i slots(__m512i state, const uint32_t* row) {
    return _mm512_ternarylogic_epi32(state, _mm512_set1_epi32(4095), _mm512_loadu_si512(row), 0xEA);  // (a & b) | c
}

template <size_t vectors, size_t count, typename Table>
void decode(DecodeTile* const* tiles, const Table* tables) {
    const __m512i slot_mask = _mm512_set1_epi32(4095), state_min = _mm512_set1_epi32(1 << 16);
    __m512i state[count][vectors];
    const uint8_t *words[count], *limit[count];
    uint8_t* symbols[count];
    const uint32_t* row[count];
    size_t steps = tiles[0]->steps;
    for (size_t t = 0; t < count; ++t) {
        for (size_t v = 0; v < vectors; ++v) state[t][v] = _mm512_load_si512(tiles[t]->state + kWidth * v);
        words[t] = tiles[t]->words;
        limit[t] = tiles[t]->limit;
        symbols[t] = tiles[t]->symbols;
        row[t] = tiles[t]->row;
        if (tiles[t]->steps < steps) steps = tiles[t]->steps;
    }
    const size_t steps_start = steps;
    alignas(64) uint32_t index[count][vectors][kWidth];
    for (size_t t = 0; t < count; ++t) {
        for (size_t v = 0; v < vectors; ++v) _mm512_store_si512(index[t][v], slots(state[t][v], row[t] + kWidth * v));
    }
    bool enough;
    do {
        enough = true;
#pragma GCC unroll 4
        for (size_t t = 0; t < count; ++t) {
            row[t] += kWidth * vectors;
            if (row[t] == tiles[t]->rows_end) row[t] = tiles[t]->rows;
#pragma GCC unroll 2
            for (size_t v = 0; v < vectors; ++v) {
                keep_in_memory(index[t][v]);
                const __m512i entry = look_up(tables, index[t][v]);
                const __m512i high = _mm512_srli_epi32(state[t][v], 12);
                const __m512i frequency_less_1 = _mm512_and_si512(_mm512_srli_epi32(entry, 8), slot_mask);
                const __m512i offset = _mm512_add_epi32(high, _mm512_srli_epi32(entry, 20));
                const __m512i next = _mm512_add_epi32(_mm512_mullo_epi32(frequency_less_1, high), offset);
                const __mmask16 low = _mm512_cmplt_epu32_mask(next, state_min);
                const __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words[t])));
                const __m512i shifted = _mm512_or_si512(_mm512_slli_epi32(next, 16), _mm512_maskz_expand_epi32(low, word));
                state[t][v] = _mm512_mask_mov_epi32(next, low, shifted);
                _mm512_store_si512(index[t][v], slots(state[t][v], row[t] + kWidth * v));  // early: the next step waits for it
                words[t] += 2 * __builtin_popcount(low);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(symbols[t] + kWidth * v), _mm512_cvtepi32_epi8(entry));
            }
            symbols[t] += kWidth * vectors;
            enough &= words[t] <= limit[t];
        }
    } while (--steps > 0 && enough);
    for (size_t t = 0; t < count; ++t) {
        for (size_t v = 0; v < vectors; ++v) _mm512_store_si512(tiles[t]->state + kWidth * v, state[t][v]);
        tiles[t]->words = words[t];
        tiles[t]->symbols = symbols[t];
        tiles[t]->row = row[t];
        tiles[t]->steps -= steps_start - steps;
    }
}

// The low and the high halves of 16 encoder entries.
inline void look_up(const uint64_t* tables, const uint32_t* index, __m512i& reciprocal, __m512i& fields) {
    const __m512i low_halves = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i high_halves = _mm512_or_si512(low_halves, _mm512_set1_epi32(1));
    __m512i half[2];
#pragma GCC unroll 2
    for (size_t i = 0; i < 2; ++i, index += 8) {
        half[i] = _mm512_set_epi64((long long)tables[index[7]], (long long)tables[index[6]], (long long)tables[index[5]], (long long)tables[index[4]],
                                   (long long)tables[index[3]], (long long)tables[index[2]], (long long)tables[index[1]], (long long)tables[index[0]]);
    }
    reciprocal = _mm512_permutex2var_epi32(half[0], low_halves, half[1]);
    fields = _mm512_permutex2var_epi32(half[0], high_halves, half[1]);
}

inline __m512i multiply_high(__m512i a, __m512i b) {
    const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(a, b), 32);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
    return _mm512_mask_mov_epi32(even, 0xAAAA, odd);
}

template <size_t vectors>
void encode(EncodeTile& tile, const uint64_t* tables) {
    const __m512i slot_mask = _mm512_set1_epi32(4095), one = _mm512_set1_epi32(1), fifteen = _mm512_set1_epi32(15);
    __m512i state[vectors];
    for (size_t v = 0; v < vectors; ++v) state[v] = _mm512_load_si512(tile.state + kWidth * v);
    uint8_t* words = tile.words;
    const uint32_t* row = tile.row;
    const uint8_t* symbols = tile.symbols + tile.steps * kWidth * vectors;
    __mmask16 missing = 0;
    for (; tile.steps > 0; --tile.steps) {
        symbols -= kWidth * vectors;
#pragma GCC unroll 2
        for (size_t v = vectors - 1; v < vectors; --v) {
            alignas(64) uint32_t index[kWidth];
            const __m512i symbol = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(symbols + kWidth * v)));
            _mm512_store_si512(index, _mm512_or_si512(symbol, _mm512_loadu_si512(row + kWidth * v)));
            __m512i reciprocal, fields;
            keep_in_memory(index);
            look_up(tables, index, reciprocal, fields);
            missing |= _mm512_testn_epi32_mask(reciprocal, reciprocal);
            const __m512i frequency_less_1 = _mm512_and_si512(fields, slot_mask);
            const __mmask16 full = _mm512_cmpgt_epu32_mask(_mm512_srli_epi32(state[v], 20), frequency_less_1);
            const unsigned emitted = unsigned(__builtin_popcount(full));
            words -= 2 * emitted;
            const __m256i word = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, state[v]));
            _mm256_mask_storeu_epi16(words, __mmask16((1u << emitted) - 1), word);
            const __m512i shifted = _mm512_mask_srli_epi32(state[v], full, state[v], 16);
            const __m512i extra = _mm512_and_si512(_mm512_srli_epi32(fields, 16), one);
            const __m512i shift = _mm512_and_si512(_mm512_srli_epi32(fields, 12), fifteen);
            const __m512i quotient = _mm512_srlv_epi32(multiply_high(_mm512_add_epi32(shifted, extra), reciprocal), shift);
            const __m512i added = _mm512_mullo_epi32(quotient, _mm512_andnot_si512(fields, slot_mask));
            state[v] = _mm512_add_epi32(_mm512_add_epi32(shifted, added), _mm512_srli_epi32(fields, 20));
        }
        row = (row == tile.rows ? tile.rows_end : row) - kWidth * vectors;
    }
    for (size_t v = 0; v < vectors; ++v) _mm512_store_si512(tile.state + kWidth * v, state[v]);
    tile.words = words;
    tile.row = row;
    tile.missing |= missing != 0;
}

}  // namespace

const Kernels kAvx512{"avx512",
                      {{}, {decode<1, 1>, decode<1, 2>, decode<1, 4>, nullptr}, {decode<2, 1>, decode<2, 2>, nullptr, nullptr}},
                      {{nullptr, nullptr, avx512::decode_digits<8, 1>, avx512::decode_digits<8, 2>},
                       {decode<1, 1>, avx512::decode_digits<16, 1>, avx512::decode_digits<16, 2>, nullptr},
                       {avx512::decode_digits<32, 1>, avx512::decode_digits<32, 2>, nullptr, nullptr}},
                      {nullptr, encode<1>, encode<2>}};

}  // namespace kvstore::r32

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
