// Block format 2: the sixteen commonest tops of a head as four-bit codes, the others as a list.
#include <cstring>

#include "exponents_blocks.h"

namespace kvstore::exponents {

namespace {

uint32_t load32(const uint8_t* from) { return uint32_t(from[0]) | uint32_t(from[1]) << 8 | uint32_t(from[2]) << 16 | uint32_t(from[3]) << 24; }

void store32(uint8_t* to, uint32_t value) {
    for (unsigned i = 0; i < 4; ++i) to[i] = uint8_t(value >> 8 * i);
}

// The parts of a coded block: codes to tops, count of escapes, low planes, codes, positions of escapes, tops of escapes.
struct Parts {
    size_t planes, codes, escapes;

    explicit Parts(const Block& block)
        : planes(kFixedHeadBytes), codes(planes + block.elements() * (block.itemsize - 1)), escapes(codes + (block.elements() + 1) / 2) {}
};

constexpr size_t kSampledTokens = 32;  // of more tokens, at least so many are counted
constexpr size_t kSearched = 256;      // elements that are searched one by one if there is an escape among them; even

// The sixteen commonest tops of the sampled tokens, the smaller one first where two are as common; ascending; 0 where there
// are fewer.
void choose(const Block& block, const uint8_t* tops, uint8_t* codes_to_tops, uint8_t* tops_to_codes) {
    uint32_t counts[4][kTops] = {};
    const size_t every = std::max<size_t>(1, block.tokens / kSampledTokens);
    for (size_t token = 0; token < block.tokens; token += every) {
        const uint8_t* row = tops + token * block.dim;
        size_t i = 0;
        for (; i + 4 <= block.dim; i += 4) {
            for (size_t lane = 0; lane < 4; ++lane) ++counts[lane][row[i + lane]];
        }
        for (; i < block.dim; ++i) ++counts[0][row[i]];
    }
    uint64_t ranks[kTops];
    for (size_t top = 0; top < kTops; ++top) {
        const uint64_t total = uint64_t(counts[0][top]) + counts[1][top] + counts[2][top] + counts[3][top];
        ranks[top] = total << 8 | (kTops - 1 - top);
    }
    std::nth_element(ranks, ranks + kCodes - 1, ranks + kTops, [](uint64_t a, uint64_t b) { return a > b; });
    size_t used = 0;
    for (size_t rank = 0; rank < kCodes; ++rank) {
        if (ranks[rank] >> 8) codes_to_tops[used++] = uint8_t(kTops - 1 - (ranks[rank] & 255));
    }
    std::sort(codes_to_tops, codes_to_tops + used);
    std::fill(codes_to_tops + used, codes_to_tops + kCodes, uint8_t{0});
    std::memset(tops_to_codes, kCodes, kTops);
    for (size_t code = used; code-- > 0;) tops_to_codes[codes_to_tops[code]] = uint8_t(code);
}

void copy_out(const Block& block, uint8_t* target) {
    block.for_each_run(0, block.elements(), [&](const uint8_t* at, size_t start, size_t length) {
        std::memcpy(target + start * block.itemsize, at, length * block.itemsize);
    });
}

void copy_in(const Block& block, const uint8_t* source) {
    block.for_each_run(0, block.elements(), [&](uint8_t* at, size_t start, size_t length) {
        std::memcpy(at, source + start * block.itemsize, length * block.itemsize);
    });
}

// Write the block to `target`, which has room for it as it is; answers the bytes. `tops` has room for one byte an element.
size_t encode_block(const Block& block, uint8_t* target, uint8_t* tops) {
    const size_t n = block.elements(), room = block.nbytes();
    const Parts parts(block);
    if (!n) return 0;
    if (parts.escapes >= room) return copy_out(block, target), room;
    for (size_t at = 0; at < n; at += kPiece) split_piece(block, at, std::min(kPiece, n - at), target + parts.planes + at, n, tops + at);
    uint8_t tops_to_codes[kTops];
    choose(block, tops, target, tops_to_codes);
    const size_t escapes_max = (room - 1 - parts.escapes) / kEscapeBytes;
    std::vector<uint32_t> positions;
    for (size_t at = 0; at < n; at += kSearched) {
        const size_t count = std::min(kSearched, n - at);
        if (!loops().contract(target + parts.codes + at / 2, tops + at, count, tops_to_codes)) continue;
        for (size_t i = at; i < at + count; ++i) {
            if (tops_to_codes[tops[i]] == kCodes) positions.push_back(uint32_t(i));
        }
        if (positions.size() > escapes_max) return copy_out(block, target), room;
    }
    store32(target + kCodes, uint32_t(positions.size()));
    uint8_t* list = target + parts.escapes;
    for (size_t i = 0; i < positions.size(); ++i) {
        store32(list + 4 * i, positions[i]);
        list[4 * positions.size() + i] = tops[positions[i]];
    }
    return parts.escapes + positions.size() * kEscapeBytes;
}

// Fill the block from `nbytes` bytes; answers nullptr or what is wrong.
const char* decode_block(const Block& block, const uint8_t* source, size_t nbytes) {
    const size_t n = block.elements();
    if (nbytes == block.nbytes()) return copy_in(block, source), nullptr;
    const Parts parts(block);
    if (nbytes > block.nbytes() || nbytes < parts.escapes) return "a block has a length that cannot be";
    const size_t escapes = load32(source + kCodes);
    if (escapes > n || nbytes != parts.escapes + escapes * kEscapeBytes) return "a block does not have its number of escapes";
    const uint8_t* positions = source + parts.escapes;
    const uint8_t* values = positions + 4 * escapes;
    alignas(64) uint8_t tops[kPiece];
    size_t escape = 0, next = 0;
    for (size_t at = 0; at < n; at += kPiece) {
        const size_t count = std::min(kPiece, n - at);
        loops().expand(tops, source + parts.codes + at / 2, count, source);
        for (; escape < escapes; ++escape) {
            const size_t position = load32(positions + 4 * escape);
            if (position >= at + count) break;
            if (position < next) return "positions of escapes do not ascend";
            tops[position - at] = values[escape];
            next = position + 1;
        }
        merge_piece(block, at, count, source + parts.planes + at, n, tops);
    }
    return escape == escapes ? nullptr : "an escape is behind the end of its block";
}

}  // namespace

size_t directory_bytes(const std::vector<Strided>& arrays) {
    size_t blocks = 0;
    for (const Strided& array : arrays) blocks += size_t(array.shape[0]);
    return 4 * blocks;
}

size_t encode_fixed(uint8_t* target, const std::vector<Strided>& arrays) {
    size_t end = directory_bytes(arrays), entry = 0, elements_max = 0;
    for (const Strided& array : arrays) elements_max = std::max(elements_max, size_t(array.shape[1]) * size_t(array.shape[2]));
    std::vector<uint8_t> tops(elements_max);
    for (const Strided& array : arrays) {
        for (ptrdiff_t head = 0; head < array.shape[0]; ++head) {
            const size_t nbytes = encode_block(block_of(array, head), target + end, tops.data());
            store32(target + 4 * entry++, uint32_t(nbytes));
            end += nbytes;
        }
    }
    return end;
}

const char* decode_fixed(const std::vector<Strided>& arrays, const uint8_t* source, size_t nbytes) {
    size_t end = directory_bytes(arrays), entry = 0;
    if (nbytes < end) return "shorter than its directory";
    for (const Strided& array : arrays) {
        for (ptrdiff_t head = 0; head < array.shape[0]; ++head) {
            const size_t length = load32(source + 4 * entry++);
            if (length > nbytes - end) return "a block ends behind the segment";
            if (const char* wrong = decode_block(block_of(array, head), source + end, length)) return wrong;
            end += length;
        }
    }
    return end == nbytes ? nullptr : "bytes behind the last block";
}

}  // namespace kvstore::exponents
