// Gather strided (heads, tokens, dim) arrays into one contiguous buffer, or scatter them from it, hashing the buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvstore {

// One array: `shape[i]` elements of `itemsize` bytes, `strides[i]` bytes apart (any sign), along each of three axes.
struct Strided {
    uint8_t* data;
    ptrdiff_t shape[3];
    ptrdiff_t strides[3];
    size_t itemsize;

    size_t nbytes() const { return size_t(shape[0]) * size_t(shape[1]) * size_t(shape[2]) * itemsize; }
};

// Write the arrays' elements in C order, one array after another, to `target`; XXH3-64 of the `nbytes` written.
// `nbytes` is the sum of the arrays' sizes.
uint64_t gather_xxh3(uint8_t* target, size_t nbytes, const std::vector<Strided>& arrays);

// Fill the arrays in the same order from `source`; XXH3-64 of the `nbytes` at `source`.
uint64_t scatter_xxh3(const std::vector<Strided>& arrays, const uint8_t* source, size_t nbytes);

}  // namespace kvstore
