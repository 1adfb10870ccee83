// From the values of a group's blocks at the finest level to the bytes of all its levels.
#include <algorithm>
#include <array>
#include <cstdlib>

#include "ladder_loops.h"
#include "ladder_plan.h"
#include "r32.h"

namespace kvstore::ladder {

namespace {

constexpr int kAbsentErrorMax = 2;
constexpr uint8_t kTritScales[kTrits] = {1, 3, 9, 27, 81};

// A segment's parts from its patches on, as far as they are written.
struct Parts {
    std::vector<uint8_t> columns, tokens, values, lengths, packed, stream;

    std::vector<uint8_t> join() const {
        std::vector<uint8_t> out;
        append(out, uint32_t(columns.size() / sizeof(uint32_t)));
        for (const auto* part : {&columns, &tokens, &values, &lengths, &packed, &stream}) out.insert(out.end(), part->begin(), part->end());
        return out;
    }

    template <typename Number>
    static void append(std::vector<uint8_t>& out, Number number) {
        const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&number);
        out.insert(out.end(), bytes, bytes + sizeof number);
    }

    void patch(size_t column, size_t token, int16_t value) {
        append(columns, uint32_t(column));
        append(tokens, uint16_t(token));
        append(values, value);
    }
};

// Writes one block after another to the parts of every level.
class BlockWriter {
  public:
    BlockWriter(const Blocks& group, const uint64_t* tables) : group_(group), tables_(tables) {
        for (size_t level = 0; level < kLevels; ++level) plans_.emplace_back(group, level);
        for (size_t i = 0; i < lost_.size(); ++i) lost_[i] = uint32_t(tables[i]) == 0;
    }

    void write(size_t block, const int8_t* classes, size_t first_column, const int16_t* finest) {
        width_ = group_.widths[block];
        const size_t count = group_.tokens * width_;
        seen_.assign(count, 0);
        zeros_.resize(width_);
        for (std::vector<int16_t>& own : ladder_) own.resize(count);
        for (size_t level = kLevels - 1; level-- > 0;) {
            loops_.coarsen(ladder_[level].data(), level + 2 == kLevels ? finest : ladder_[level + 1].data(), count);
        }
        for (size_t level = 0; level < kLevels; ++level) {
            const int16_t* values = level + 1 == kLevels ? finest : ladder_[level].data();
            write_level(level, plans_[level].blocks[block], classes, first_column, values);
        }
    }

    std::array<Parts, kLevels> parts;

  private:
    // One level of one block; `seen_` is what a decoder saw at the level below, and then of this one.
    void write_level(size_t level, const LevelPlan& plan, const int8_t* classes, size_t first_column, const int16_t* values) {
        const size_t symbols = plan.symbols(group_.tokens);
        symbols_.resize(symbols);
        bases_.assign((symbols + r32::kLanesMax - 1) / r32::kLanesMax * r32::kLanesMax, 0);
        at_ = 0;
        const int raised = kPitch * int(level);
        if (level) {
            pack_digits(parts[level], plan.packed, values);
            write_pairs(plan, classes, raised, values);
        }
        for (size_t alphabet = 0; alphabet < kAlphabets; ++alphabet) write_first(parts[level], plan, alphabet, classes, raised, first_column, values);
        finish_level(parts[level], plan.coded(), first_column, values);
        const size_t lanes = plans_[level].lanes, room = r32::tile_bytes_max(symbols, unsigned(lanes));
        room_.resize(room);
        size_t nbytes = 0;
        if (symbols) nbytes = r32::encode_tile(symbols, unsigned(lanes), bases_.data(), tables_, symbols_.data(), room_.data() + room);
        Parts::append(parts[level].lengths, uint32_t(nbytes));
        parts[level].stream.insert(parts[level].stream.end(), room_.end() - ptrdiff_t(nbytes), room_.end());
    }

    void pack_digits(Parts& out, size_t packed, const int16_t* values) {
        digits_.assign((group_.tokens * packed + kTrits - 1) / kTrits * kTrits, 0);
        for (size_t token = 0; token < group_.tokens; ++token) {
            loops_.digits(digits_.data() + token * packed, values + token * width_, seen_.data() + token * width_, packed);
        }
        const size_t start = out.packed.size(), count = digits_.size() / kTrits;
        out.packed.resize(start + count);
        for (size_t i = 0; i < count; ++i) {
            const uint8_t* five = digits_.data() + i * kTrits;
            unsigned byte = 0;
            for (size_t place = 0; place < kTrits; ++place) byte += five[place] * unsigned{kTritScales[place]};
            out.packed[start + i] = uint8_t(byte);
        }
    }

    void write_pairs(const LevelPlan& plan, const int8_t* classes, int raised, const int16_t* values) {
        const size_t count = plan.refined - plan.packed;
        rows_.resize(count);
        for (size_t i = 0; i < count; ++i) rows_[i] = uint16_t(refine_row(classes[plan.packed + i] + raised));
        for (size_t token = 0; count && token < group_.tokens; token += 2, at_ += count) {
            const size_t first = token * width_ + plan.packed;
            const bool both = token + 1 < group_.tokens;
            const int16_t *one = values + first, *one_above = seen_.data() + first;
            const int16_t *other = both ? one + width_ : nullptr, *other_above = both ? one_above + width_ : zeros_.data();
            loops_.pair_bases(bases_.data() + at_, rows_.data(), one_above, other_above, count, kEntryBits);
            loops_.pair_symbols(symbols_.data() + at_, one, one_above, other, other_above, count);
        }
    }

    void write_first(Parts& out, const LevelPlan& plan, size_t alphabet, const int8_t* classes, int raised, size_t first_column, const int16_t* values) {
        const size_t start = plan.first_start(alphabet), count = plan.first_end[alphabet] - start;
        const Alphabet& own = kAlphabet[alphabet];
        for (size_t token = 0; count && token < group_.tokens; token += own.count, at_ += count) {
            const int16_t* rows[3];
            for (size_t i = 0; i < 3; ++i) rows[i] = i < own.count && token + i < group_.tokens ? values + (token + i) * width_ + start : nullptr;
            uint8_t* symbols = symbols_.data() + at_;
            const bool outside = loops_.first_symbols[alphabet](symbols, rows, count);
            bool lost = false;
            for (size_t i = 0; i < count; ++i) {
                bases_[at_ + i] = uint32_t(classes[start + i] + raised) << kEntryBits;
                lost |= lost_[bases_[at_ + i] | symbols[i]];
            }
            if (outside || lost) write_patches(out, own, bases_.data() + at_, symbols, rows, count, first_column + start, token);
        }
    }

    // Values beyond the alphabet, and all but zeros where the table lacks their symbol.
    void write_patches(Parts& out, const Alphabet& alphabet, const uint32_t* bases, uint8_t* symbols, const int16_t* const* rows, size_t count, size_t first_column, size_t token) {
        for (size_t place = 0; place < alphabet.count && rows[place]; ++place) {
            for (size_t i = 0; i < count; ++i) {
                const int value = rows[place][i];
                const bool lost = lost_[bases[i] | symbols[i]];
                if (std::abs(value) > int(alphabet.limit) || (lost && value)) out.patch(first_column + i, token + place, int16_t(value));
            }
        }
        for (size_t i = 0; i < count; ++i) {
            if (lost_[bases[i] | symbols[i]]) symbols[i] = uint8_t(alphabet.zero_symbol());
        }
    }

    // Brings `seen_` to this level. Of components that are not coded it is what is known from below, but for values far from it.
    void finish_level(Parts& out, size_t coded, size_t first_column, const int16_t* values) {
        for (size_t token = 0; token < group_.tokens; ++token) {
            int16_t* seen = seen_.data() + token * width_;
            const int16_t* row = values + token * width_;
            std::copy(row, row + coded, seen);
            bool far = false;
            for (size_t i = coded; i < width_; ++i) {
                seen[i] = int16_t(3 * seen[i]);
                far |= std::abs(row[i] - seen[i]) > kAbsentErrorMax;
            }
            for (size_t i = coded; far && i < width_; ++i) {
                if (std::abs(row[i] - seen[i]) <= kAbsentErrorMax) continue;
                out.patch(first_column + i, token, row[i]);
                seen[i] = row[i];
            }
        }
    }

    static constexpr unsigned kEntryBits = 8;

    const Blocks& group_;
    const uint64_t* tables_;
    const Loops& loops_ = loops();
    std::vector<LevelPlans> plans_;
    std::array<bool, kFirstRows * r32::kSymbols> lost_;  // which symbols of first values have no entry: less to keep in cache
    size_t width_ = 0, at_ = 0;
    std::array<std::vector<int16_t>, kLevels - 1> ladder_;
    std::vector<int16_t> seen_, zeros_;
    std::vector<uint16_t> rows_;
    std::vector<uint8_t> symbols_, digits_, room_;
    std::vector<uint32_t> bases_;
};

}  // namespace

bool quantise(int16_t* finest, const float* numbers, const uint32_t* sources, const uint8_t* marks, size_t tokens, size_t width) {
    std::vector<int16_t> row(width);
    bool fit = true;
    for (size_t token = 0; token < tokens; ++token, finest += width, numbers += width) {
        if (marks[token]) {
            std::fill(finest, finest + width, 0);
            continue;
        }
        fit &= loops().quantise(row.data(), numbers, width);
        for (size_t i = 0; i < width; ++i) finest[i] = row[sources[i]];
    }
    return fit;
}

void encode(const Blocks& blocks, const int16_t* finest, const uint64_t* tables, std::vector<uint8_t> (&levels)[kLevels]) {
    BlockWriter writer(blocks, tables);
    const int8_t* classes = blocks.classes;
    for (size_t block = 0; block < blocks.count; ++block) {
        writer.write(block, classes, size_t(classes - blocks.classes), finest);
        classes += blocks.widths[block];
        finest += blocks.tokens * blocks.widths[block];
    }
    for (size_t level = 0; level < kLevels; ++level) levels[level] = writer.parts[level].join();
}

}  // namespace kvstore::ladder
