// Rotated byte planes, and the statistics of tops that choose their tables.
#include <cstring>

#include "exponents_blocks.h"

namespace kvstore::exponents {

void split_rotated(uint8_t* planes, const Strided& array) {
    const size_t total = array.nbytes() / array.itemsize;
    for (ptrdiff_t head = 0; head < array.shape[0]; ++head) {
        const Block block = block_of(array, head);
        const size_t n = block.elements(), start = size_t(head) * n;
        for (size_t at = 0; at < n; at += kPiece) {
            split_piece(block, at, std::min(kPiece, n - at), planes + start + at, total, planes + total * (array.itemsize - 1) + start + at);
        }
    }
}

void merge_rotated(const Strided& array, const uint8_t* planes) {
    const size_t total = array.nbytes() / array.itemsize;
    for (ptrdiff_t head = 0; head < array.shape[0]; ++head) {
        const Block block = block_of(array, head);
        const size_t n = block.elements(), start = size_t(head) * n;
        for (size_t at = 0; at < n; at += kPiece) {
            merge_piece(block, at, std::min(kPiece, n - at), planes + start + at, total, planes + total * (array.itemsize - 1) + start + at);
        }
    }
}

void channel_sums(uint64_t* sums, const uint8_t* tops, size_t heads, size_t tokens, size_t dim) {
    constexpr size_t kChannels = 64, kTokens = 32768;  // sums of squares of so many tokens fit 32 bits
    uint32_t sum[kChannels], square[kChannels];
    std::memset(sums, 0, heads * dim * 2 * sizeof *sums);
    for (size_t head = 0; head < heads; ++head, tops += tokens * dim) {
        for (size_t channel = 0; channel < dim; channel += kChannels) {
            const size_t count = std::min(kChannels, dim - channel);
            for (size_t token = 0; token < tokens;) {
                std::memset(sum, 0, sizeof sum);
                std::memset(square, 0, sizeof square);
                for (const size_t stop = std::min(tokens, token + kTokens); token < stop; ++token) {
                    const uint8_t* row = tops + token * dim + channel;
                    for (size_t i = 0; i < count; ++i) {
                        sum[i] += row[i];
                        square[i] += uint32_t(row[i]) * row[i];
                    }
                }
                uint64_t* out = sums + (head * dim + channel) * 2;
                for (size_t i = 0; i < count; ++i) {
                    out[2 * i] += sum[i];
                    out[2 * i + 1] += square[i];
                }
            }
        }
    }
}

void count_tops(uint64_t* counts, const uint8_t* tops, const uint8_t* ids, size_t heads, size_t tokens, size_t dim, size_t tables) {
    // Two sets, so that equal neighbours do not wait for each other.
    std::vector<uint64_t> other(tables * kTops);
    for (size_t head = 0; head < heads; ++head, ids += dim) {
        for (size_t token = 0; token < tokens; ++token, tops += dim) {
            size_t i = 0;
            for (; i + 2 <= dim; i += 2) {
                ++counts[size_t(ids[i]) * kTops + tops[i]];
                ++other[size_t(ids[i + 1]) * kTops + tops[i + 1]];
            }
            if (i < dim) ++counts[size_t(ids[i]) * kTops + tops[i]];
        }
    }
    for (size_t i = 0; i < other.size(); ++i) counts[i] += other[i];
}

}  // namespace kvstore::exponents
