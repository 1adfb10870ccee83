// Exponents apart from the rest of an element: the kernels of the codec `lossless`. docs/format.md has the bytes.
//
// Every element is first rotated left by one bit, so that its most significant byte (the top) holds the exponent of bfloat16
// and float32, and the sign ends up with the mantissa. Nothing here trusts the bytes it decodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pieces.h"

namespace kvstore::exponents {

constexpr size_t kTops = 256;
constexpr size_t kCodes = 16;
constexpr size_t kFixedHeadBytes = kCodes + 4;
constexpr size_t kEscapeBytes = 5;

// Bytes of the segment's directory, one entry a head of each array.
size_t directory_bytes(const std::vector<Strided>& arrays);

// Write the segment of block format 2 of these arrays (itemsize 1, 2 or 4): `target` has room for the directory and for every
// element as it is. Answers the bytes written. Throws std::bad_alloc.
size_t encode_fixed(uint8_t* target, const std::vector<Strided>& arrays);

// Fill the arrays from such a segment. Answers nullptr, or what is wrong with it; the arrays are then unspecified.
const char* decode_fixed(const std::vector<Strided>& arrays, const uint8_t* source, size_t nbytes);

// Split the rotated elements of an array into byte planes, the lowest first: plane p has byte p of every element in C order.
void split_rotated(uint8_t* planes, const Strided& array);

// Undo split_rotated.
void merge_rotated(const Strided& array, const uint8_t* planes);

// For each channel of tops (heads, tokens, dim): the sum and the sum of squares over the tokens, to sums (heads, dim, 2).
void channel_sums(uint64_t* sums, const uint8_t* tops, size_t heads, size_t tokens, size_t dim);

// Add to counts (tables, 256) how often each top occurs in the channels of each table; ids (heads, dim) are below `tables`.
// Throws std::bad_alloc.
void count_tops(uint64_t* counts, const uint8_t* tops, const uint8_t* ids, size_t heads, size_t tokens, size_t dim, size_t tables);

// Use another instruction set ("avx512", "avx2" or "scalar"); false if the processor lacks it.
bool use_isa(const char* name);

}  // namespace kvstore::exponents
