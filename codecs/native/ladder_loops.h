// The inner loops of the ladder, one set per instruction set. A row is what one token has of consecutive components.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ladder.h"

namespace kvstore::ladder {

// What each channel of a block is made with.
struct ChannelScales {
    const uint16_t* sources;  // its component
    const float* centroids;
    const float* gains;
    const float* centres;
};

struct Loops {
    // bases[i] = (rows[i] + contexts of one[i] and other[i]) << bits: tables of the digits of two tokens behind these values.
    void (*pair_bases)(uint32_t* bases, const uint16_t* rows, const int16_t* one, const int16_t* other, size_t count, unsigned bits);
    // one = 3 one + first digit, other = 3 other + second digit, digits mirrored where the value is negative.
    void (*refine)(int16_t* one, int16_t* other, const uint8_t* symbols, size_t count);
    // values = 3 values + digits.
    void (*refine_packed)(int16_t* values, const int8_t* digits, size_t count);
    // values = 3 values.
    void (*triple)(int16_t* values, size_t count);
    // The values of each of an alphabet's tokens; rows[i] null is behind the last token. By index in kAlphabet.
    void (*first[3])(int16_t* const* rows, const uint8_t* symbols, size_t count);
    // numbers = (values - sign * centroids) * unit * step, each operation rounded.
    void (*dequantise)(float* numbers, const int16_t* values, const float* centroids, size_t count, float unit, float step);
    // The same of values[sources[i]], times gains, plus centres; the others by i. Sources are below count.
    void (*channels)(float* channels, const int16_t* values, const ChannelScales& scales, size_t count, float unit, float step);
    // channels = channels + means.
    void (*add)(float* channels, const float* means, size_t count);
    // first, second = first cosine - second sine, second cosine + first sine.
    void (*rotate)(float* first, float* second, const float* cosine, const float* sine, size_t count);
    // Elements of a format, by Format.
    void (*convert[5])(uint8_t* elements, const float* channels, size_t count);

    // values = 27 numbers, rounded; answers whether all are at most kValueMax in size.
    bool (*quantise)(int16_t* values, const float* numbers, size_t count);
    // coarse = fine / 3 rounded.
    void (*coarsen)(int16_t* coarse, const int16_t* fine, size_t count);
    // symbols of two tokens' digits, mirrored where the value above is negative; null `other`: behind the last token.
    void (*pair_symbols)(uint8_t* symbols, const int16_t* one, const int16_t* one_above, const int16_t* other, const int16_t* other_above, size_t count);
    // Packed digits, 0 to 2.
    void (*digits)(uint8_t* digits, const int16_t* values, const int16_t* above, size_t count);
    // Symbols of an alphabet's tokens, what is beyond it as 0; answers whether anything was. Null rows are behind the last token.
    bool (*first_symbols[3])(uint8_t* symbols, const int16_t* const* rows, size_t count);
};

// The set in use.
const Loops& loops();

}  // namespace kvstore::ladder
