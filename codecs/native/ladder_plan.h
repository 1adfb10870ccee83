// What a block has at a level, from its components' classes alone: LevelPlan of codecs/ladder_level.py.
#pragma once

#include <algorithm>
#include <vector>

#include "ladder.h"

namespace kvstore::ladder {

// First values -limit..limit, `count` of consecutive tokens to a symbol.
struct Alphabet {
    int lowest_class;
    unsigned limit;
    unsigned count;

    constexpr unsigned radix() const { return 2 * limit + 1; }
    constexpr unsigned zero_symbol() const {
        unsigned out = 0;
        for (unsigned place = 0, scale = 1; place < count; ++place, scale *= radix()) out += limit * scale;
        return out;
    }
};

constexpr size_t kAlphabets = 3;
constexpr Alphabet kAlphabet[kAlphabets] = {{12, 127, 1}, {4, 7, 2}, {0, 2, 3}};  // by falling class

// symbol / radix by a product that fits 16 bits, so that as many symbols as possible fit a register.
template <unsigned radix>
struct Quotient {
    static constexpr unsigned shift = radix == 255 ? 15 : radix == 15 ? 11 : radix == 5 ? 10 : 9;
    static constexpr uint16_t reciprocal = ((1u << shift) + radix - 1) / radix;

    static constexpr bool exact() {
        for (unsigned symbol = 0; symbol < 256; ++symbol) {
            if (symbol * reciprocal > 65535 || symbol * reciprocal >> shift != symbol / radix) return false;
        }
        return true;
    }
};
static_assert(Quotient<3>::exact() && Quotient<5>::exact() && Quotient<15>::exact() && Quotient<255>::exact());

// Packed digits of one byte.
constexpr size_t kTrits = 5;

// Components of a block, by what they have: packed | refined by tables | first values by alphabet | absent.
struct LevelPlan {
    uint32_t packed;
    uint32_t refined;
    uint32_t first_end[kAlphabets];

    uint32_t coded() const { return first_end[kAlphabets - 1]; }
    uint32_t first_start(size_t alphabet) const { return alphabet ? first_end[alphabet - 1] : refined; }
    size_t packed_bytes(size_t tokens) const { return (tokens * packed + kTrits - 1) / kTrits; }
    size_t symbols(size_t tokens) const {
        size_t out = (tokens + 1) / 2 * (refined - packed);
        for (size_t i = 0; i < kAlphabets; ++i) out += (tokens + kAlphabet[i].count - 1) / kAlphabet[i].count * (first_end[i] - first_start(i));
        return out;
    }
};

inline LevelPlan plan_of(const int8_t* classes, uint32_t width, size_t level) {
    const int raised = kPitch * int(level);
    const auto at_least = [&](int scale) {
        return uint32_t(std::partition_point(classes, classes + width, [&](int own) { return own + raised >= scale; }) - classes);
    };
    LevelPlan out{};
    out.refined = level ? at_least(kPitch) : 0;
    out.packed = std::min(out.refined, at_least(kPackedMin));
    const uint32_t coded = at_least(0);
    for (size_t i = 0; i < kAlphabets; ++i) out.first_end[i] = std::min(coded, std::max(out.refined, at_least(kAlphabet[i].lowest_class)));
    return out;
}

// The bank's row of context (0, 0) for digits of components of that class.
inline uint32_t refine_row(int scale) { return uint32_t(kFirstRows) + uint32_t(scale - kPitch) / 2 * kContexts * kContexts; }

// Every block's plan at one level, and the lanes of its tiles.
struct LevelPlans {
    std::vector<LevelPlan> blocks;
    unsigned lanes = 8;

    LevelPlans(const Blocks& group, size_t level) : blocks(group.count) {
        size_t symbols = 0;
        const int8_t* classes = group.classes;
        for (size_t i = 0; i < group.count; ++i) {
            blocks[i] = plan_of(classes, group.widths[i], level);
            symbols += blocks[i].symbols(group.tokens);
            classes += group.widths[i];
        }
        constexpr size_t lane_symbols_min = 1024;
        const size_t average = symbols / std::max<size_t>(1, group.count);
        for (const unsigned more : {16u, 32u}) {
            if (more * lane_symbols_min <= average) lanes = more;
        }
    }
};

}  // namespace kvstore::ladder
