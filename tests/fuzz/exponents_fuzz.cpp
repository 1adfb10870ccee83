// Feeds the C++ decoder of lossless format 2 damaged segments, in buffers that end where AddressSanitizer notices one byte more.
//
//   g++ -std=c++17 -O2 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Icodecs/native -Ikvstore/native
//       tests/fuzz/exponents_fuzz.cpp codecs/native/exponents_{loops,fixed,planes}.cpp -o exponents_fuzz
//   ./exponents_fuzz CASES [SEED]
//
// A case is one or two arrays of any strides, encoded, perhaps damaged, and decoded by every instruction set of this processor.
// All must write the same segment, judge a damaged one alike, and touch nothing outside their buffers.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "exponents.h"

namespace exponents = kvstore::exponents;
using kvstore::Strided;

namespace {

using Random = std::mt19937_64;
constexpr const char* kIsas[] = {"scalar", "avx2", "avx512"};

size_t below(Random& random, size_t bound) { return bound ? random() % bound : 0; }

[[noreturn]] void fail(uint64_t seed, size_t number, const char* what) {
    std::fprintf(stderr, "seed %llu case %zu: %s\n", static_cast<unsigned long long>(seed), number, what);
    std::exit(1);
}

// Memory of exactly `size` bytes, from malloc, so that the sanitizer guards both ends.
struct Bytes {
    explicit Bytes(size_t size) : size(size), data(static_cast<uint8_t*>(std::malloc(size ? size : 1)), std::free) {}
    size_t size;
    std::unique_ptr<uint8_t, decltype(&std::free)> data;
};

struct Array {
    Bytes memory;
    Strided view;
};

// An array of zeros: heads, tokens and channels in that order of axes, or tokens first, or every other channel backwards.
Array make_array(const ptrdiff_t shape[3], size_t itemsize, size_t layout) {
    const ptrdiff_t unit = ptrdiff_t(itemsize) * (layout == 2 ? 2 : 1);
    Strided view{nullptr, {shape[0], shape[1], shape[2]}, {shape[1] * shape[2] * unit, shape[2] * unit, unit}, itemsize};
    if (layout == 1) view.strides[0] = shape[2] * unit, view.strides[1] = shape[0] * shape[2] * unit;
    Bytes memory(size_t(shape[0] * shape[1] * shape[2] * unit));
    std::memset(memory.data.get(), 0, memory.size);
    view.data = memory.data.get();
    if (layout == 2 && shape[2]) view.data += (shape[2] - 1) * unit, view.strides[2] = -unit;
    return {std::move(memory), view};
}

template <typename Visit>
void for_each_element(const Strided& view, Visit visit) {
    for (ptrdiff_t h = 0; h < view.shape[0]; ++h)
        for (ptrdiff_t t = 0; t < view.shape[1]; ++t)
            for (ptrdiff_t d = 0; d < view.shape[2]; ++d) visit(view.data + h * view.strides[0] + t * view.strides[1] + d * view.strides[2]);
}

void fill(Random& random, const Strided& view, size_t distinct) {
    for_each_element(view, [&](uint8_t* at) {
        for (size_t i = 0; i < view.itemsize; ++i) at[i] = uint8_t(random());
        at[view.itemsize - 1] = uint8_t(60 + below(random, distinct) / 2);
    });
}

std::vector<uint8_t> contents(const std::vector<Array>& arrays) {
    std::vector<uint8_t> out;
    for (const Array& array : arrays) for_each_element(array.view, [&](const uint8_t* at) { out.insert(out.end(), at, at + array.view.itemsize); });
    return out;
}

std::vector<Strided> views(const std::vector<Array>& arrays) {
    std::vector<Strided> out;
    for (const Array& array : arrays) out.push_back(array.view);
    return out;
}

void damage(Random& random, std::vector<uint8_t>& segment) {
    const size_t at = below(random, below(random, 2) ? std::min<size_t>(segment.size(), 64) : segment.size());
    switch (below(random, 4)) {
        case 0: if (!segment.empty()) segment[at] ^= uint8_t(1u << below(random, 8)); break;
        case 1: segment.resize(at); break;
        case 2: segment.insert(segment.begin() + ptrdiff_t(at), 1 + below(random, 9), uint8_t(random())); break;
        default: for (size_t i = at; i < std::min(segment.size(), at + 4); ++i) segment[i] = uint8_t(below(random, 2) ? 0xFF : random());
    }
}

void run_case(Random& random, uint64_t seed, size_t number) {
    const size_t itemsize = size_t{1} << below(random, 3);
    std::vector<Array> originals;
    for (size_t i = 0, count = 1 + below(random, 2); i < count; ++i) {
        const ptrdiff_t shape[3] = {ptrdiff_t(1 + below(random, 3)), ptrdiff_t(1 + below(random, 40)), ptrdiff_t(below(random, below(random, 4) ? 70 : 3))};
        originals.push_back(make_array(shape, itemsize, below(random, 3)));
        fill(random, originals.back().view, 1 + below(random, 60));
    }
    const std::vector<Strided> from = views(originals);
    const std::vector<uint8_t> expected = contents(originals);
    std::vector<uint8_t> segment;
    for (const char* isa : kIsas) {
        if (!exponents::use_isa(isa)) continue;
        Bytes target(exponents::directory_bytes(from) + expected.size());
        const size_t nbytes = exponents::encode_fixed(target.data.get(), from);
        std::vector<uint8_t> written(target.data.get(), target.data.get() + nbytes);
        if (!segment.empty() && written != segment) fail(seed, number, "instruction sets write different segments");
        segment = std::move(written);
    }
    const bool whole = below(random, 4) == 0;
    if (!whole) damage(random, segment);
    int verdict = -1;
    for (const char* isa : kIsas) {
        if (!exponents::use_isa(isa)) continue;
        Bytes source(segment.size());
        std::memcpy(source.data.get(), segment.data(), segment.size());
        std::vector<Array> targets;
        for (const Array& array : originals) targets.push_back(make_array(array.view.shape, itemsize, below(random, 3)));
        const bool fine = exponents::decode_fixed(views(targets), source.data.get(), source.size) == nullptr;
        if (verdict >= 0 && fine != (verdict == 1)) fail(seed, number, "instruction sets judge a segment differently");
        if (whole && (!fine || contents(targets) != expected)) fail(seed, number, "a whole segment did not come back");
        verdict = fine;
    }
}

}  // namespace

int main(int count, char** arguments) {
    const size_t cases = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1000;
    const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
    Random random(seed);
    for (size_t number = 0; number < cases; ++number) run_case(random, seed, number);
    std::printf("%zu cases\n", cases);
    return 0;
}
