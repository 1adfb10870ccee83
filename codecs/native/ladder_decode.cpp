// From the bytes of a group's levels to the values of its blocks, a few blocks at a time so that they stay in cache.
#include "ladder_decode.h"

#include <cstring>

#include "ladder_loops.h"
#include "r32.h"

namespace kvstore::ladder {

namespace {

// Blocks that are decoded together: enough for R32, few enough for the cache.
constexpr size_t kTogetherMin = 2, kTogetherMax = 8, kTogetherValues = size_t{1} << 18;

static_assert(kTables - kFirstRows <= r32::kDigitTablesMax);
using r32::kDigitBits;

// For each byte of packed digits: the digits of kTrits values, and three bytes to fill a word.
struct Trits {
    int8_t digits[256][8];

    constexpr Trits() : digits() {
        for (int byte = 0; byte < 256; ++byte) {
            for (int place = 0, rest = byte; place < int(kTrits); ++place, rest /= 3) digits[byte][place] = int8_t(rest % 3 - 1);
        }
    }
};
constexpr Trits kTritsOf;

template <typename Number>
Number load(const uint8_t* at) {
    Number out;
    std::memcpy(&out, at, sizeof out);
    return out;
}

}  // namespace

const char* Level::open(const Blocks& group, size_t level, Bytes bytes) {
    starts_.resize(group.count + 1);
    packed_starts_.resize(group.count + 1);
    if (const char* wrong = read_patches(group, level, bytes)) return wrong;
    if (bytes.size < 4 * group.count) return "a ladder segment ends before the lengths of its tiles";
    const uint8_t* lengths = bytes.data;
    bytes = {bytes.data + 4 * group.count, bytes.size - 4 * group.count};
    size_t packed = 0, streams = 0;
    for (size_t i = 0; i < group.count; ++i) {
        packed_starts_[i] = packed;
        packed += plans.blocks[i].packed_bytes(group.tokens);
        starts_[i] = streams;
        streams += load<uint32_t>(lengths + 4 * i);
    }
    packed_starts_[group.count] = packed;
    starts_[group.count] = streams;
    if (bytes.size < packed || bytes.size - packed != streams) return "the tiles of a ladder segment do not add up to its bytes";
    packed_ = bytes.data;
    stream_ = bytes.data + packed;
    return nullptr;
}

const char* Level::read_patches(const Blocks& group, size_t level, Bytes& bytes) {
    constexpr size_t patch_bytes = 8;
    int largest = kValueMax;
    for (size_t i = level + 1; i < kLevels; ++i) largest /= 3;
    if (bytes.size < 4) return "a ladder segment ends before its patches";
    const size_t count = load<uint32_t>(bytes.data);
    if (count > (bytes.size - 4) / patch_bytes) return "a ladder segment ends within its patches";
    const uint8_t *columns = bytes.data + 4, *tokens = columns + 4 * count, *values = tokens + 2 * count;
    bytes = {values + 2 * count, bytes.size - 4 - patch_bytes * count};
    std::vector<size_t> first_columns(group.count + 1);
    for (size_t i = 0; i < group.count; ++i) first_columns[i + 1] = first_columns[i] + group.widths[i];
    patches_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        const size_t column = load<uint32_t>(columns + 4 * i), token = load<uint16_t>(tokens + 2 * i);
        const int value = load<int16_t>(values + 2 * i);
        if (column >= first_columns.back() || token >= group.tokens || value < -largest || value > largest) {
            return "a patch lies outside the chunk or is too large";
        }
        const size_t block = size_t(std::upper_bound(first_columns.begin(), first_columns.end(), column) - first_columns.begin()) - 1;
        const size_t component = column - first_columns[block];
        if (component < plans.blocks[block].refined) return "a patch is for a value that is refined";
        patches_.push_back({uint32_t(block), uint32_t(component), uint32_t(token), int16_t(value)});
    }
    const auto before = [](const Patch& one, const Patch& other) { return one.block < other.block; };
    if (!std::is_sorted(patches_.begin(), patches_.end(), before)) std::stable_sort(patches_.begin(), patches_.end(), before);
    return nullptr;
}

GroupReader::GroupReader(const Blocks& group, const Source& source) : group_(group), source_(source) {
    size_t widest = 1;
    for (size_t i = 0; i < group.count; ++i) widest = std::max<size_t>(widest, group.widths[i]);
    const size_t block_values = widest * std::max<size_t>(1, group.tokens);
    together = std::max(kTogetherMin, std::min(kTogetherMax, kTogetherValues / block_values));
    block_values_ = block_values;
    for (size_t i = 0; i < kTables - kFirstRows; ++i) digits_fit_ &= digit_tables_.set(i, source.tables + (kFirstRows + i) * r32::kSlots);
    class_starts_.resize(group.count + 1);
    for (size_t i = 0; i < group.count; ++i) class_starts_[i + 1] = class_starts_[i] + group.widths[i];
}

const char* GroupReader::open() {
    size_t symbols = 0, packed = 0;
    levels_.reserve(source_.levels.size());
    for (size_t level = 0; level < source_.levels.size(); ++level) {
        levels_.emplace_back(LevelPlans(group_, level));
        if (const char* wrong = levels_.back().open(group_, level, source_.levels[level])) return wrong;
        for (const LevelPlan& plan : levels_.back().plans.blocks) {
            symbols = std::max(symbols, plan.symbols(group_.tokens));
            packed = std::max(packed, plan.packed_bytes(group_.tokens));
        }
    }
    block_symbols_ = (symbols + r32::kLanesMax - 1) / r32::kLanesMax * r32::kLanesMax;
    values_.resize(together * block_values_);
    symbols_.resize(together * block_symbols_);
    bases_.resize(together * block_symbols_);
    digits_.resize(packed * kTrits + sizeof(kTritsOf.digits[0]));
    return nullptr;
}

const char* GroupReader::read(size_t first, size_t count) {
    r32::Tile tiles[kTogetherMax];
    for (size_t level = 0; level < levels_.size(); ++level) {
        const Level& own = levels_[level];
        for (size_t i = 0; i < count; ++i) {
            const Bytes stream = own.stream(first + i);
            uint32_t* bases = bases_.data() + i * block_symbols_;
            const size_t digits = prepare_bases(first + i, level, bases, values(i));
            tiles[i] = {stream.data, stream.size, own.plans.blocks[first + i].symbols(group_.tokens), digits, bases, symbols_.data() + i * block_symbols_, false};
        }
        r32::decode_tiles(tiles, count, own.plans.lanes, source_.tables, digit_tables_);
        for (size_t i = 0; i < count; ++i) {
            if (!tiles[i].ok) return "a tile of a ladder segment does not decode";
            take_level(first + i, level, tiles[i].symbols, values(i));
        }
    }
    return nullptr;
}

size_t GroupReader::prepare_bases(size_t block, size_t level, uint32_t* bases, const int16_t* values) {
    constexpr unsigned bits = r32::kSlotBits;
    const LevelPlan& plan = levels_[level].plans.blocks[block];
    const int8_t* classes = classes_of(block);
    const size_t width = group_.widths[block];
    const int raised = kPitch * int(level);
    const size_t refined = plan.refined - plan.packed;
    const size_t pairs = (group_.tokens + 1) / 2 * refined;
    const size_t digits = digits_fit_ ? pairs / levels_[level].plans.lanes * levels_[level].plans.lanes : 0;
    rows_.resize(width);
    zeros_.resize(width);
    for (size_t i = 0; i < refined; ++i) rows_[i] = uint16_t(refine_row(classes[plan.packed + i] + raised) - kFirstRows);
    for (size_t token = 0; refined && token < group_.tokens; token += 2, bases += refined) {
        const int16_t* one = values + token * width + plan.packed;
        loops_.pair_bases(bases, rows_.data(), one, token + 1 < group_.tokens ? one + width : zeros_.data(), refined, kDigitBits);
    }
    for (size_t left = pairs - digits; left > 0; --left) bases[-ptrdiff_t(left)] = uint32_t((bases[-ptrdiff_t(left)] >> kDigitBits) + kFirstRows) << bits;
    for (size_t alphabet = 0; alphabet < kAlphabets; ++alphabet) {
        const size_t start = plan.first_start(alphabet), count = plan.first_end[alphabet] - start;
        if (!count) continue;
        const size_t groups = (group_.tokens + kAlphabet[alphabet].count - 1) / kAlphabet[alphabet].count;
        for (size_t i = 0; groups && i < count; ++i) bases[i] = uint32_t(classes[start + i] + raised) << bits;
        for (size_t i = 1; i < groups; ++i) std::memcpy(bases + i * count, bases, count * sizeof *bases);
        bases += groups * count;
    }
    std::fill(bases, bases + r32::kLanesMax - 1 - (bases - bases_.data() + r32::kLanesMax - 1) % r32::kLanesMax, 0);
    return digits;
}

void GroupReader::take_level(size_t block, size_t level, const uint8_t* symbols, int16_t* values) {
    const LevelPlan& plan = levels_[level].plans.blocks[block];
    const size_t width = group_.widths[block], tokens = group_.tokens;
    if (level == 0) {
        std::memset(values, 0, tokens * width * sizeof *values);
    } else {
        unpack_digits(levels_[level].packed(block));
        const size_t refined = plan.refined - plan.packed, coded = plan.coded();
        for (size_t token = 0; token < tokens; ++token) {
            int16_t* row = values + token * width;
            loops_.refine_packed(row, digits_.data() + token * plan.packed, plan.packed);
            loops_.triple(row + coded, width - coded);
        }
        spare_.resize(width);
        for (size_t token = 0; refined && token < tokens; token += 2, symbols += refined) {
            int16_t* one = values + token * width + plan.packed;
            loops_.refine(one, token + 1 < tokens ? one + width : spare_.data(), symbols, refined);
        }
    }
    for (size_t alphabet = 0; alphabet < kAlphabets; ++alphabet) {
        const size_t start = plan.first_start(alphabet), count = plan.first_end[alphabet] - start;
        if (!count) continue;
        for (size_t token = 0; token < tokens; token += kAlphabet[alphabet].count, symbols += count) {
            int16_t* rows[3];
            for (size_t i = 0; i < 3; ++i) rows[i] = token + i < tokens ? values + (token + i) * width + start : nullptr;
            loops_.first[alphabet](rows, symbols, count);
        }
    }
    for (const Patch& patch : levels_[level].patches(block)) values[patch.token * width + patch.component] = patch.value;
}

void GroupReader::unpack_digits(Bytes packed) {
    int8_t* out = digits_.data();
    for (size_t i = 0; i < packed.size; ++i, out += kTrits) std::memcpy(out, kTritsOf.digits[packed.data[i]], sizeof kTritsOf.digits[0]);
}

std::vector<float> GroupReader::centroids(size_t block) const {
    const int raised = kPitch * int(levels_.size() - 1);
    std::vector<float> out(group_.widths[block]);
    for (size_t i = 0; i < out.size(); ++i) {
        const int scale = classes_of(block)[i] + raised;
        out[i] = scale < 0 ? 0.0f : source_.centroids[scale];
    }
    return out;
}

uint32_t GroupReader::present(size_t block, size_t index) const {
    const int raised = kPitch * int(levels_.size() - 1);
    const uint32_t width = group_.widths[block];
    const int8_t* classes = classes_of(block);
    const size_t first = size_t(std::partition_point(classes, classes + width, [&](int own) { return own + raised >= 0; }) - classes);
    for (size_t token = 0; token < group_.tokens; ++token) {
        const int16_t* row = values(index) + token * width;
        if (std::any_of(row + first, row + width, [](int16_t value) { return value != 0; })) return width;  // patches
    }
    return uint32_t(first);
}

const char* decode_components(const Blocks& blocks, const Source& source, const float* steps, float* numbers, uint32_t* present) {
    GroupReader reader(blocks, source);
    if (const char* wrong = reader.open()) return wrong;
    for (size_t first = 0; first < blocks.count; first += reader.together) {
        const size_t count = std::min(reader.together, blocks.count - first);
        if (const char* wrong = reader.read(first, count)) return wrong;
        for (size_t i = 0; i < count; ++i) {
            const size_t block = first + i, width = blocks.widths[block];
            const std::vector<float> centroids = reader.centroids(block);
            present[block] = reader.present(block, i);
            for (size_t token = 0; token < blocks.tokens; ++token, numbers += width) {
                loops().dequantise(numbers, reader.values(i) + token * width, centroids.data(), present[block], reader.unit(), steps[block]);
            }
        }
    }
    return nullptr;
}

}  // namespace kvstore::ladder
