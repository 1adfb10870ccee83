// Looking up digits: included where an instruction set has been chosen, AVX2 and popcnt at least. Internal linkage throughout.
#pragma once

#include <cstddef>

#include <immintrin.h>

#include "r32.h"

namespace kvstore::r32 {

namespace {

// The entry of one index, but for its slot. Each comparison that holds sets two bits of the mask: their number is twice the symbol.
inline int digit_entry(const DigitTable* tables, const uint32_t* index) {
    const uint8_t *at = reinterpret_cast<const uint8_t*>(index), *bytes = reinterpret_cast<const uint8_t*>(tables);
    uint16_t slot, offset;
    __builtin_memcpy(&slot, at, sizeof slot);
    __builtin_memcpy(&offset, at + sizeof slot, sizeof offset);
    const __m128i below = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + offset));
    const unsigned mask = unsigned(_mm_movemask_epi8(_mm_cmpgt_epi16(_mm_set1_epi16(short(slot)), below)));
    const size_t twice = size_t(_mm_popcnt_u64(mask));
    int entry;
    __builtin_memcpy(&entry, bytes + offset + offsetof(DigitTable, entries) + 2 * twice, sizeof entry);
    return entry;
}

inline __m128i digit_entries(const DigitTable* tables, const uint32_t* index) {
    return _mm_set_epi32(digit_entry(tables, index + 3), digit_entry(tables, index + 2), digit_entry(tables, index + 1), digit_entry(tables, index));
}

}  // namespace

}  // namespace kvstore::r32
