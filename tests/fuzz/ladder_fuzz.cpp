// Feeds the ladder's C++ decoder damaged levels, in buffers that end where AddressSanitizer notices one byte more.
//
//   g++ -std=c++17 -O2 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -Icodecs/native -Ikvstore/native
//       tests/fuzz/ladder_fuzz.cpp codecs/native/ladder_{avx512,decode,encode,loops,output}.cpp
//       codecs/native/r32_{decode,encode,pack,dispatch,scalar,avx2,avx512,avx512_digits,neon}.cpp -lpthread -o ladder_fuzz
//   ./ladder_fuzz CASES [SEED]
//
// A case is a layer group of a few small blocks, encoded, perhaps damaged, and decoded from some levels by every instruction set of
// this processor. All must write the same bytes, judge damaged ones alike, decode the same elements, come near to the values
// where nothing was damaged, and touch nothing outside their buffers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "ladder.h"
#include "ladder_plan.h"
#include "r32.h"
#include "tables.h"

namespace ladder = kvstore::ladder;
namespace r32 = kvstore::r32;
using kvstore::Strided;

namespace {

using Random = std::mt19937_64;
constexpr const char* kIsas[] = {"scalar", "avx2", "avx512", "neon"};
constexpr size_t kTableSets = 8;

size_t below(Random& random, size_t bound) { return bound ? random() % bound : 0; }

[[noreturn]] void fail(uint64_t seed, size_t number, const char* what) {
    std::fprintf(stderr, "seed %llu case %zu: %s\n", static_cast<unsigned long long>(seed), number, what);
    std::exit(1);
}

bool use_isa(const char* name) { return r32::use_isa(name) && ladder::use_isa(name); }

// Exactly that many items, so that the sanitizer sees the first one too many.
template <typename Item>
std::unique_ptr<Item[]> exact(const std::vector<Item>& items) {
    std::unique_ptr<Item[]> out(new Item[items.size()]);
    std::copy(items.begin(), items.end(), out.get());
    return out;
}

// Tables of some of the symbols that a class or digits can have, always of those that the encoder needs; one set in four has digit
// tables with other symbols too.
Tables ladder_tables(Random& random, bool strange) {
    Tables out(ladder::kTables);
    for (size_t row = 0; row < ladder::kTables; ++row) {
        const bool digits = row >= ladder::kFirstRows;
        size_t symbols = digits ? r32::kDigitSymbols : 0, zero = 0;
        for (const ladder::Alphabet& own : ladder::kAlphabet) {
            if (symbols || int(row) < own.lowest_class) continue;
            zero = own.zero_symbol();
            symbols = 1;
            for (unsigned i = 0; i < own.count; ++i) symbols *= own.radix();
        }
        if (digits && strange) symbols += 3;
        std::vector<uint32_t> frequencies(symbols);
        uint32_t left = r32::kSlots;
        for (size_t symbol = 0; symbol < symbols; ++symbol) {
            if (!digits && symbol != zero && below(random, 3) == 0) continue;
            frequencies[symbol] = uint32_t(1 + (left > 2 * symbols ? below(random, (left - symbols) / 16) : 0));
            left -= frequencies[symbol];
        }
        frequencies[zero] += left;
        std::vector<uint32_t> cuts{0};
        for (const uint32_t frequency : frequencies) cuts.push_back(cuts.back() + frequency);
        out.set(row, cuts);
    }
    return out;
}

struct Group {
    size_t tokens, heads, layers;
    std::vector<uint32_t> widths;
    std::vector<int8_t> classes;
    std::vector<int16_t> finest;
    std::vector<uint32_t> places;
    std::vector<float> steps, gains, centres, cosine, sine;
};

// One or two parts of some layers, as K and V are; one in a thousand is large, so that its tiles may have 16 or 32 lanes. In one of
// two the blocks have like classes, so that many are decoded by the same kernel.
Group random_group(Random& random) {
    const bool large = below(random, 1000) == 0, alike = below(random, 2) == 0;
    const size_t tokens = large ? 400 + below(random, 600) : below(random, below(random, 3) ? 24 : 90);
    Group out{tokens, 1 + below(random, 2), 1 + below(random, 2), {}, {}, {}, {}, {}, {}, {}, {}, {}};
    const size_t half = below(random, 4), parts = 1 + below(random, 2);
    for (size_t part = 0; part < parts; ++part) {
        const uint32_t width = uint32_t(2 * half + (large ? 90 : 0) + below(random, below(random, 8) ? 20 : 150));
        for (size_t i = 0; i < out.layers * out.heads; ++i) out.widths.push_back(width);
    }
    int lowest = 0, spread = 1;
    for (const uint32_t width : out.widths) {
        std::vector<int8_t> own(width);
        if (out.steps.empty() || !alike) lowest = large ? int(below(random, 24)) - 16 : int(below(random, 70)) + ladder::kClassMin, spread = 1 + int(below(random, 30));
        for (int8_t& one : own) one = int8_t(std::min(ladder::kClassMax, lowest + int(below(random, size_t(spread)))));
        std::sort(own.rbegin(), own.rend());
        out.classes.insert(out.classes.end(), own.begin(), own.end());
        for (size_t token = 0; token < out.tokens; ++token) {
            for (const int8_t scale : own) {
                const double deviation = 0.42 * std::pow(3.0, std::min(24.0, scale / 8.0 + 3));
                const double value = below(random, 200) ? std::normal_distribution<double>(0, deviation)(random) : 40 * deviation;
                out.finest.push_back(int16_t(std::lround(std::max(-32751.0, std::min(32751.0, value)))));
            }
        }
        std::vector<uint32_t> order(width);
        for (uint32_t i = 0; i < width; ++i) order[i] = i;
        std::shuffle(order.begin(), order.end(), random);
        out.places.insert(out.places.end(), order.begin(), order.end());
        out.steps.push_back(float(1 + below(random, 9)) / 4);
    }
    for (size_t i = 0; i < out.classes.size(); ++i) {
        out.gains.push_back(float(below(random, 7)) - 2);
        out.centres.push_back(float(below(random, 70)) - 35);
    }
    for (size_t i = 0; i < out.tokens * half; ++i) {
        out.cosine.push_back(std::cos(float(i)));
        out.sine.push_back(std::sin(float(i)));
    }
    return out;
}

ladder::Blocks blocks_of(const Group& group) { return {group.tokens, group.widths.size(), group.classes.data(), group.widths.data()}; }

using Levels = std::vector<std::vector<uint8_t>>;

void damage(Random& random, std::vector<uint8_t>& level) {
    const size_t at = below(random, below(random, 2) ? std::min<size_t>(level.size(), 64) : level.size());
    switch (below(random, 4)) {
        case 0: if (!level.empty()) level[at] ^= uint8_t(1u << below(random, 8)); break;
        case 1: level.resize(at); break;
        case 2: level.insert(level.begin() + ptrdiff_t(at), 1 + below(random, 9), uint8_t(random())); break;
        default: for (size_t i = at; i < std::min(level.size(), at + 4); ++i) level[i] = uint8_t(below(random, 2) ? 0xFF : random());
    }
}

// The arrays that blocks are decoded to: their bytes are compared, so those between elements are 0.
struct Targets {
    std::vector<std::unique_ptr<uint8_t[]>> memory;
    std::vector<size_t> sizes;
    std::vector<ladder::Target> targets;
    ladder::Rotation rotation;

    Targets(const Group& group, ladder::Format format, size_t layout, size_t rotated) : rotation{group.cosine.data(), group.sine.data(), group.tokens ? group.cosine.size() / group.tokens : 0} {
        const size_t itemsize = format == ladder::Format::kFloat32 ? 4 : format <= ladder::Format::kFloat16 ? 2 : 1;
        const ptrdiff_t unit = ptrdiff_t(itemsize) * (layout == 2 ? 2 : 1), tokens = ptrdiff_t(group.tokens), heads = ptrdiff_t(group.heads);
        for (size_t i = 0; i < group.widths.size() / group.heads; ++i) {
            const ptrdiff_t dim = ptrdiff_t(group.widths[i * group.heads]);
            Strided view{nullptr, {heads, tokens, dim}, {tokens * dim * unit, dim * unit, unit}, itemsize};
            if (layout == 1) view.strides[0] = dim * unit, view.strides[1] = heads * dim * unit;
            sizes.push_back(size_t(heads * tokens * dim * unit));
            memory.emplace_back(new uint8_t[sizes.back()]());
            view.data = memory.back().get();
            targets.push_back({view, format, i < rotated ? &rotation : nullptr});
        }
    }

    std::vector<uint8_t> contents() const {
        std::vector<uint8_t> out;
        for (size_t i = 0; i < memory.size(); ++i) out.insert(out.end(), memory[i].get(), memory[i].get() + sizes[i]);
        return out;
    }
};

Levels encode(const Group& group, const Tables& tables, uint64_t seed, size_t number) {
    Levels out;
    for (const char* isa : kIsas) {
        if (!use_isa(isa)) continue;
        std::vector<uint8_t> levels[ladder::kLevels];
        ladder::encode(blocks_of(group), exact(group.finest).get(), tables.encode.data(), levels);
        Levels written(levels, levels + ladder::kLevels);
        if (!out.empty() && written != out) fail(seed, number, "instruction sets write different levels");
        out = std::move(written);
    }
    return out;
}

// Whether components at the finest level are within what absent ones may err by.
bool near(const Group& group, const std::vector<float>& numbers) {
    size_t at = 0;
    for (size_t block = 0; block < group.widths.size(); ++block) {
        for (size_t i = 0; i < group.tokens * group.widths[block]; ++i, ++at) {
            if (std::abs(numbers[at] / group.steps[block] * 27 - float(group.finest[at])) > 2.1f) return false;
        }
    }
    return true;
}

void run_case(Random& random, const std::vector<Tables>& all_tables, uint64_t seed, size_t number) {
    const Group group = random_group(random);
    const Tables& tables = all_tables[below(random, all_tables.size())];
    Levels levels = encode(group, tables, seed, number);
    levels.resize(1 + below(random, ladder::kLevels));
    const bool whole = below(random, 4) == 0;
    if (!whole) damage(random, levels[below(random, levels.size())]);
    const std::vector<float> centroids(ladder::kCentroids, 0.0f);
    const auto format = ladder::Format(below(random, 5));
    const size_t layout = below(random, 3), rotated = below(random, group.widths.size() / group.heads + 1);
    std::vector<std::unique_ptr<uint8_t[]>> memory;
    ladder::Source source{{}, tables.decode.data(), centroids.data()};
    for (const auto& level : levels) {
        memory.push_back(exact(level));
        source.levels.push_back({memory.back().get(), level.size()});
    }
    const ladder::Scales scales{group.steps.data(), group.places.data(), group.gains.data(), group.centres.data()};
    int verdict = -1;
    std::vector<uint8_t> expected;
    for (const char* isa : kIsas) {
        if (!use_isa(isa)) continue;
        Targets targets(group, format, layout, rotated);
        const bool fine = ladder::decode_heads(blocks_of(group), source, scales, targets.targets) == nullptr;
        std::vector<float> numbers(group.finest.size());
        std::vector<uint32_t> present(group.widths.size());
        const bool again = ladder::decode_components(blocks_of(group), source, group.steps.data(), numbers.data(), present.data()) == nullptr;
        if (fine != again || (verdict >= 0 && fine != (verdict == 1))) fail(seed, number, "levels are judged differently");
        if (whole && !fine) fail(seed, number, "whole levels do not decode");
        if (whole && levels.size() == ladder::kLevels && !near(group, numbers)) fail(seed, number, "values did not come back");
        if (fine && verdict >= 0 && targets.contents() != expected) fail(seed, number, "instruction sets decode different elements");
        if (fine) expected = targets.contents();
        verdict = fine;
    }
}

}  // namespace

int main(int count, char** arguments) {
    const size_t cases = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1000;
    const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
    Random random(seed);
    std::vector<Tables> tables;
    for (size_t i = 0; i < kTableSets; ++i) tables.push_back(ladder_tables(random, i % 4 == 3));
    for (size_t number = 0; number < cases; ++number) {
        run_case(random, tables, seed, number);
        // A campaign of an hour that is cut short should still say how far it came.
        if ((number + 1) % 50000 == 0 && number + 1 < cases) std::fprintf(stderr, "%zu cases\n", number + 1);
    }
    std::printf("%zu cases\n", cases);
    return 0;
}
