// R32: interleaved rANS over tiles of byte symbols. The stream is described in docs/format.md, "R32 stream".
//
// Everything here takes memory it may use and trusts no byte of a stream: decoding reads and writes nothing outside the
// memory it was given, whatever the bytes and the tables are, and answers for each tile whether it was whole.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore::r32 {

constexpr unsigned kSlotBits = 12;
constexpr uint32_t kSlots = 1u << kSlotBits;
constexpr uint32_t kStateMin = 1u << 16;
constexpr unsigned kLanesMax = 32;
constexpr size_t kSymbols = 256;
constexpr size_t kThreadsMax = 64;

// Tiles that are coded by one call. Symbol i of a tile belongs to lane i % lanes of step i / lanes, and is coded with the
// table ids[tile][step % period][lane]; an axis of ids with one row serves every tile, or every lane.
struct Batch {
    size_t tiles;
    const uint32_t* counts;  // symbols of each tile
    unsigned lanes;          // 8, 16 or 32
    const uint16_t* ids;     // shape (id_tiles, period, id_lanes); each below the number of tables
    size_t id_tiles;         // 1 or tiles
    size_t period;           // at least 1
    size_t id_lanes;         // 1 or lanes
};

// Most bytes that a tile of `count` symbols can have.
inline size_t tile_bytes_max(size_t count, unsigned lanes) { return 4 * (count < lanes ? count : lanes) + 2 * count; }

// How symbols become values: symbol = sum of (value[i] + zero) * radix^i over `values_per_symbol` consecutive tokens of one
// channel; symbols lie in the order token group, channel. radix^values_per_symbol is at most 256.
struct Unpacking {
    unsigned radix;
    unsigned values_per_symbol;
    int zero;
    size_t tokens;
    size_t channels;
};

// Decode every tile: tile i is the `lengths[i]` bytes behind those of tile i - 1, and its symbols go behind those of
// tile i - 1 to `symbols`. `tables` has 4096 entries a table: symbol | (frequency - 1) << 8 | (slot - start) << 20.
// Sets ok[i] to 1 if tile i was whole, else to 0, and then its symbols are unspecified. Throws std::bad_alloc.
void decode(const Batch& batch, const uint32_t* tables, const uint8_t* stream, const uint32_t* lengths, uint8_t* symbols, uint8_t* ok, size_t threads);

// The same, and unpack each tile to `tokens` x `channels` values. Every tile has channels * ceil(tokens / values_per_symbol)
// symbols.
void decode_values(const Batch& batch, const uint32_t* tables, const uint8_t* stream, const uint32_t* lengths, const Unpacking& unpacking, int8_t* values, uint8_t* ok, size_t threads);

// Encode every tile to `stream`, which has room for the sum of tile_bytes_max; writes lengths[i]. `tables` has 256 entries a
// table, see tables.py. Answers the bytes of all tiles, or SIZE_MAX if a tile has a symbol that its table lacks.
// Throws std::bad_alloc.
size_t encode(const Batch& batch, const uint64_t* tables, const uint8_t* symbols, uint8_t* stream, uint32_t* lengths, size_t threads);

// A table of symbols 0 to 8 in one line of the cache, where 16 KiB a table would be too much: the symbol of a slot is the number
// of `below` that are less than it, and its entry is entries[symbol] + (slot << 20).
constexpr size_t kDigitSymbols = 9;
struct alignas(64) DigitTable {
    int16_t below[kDigitSymbols - 1];
    uint32_t entries[kDigitSymbols];
};

constexpr size_t kDigitTablesMax = 96;

// Tables of digits, by number. `cuts` has the same for vectors of tables: below[i] + 1 of each.
struct DigitTables {
    DigitTable rows[kDigitTablesMax];
    alignas(64) uint16_t cuts[kDigitSymbols - 1][kDigitTablesMax];

    // Set one from the decoder entries of a table; false if it has other symbols.
    bool set(size_t number, const uint32_t* table);
};

// The base of a table of digits is its number shifted by this: its bytes from the first one, in the high half.
constexpr unsigned kDigitBits = 16 + 6;
static_assert(sizeof(DigitTable) == 1u << (kDigitBits - 16));

// A tile whose symbols have tables of their own. Its first `digits` symbols, whole steps, have digit tables' bases. For the other symbols bases[i] is the first entry of their table.
// `bases` has whole steps too: `count` rounded up to a multiple of the lanes; those behind the last symbol are any table's.
struct Tile {
    const uint8_t* stream;
    size_t nbytes;
    size_t count;
    size_t digits;
    const uint32_t* bases;
    uint8_t* symbols;
    bool ok;  // set by decode_tiles: whether it was whole
};

// Decode tiles on this thread. Throws std::bad_alloc.
void decode_tiles(Tile* tiles, size_t count, unsigned lanes, const uint32_t* tables, const DigitTables& digit_tables);

// Encode a tile of at least one symbol, all with bases of the second kind, so that it ends at `room_end`, below which there are tile_bytes_max bytes. Answers its
// bytes, or 0 if a symbol has no entry in its table.
size_t encode_tile(size_t count, unsigned lanes, const uint32_t* bases, const uint64_t* tables, const uint8_t* symbols, uint8_t* room_end);

// Undo the packing of one tile.
void unpack(const Unpacking& unpacking, const uint8_t* symbols, int8_t* values);

// Pack tokens x channels values to symbols, behind the last token with zeros; false if a value does not fit its digit.
bool pack(const Unpacking& unpacking, const int8_t* values, uint8_t* symbols);

// Instruction set in use ("avx512", "avx2", "neon" or "scalar"), and use another; false if the processor lacks it.
const char* isa();
bool use_isa(const char* name);

}  // namespace kvstore::r32
