// Loops of the ladder written for AVX-512; see ladder_avx512.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ladder_loops.h"

namespace kvstore::ladder::avx512 {

void pair_bases(uint32_t* bases, const uint16_t* rows, const int16_t* one, const int16_t* other, size_t count, unsigned bits);
void refine(int16_t* one, int16_t* other, const uint8_t* symbols, size_t count);
template <size_t alphabet>
void first(int16_t* const* rows, const uint8_t* symbols, size_t count);
void refine_packed(int16_t* values, const int8_t* digits, size_t count);
void triple(int16_t* values, size_t count);
void dequantise(float* numbers, const int16_t* values, const float* centroids, size_t count, float unit, float step);
void channels(float* channels, const int16_t* values, const ChannelScales& scales, size_t count, float unit, float step);

}  // namespace kvstore::ladder::avx512
