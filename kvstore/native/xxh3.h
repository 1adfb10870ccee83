// XXH3-64 (seed 0, default secret) as a stream along one contiguous buffer, optionally fused with a copy.
//
// Written from the specification: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore {

constexpr size_t kStripeBytes = 64;
constexpr size_t kSecretBytes = 192;
constexpr size_t kStripesPerBlock = (kSecretBytes - kStripeBytes) / 8;

extern const uint8_t kSecret[kSecretBytes];

// Accumulators of the long form (more than 240 bytes), and the next stripe's place in its block.
struct Accumulators {
    alignas(64) uint64_t lane[8];
    size_t stripe;

    Accumulators();
};

// What `consume` does with the bytes it hashes.
enum class Store {
    kNone,    // hash only
    kCached,  // copy with ordinary stores
    kStream,  // copy with non-temporal stores; the target is 64-byte aligned
};

// Hash `stripes` stripes from `source` into `acc` and store them to `target` as `store` says.
// Every byte is loaded once. After kStream the caller must call `stream_fence`.
void consume(Accumulators& acc, uint8_t* target, const uint8_t* source, size_t stripes, Store store);

// Make non-temporal stores visible before anything that follows.
void stream_fence();

// Hash of `nbytes` bytes.
uint64_t xxh3(const uint8_t* data, size_t nbytes);

// Copy `nbytes` bytes (not overlapping) and hash them.
uint64_t copy_xxh3(uint8_t* target, const uint8_t* source, size_t nbytes);

// Stripes that go through `consume` when `nbytes` > 240 are hashed; `finish` takes the 1 to 64 bytes behind them.
inline size_t full_stripes(size_t nbytes) { return (nbytes - 1) / kStripeBytes; }

// The hash, once all full stripes of the `nbytes` at `data` were consumed.
uint64_t finish(Accumulators& acc, const uint8_t* data, size_t nbytes);

// Up to this many bytes the whole input is hashed at once, by `xxh3`.
constexpr size_t kShortBytesMax = 240;

// Copies from this size on bypass the cache. A layer group of a large model is this long, and comes from and goes to memory
// that is not cached: measured there, a third faster, and still faster when the copy is read right afterwards. Repeated
// copies inside the cache lose instead, which is why memcpy changes over later.
constexpr size_t kStreamBytesMin = size_t{1} << 20;

inline bool can_stream(const uint8_t* target) { return reinterpret_cast<uintptr_t>(target) % kStripeBytes == 0; }

// Instruction set in use: "avx512", "avx2" or "scalar".
const char* isa();

// Use another instruction set; false if this processor or build lacks it.
bool use_isa(const char* name);

}  // namespace kvstore
