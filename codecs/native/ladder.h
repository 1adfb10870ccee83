// The codec `ladder` between integers and bytes, and from integers to elements: the loops of codecs/ladder_level.py,
// ladder_segment.py and, where components are channels, of decoding altogether. docs/format.md has the bytes.
//
// Results equal those of the NumPy code bit for bit: numbers are fp32, each operation rounds, and none are contracted.
// Nothing here trusts the bytes it decodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pieces.h"

namespace kvstore::ladder {

constexpr size_t kLevels = 4;
constexpr int kPitch = 8;
constexpr int kClassMin = -kPitch * int(kLevels);
constexpr int kClassMax = 38;
constexpr int kPackedMin = 28;
constexpr unsigned kContexts = 3;
constexpr int kValueMax = 32767 / 27 * 27;
constexpr size_t kFirstRows = kClassMax + 1;
constexpr size_t kTables = kFirstRows + size_t(kPackedMin - kPitch) / 2 * kContexts * kContexts;
constexpr size_t kCentroids = kClassMax + 1 + kPitch * (kLevels - 1);

// The blocks of a layer group. `classes` has those of every block's components at level 0, one block behind the other, each
// descending and within kClassMin..kClassMax; `widths` how many components each has. A block has tokens * widths[i] values.
struct Blocks {
    size_t tokens;
    size_t count;
    const int8_t* classes;
    const uint32_t* widths;
};

struct Bytes {
    const uint8_t* data;
    size_t size;
};

// The levels of a group from the lowest, each from its patches on, and how to read them.
struct Source {
    std::vector<Bytes> levels;    // 1 to kLevels
    const uint32_t* tables;       // R32 decoder entries, kTables * 4096
    const float* centroids;       // kCentroids
};

enum class Format { kFloat32, kBfloat16, kFloat16, kFloat8E4M3, kFloat8E5M2 };

// Rotates channels i and i + half of every token; (tokens, half).
struct Rotation {
    const float* cosine;
    const float* sine;
    size_t half;
};

// (heads, tokens, dim) elements to be written.
struct Target {
    Strided array;
    Format format;
    const Rotation* rotation;  // null: none
};

// How components become channels where they are channels: channel places[i] = component i * steps[block] * gain + centre.
// `places`, `gains` and `centres` have as many items as all blocks have components; the latter two are in channel order.
struct Scales {
    const float* steps;
    const uint32_t* places;
    const float* gains;
    const float* centres;
};

// Decode blocks that are heads: block i is head i % heads of targets[i / heads]. Answers nullptr, or what is wrong with the
// bytes; the targets are then unspecified. Throws std::bad_alloc.
const char* decode_heads(const Blocks& blocks, const Source& source, const Scales& scales, const std::vector<Target>& targets);

// Decode blocks to components times steps[block]: numbers has tokens * widths[i] for each block, one behind the other, of which
// the first present[i] of every token are written, for the others are 0. Otherwise as decode_heads.
const char* decode_components(const Blocks& blocks, const Source& source, const float* steps, float* numbers, uint32_t* present);

// Write fp32 channels plus their means: channels[i] (heads, tokens, dim) of any strides but the last, means[i] (heads, dim).
void write_channels(const std::vector<Target>& targets, const std::vector<Strided>& channels, const std::vector<const float*>& means);

// Values at the finest level of a block's numbers (tokens, width) in base steps: component i is numbers[sources[i]] of its token, and
// tokens with a mark are 0. False if one is not finite or too large.
bool quantise(int16_t* finest, const float* numbers, const uint32_t* sources, const uint8_t* marks, size_t tokens, size_t width);

// Write the levels of blocks, each from its patches on, from their values at the finest level. `tables` are R32 encoder entries,
// kTables * 256, which can code all digits and zeros of every class. Throws std::bad_alloc.
void encode(const Blocks& blocks, const int16_t* finest, const uint64_t* tables, std::vector<uint8_t> (&levels)[kLevels]);

// Use another instruction set ("avx512", "avx2" or "scalar"); false if the processor lacks it.
bool use_isa(const char* name);

}  // namespace kvstore::ladder
