// R32 steps for AVX2: 8 lanes a register.
#if defined(__x86_64__)
#include <array>
#include <cstddef>
#include <cstdint>

#include <immintrin.h>

#include "r32_kernels.h"

namespace kvstore::r32 {

namespace {

template <size_t nbytes>
using ByMask = std::array<std::array<uint8_t, nbytes>, 256>;

// Expanding: the bytes of lane i, if its bit is set, are the two of word number (set bits below i) and two zeros.
constexpr ByMask<32> make_expand() {
    ByMask<32> out{};
    for (unsigned mask = 0; mask < 256; ++mask) {
        uint8_t next = 0;
        for (unsigned lane = 0; lane < 8; ++lane) {
            const bool set = mask >> lane & 1;
            out[mask][4 * lane] = set ? next++ : 0x80;
            out[mask][4 * lane + 1] = set ? next++ : 0x80;
            out[mask][4 * lane + 2] = out[mask][4 * lane + 3] = 0x80;
        }
    }
    return out;
}

// Compressing to the upper end: the last places take the lanes whose bits are set, in order.
constexpr ByMask<8> make_compress() {
    ByMask<8> out{};
    for (unsigned mask = 0; mask < 256; ++mask) {
        unsigned place = 8;
        for (unsigned lane = 8; lane-- > 0;) {
            if (mask >> lane & 1) out[mask][--place] = uint8_t(lane);
        }
    }
    return out;
}

alignas(64) constexpr ByMask<32> kExpand = make_expand();
alignas(64) constexpr ByMask<8> kCompress = make_compress();
constexpr size_t kWidth = 8;

}  // namespace

}  // namespace kvstore::r32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,popcnt")
#endif

#include "r32_digits.h"

namespace kvstore::r32 {

namespace {

// Four entries, loaded one by one: faster than vpgatherdd on the processors measured, and not slowed by mitigations for it.
// The indices are loaded in pairs, for the queue of loads is what fills first.
inline __m128i look_up_four(const uint32_t* tables, const uint32_t* index) {
    uint64_t low, high;
    __builtin_memcpy(&low, index, sizeof low);
    __builtin_memcpy(&high, index + 2, sizeof high);
    return _mm_set_epi32(int(tables[high >> 32]), int(tables[uint32_t(high)]), int(tables[low >> 32]), int(tables[uint32_t(low)]));
}

inline __m256i look_up(const uint32_t* tables, const uint32_t* index) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(look_up_four(tables, index)), look_up_four(tables, index + 4), 1);
}

// Entries of digits: the slots of an index are its low 16 bits, its table the high ones.
inline __m256i look_up(const DigitTables* tables, const uint32_t* index) {
    const __m128i low = digit_entries(tables->rows, index), high = digit_entries(tables->rows, index + 4);
    const __m256i slots = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
    return _mm256_add_epi32(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), _mm256_slli_epi32(slots, 20));
}

// The low bytes of 8 entries.
inline void store_symbols(uint8_t* symbols, __m256i entry) {
    const __m256i low_bytes = _mm256_set_epi32(-1, -1, -1, 0x0C080400, -1, -1, -1, 0x0C080400);
    const __m256i halves = _mm256_shuffle_epi8(entry, low_bytes);
    const __m128i packed = _mm_unpacklo_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(symbols), packed);
}

// Indices reach the loads below through memory, which takes fewer instructions than out of a register; the compiler thinks
// otherwise.
template <typename Indices>
inline void keep_in_memory(Indices& indices) {
    __asm__ volatile("" : "+m"(indices));
}

// Where the states' entries lie in the tables.
inline void store_slots(uint32_t* index, __m256i state, const uint32_t* row) {
    const __m256i slot = _mm256_and_si256(state, _mm256_set1_epi32(4095));
    const __m256i base = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
    _mm256_store_si256(reinterpret_cast<__m256i*>(index), _mm256_or_si256(slot, base));
}

template <size_t vectors, size_t count, typename Table>
void decode(DecodeTile* const* tiles, const Table* tables) {
    const __m256i slot_mask = _mm256_set1_epi32(4095);
    __m256i state[count][vectors];
    const uint8_t *words[count], *limit[count];
    uint8_t* symbols[count];
    const uint32_t* row[count];
    size_t steps = tiles[0]->steps;
    for (size_t t = 0; t < count; ++t) {
        for (size_t v = 0; v < vectors; ++v) state[t][v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(tiles[t]->state + kWidth * v));
        words[t] = tiles[t]->words;
        limit[t] = tiles[t]->limit;
        symbols[t] = tiles[t]->symbols;
        row[t] = tiles[t]->row;
        if (tiles[t]->steps < steps) steps = tiles[t]->steps;
    }
    const size_t steps_start = steps;
    alignas(32) uint32_t index[count][vectors][kWidth];
    for (size_t t = 0; t < count; ++t) {
        for (size_t v = 0; v < vectors; ++v) store_slots(index[t][v], state[t][v], row[t] + kWidth * v);
    }
    bool enough;
    do {
        enough = true;
#pragma GCC unroll 8
        for (size_t t = 0; t < count; ++t) {
            row[t] += kWidth * vectors;
            if (row[t] == tiles[t]->rows_end) row[t] = tiles[t]->rows;
#pragma GCC unroll 4
            for (size_t v = 0; v < vectors; ++v) {
                keep_in_memory(index[t][v]);
                const __m256i entry = look_up(tables, index[t][v]);
                const __m256i high = _mm256_srli_epi32(state[t][v], 12);
                const __m256i frequency_less_1 = _mm256_and_si256(_mm256_srli_epi32(entry, 8), slot_mask);
                const __m256i offset = _mm256_add_epi32(high, _mm256_srli_epi32(entry, 20));
                const __m256i next = _mm256_add_epi32(_mm256_mullo_epi32(frequency_less_1, high), offset);
                const __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(next, 16), _mm256_setzero_si256());
                const unsigned mask = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(low)));
                const __m256i word = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words[t])));
                const __m256i expand = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpand[mask].data()));
                const __m256i shifted = _mm256_or_si256(_mm256_slli_epi32(next, 16), _mm256_shuffle_epi8(word, expand));
                state[t][v] = _mm256_blendv_epi8(next, shifted, low);
                store_slots(index[t][v], state[t][v], row[t] + kWidth * v);  // early: the next step waits for it
                words[t] += 2 * __builtin_popcount(mask);
                store_symbols(symbols[t] + kWidth * v, entry);
            }
            symbols[t] += kWidth * vectors;
            enough &= words[t] <= limit[t];
        }
    } while (--steps > 0 && enough);
    for (size_t t = 0; t < count; ++t) {
        for (size_t v = 0; v < vectors; ++v) _mm256_store_si256(reinterpret_cast<__m256i*>(tiles[t]->state + kWidth * v), state[t][v]);
        tiles[t]->words = words[t];
        tiles[t]->symbols = symbols[t];
        tiles[t]->row = row[t];
        tiles[t]->steps -= steps_start - steps;
    }
}

// The low and the high halves of 8 encoder entries.
inline void look_up(const uint64_t* tables, const uint32_t* index, __m256i& reciprocal, __m256i& fields) {
    __m256i half[2];
#pragma GCC unroll 2
    for (size_t i = 0; i < 2; ++i) {
        // Lanes 0 1 4 5, then 2 3 6 7, so that the shuffles below, which work within 128 bits, put them in order.
        const uint32_t* at = index + 2 * i;
        half[i] = _mm256_set_epi64x((long long)tables[at[5]], (long long)tables[at[4]], (long long)tables[at[1]], (long long)tables[at[0]]);
    }
    const __m256 a = _mm256_castsi256_ps(half[0]), b = _mm256_castsi256_ps(half[1]);
    reciprocal = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
    fields = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD));
}

inline __m256i multiply_high(__m256i a, __m256i b) {
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(a, b), 32);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
    return _mm256_blend_epi32(even, odd, 0xAA);
}

// The low 16 bits of 8 lanes.
inline __m128i low_words(__m256i lanes) {
    const __m256i low = _mm256_and_si256(lanes, _mm256_set1_epi32(0xFFFF));
    return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}

template <size_t vectors>
void encode(EncodeTile& tile, const uint64_t* tables) {
    const __m256i slot_mask = _mm256_set1_epi32(4095), one = _mm256_set1_epi32(1), fifteen = _mm256_set1_epi32(15);
    __m256i state[vectors];
    for (size_t v = 0; v < vectors; ++v) state[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile.state + kWidth * v));
    uint8_t* words = tile.words;
    const uint32_t* row = tile.row;
    const uint8_t* symbols = tile.symbols + tile.steps * kWidth * vectors;
    __m256i missing = _mm256_setzero_si256();
    for (; tile.steps > 0; --tile.steps) {
        symbols -= kWidth * vectors;
#pragma GCC unroll 4
        for (size_t v = vectors - 1; v < vectors; --v) {
            alignas(32) uint32_t index[kWidth];
            const __m256i symbol = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(symbols + kWidth * v)));
            const __m256i base = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + kWidth * v));
            _mm256_store_si256(reinterpret_cast<__m256i*>(index), _mm256_or_si256(symbol, base));
            __m256i reciprocal, fields;
            keep_in_memory(index);
            look_up(tables, index, reciprocal, fields);
            missing = _mm256_or_si256(missing, _mm256_cmpeq_epi32(reciprocal, _mm256_setzero_si256()));
            const __m256i frequency_less_1 = _mm256_and_si256(fields, slot_mask);
            const __m256i full = _mm256_cmpgt_epi32(_mm256_srli_epi32(state[v], 20), frequency_less_1);
            const unsigned mask = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(full)));
            const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress[mask].data()));
            const __m256i emitted = _mm256_permutevar8x32_epi32(state[v], _mm256_cvtepu8_epi32(order));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(words - 16), low_words(emitted));  // the rest is overwritten later
            words -= 2 * __builtin_popcount(mask);
            const __m256i shifted = _mm256_blendv_epi8(state[v], _mm256_srli_epi32(state[v], 16), full);
            const __m256i extra = _mm256_and_si256(_mm256_srli_epi32(fields, 16), one);
            const __m256i shift = _mm256_and_si256(_mm256_srli_epi32(fields, 12), fifteen);
            const __m256i quotient = _mm256_srlv_epi32(multiply_high(_mm256_add_epi32(shifted, extra), reciprocal), shift);
            const __m256i added = _mm256_mullo_epi32(quotient, _mm256_andnot_si256(fields, slot_mask));
            state[v] = _mm256_add_epi32(_mm256_add_epi32(shifted, added), _mm256_srli_epi32(fields, 20));
        }
        row = (row == tile.rows ? tile.rows_end : row) - kWidth * vectors;
    }
    for (size_t v = 0; v < vectors; ++v) _mm256_store_si256(reinterpret_cast<__m256i*>(tile.state + kWidth * v), state[v]);
    tile.words = words;
    tile.row = row;
    tile.missing |= _mm256_testz_si256(missing, missing) == 0;
}

}  // namespace

const Kernels kAvx2{"avx2",
                    {{decode<1, 1>, decode<1, 2>, decode<1, 4>, decode<1, 8>},
                     {decode<2, 1>, decode<2, 2>, decode<2, 4>, nullptr},
                     {decode<4, 1>, decode<4, 2>, nullptr, nullptr}},
                    {{decode<1, 1>, decode<1, 2>, decode<1, 4>, decode<1, 8>},
                     {decode<2, 1>, decode<2, 2>, decode<2, 4>, nullptr},
                     {decode<4, 1>, decode<4, 2>, nullptr, nullptr}},
                    {encode<1>, encode<2>, encode<4>}};

}  // namespace kvstore::r32

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
