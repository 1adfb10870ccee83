#include "exponents_loops.h"

#include "exponents.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvstore::exponents {

namespace {

// The loops are plain so that the compiler vectorises them for each instruction set below.
#define KVSTORE_INLINE inline __attribute__((always_inline))

template <typename Item>
KVSTORE_INLINE void merge(uint8_t* elements, const uint8_t* __restrict planes, size_t stride, const uint8_t* __restrict tops, size_t count) {
    constexpr unsigned bits = 8 * sizeof(Item);
    Item* __restrict out = reinterpret_cast<Item*>(elements);
    for (size_t i = 0; i < count; ++i) {
        Item rotated = Item(Item(tops[i]) << (bits - 8));
        for (size_t plane = 0; plane + 1 < sizeof(Item); ++plane) rotated = Item(rotated | Item(Item(planes[plane * stride + i]) << 8 * plane));
        const Item element = Item(Item(rotated >> 1) | Item(rotated << (bits - 1)));
        std::memcpy(out + i, &element, sizeof element);
    }
}

template <typename Item>
KVSTORE_INLINE void split(uint8_t* __restrict planes, size_t stride, uint8_t* __restrict tops, const uint8_t* elements, size_t count) {
    constexpr unsigned bits = 8 * sizeof(Item);
    const Item* __restrict in = reinterpret_cast<const Item*>(elements);
    for (size_t i = 0; i < count; ++i) {
        Item element;
        std::memcpy(&element, in + i, sizeof element);
        const Item rotated = Item(Item(element << 1) | Item(element >> (bits - 1)));
        for (size_t plane = 0; plane + 1 < sizeof(Item); ++plane) planes[plane * stride + i] = uint8_t(rotated >> 8 * plane);
        tops[i] = uint8_t(rotated >> (bits - 8));
    }
}

KVSTORE_INLINE void expand_plain(uint8_t* tops, const uint8_t* codes, size_t count, const uint8_t* codes_to_tops) {
    for (size_t i = 0; i < count; ++i) tops[i] = codes_to_tops[codes[i / 2] >> (i % 2 * 4) & 15];
}

KVSTORE_INLINE bool contract_plain(uint8_t* codes, const uint8_t* tops, size_t count, const uint8_t* tops_to_codes) {
    unsigned seen = 0;
    for (size_t i = 0; i + 1 < count; i += 2) {
        const unsigned first = tops_to_codes[tops[i]], second = tops_to_codes[tops[i + 1]];
        seen |= first | second;
        codes[i / 2] = uint8_t((first & 15) | second << 4);
    }
    if (count % 2) {
        const unsigned last = tops_to_codes[tops[count - 1]];
        seen |= last;
        codes[count / 2] = uint8_t(last & 15);
    }
    return seen > 15;
}

void expand_portable(uint8_t* tops, const uint8_t* codes, size_t count, const uint8_t* codes_to_tops) {
    expand_plain(tops, codes, count, codes_to_tops);
}

bool contract_portable(uint8_t* codes, const uint8_t* tops, size_t count, const uint8_t* tops_to_codes) {
    return contract_plain(codes, tops, count, tops_to_codes);
}

#if defined(__x86_64__)

#define KVSTORE_AVX2 __attribute__((target("avx2")))
#define KVSTORE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi")))

KVSTORE_AVX2 void expand_avx2(uint8_t* tops, const uint8_t* codes, size_t count, const uint8_t* codes_to_tops) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes_to_tops)));
    const __m256i low = _mm256_set1_epi8(15);
    size_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
        const __m256i nibbles = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(tops + i), _mm256_shuffle_epi8(table, nibbles));
    }
    expand_plain(tops + i, codes + i / 2, count - i, codes_to_tops);
}

KVSTORE_AVX512 void expand_avx512(uint8_t* tops, const uint8_t* codes, size_t count, const uint8_t* codes_to_tops) {
    const __m512i table = _mm512_maskz_broadcast_i32x4(__mmask16(0xffff), _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes_to_tops)));
    const __m512i low = _mm512_set1_epi8(15);
    size_t i = 0;
    for (; i + 64 <= count; i += 64) {
        const __m512i pairs = _mm512_maskz_cvtepu8_epi16(~__mmask32{0}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i / 2)));
        const __m512i nibbles = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), low);
        _mm512_storeu_si512(tops + i, _mm512_shuffle_epi8(table, nibbles));
    }
    expand_plain(tops + i, codes + i / 2, count - i, codes_to_tops);
}

KVSTORE_AVX512 bool contract_avx512(uint8_t* codes, const uint8_t* tops, size_t count, const uint8_t* tops_to_codes) {
    const __m512i quarters[4] = {_mm512_loadu_si512(tops_to_codes), _mm512_loadu_si512(tops_to_codes + 64),
                                 _mm512_loadu_si512(tops_to_codes + 128), _mm512_loadu_si512(tops_to_codes + 192)};
    __m512i seen = _mm512_setzero_si512();
    size_t i = 0;
    for (; i + 64 <= count; i += 64) {
        const __m512i index = _mm512_loadu_si512(tops + i);
        const __m512i near = _mm512_permutex2var_epi8(quarters[0], index, quarters[1]);
        const __m512i far = _mm512_permutex2var_epi8(quarters[2], index, quarters[3]);
        const __m512i found = _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), near, far);
        seen = _mm512_or_si512(seen, found);
        const __m512i nibbles = _mm512_and_si512(found, _mm512_set1_epi8(15));
        const __m512i pairs = _mm512_or_si512(nibbles, _mm512_srli_epi16(nibbles, 4));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i / 2), _mm512_maskz_cvtepi16_epi8(~__mmask32{0}, pairs));
    }
    const bool rest = contract_plain(codes + i / 2, tops + i, count - i, tops_to_codes);
    return rest || _mm512_test_epi8_mask(seen, _mm512_set1_epi8(16)) != 0;
}

#endif

#define KVSTORE_PLANES(isa, attribute, Item, bytes)                                                                                          \
    attribute void merge##bytes##_##isa(uint8_t* elements, const uint8_t* planes, size_t stride, const uint8_t* tops, size_t count) {         \
        merge<Item>(elements, planes, stride, tops, count);                                                                                   \
    }                                                                                                                                         \
    attribute void split##bytes##_##isa(uint8_t* planes, size_t stride, uint8_t* tops, const uint8_t* elements, size_t count) {               \
        split<Item>(planes, stride, tops, elements, count);                                                                                   \
    }
#define KVSTORE_LOOPS(isa, attribute, expand, contract)                                   \
    KVSTORE_PLANES(isa, attribute, uint8_t, 1)                                            \
    KVSTORE_PLANES(isa, attribute, uint16_t, 2)                                           \
    KVSTORE_PLANES(isa, attribute, uint32_t, 4)                                           \
    constexpr Loops loops_##isa{expand,                                                   \
                                contract,                                                 \
                                {nullptr, merge1_##isa, merge2_##isa, nullptr, merge4_##isa}, \
                                {nullptr, split1_##isa, split2_##isa, nullptr, split4_##isa}};

KVSTORE_LOOPS(portable, , expand_portable, contract_portable)
#if defined(__x86_64__)
KVSTORE_LOOPS(avx2, KVSTORE_AVX2, expand_avx2, contract_portable)
KVSTORE_LOOPS(avx512, KVSTORE_AVX512, expand_avx512, contract_avx512)
#endif

// The named set, or the fastest for nullptr; nullptr if the processor lacks it.
const Loops* find(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi");
    if ((!name || std::strcmp(name, "avx512") == 0) && avx512) return &loops_avx512;
    if ((!name || std::strcmp(name, "avx2") == 0) && __builtin_cpu_supports("avx2")) return &loops_avx2;
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

}  // namespace kvstore::exponents
