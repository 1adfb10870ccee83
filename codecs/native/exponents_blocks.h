// The elements of one head of a strided array, in runs that lie without gaps.
#pragma once

#include <algorithm>
#include <cstring>

#include "exponents.h"
#include "exponents_loops.h"

namespace kvstore::exponents {

constexpr size_t kPiece = 2048;  // elements whose tops and planes stay in the first-level cache; even

// One head of an array: tokens x dim elements.
struct Block {
    uint8_t* data;
    size_t tokens, dim;
    ptrdiff_t token_stride, dim_stride;
    size_t itemsize;

    size_t elements() const { return tokens * dim; }
    size_t nbytes() const { return elements() * itemsize; }
    bool rows_contiguous() const { return dim_stride == ptrdiff_t(itemsize) || dim == 1; }
    bool contiguous() const { return rows_contiguous() && (tokens == 1 || token_stride == ptrdiff_t(dim * itemsize)); }

    // Call run(pointer, first, count) for runs without gaps that together are the elements [first, first + count).
    template <typename Run>
    void for_each_run(size_t first, size_t count, const Run& run) const {
        if (!count) return;
        if (contiguous()) return run(data + first * itemsize, first, count);
        size_t token = first / dim, channel = first % dim;
        while (count) {
            uint8_t* at = data + ptrdiff_t(token) * token_stride + ptrdiff_t(channel) * dim_stride;
            const size_t length = rows_contiguous() ? std::min(count, dim - channel) : 1;
            run(at, first, length);
            first += length;
            count -= length;
            channel += length;
            if (channel == dim) channel = 0, ++token;
        }
    }
};

inline Block block_of(const Strided& array, ptrdiff_t head) {
    return {array.data + head * array.strides[0], size_t(array.shape[1]), size_t(array.shape[2]), array.strides[1], array.strides[2], array.itemsize};
}

// Split the elements [first, first + count) of a block; count is at most kPiece.
inline void split_piece(const Block& block, size_t first, size_t count, uint8_t* planes, size_t stride, uint8_t* tops) {
    alignas(64) uint8_t gathered[kPiece * 4];
    if (block.rows_contiguous()) {
        return block.for_each_run(first, count, [&](const uint8_t* at, size_t start, size_t length) {
            loops().split[block.itemsize](planes + (start - first), stride, tops + (start - first), at, length);
        });
    }
    block.for_each_run(first, count, [&](const uint8_t* at, size_t start, size_t) {
        std::memcpy(gathered + (start - first) * block.itemsize, at, block.itemsize);
    });
    loops().split[block.itemsize](planes, stride, tops, gathered, count);
}

// Undo split_piece.
inline void merge_piece(const Block& block, size_t first, size_t count, const uint8_t* planes, size_t stride, const uint8_t* tops) {
    alignas(64) uint8_t merged[kPiece * 4];
    if (block.rows_contiguous()) {
        return block.for_each_run(first, count, [&](uint8_t* at, size_t start, size_t length) {
            loops().merge[block.itemsize](at, planes + (start - first), stride, tops + (start - first), length);
        });
    }
    loops().merge[block.itemsize](merged, planes, stride, tops, count);
    block.for_each_run(first, count, [&](uint8_t* at, size_t start, size_t) {
        std::memcpy(at, merged + (start - first) * block.itemsize, block.itemsize);
    });
}

}  // namespace kvstore::exponents
