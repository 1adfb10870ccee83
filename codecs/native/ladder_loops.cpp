#include "ladder_loops.h"

#include <cmath>
#include <cstring>

#include "ladder_avx512.h"
#include "ladder_plan.h"

namespace kvstore::ladder {

namespace {

// The loops are plain so that the compiler vectorises them for each instruction set below.
#define KVSTORE_INLINE inline __attribute__((always_inline))

KVSTORE_INLINE unsigned context(int value) {
    const int size = value < 0 ? -value : value;
    return unsigned(size < 2 ? size : 2);
}

KVSTORE_INLINE void pair_bases(uint32_t* __restrict bases, const uint16_t* __restrict rows, const int16_t* __restrict one, const int16_t* __restrict other, size_t count, unsigned bits) {
    for (size_t i = 0; i < count; ++i) bases[i] = (rows[i] + context(one[i]) * kContexts + context(other[i])) << bits;
}

template <unsigned radix>
KVSTORE_INLINE uint16_t over(uint16_t symbol) {
    return uint16_t(uint16_t(symbol * Quotient<radix>::reciprocal) >> Quotient<radix>::shift);
}

KVSTORE_INLINE int16_t mirrored(int16_t digit, int16_t above) {
    const int16_t sign = int16_t(above >> 15);
    return int16_t((digit ^ sign) - sign);
}

KVSTORE_INLINE void refine(int16_t* __restrict one, int16_t* __restrict other, const uint8_t* __restrict symbols, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        const uint16_t symbol = symbols[i], rest = over<3>(symbol), last = over<3>(rest);
        one[i] = int16_t(3 * one[i] + mirrored(int16_t(symbol - 3 * rest - 1), one[i]));
        other[i] = int16_t(3 * other[i] + mirrored(int16_t(rest - 3 * last - 1), other[i]));
    }
}

KVSTORE_INLINE void refine_packed(int16_t* __restrict values, const int8_t* __restrict digits, size_t count) {
    for (size_t i = 0; i < count; ++i) values[i] = int16_t(3 * values[i] + digits[i]);
}

KVSTORE_INLINE void triple(int16_t* values, size_t count) {
    for (size_t i = 0; i < count; ++i) values[i] = int16_t(3 * values[i]);
}

template <size_t alphabet>
KVSTORE_INLINE void first(int16_t* const* rows, const uint8_t* symbols, size_t count) {
    constexpr Alphabet own = kAlphabet[alphabet];
    constexpr unsigned radix = own.radix();
    for (unsigned place = 0; place < own.count && rows[place]; ++place) {
        int16_t* __restrict row = rows[place];
        for (size_t i = 0; i < count; ++i) {
            uint16_t rest = symbols[i];
            for (unsigned before = 0; before < place; ++before) rest = over<radix>(rest);
            row[i] = int16_t(rest - over<radix>(rest) * radix - own.limit);
        }
    }
}

KVSTORE_INLINE float dequantised(int value, float centroid, float unit, float step) {
    const float sign = float((value > 0) - (value < 0));
    return (float(value) - sign * centroid) * unit * step;
}

KVSTORE_INLINE void dequantise(float* __restrict numbers, const int16_t* __restrict values, const float* __restrict centroids, size_t count, float unit, float step) {
    for (size_t i = 0; i < count; ++i) numbers[i] = dequantised(values[i], centroids[i], unit, step);
}

KVSTORE_INLINE void make_channels(float* __restrict channels, const int16_t* __restrict values, const ChannelScales& scales, size_t count, float unit, float step) {
    const uint16_t* __restrict sources = scales.sources;
    const float *__restrict centroids = scales.centroids, *__restrict gains = scales.gains, *__restrict centres = scales.centres;
    for (size_t i = 0; i < count; ++i) channels[i] = dequantised(values[sources[i]], centroids[i], unit, step) * gains[i] + centres[i];
}

KVSTORE_INLINE void add(float* __restrict channels, const float* __restrict means, size_t count) {
    for (size_t i = 0; i < count; ++i) channels[i] += means[i];
}

KVSTORE_INLINE void rotate(float* __restrict first, float* __restrict second, const float* __restrict cosine, const float* __restrict sine, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        const float turned = first[i] * cosine[i] - second[i] * sine[i];
        second[i] = second[i] * cosine[i] + first[i] * sine[i];
        first[i] = turned;
    }
}

KVSTORE_INLINE uint32_t pattern_of(float number) {
    uint32_t out;
    std::memcpy(&out, &number, sizeof out);
    return out;
}

KVSTORE_INLINE float number_of(uint32_t pattern) {
    float out;
    std::memcpy(&out, &pattern, sizeof out);
    return out;
}

KVSTORE_INLINE void to_float32(uint8_t* elements, const float* channels, size_t count) { std::memcpy(elements, channels, count * sizeof(float)); }

// As codecs/floats.py: to nearest, ties to even, and beyond the range to the largest finite number.
KVSTORE_INLINE void to_bfloat16(uint8_t* elements, const float* __restrict channels, size_t count) {
    uint16_t* __restrict out = reinterpret_cast<uint16_t*>(elements);
    for (size_t i = 0; i < count; ++i) {
        const uint32_t pattern = pattern_of(channels[i]);
        const uint32_t rounded = (pattern + (0x7FFFu + (pattern >> 16 & 1))) >> 16;
        const uint16_t element = uint16_t(rounded - ((rounded & 0x7FFF) == 0x7F80));
        std::memcpy(out + i, &element, sizeof element);
    }
}

// A format of fewer bits: adding a power of two whose last bit is worth one step of the result rounds to that step.
template <typename Item, unsigned exponent_bits, unsigned mantissa_bits, uint32_t largest>
KVSTORE_INLINE void to_small(uint8_t* elements, const float* __restrict channels, size_t count, float bound) {
    constexpr uint32_t lowest = 129 - (1u << (exponent_bits - 1));
    Item* __restrict out = reinterpret_cast<Item*>(elements);
    for (size_t i = 0; i < count; ++i) {
        const uint32_t pattern = pattern_of(channels[i]);
        const float magnitude = number_of(pattern & 0x7FFFFFFF);
        const float size = magnitude < bound ? magnitude : bound;
        const uint32_t exponent = pattern_of(size) >> 23 > lowest ? pattern_of(size) >> 23 : lowest;
        const uint32_t magic = (exponent + (23 - mantissa_bits)) << 23;
        const uint32_t steps = pattern_of(size + number_of(magic)) - magic;
        const uint32_t code = ((exponent - lowest) << mantissa_bits) + steps;
        const Item element = Item((code < largest ? code : largest) | pattern >> 31 << (exponent_bits + mantissa_bits));
        std::memcpy(out + i, &element, sizeof element);
    }
}

KVSTORE_INLINE void to_float16(uint8_t* elements, const float* channels, size_t count) { to_small<uint16_t, 5, 10, 0x7BFF>(elements, channels, count, 65504.0f); }
KVSTORE_INLINE void to_float8_e4m3(uint8_t* elements, const float* channels, size_t count) { to_small<uint8_t, 4, 3, 0x7E>(elements, channels, count, 448.0f); }
KVSTORE_INLINE void to_float8_e5m2(uint8_t* elements, const float* channels, size_t count) { to_small<uint8_t, 5, 2, 0x7B>(elements, channels, count, 57344.0f); }

KVSTORE_INLINE bool quantise(int16_t* __restrict values, const float* __restrict numbers, size_t count) {
    constexpr float finest = 27.0f, far = 40000.0f;
    constexpr float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, ties to even, where numbers are not far
    uint32_t outside = 0;
    for (size_t i = 0; i < count; ++i) {
        const float wanted = numbers[i] * finest;
        const bool is_near = wanted > -far && wanted < far;  // not so for NaN
        const float rounded = ((is_near ? wanted : 0.0f) + magic) - magic;
        const int32_t value = int32_t(rounded);
        outside |= uint32_t(!is_near) | uint32_t(value > kValueMax) | uint32_t(value < -kValueMax);
        values[i] = int16_t(value);
    }
    return !outside;
}

KVSTORE_INLINE void coarsen(int16_t* __restrict coarse, const int16_t* __restrict fine, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        const uint16_t size = uint16_t((fine[i] < 0 ? -fine[i] : fine[i]) + 1);
        const uint16_t third = uint16_t(size * 21846u >> 16);
        coarse[i] = int16_t(fine[i] < 0 ? -third : third);
    }
}

KVSTORE_INLINE void pair_symbols(uint8_t* __restrict symbols, const int16_t* __restrict one, const int16_t* __restrict one_above, const int16_t* __restrict other, const int16_t* __restrict other_above, size_t count) {
    if (!other) {
        for (size_t i = 0; i < count; ++i) symbols[i] = uint8_t(mirrored(int16_t(one[i] - 3 * one_above[i]), one_above[i]) + 1 + 3);
        return;
    }
    for (size_t i = 0; i < count; ++i) {
        const int16_t low = mirrored(int16_t(one[i] - 3 * one_above[i]), one_above[i]);
        const int16_t high = mirrored(int16_t(other[i] - 3 * other_above[i]), other_above[i]);
        symbols[i] = uint8_t(low + 1 + 3 * (high + 1));
    }
}

KVSTORE_INLINE void packed_digits(uint8_t* __restrict digits, const int16_t* __restrict values, const int16_t* __restrict above, size_t count) {
    for (size_t i = 0; i < count; ++i) digits[i] = uint8_t(values[i] - 3 * above[i] + 1);
}

template <size_t alphabet>
KVSTORE_INLINE bool first_symbols(uint8_t* __restrict symbols, const int16_t* const* rows, size_t count) {
    constexpr Alphabet own = kAlphabet[alphabet];
    uint8_t outside = 0;
    for (size_t i = 0; i < count; ++i) symbols[i] = uint8_t(own.zero_symbol());
    unsigned weight = 1;
    for (unsigned place = 0; place < own.count && rows[place]; ++place, weight *= own.radix()) {
        const int16_t* __restrict row = rows[place];
        for (size_t i = 0; i < count; ++i) {
            const bool far = row[i] > int(own.limit) || row[i] < -int(own.limit);
            outside |= far;
            symbols[i] = uint8_t(symbols[i] + (far ? 0 : row[i]) * int(weight));
        }
    }
    return outside != 0;
}

#define KVSTORE_LOOPS(isa, attribute)                                                                                                                        \
    attribute void pair_bases_##isa(uint32_t* a, const uint16_t* b, const int16_t* c, const int16_t* d, size_t n, unsigned e) { pair_bases(a, b, c, d, n, e); } \
    attribute void refine_##isa(int16_t* a, int16_t* b, const uint8_t* c, size_t n) { refine(a, b, c, n); }                                                   \
    attribute void refine_packed_##isa(int16_t* a, const int8_t* b, size_t n) { refine_packed(a, b, n); }                                                     \
    attribute void triple_##isa(int16_t* a, size_t n) { triple(a, n); }                                                                                       \
    attribute void first0_##isa(int16_t* const* a, const uint8_t* b, size_t n) { first<0>(a, b, n); }                                                         \
    attribute void first1_##isa(int16_t* const* a, const uint8_t* b, size_t n) { first<1>(a, b, n); }                                                         \
    attribute void first2_##isa(int16_t* const* a, const uint8_t* b, size_t n) { first<2>(a, b, n); }                                                         \
    attribute void dequantise_##isa(float* a, const int16_t* b, const float* c, size_t n, float d, float e) { dequantise(a, b, c, n, d, e); }                 \
    attribute void channels_##isa(float* a, const int16_t* b, const ChannelScales& c, size_t n, float d, float e) { make_channels(a, b, c, n, d, e); }         \
    attribute void add_##isa(float* a, const float* b, size_t n) { add(a, b, n); }                                                                            \
    attribute void rotate_##isa(float* a, float* b, const float* c, const float* d, size_t n) { rotate(a, b, c, d, n); }                                      \
    attribute void to_float32_##isa(uint8_t* a, const float* b, size_t n) { to_float32(a, b, n); }                                                            \
    attribute void to_bfloat16_##isa(uint8_t* a, const float* b, size_t n) { to_bfloat16(a, b, n); }                                                          \
    attribute void to_float16_##isa(uint8_t* a, const float* b, size_t n) { to_float16(a, b, n); }                                                            \
    attribute void to_float8_e4m3_##isa(uint8_t* a, const float* b, size_t n) { to_float8_e4m3(a, b, n); }                                                    \
    attribute void to_float8_e5m2_##isa(uint8_t* a, const float* b, size_t n) { to_float8_e5m2(a, b, n); }                                                    \
    attribute bool quantise_##isa(int16_t* a, const float* b, size_t n) { return quantise(a, b, n); }                                                        \
    attribute void coarsen_##isa(int16_t* a, const int16_t* b, size_t n) { coarsen(a, b, n); }                                                                \
    attribute void pair_symbols_##isa(uint8_t* a, const int16_t* b, const int16_t* c, const int16_t* d, const int16_t* e, size_t n) { pair_symbols(a, b, c, d, e, n); } \
    attribute void digits_##isa(uint8_t* a, const int16_t* b, const int16_t* c, size_t n) { packed_digits(a, b, c, n); }                                      \
    attribute bool first_symbols0_##isa(uint8_t* a, const int16_t* const* b, size_t n) { return first_symbols<0>(a, b, n); }                                  \
    attribute bool first_symbols1_##isa(uint8_t* a, const int16_t* const* b, size_t n) { return first_symbols<1>(a, b, n); }                                  \
    attribute bool first_symbols2_##isa(uint8_t* a, const int16_t* const* b, size_t n) { return first_symbols<2>(a, b, n); }                                  \
    constexpr Loops loops_##isa{pair_bases_##isa,                                                                                                             \
                                refine_##isa,                                                                                                                 \
                                refine_packed_##isa,                                                                                                          \
                                triple_##isa,                                                                                                                 \
                                {first0_##isa, first1_##isa, first2_##isa},                                                                                   \
                                dequantise_##isa,                                                                                                             \
                                channels_##isa,                                                                                                               \
                                add_##isa,                                                                                                                    \
                                rotate_##isa,                                                                                                                 \
                                {to_float32_##isa, to_bfloat16_##isa, to_float16_##isa, to_float8_e4m3_##isa, to_float8_e5m2_##isa},                          \
                                quantise_##isa,                                                                                                               \
                                coarsen_##isa,                                                                                                                \
                                pair_symbols_##isa,                                                                                                           \
                                digits_##isa,                                                                                                                 \
                                {first_symbols0_##isa, first_symbols1_##isa, first_symbols2_##isa}};

KVSTORE_LOOPS(portable, )
#if defined(__x86_64__)
KVSTORE_LOOPS(avx2, __attribute__((target("avx2"))))
KVSTORE_LOOPS(plain512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))

constexpr Loops with_avx512() {
    Loops out = loops_plain512;
    out.pair_bases = avx512::pair_bases;
    out.refine = avx512::refine;
    out.first[0] = avx512::first<0>;
    out.first[1] = avx512::first<1>;
    out.first[2] = avx512::first<2>;
    out.channels = avx512::channels;
    out.refine_packed = avx512::refine_packed;
    out.triple = avx512::triple;
    out.dequantise = avx512::dequantise;
    return out;
}
constexpr Loops loops_avx512 = with_avx512();
#endif

// The named set, or the fastest for nullptr; nullptr if the processor lacks it.
const Loops* find(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if ((!name || std::strcmp(name, "avx512") == 0) && avx512) return &loops_avx512;
    if ((!name || std::strcmp(name, "avx2") == 0) && __builtin_cpu_supports("avx2")) return &loops_avx2;
#elif defined(__aarch64__)
    if (name && std::strcmp(name, "neon") == 0) return &loops_portable;  // compiled for NEON, as everything is there
#endif
    return !name || std::strcmp(name, "scalar") == 0 ? &loops_portable : nullptr;
}

const Loops*& chosen() {
    static const Loops* loops = find(nullptr);
    return loops;
}

}  // namespace

const Loops& loops() { return *chosen(); }

bool use_isa(const char* name) {
    const Loops* found = find(name);
    if (found) chosen() = found;
    return found != nullptr;
}

}  // namespace kvstore::ladder
