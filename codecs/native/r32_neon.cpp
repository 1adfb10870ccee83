// R32 steps for NEON, which every 64-bit Arm processor has: 8 lanes in two registers.
#if defined(__aarch64__)
#include <array>
#include <cstddef>
#include <cstdint>

#include <arm_neon.h>

#include "r32_kernels.h"

namespace kvstore::r32 {

namespace {

using ByMask = std::array<std::array<uint8_t, 16>, 256>;

// Expanding 8 words: lane i, if its bit is set, takes word number (set bits below i), else 0.
constexpr ByMask make_expand() {
    ByMask out{};
    for (unsigned mask = 0; mask < 256; ++mask) {
        uint8_t next = 0;
        for (unsigned lane = 0; lane < 8; ++lane) {
            const bool set = mask >> lane & 1;
            out[mask][2 * lane] = set ? next++ : 0xFF;
            out[mask][2 * lane + 1] = set ? next++ : 0xFF;
        }
    }
    return out;
}

// Compressing 8 words to the upper end: the last places take the lanes whose bits are set, in order.
constexpr ByMask make_compress() {
    ByMask out{};
    for (unsigned mask = 0; mask < 256; ++mask) {
        unsigned place = 8;
        for (unsigned lane = 8; lane-- > 0;) {
            if (!(mask >> lane & 1)) continue;
            --place;
            out[mask][2 * place] = uint8_t(2 * lane);
            out[mask][2 * place + 1] = uint8_t(2 * lane + 1);
        }
    }
    return out;
}

alignas(64) constexpr ByMask kExpand = make_expand();
alignas(64) constexpr ByMask kCompress = make_compress();
constexpr size_t kWidth = 8;

struct Lanes {
    uint32x4_t low, high;
};

inline Lanes load(const uint32_t* from) { return {vld1q_u32(from), vld1q_u32(from + 4)}; }

inline void store(uint32_t* to, Lanes lanes) {
    vst1q_u32(to, lanes.low);
    vst1q_u32(to + 4, lanes.high);
}

// The low 16 bits of 8 lanes.
inline uint16x8_t low_words(Lanes lanes) { return vuzp1q_u16(vreinterpretq_u16_u32(lanes.low), vreinterpretq_u16_u32(lanes.high)); }

inline Lanes widened(uint16x8_t words) { return {vmovl_u16(vget_low_u16(words)), vmovl_high_u16(words)}; }

// Which lanes are set, a bit each, and twice their number: of lanes that are all ones or zeros.
struct Chosen {
    unsigned mask, bytes;

    explicit Chosen(Lanes set) {
        // One sum has both: a bit a lane below, and two a lane from bit 8 on.
        alignas(16) static constexpr uint16_t kWeights[8] = {0x201, 0x202, 0x204, 0x208, 0x210, 0x220, 0x240, 0x280};
        const unsigned sum = vaddvq_u16(vandq_u16(low_words(set), vld1q_u16(kWeights)));
        mask = sum & 0xFF;
        bytes = sum >> 8;
    }
};

// Indices reach the loads below through memory, which takes fewer instructions than out of a register; the compiler thinks
// otherwise.
template <typename Indices>
inline void keep_in_memory(Indices& indices) {
    __asm__ volatile("" : "+m"(indices));
}

// Four entries, by pairs, so that no load into a lane waits for three others.
inline uint32x4_t look_up_four(const uint32_t* tables, const uint32_t* index) {
    const uint32x2_t low = vld1_lane_u32(tables + index[1], vld1_dup_u32(tables + index[0]), 1);
    const uint32x2_t high = vld1_lane_u32(tables + index[3], vld1_dup_u32(tables + index[2]), 1);
    return vcombine_u32(low, high);
}

// What a step needs to know of 8 symbols; `offset` is where the slot is among those of its symbol.
struct Entries {
    Lanes frequency, offset;
    uint8x8_t symbol;
};

inline Entries look_up(const uint32_t* tables, Lanes slots, const uint32_t* row) {
    const uint32x4_t slot_mask = vdupq_n_u32(kSlots - 1), one = vdupq_n_u32(1);
    const Lanes bases = load(row);
    alignas(32) uint32_t index[kWidth];
    store(index, {vorrq_u32(slots.low, bases.low), vorrq_u32(slots.high, bases.high)});
    keep_in_memory(index);
    const Lanes entry{look_up_four(tables, index), look_up_four(tables, index + 4)};
    return {{vaddq_u32(vandq_u32(vshrq_n_u32(entry.low, 8), slot_mask), one), vaddq_u32(vandq_u32(vshrq_n_u32(entry.high, 8), slot_mask), one)},
            {vshrq_n_u32(entry.low, 20), vshrq_n_u32(entry.high, 20)},
            vmovn_u16(low_words(entry))};
}

// Of pairs of neighbours, until there is one of each of 8 registers.
template <typename Pairwise>
inline uint16x8_t reduce(const uint16x8_t (&lanes)[kWidth], Pairwise pairwise) {
    return pairwise(pairwise(pairwise(lanes[0], lanes[1]), pairwise(lanes[2], lanes[3])), pairwise(pairwise(lanes[4], lanes[5]), pairwise(lanes[6], lanes[7])));
}

// Digits are found by comparison, so that nothing is loaded from where a state says. For each cut between symbols, slot - cut counts
// up from it, and is large (it wraps) before it: the least of them is the slot's place in its symbol, the largest says how far the
// next symbol is.
inline Entries look_up(const DigitTables* tables, Lanes slots, const uint32_t* row) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(tables->rows);
    const uint16x8_t slot = low_words(slots), before = vsubq_u16(slot, vdupq_n_u16(1)), end = vdupq_n_u16(kSlots);
    uint16x8_t distance[kWidth], behind[kWidth];
#pragma GCC unroll 8
    for (size_t i = 0; i < kWidth; ++i) {
        const int16x8_t below = vld1q_s16(reinterpret_cast<const int16_t*>(bytes + (row[i] >> 16) + offsetof(DigitTable, below)));
        distance[i] = vsubq_u16(vdupq_n_u16(before[i]), vreinterpretq_u16_s16(below));  // a cut is one more
        behind[i] = vcltq_u16(distance[i], end);
    }
    const uint16x8_t least = vminq_u16(slot, reduce(distance, [](uint16x8_t a, uint16x8_t b) { return vpminq_u16(a, b); }));
    const uint16x8_t largest = vmaxq_u16(vsubq_u16(slot, end), reduce(distance, [](uint16x8_t a, uint16x8_t b) { return vpmaxq_u16(a, b); }));
    const uint16x8_t symbol = vsubq_u16(vdupq_n_u16(0), reduce(behind, [](uint16x8_t a, uint16x8_t b) { return vpaddq_u16(a, b); }));
    return {widened(vsubq_u16(least, largest)), widened(least), vmovn_u16(symbol)};
}

template <size_t vectors, size_t count, typename Table>
void decode(DecodeTile* const* tiles, const Table* tables) {
    const uint32x4_t slot_mask = vdupq_n_u32(kSlots - 1), state_min = vdupq_n_u32(kStateMin);
    Lanes state[count][vectors];
    const uint8_t *words[count], *limit[count];
    uint8_t* symbols[count];
    const uint32_t* row[count];
    size_t steps = tiles[0]->steps;
    for (size_t t = 0; t < count; ++t) {
        for (size_t v = 0; v < vectors; ++v) state[t][v] = load(tiles[t]->state + kWidth * v);
        words[t] = tiles[t]->words;
        limit[t] = tiles[t]->limit;
        symbols[t] = tiles[t]->symbols;
        row[t] = tiles[t]->row;
        if (tiles[t]->steps < steps) steps = tiles[t]->steps;
    }
    const size_t steps_start = steps;
    bool enough;
    do {
        enough = true;
#pragma GCC unroll 8
        for (size_t t = 0; t < count; ++t) {
#pragma GCC unroll 4
            for (size_t v = 0; v < vectors; ++v) {
                const Lanes before = state[t][v];
                const Entries entry = look_up(tables, {vandq_u32(before.low, slot_mask), vandq_u32(before.high, slot_mask)}, row[t] + kWidth * v);
                const Lanes next{vmlaq_u32(entry.offset.low, entry.frequency.low, vshrq_n_u32(before.low, kSlotBits)),
                                 vmlaq_u32(entry.offset.high, entry.frequency.high, vshrq_n_u32(before.high, kSlotBits))};
                const Lanes low{vcltq_u32(next.low, state_min), vcltq_u32(next.high, state_min)};
                const Chosen taking(low);
                const Lanes word = widened(vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(words[t]), vld1q_u8(kExpand[taking.mask].data()))));
                words[t] += taking.bytes;
                state[t][v] = {vbslq_u32(low.low, vsliq_n_u32(word.low, next.low, 16), next.low),
                               vbslq_u32(low.high, vsliq_n_u32(word.high, next.high, 16), next.high)};
                vst1_u8(symbols[t] + kWidth * v, entry.symbol);
            }
            row[t] += kWidth * vectors;
            if (row[t] == tiles[t]->rows_end) row[t] = tiles[t]->rows;
            symbols[t] += kWidth * vectors;
            enough &= words[t] <= limit[t];
        }
    } while (--steps > 0 && enough);
    for (size_t t = 0; t < count; ++t) {
        for (size_t v = 0; v < vectors; ++v) store(tiles[t]->state + kWidth * v, state[t][v]);
        tiles[t]->words = words[t];
        tiles[t]->symbols = symbols[t];
        tiles[t]->row = row[t];
        tiles[t]->steps -= steps_start - steps;
    }
}

// The high halves of products.
inline uint32x4_t multiply_high(uint32x4_t a, uint32x4_t b) {
    const uint64x2_t low = vmull_u32(vget_low_u32(a), vget_low_u32(b)), high = vmull_high_u32(a, b);
    return vuzp2q_u32(vreinterpretq_u32_u64(low), vreinterpretq_u32_u64(high));
}

// Four lanes being encoded: what their entries say, and which of them have no room.
struct Encoding {
    uint32x4_t reciprocal, fields, full;

    Encoding(const uint64_t* tables, const uint32_t* index, uint32x4_t state) {
        const uint64x2_t first = vcombine_u64(vld1_u64(tables + index[0]), vld1_u64(tables + index[1]));
        const uint64x2_t second = vcombine_u64(vld1_u64(tables + index[2]), vld1_u64(tables + index[3]));
        reciprocal = vuzp1q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
        fields = vuzp2q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
        full = vcgtq_u32(vshrq_n_u32(state, 20), vandq_u32(fields, vdupq_n_u32(kSlots - 1)));
    }

    // The state behind the symbol, where those without room have given their low word.
    uint32x4_t next(uint32x4_t state) const {
        const uint32x4_t shifted = vbslq_u32(full, vshrq_n_u32(state, 16), state);
        const uint32x4_t extra = vandq_u32(vshrq_n_u32(fields, 16), vdupq_n_u32(1));
        const uint32x4_t shift = vandq_u32(vshrq_n_u32(fields, 12), vdupq_n_u32(15));
        const uint32x4_t quotient = vshlq_u32(multiply_high(vaddq_u32(shifted, extra), reciprocal), vnegq_s32(vreinterpretq_s32_u32(shift)));
        return vmlaq_u32(vaddq_u32(shifted, vshrq_n_u32(fields, 20)), quotient, vbicq_u32(vdupq_n_u32(kSlots - 1), fields));
    }
};

template <size_t vectors>
void encode(EncodeTile& tile, const uint64_t* tables) {
    Lanes state[vectors];
    for (size_t v = 0; v < vectors; ++v) state[v] = load(tile.state + kWidth * v);
    uint8_t* words = tile.words;
    const uint32_t* row = tile.row;
    const uint8_t* symbols = tile.symbols + tile.steps * kWidth * vectors;
    uint32x4_t least = vdupq_n_u32(UINT32_MAX);  // of all reciprocals: 0 if a symbol had no entry
    for (; tile.steps > 0; --tile.steps) {
        symbols -= kWidth * vectors;
#pragma GCC unroll 4
        for (size_t v = vectors - 1; v < vectors; --v) {
            alignas(32) uint32_t index[kWidth];
            const Lanes symbol = widened(vmovl_u8(vld1_u8(symbols + kWidth * v))), base = load(row + kWidth * v);
            store(index, {vorrq_u32(symbol.low, base.low), vorrq_u32(symbol.high, base.high)});
            keep_in_memory(index);
            const Encoding low(tables, index, state[v].low), high(tables, index + 4, state[v].high);
            least = vminq_u32(least, vminq_u32(low.reciprocal, high.reciprocal));
            const Chosen giving({low.full, high.full});
            const uint8x16_t emitted = vqtbl1q_u8(vreinterpretq_u8_u16(low_words(state[v])), vld1q_u8(kCompress[giving.mask].data()));
            vst1q_u8(words - sizeof emitted, emitted);  // the rest is overwritten later
            words -= giving.bytes;
            state[v] = {low.next(state[v].low), high.next(state[v].high)};
        }
        row = (row == tile.rows ? tile.rows_end : row) - kWidth * vectors;
    }
    for (size_t v = 0; v < vectors; ++v) store(tile.state + kWidth * v, state[v]);
    tile.words = words;
    tile.row = row;
    tile.missing |= vminvq_u32(least) == 0;
}

}  // namespace

const Kernels kNeon{"neon",
                    {{decode<1, 1>, decode<1, 2>, decode<1, 4>, decode<1, 8>},
                     {decode<2, 1>, decode<2, 2>, decode<2, 4>, nullptr},
                     {decode<4, 1>, decode<4, 2>, nullptr, nullptr}},
                    {{decode<1, 1>, decode<1, 2>, decode<1, 4>, decode<1, 8>},
                     {decode<2, 1>, decode<2, 2>, decode<2, 4>, nullptr},
                     {decode<4, 1>, decode<4, 2>, nullptr, nullptr}},
                    {encode<1>, encode<2>, encode<4>}};

}  // namespace kvstore::r32
#endif
