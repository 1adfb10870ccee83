// Reading the values of a group's blocks; see ladder_decode.cpp.
#pragma once

#include <algorithm>
#include <vector>

#include "ladder.h"
#include "ladder_loops.h"
#include "ladder_plan.h"
#include "r32.h"

namespace kvstore::ladder {

// A value apart from its tile.
struct Patch {
    uint32_t block;
    uint32_t component;
    uint32_t token;
    int16_t value;
};

// Consecutive patches.
struct Patches {
    const Patch* first;
    const Patch* last;
    const Patch* begin() const { return first; }
    const Patch* end() const { return last; }
};

// One level of a group: where each block's patches, packed digits and tile are.
class Level {
  public:
    explicit Level(LevelPlans own) : plans(std::move(own)) {}

    // Answers nullptr, or what is wrong with the bytes.
    const char* open(const Blocks& group, size_t level, Bytes bytes);

    Bytes stream(size_t block) const { return {stream_ + starts_[block], starts_[block + 1] - starts_[block]}; }
    Bytes packed(size_t block) const { return {packed_ + packed_starts_[block], packed_starts_[block + 1] - packed_starts_[block]}; }
    Patches patches(size_t block) const {
        const auto before = [](const Patch& one, size_t number) { return one.block < number; };
        const Patch *begin = patches_.data(), *end = begin + patches_.size();
        const Patch* first = std::lower_bound(begin, end, block, before);
        return {first, std::lower_bound(first, end, block + 1, before)};
    }

    const LevelPlans plans;

  private:
    const char* read_patches(const Blocks& group, size_t level, Bytes& bytes);

    std::vector<Patch> patches_;  // by block, else as they came
    std::vector<size_t> starts_, packed_starts_;
    const uint8_t* packed_ = nullptr;
    const uint8_t* stream_ = nullptr;
};

// Decodes blocks, `together` at a time, into memory of its own.
class GroupReader {
  public:
    GroupReader(const Blocks& group, const Source& source);

    // Take the levels apart; to be called once. Answers nullptr, or what is wrong with them.
    const char* open();

    // Decode blocks first .. first + count - 1, count at most `together`. Answers nullptr, or what is wrong.
    const char* read(size_t first, size_t count);

    // Values (tokens, width) of the i-th block that was read last.
    int16_t* values(size_t i) { return values_.data() + i * block_values_; }
    const int16_t* values(size_t i) const { return values_.data() + i * block_values_; }

    // What dequantising takes from every component's values, and their unit.
    std::vector<float> centroids(size_t block) const;
    float unit() const {
        constexpr float units[kLevels] = {1.0f, float(1.0 / 3), float(1.0 / 9), float(1.0 / 27)};
        return units[levels_.size() - 1];
    }

    // Components of a block, the i-th read last, that may not be 0: those coded, or all where an absent one has a patch.
    uint32_t present(size_t block, size_t i) const;

    const int8_t* classes_of(size_t block) const { return group_.classes + class_starts_[block]; }
    size_t first_column(size_t block) const { return class_starts_[block]; }

    size_t together;

  private:
    // Bases of a block's tile from its values at the level below; answers how many symbols have digit tables.
    size_t prepare_bases(size_t block, size_t level, uint32_t* bases, const int16_t* values);
    void take_level(size_t block, size_t level, const uint8_t* symbols, int16_t* values);
    void unpack_digits(Bytes packed);

    const Blocks& group_;
    const Source& source_;
    const Loops& loops_ = loops();
    r32::DigitTables digit_tables_{};
    bool digits_fit_ = true;
    std::vector<Level> levels_;
    std::vector<size_t> class_starts_;
    size_t block_values_, block_symbols_ = 0;
    std::vector<int16_t> values_, zeros_, spare_;
    std::vector<uint16_t> rows_;
    std::vector<uint8_t> symbols_;
    std::vector<uint32_t> bases_;
    std::vector<int8_t> digits_;
};

}  // namespace kvstore::ladder
