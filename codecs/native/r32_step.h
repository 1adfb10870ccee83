// One symbol of R32, and the rows of tables that steps are coded with. Internal linkage throughout: files that are compiled
// for different instruction sets include this.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "r32.h"

namespace kvstore::r32 {

// The state behind one decoded symbol, before it takes a word.
static inline uint32_t decode_state(uint32_t state, uint32_t entry) {
    const uint32_t high = state >> kSlotBits;
    return ((entry >> 8) & (kSlots - 1)) * high + high + (entry >> 20);
}

// Encode one symbol; writes a word below `words`, which is kept if the state has no room.
static inline uint32_t encode_state(uint32_t state, uint64_t entry, uint8_t*& words) {
    const uint32_t reciprocal = uint32_t(entry), fields = uint32_t(entry >> 32);
    const uint32_t frequency_less_1 = fields & (kSlots - 1);
    const uint32_t full = state >> 20 > frequency_less_1;  // no branch: it could not be predicted
    const uint16_t word = uint16_t(state);
    std::memcpy(words - sizeof word, &word, sizeof word);
    words -= 2 * full;
    state >>= 16 * full;
    const uint64_t product = uint64_t(state + (fields >> 16 & 1)) * reciprocal;
    const uint32_t quotient = uint32_t(product >> 32) >> (fields >> 12 & 15);
    return state + quotient * (kSlots - 1 - frequency_less_1) + (fields >> 20);
}

// A symbol without a frequency has an entry of zeros.
static inline bool has_entry(uint64_t entry) { return uint32_t(entry) != 0; }

namespace {

// For each step of a period and each lane: the first entry of its table.
class Rows {
  public:
    // Allocates for the longest tile of the batch; nothing is allocated later.
    Rows(const Batch& batch, unsigned entry_bits) : batch_(batch), entry_bits_(entry_bits) {
        size_t steps = 1;
        for (size_t i = 0; i < batch.tiles; ++i) steps = std::max(steps, (size_t{batch.counts[i]} + batch.lanes - 1) / batch.lanes);
        bases_.resize(std::min(batch.period, steps) * batch.lanes);
        if (batch.tiles && batch.id_tiles == 1) fill(0);
    }

    void use(size_t tile) {
        if (batch_.id_tiles != 1) fill(tile);
    }
    const uint32_t* begin() const { return bases_.data(); }
    const uint32_t* end() const { return bases_.data() + bases_.size(); }

  private:
    void fill(size_t tile) {
        const uint16_t* ids = batch_.ids + tile * batch_.period * batch_.id_lanes;
        for (size_t i = 0; i < bases_.size(); ++i) {
            bases_[i] = uint32_t{ids[batch_.id_lanes == 1 ? i / batch_.lanes : i]} << entry_bits_;
        }
    }

    const Batch& batch_;
    unsigned entry_bits_;
    std::vector<uint32_t> bases_;
};

}  // namespace

}  // namespace kvstore::r32
