// Several small values in one symbol: packing, unpacking.
#include <algorithm>

#include "r32.h"

namespace kvstore::r32 {

namespace {

#define KVSTORE_INLINE inline __attribute__((always_inline))

// The loops are plain so that the compiler vectorises them for each instruction set below. A digit comes from a quotient, found
// by multiplication with ceil(65536 / radix), which is exact for symbols below 256.
constexpr size_t kBlock = 64;  // channels whose rests stay in registers

KVSTORE_INLINE void unpack_block(const Unpacking& how, const uint8_t* symbols, int8_t* values, size_t tokens, size_t count) {
    const size_t stride = how.channels;
    const uint16_t radix = uint16_t(how.radix), zero = uint16_t(how.zero);
    const uint16_t reciprocal = uint16_t(65536 / radix + (65536 % radix != 0));
    uint16_t rest[kBlock];
    for (size_t i = 0; i < count; ++i) rest[i] = symbols[i];
    for (size_t token = 0; token < tokens; ++token, values += stride) {
        for (size_t i = 0; i < count; ++i) {
            const uint16_t quotient = uint16_t(uint32_t(rest[i]) * reciprocal >> 16);
            values[i] = int8_t(rest[i] - quotient * radix - zero);
            rest[i] = quotient;
        }
    }
}

KVSTORE_INLINE void unpack_group(const Unpacking& how, const uint8_t* symbols, int8_t* values, size_t tokens) {
    size_t start = 0;
    const size_t channels = how.channels;
    for (; start + kBlock <= channels; start += kBlock) unpack_block(how, symbols + start, values + start, tokens, kBlock);
    if (start < channels) unpack_block(how, symbols + start, values + start, tokens, channels - start);
}

KVSTORE_INLINE unsigned pack_block(const Unpacking& how, const int8_t* values, uint8_t* symbols, size_t tokens, size_t count) {
    const size_t per_symbol = how.values_per_symbol, stride = how.channels;
    const uint8_t radix = uint8_t(how.radix), digit_max = uint8_t(how.radix - 1), zero = uint8_t(how.zero);
    uint8_t sum[kBlock] = {}, misfit[kBlock] = {};
    for (size_t token = per_symbol; token-- > 0;) {  // the last value has the highest place
        for (size_t i = 0; i < count; ++i) {
            const uint8_t digit = uint8_t((token < tokens ? uint8_t(values[token * stride + i]) : uint8_t{0}) + zero);
            misfit[i] |= uint8_t(digit > digit_max);
            sum[i] = uint8_t(sum[i] * radix + digit);
        }
    }
    unsigned any = 0;
    for (size_t i = 0; i < count; ++i) any |= misfit[i];
    std::copy_n(sum, count, symbols);
    return any;
}

KVSTORE_INLINE unsigned pack_group(const Unpacking& how, const int8_t* values, uint8_t* symbols, size_t tokens) {
    const size_t channels = how.channels;
    size_t start = 0;
    unsigned misfit = 0;
    for (; start + kBlock <= channels; start += kBlock) misfit |= pack_block(how, values + start, symbols + start, tokens, kBlock);
    if (start < channels) misfit |= pack_block(how, values + start, symbols + start, tokens, channels - start);
    return misfit;
}

#define KVSTORE_PACKING(isa, attribute)                                                                              \
    attribute void unpack_##isa(const Unpacking& how, const uint8_t* symbols, int8_t* values, size_t tokens) {        \
        unpack_group(how, symbols, values, tokens);                                                                   \
    }                                                                                                                 \
    attribute unsigned pack_##isa(const Unpacking& how, const int8_t* values, uint8_t* symbols, size_t tokens) {      \
        return pack_group(how, values, symbols, tokens);                                                              \
    }

struct Packing {
    void (*unpack)(const Unpacking&, const uint8_t*, int8_t*, size_t);
    unsigned (*pack)(const Unpacking&, const int8_t*, uint8_t*, size_t);
};

KVSTORE_PACKING(portable, )
#if defined(__x86_64__)
KVSTORE_PACKING(avx2, __attribute__((target("avx2"))))
#endif

Packing best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) return {unpack_avx2, pack_avx2};
#endif
    return {unpack_portable, pack_portable};
}

const Packing packing = best();

// Calls `group(token, tokens)` for each run of tokens that share symbols.
template <typename Group>
void for_each_group(const Unpacking& how, Group group) {
    for (size_t token = 0; token < how.tokens; token += how.values_per_symbol) {
        group(token, std::min<size_t>(how.values_per_symbol, how.tokens - token));
    }
}

}  // namespace

void unpack(const Unpacking& unpacking, const uint8_t* symbols, int8_t* values) {
    for_each_group(unpacking, [&](size_t token, size_t tokens) {
        packing.unpack(unpacking, symbols + token / unpacking.values_per_symbol * unpacking.channels, values + token * unpacking.channels, tokens);
    });
}

bool pack(const Unpacking& unpacking, const int8_t* values, uint8_t* symbols) {
    unsigned misfit = 0;
    for_each_group(unpacking, [&](size_t token, size_t tokens) {
        misfit |= packing.pack(unpacking, values + token * unpacking.channels, symbols + token / unpacking.values_per_symbol * unpacking.channels, tokens);
    });
    return misfit == 0;
}

}  // namespace kvstore::r32
