// XXH3-64: inputs of up to 240 bytes, and the ends of longer ones.
#include "xxh3.h"

#include <cstring>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "kvstore's formats and kernels are little-endian");

namespace kvstore {

alignas(64) const uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

namespace {

constexpr uint64_t kPrime32_1 = 0x9E3779B1;
constexpr uint64_t kPrime32_2 = 0x85EBCA77;
constexpr uint64_t kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87;
constexpr uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9;
constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63;
constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t kPrimeMx1 = 0x165667919E3779F9;
constexpr uint64_t kPrimeMx2 = 0x9FB21C651E98DF25;

template <typename T>
T load(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

uint64_t rotate_left(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

uint64_t fold_product(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t avalanche(uint64_t hash) {
    hash ^= hash >> 37;
    hash *= kPrimeMx1;
    return hash ^ hash >> 32;
}

uint64_t avalanche_xxh64(uint64_t hash) {
    hash ^= hash >> 33;
    hash *= kPrime64_2;
    hash ^= hash >> 29;
    hash *= kPrime64_3;
    return hash ^ hash >> 32;
}

uint64_t mix16(const uint8_t* data, const uint8_t* secret) {
    return fold_product(load<uint64_t>(data) ^ load<uint64_t>(secret), load<uint64_t>(data + 8) ^ load<uint64_t>(secret + 8));
}

uint64_t hash_0_to_16(const uint8_t* data, size_t n) {
    if (n > 8) {
        const uint64_t low = load<uint64_t>(data) ^ load<uint64_t>(kSecret + 24) ^ load<uint64_t>(kSecret + 32);
        const uint64_t high = load<uint64_t>(data + n - 8) ^ load<uint64_t>(kSecret + 40) ^ load<uint64_t>(kSecret + 48);
        return avalanche(n + __builtin_bswap64(low) + high + fold_product(low, high));
    }
    if (n >= 4) {
        const uint64_t both = uint64_t{load<uint32_t>(data)} << 32 | load<uint32_t>(data + n - 4);
        uint64_t hash = both ^ load<uint64_t>(kSecret + 8) ^ load<uint64_t>(kSecret + 16);
        hash ^= rotate_left(hash, 49) ^ rotate_left(hash, 24);
        hash *= kPrimeMx2;
        hash ^= (hash >> 35) + n;
        hash *= kPrimeMx2;
        return hash ^ hash >> 28;
    }
    if (n > 0) {
        const uint32_t combined = uint32_t{data[0]} << 16 | uint32_t{data[n >> 1]} << 24 | data[n - 1] | uint32_t(n) << 8;
        return avalanche_xxh64(combined ^ load<uint32_t>(kSecret) ^ load<uint32_t>(kSecret + 4));
    }
    return avalanche_xxh64(load<uint64_t>(kSecret + 56) ^ load<uint64_t>(kSecret + 64));
}

uint64_t hash_17_to_128(const uint8_t* data, size_t n) {
    uint64_t hash = n * kPrime64_1;
    for (size_t i = (n - 1) / 32 + 1; i-- > 0;) {
        hash += mix16(data + 16 * i, kSecret + 32 * i);
        hash += mix16(data + n - 16 * (i + 1), kSecret + 32 * i + 16);
    }
    return avalanche(hash);
}

uint64_t hash_129_to_240(const uint8_t* data, size_t n) {
    uint64_t hash = n * kPrime64_1;
    for (size_t i = 0; i < 8; ++i) hash += mix16(data + 16 * i, kSecret + 16 * i);
    hash = avalanche(hash);
    for (size_t i = 8; i < n / 16; ++i) hash += mix16(data + 16 * i, kSecret + 16 * (i - 8) + 3);
    return avalanche(hash + mix16(data + n - 16, kSecret + 136 - 17));
}

uint64_t hash_short(const uint8_t* data, size_t n) {
    if (n <= 16) return hash_0_to_16(data, n);
    return n <= 128 ? hash_17_to_128(data, n) : hash_129_to_240(data, n);
}

}  // namespace

Accumulators::Accumulators()
    : lane{kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1}, stripe(0) {}

uint64_t finish(Accumulators& acc, const uint8_t* data, size_t nbytes) {
    const uint8_t* last = data + nbytes - kStripeBytes;
    for (size_t i = 0; i < 8; ++i) {
        const uint64_t value = load<uint64_t>(last + 8 * i);
        const uint64_t keyed = value ^ load<uint64_t>(kSecret + kSecretBytes - kStripeBytes - 7 + 8 * i);
        acc.lane[i ^ 1] += value;
        acc.lane[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
    }
    uint64_t hash = nbytes * kPrime64_1;
    for (size_t i = 0; i < 8; i += 2) {
        const uint8_t* secret = kSecret + 11 + 8 * i;
        hash += fold_product(acc.lane[i] ^ load<uint64_t>(secret), acc.lane[i + 1] ^ load<uint64_t>(secret + 8));
    }
    return avalanche(hash);
}

uint64_t xxh3(const uint8_t* data, size_t nbytes) {
    if (nbytes <= kShortBytesMax) return hash_short(data, nbytes);
    Accumulators acc;
    consume(acc, nullptr, data, full_stripes(nbytes), Store::kNone);
    return finish(acc, data, nbytes);
}

uint64_t copy_xxh3(uint8_t* target, const uint8_t* source, size_t nbytes) {
    if (nbytes <= kShortBytesMax) {
        if (nbytes) std::memcpy(target, source, nbytes);
        return hash_short(source, nbytes);
    }
    Accumulators acc;
    const size_t stripes = full_stripes(nbytes);
    const Store store = nbytes >= kStreamBytesMin && can_stream(target) ? Store::kStream : Store::kCached;
    consume(acc, target, source, stripes, store);
    if (store == Store::kStream) stream_fence();
    std::memcpy(target + stripes * kStripeBytes, source + stripes * kStripeBytes, nbytes - stripes * kStripeBytes);
    return finish(acc, source, nbytes);
}

}  // namespace kvstore
