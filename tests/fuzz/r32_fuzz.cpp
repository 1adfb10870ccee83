// Feeds R32's C++ decoders random and damaged streams, in buffers that end where AddressSanitizer notices one byte more.
//
//   g++ -std=c++17 -O2 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Icodecs/native tests/fuzz/r32_fuzz.cpp
//       codecs/native/r32_{decode,encode,pack,dispatch,scalar,avx2,avx512,avx512_digits,neon}.cpp -lpthread -o r32_fuzz
//   ./r32_fuzz CASES [SEED]
//
// A case is a batch of tiles, encoded, perhaps damaged, and decoded by every instruction set of this processor. All must
// judge each tile alike, return the symbols of whole tiles, and touch nothing outside their buffers.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "r32.h"
#include "tables.h"

namespace r32 = kvstore::r32;

namespace {

using Random = std::mt19937_64;
constexpr const char* kIsas[] = {"scalar", "avx2", "avx512", "neon"};

size_t below(Random& random, size_t bound) { return bound ? random() % bound : 0; }

[[noreturn]] void fail(uint64_t seed, size_t number, const char* what) {
    std::fprintf(stderr, "seed %llu case %zu: %s\n", static_cast<unsigned long long>(seed), number, what);
    std::exit(1);
}

Tables random_tables(Random& random, size_t count) {
    Tables out(count);
    for (size_t table = 0; table < count; ++table) {
        const size_t symbols = 1 + below(random, below(random, 2) ? 4 : 256);
        std::vector<uint32_t> cuts{0, r32::kSlots};
        while (cuts.size() < symbols + 1) cuts.push_back(uint32_t(below(random, r32::kSlots + 1)));
        std::sort(cuts.begin(), cuts.end());
        out.set(table, cuts);
    }
    return out;
}

// Exactly that many bytes, so that the sanitizer sees the first one too many.
std::unique_ptr<uint8_t[]> exact(const uint8_t* data, size_t count) {
    std::unique_ptr<uint8_t[]> out(new uint8_t[count]);
    if (count) std::memcpy(out.get(), data, count);
    return out;
}

struct Case {
    Tables tables{0};
    std::vector<uint32_t> counts, lengths;
    std::vector<uint16_t> ids;
    std::vector<uint8_t> symbols, stream;
    r32::Batch batch;
};

Case random_case(Random& random) {
    Case out;
    const size_t tables = 1 + below(random, 3), tiles = below(random, 10);
    const unsigned lanes = 8u << below(random, 3);
    out.tables = random_tables(random, tables);
    for (size_t i = 0; i < tiles; ++i) out.counts.push_back(uint32_t(below(random, below(random, 4) ? 200 : 2000)));
    const size_t id_tiles = below(random, 2) ? 1 : std::max<size_t>(tiles, 1), id_lanes = below(random, 2) ? 1 : lanes;
    const size_t period = 1 + below(random, 4);
    for (size_t i = 0; i < id_tiles * period * id_lanes; ++i) out.ids.push_back(uint16_t(below(random, tables)));
    out.lengths.resize(tiles);
    out.batch = {tiles, out.counts.data(), lanes, out.ids.data(), id_tiles, period, id_lanes};
    size_t room = 0;
    for (size_t tile = 0; tile < tiles; ++tile) {
        room += r32::tile_bytes_max(out.counts[tile], lanes);
        for (size_t i = 0; i < out.counts[tile]; ++i) {
            const size_t row = (id_tiles == 1 ? 0 : tile) * period + i / lanes % period;
            const auto& usable = out.tables.usable[out.ids[row * id_lanes + (id_lanes == 1 ? 0 : i % lanes)]];
            out.symbols.push_back(usable[below(random, usable.size())]);
        }
    }
    out.stream.resize(room);
    r32::use_isa(kIsas[below(random, std::size(kIsas))]);
    const size_t used = r32::encode(out.batch, out.tables.encode.data(), out.symbols.data(), out.stream.data(), out.lengths.data(), 1 + below(random, 2));
    if (used == SIZE_MAX) std::abort();
    out.stream.resize(used);
    return out;
}

// Damage the stream, or none; answers whether it is as it was.
bool damage(Random& random, Case& one) {
    auto& stream = one.stream;
    const size_t at = below(random, stream.size()), kind = below(random, 8);
    if (kind == 0 || stream.empty()) return true;
    if (kind == 1) stream[at] = uint8_t(stream[at] ^ (1u << below(random, 8)));
    if (kind == 2) std::fill(stream.begin() + ptrdiff_t(at), stream.end(), uint8_t(below(random, 2) ? 0xFF : 0));
    if (kind == 3) std::generate(stream.begin() + ptrdiff_t(at), stream.end(), [&] { return uint8_t(random()); });
    if (kind == 4) std::generate(stream.begin(), stream.end(), [&] { return uint8_t(random()); });
    if (kind == 5) {  // cut the last tile that has bytes
        size_t last = one.lengths.size() - 1;
        while (!one.lengths[last]) --last;
        const size_t cut = 1 + below(random, one.lengths[last]);
        one.lengths[last] -= uint32_t(cut);
        stream.resize(stream.size() - cut);
    }
    if (kind == 6) {  // bytes behind the end
        one.lengths.back() += 2;
        stream.insert(stream.end(), 2, uint8_t(random()));
    }
    if (kind == 7) {  // tables that no encoder had
        for (auto& entry : one.tables.decode) {
            if (below(random, 64) == 0) entry = uint32_t(random());
        }
    }
    return false;
}

void run_case(uint64_t seed, size_t number) {
    Random random(seed + number * 0x9E3779B97F4A7C15);
    Case one = random_case(random);
    const bool whole = damage(random, one);
    const auto stream = exact(one.stream.data(), one.stream.size());
    const std::vector<uint8_t> zeros(one.symbols.size());
    const size_t threads = 1 + below(random, 2);
    std::vector<uint8_t> first_ok, first_symbols;
    for (const char* isa : kIsas) {
        if (!r32::use_isa(isa)) continue;
        auto symbols = exact(zeros.data(), zeros.size());
        std::vector<uint8_t> verdicts(one.batch.tiles);
        r32::decode(one.batch, one.tables.decode.data(), stream.get(), one.lengths.data(), symbols.get(), verdicts.data(), threads);
        if (whole) {
            if (std::count(verdicts.begin(), verdicts.end(), 1) != ptrdiff_t(one.batch.tiles)) fail(seed, number, "a whole tile was refused");
            if (!std::equal(one.symbols.begin(), one.symbols.end(), symbols.get())) fail(seed, number, "symbols differ from the encoded ones");
        }
        for (size_t tile = 0, start = 0; tile < one.batch.tiles; start += one.counts[tile++]) {
            if (!verdicts[tile]) std::memset(symbols.get() + start, 0, one.counts[tile]);
        }
        const std::vector<uint8_t> seen(symbols.get(), symbols.get() + one.symbols.size());
        if (first_ok.empty() && first_symbols.empty()) {
            first_ok = verdicts;
            first_symbols = seen;
        }
        if (verdicts != first_ok) fail(seed, number, "instruction sets judge a tile differently");
        if (seen != first_symbols) fail(seed, number, "instruction sets decode different symbols");
    }
}

}  // namespace

int main(int count, char** arguments) {
    const size_t cases = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1000;
    const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
    for (size_t number = 0; number < cases; ++number) run_case(seed, number);
    std::printf("%zu cases, seed %llu\n", cases, static_cast<unsigned long long>(seed));
}
