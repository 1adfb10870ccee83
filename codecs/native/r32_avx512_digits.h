// Decoding digits with AVX-512; see r32_avx512_digits.cpp.
#pragma once

#include "r32_kernels.h"

namespace kvstore::r32::avx512 {

// `groups` times 32 lanes of tiles. The rows of a tile of digits never begin again.
template <unsigned lanes, size_t groups>
void decode_digits(DecodeTile* const* tiles, const DigitTables* tables);

}  // namespace kvstore::r32::avx512
