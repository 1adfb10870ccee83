// The inner loops of R32, one set per instruction set: whole steps only, while enough words are left.
#pragma once

#include <cstddef>
#include <cstdint>

#include "r32.h"

namespace kvstore::r32 {

// A tile being decoded. A kernel runs at least one step, then on while steps are left and words <= limit; every step may
// read 2 * lanes bytes at `words`.
struct DecodeTile {
    alignas(64) uint32_t state[32];
    const uint8_t* words;
    const uint8_t* limit;
    uint8_t* symbols;
    size_t steps;
    const uint32_t* row;        // table bases of the next step: `lanes` indices into the tables
    const uint32_t* rows;       // the first row
    const uint32_t* rows_end;   // behind the last row
};

// A tile being encoded, from its last whole step to its first. Words are written below `words`, at most one a symbol; a
// kernel may also overwrite the 2 * lanes bytes below them.
struct EncodeTile {
    alignas(64) uint32_t state[32];
    uint8_t* words;
    const uint8_t* symbols;     // of the first step
    size_t steps;
    const uint32_t* row;        // table bases of the last step
    const uint32_t* rows;
    const uint32_t* rows_end;
    bool missing;               // set if a symbol had no entry
};

// Tiles that are decoded together: a step of one tile waits for itself most of the time.
constexpr size_t kLanesTogether = 64;
constexpr size_t kTilesTogetherMax = kLanesTogether / 8;
constexpr size_t kCounts = 4;

template <typename Table>
using DecodeKernel = void (*)(DecodeTile* const*, const Table*);

// Indexed by lanes / 16: 8, 16 and 32 lanes; and decoding by how many tiles at once: 1, 2, 4, 8, of at most kLanesTogether lanes.
// Eight lanes fill half a register of AVX-512, which leaves them to AVX2.
struct Kernels {
    const char* name;
    DecodeKernel<uint32_t> decode[3][kCounts];
    DecodeKernel<DigitTables> decode_digits[3][kCounts];
    void (*encode[3])(EncodeTile&, const uint64_t*);
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

// The set in use.
const Kernels& kernels();

}  // namespace kvstore::r32
