// The inner loops of XXH3, one per instruction set, chosen once at run time.
#include <cstring>

#include "xxh3.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own AVX-512 header
#endif
#include <immintrin.h>
#endif

namespace kvstore {

namespace {

constexpr uint32_t kPrime32_1 = 0x9E3779B1;
constexpr const uint8_t* kScrambleSecret = kSecret + kSecretBytes - kStripeBytes;

// Streaming copies read this far ahead of the hardware prefetchers, which stop at page ends. Measured: it helps them by a
// sixth and slows the others.
constexpr size_t kPrefetchBytes = 2048;

using Consume = void (*)(Accumulators&, uint8_t*, const uint8_t*, size_t, Store);

// Calls `run(stripes from here, first stripe's place in its block)` up to each block's end, and `scramble` at block ends.
#define KVSTORE_FOR_EACH_RUN(acc, stripes, run, scramble)                          \
    while (stripes > 0) {                                                          \
        const size_t left = kStripesPerBlock - acc.stripe;                         \
        const size_t count = stripes < left ? stripes : left;                      \
        run;                                                                       \
        stripes -= count;                                                          \
        acc.stripe += count;                                                       \
        if (acc.stripe == kStripesPerBlock) {                                      \
            scramble;                                                              \
            acc.stripe = 0;                                                        \
        }                                                                          \
    }

uint64_t load64(const uint8_t* from) {
    uint64_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// The lanes are local, or the compiler would store them after every stripe lest `target` point at them.
void consume_scalar(Accumulators& acc, uint8_t* target, const uint8_t* source, size_t stripes, Store store) {
    uint64_t lane[8];
    std::memcpy(lane, acc.lane, sizeof lane);
    KVSTORE_FOR_EACH_RUN(
        acc, stripes,
        {
            for (size_t at = 0; at < count; ++at) {
                const uint8_t* stripe = source + at * kStripeBytes;
                const uint8_t* secret = kSecret + 8 * (acc.stripe + at);
                for (size_t i = 0; i < 8; ++i) {
                    const uint64_t value = load64(stripe + 8 * i);
                    const uint64_t keyed = value ^ load64(secret + 8 * i);
                    lane[i ^ 1] += value;
                    lane[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
                }
            }
            if (store != Store::kNone) {
                std::memcpy(target, source, count * kStripeBytes);
                target += count * kStripeBytes;
            }
            source += count * kStripeBytes;
        },
        {
            for (size_t i = 0; i < 8; ++i) {
                lane[i] = (lane[i] ^ lane[i] >> 47 ^ load64(kScrambleSecret + 8 * i)) * kPrime32_1;
            }
        })
    std::memcpy(acc.lane, lane, sizeof lane);
}

#if defined(__x86_64__)

#define KVSTORE_AVX512 __attribute__((target("avx512f,avx512dq")))
#define KVSTORE_AVX2 __attribute__((target("avx2")))

inline void prefetch(const uint8_t* source) {
    _mm_prefetch(reinterpret_cast<const char*>(source + kPrefetchBytes), _MM_HINT_T0);
}

template <Store store>
KVSTORE_AVX512 inline __m512i step_avx512(__m512i lane, uint8_t* target, const uint8_t* source, __m512i secret) {
    if (store == Store::kStream) prefetch(source);
    const __m512i value = _mm512_loadu_si512(source);
    const __m512i keyed = _mm512_xor_si512(value, secret);
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    const __m512i swapped = _mm512_shuffle_epi32(value, _MM_PERM_BADC);
    if (store == Store::kCached) _mm512_storeu_si512(target, value);
    if (store == Store::kStream) _mm512_stream_si512(reinterpret_cast<__m512i*>(target), value);
    return _mm512_add_epi64(lane, _mm512_add_epi64(product, swapped));
}

KVSTORE_AVX512 inline __m512i scramble_avx512(__m512i lane) {
    lane = _mm512_xor_si512(lane, _mm512_srli_epi64(lane, 47));
    lane = _mm512_xor_si512(lane, _mm512_loadu_si512(kScrambleSecret));
    return _mm512_mullo_epi64(lane, _mm512_set1_epi64(kPrime32_1));
}

template <Store store>
KVSTORE_AVX512 void consume_avx512_as(Accumulators& acc, uint8_t* target, const uint8_t* source, size_t stripes) {
    const size_t step = store == Store::kNone ? 0 : kStripeBytes;
    __m512i lane = _mm512_load_si512(acc.lane);
    if (acc.stripe == 0 && stripes >= kStripesPerBlock) {
        __m512i secrets[kStripesPerBlock];  // in registers: most of these loads would cross a cache line
        for (size_t i = 0; i < kStripesPerBlock; ++i) secrets[i] = _mm512_loadu_si512(kSecret + 8 * i);
        for (; stripes >= kStripesPerBlock; stripes -= kStripesPerBlock) {
#pragma GCC unroll 16
            for (size_t i = 0; i < kStripesPerBlock; ++i, source += kStripeBytes, target += step) {
                lane = step_avx512<store>(lane, target, source, secrets[i]);
            }
            lane = scramble_avx512(lane);
        }
    }
    KVSTORE_FOR_EACH_RUN(
        acc, stripes,
        {
            const uint8_t* secret = kSecret + 8 * acc.stripe;
            for (size_t i = 0; i < count; ++i, source += kStripeBytes, target += step) {
                lane = step_avx512<store>(lane, target, source, _mm512_loadu_si512(secret + 8 * i));
            }
        },
        lane = scramble_avx512(lane))
    _mm512_store_si512(acc.lane, lane);
}

KVSTORE_AVX2 inline __m256i accumulate_avx2(__m256i lane, __m256i value, const uint8_t* secret) {
    const __m256i keyed = _mm256_xor_si256(value, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret)));
    const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    const __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(lane, _mm256_add_epi64(product, swapped));
}

KVSTORE_AVX2 inline __m256i scramble_avx2(__m256i lane, const uint8_t* secret) {
    const __m256i prime = _mm256_set1_epi64x(kPrime32_1);
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret));
    lane = _mm256_xor_si256(_mm256_xor_si256(lane, _mm256_srli_epi64(lane, 47)), key);
    const __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(lane, 32), prime), 32);
    return _mm256_add_epi64(_mm256_mul_epu32(lane, prime), high);
}

template <Store store>
KVSTORE_AVX2 inline void put_avx2(uint8_t* target, __m256i value) {
    if (store == Store::kCached) _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), value);
    if (store == Store::kStream) _mm256_stream_si256(reinterpret_cast<__m256i*>(target), value);
}

template <Store store>
KVSTORE_AVX2 void consume_avx2_as(Accumulators& acc, uint8_t* target, const uint8_t* source, size_t stripes) {
    __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(acc.lane));
    __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(acc.lane + 4));
    KVSTORE_FOR_EACH_RUN(
        acc, stripes,
        {
            const uint8_t* secret = kSecret + 8 * acc.stripe;
            for (size_t i = 0; i < count; ++i, source += kStripeBytes, secret += 8) {
                if (store == Store::kStream) prefetch(source);
                const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
                const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + 32));
                low = accumulate_avx2(low, first, secret);
                high = accumulate_avx2(high, second, secret + 32);
                put_avx2<store>(target, first);
                put_avx2<store>(target + 32, second);
                if (store != Store::kNone) target += kStripeBytes;
            }
        },
        {
            low = scramble_avx2(low, kScrambleSecret);
            high = scramble_avx2(high, kScrambleSecret + 32);
        })
    _mm256_store_si256(reinterpret_cast<__m256i*>(acc.lane), low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(acc.lane + 4), high);
}

void consume_avx512(Accumulators& acc, uint8_t* target, const uint8_t* source, size_t stripes, Store store) {
    if (store == Store::kNone) consume_avx512_as<Store::kNone>(acc, target, source, stripes);
    if (store == Store::kCached) consume_avx512_as<Store::kCached>(acc, target, source, stripes);
    if (store == Store::kStream) consume_avx512_as<Store::kStream>(acc, target, source, stripes);
}

void consume_avx2(Accumulators& acc, uint8_t* target, const uint8_t* source, size_t stripes, Store store) {
    if (store == Store::kNone) consume_avx2_as<Store::kNone>(acc, target, source, stripes);
    if (store == Store::kCached) consume_avx2_as<Store::kCached>(acc, target, source, stripes);
    if (store == Store::kStream) consume_avx2_as<Store::kStream>(acc, target, source, stripes);
}

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
bool has_avx2() { return __builtin_cpu_supports("avx2"); }

#endif

struct Choice {
    const char* name;
    Consume consume;
};

// Fastest first; the last runs everywhere.
Choice best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (has_avx512()) return {"avx512", consume_avx512};
    if (has_avx2()) return {"avx2", consume_avx2};
#endif
    return {"scalar", consume_scalar};
}

Choice chosen = best();

}  // namespace

void consume(Accumulators& acc, uint8_t* target, const uint8_t* source, size_t stripes, Store store) {
    chosen.consume(acc, target, source, stripes, store);
}

void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

const char* isa() { return chosen.name; }

bool use_isa(const char* name) {
    if (std::strcmp(name, "scalar") == 0) {
        chosen = {"scalar", consume_scalar};
        return true;
    }
#if defined(__x86_64__)
    if (std::strcmp(name, "avx512") == 0 && has_avx512()) {
        chosen = {"avx512", consume_avx512};
        return true;
    }
    if (std::strcmp(name, "avx2") == 0 && has_avx2()) {
        chosen = {"avx2", consume_avx2};
        return true;
    }
#endif
    return false;
}

}  // namespace kvstore
