// The inner loops over exponents, one set per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore::exponents {

struct Loops {
    // tops[i] = codes_to_tops[code i], code i being a nibble of `codes`, low nibble first.
    void (*expand)(uint8_t* tops, const uint8_t* codes, size_t count, const uint8_t* codes_to_tops);
    // The reverse, for an even count or the end of a block; a top without a code (tops_to_codes[top] = 16) gets code 0.
    // Answers whether there was one.
    bool (*contract)(uint8_t* codes, const uint8_t* tops, size_t count, const uint8_t* tops_to_codes);
    // Elements from their planes, `stride` bytes apart, top plane given apart; indexed by itemsize.
    void (*merge[5])(uint8_t* elements, const uint8_t* planes, size_t stride, const uint8_t* tops, size_t count);
    void (*split[5])(uint8_t* planes, size_t stride, uint8_t* tops, const uint8_t* elements, size_t count);
};

// The set in use.
const Loops& loops();

}  // namespace kvstore::exponents
