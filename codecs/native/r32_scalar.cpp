// R32 steps in portable C++: what the vector kernels must equal, and what other processors run.
#include <cstring>

#include "r32_kernels.h"
#include "r32_step.h"

namespace kvstore::r32 {

namespace {

uint32_t look_up(const uint32_t* tables, uint32_t base, uint32_t slot) { return tables[base | slot]; }

uint32_t look_up(const DigitTables* tables, uint32_t base, uint32_t slot) {
    const DigitTable& table = tables->rows[base >> kDigitBits];
    size_t symbol = 0;
    for (const int16_t below : table.below) symbol += below < int(slot);
    return table.entries[symbol] + (slot << 20);
}

template <unsigned lanes, typename Table>
void decode_one(DecodeTile& tile, const Table* tables) {
    const uint8_t* words = tile.words;
    do {
        for (unsigned lane = 0; lane < lanes; ++lane) {
            const uint32_t entry = look_up(tables, tile.row[lane], tile.state[lane] & (kSlots - 1));
            const uint32_t state = decode_state(tile.state[lane], entry);
            uint16_t word;
            std::memcpy(&word, words, sizeof word);
            const uint32_t low = state < kStateMin;  // no branch: it could not be predicted
            tile.state[lane] = state << 16 * low | (word & (0 - low));
            words += 2 * low;
            tile.symbols[lane] = uint8_t(entry);
        }
        tile.symbols += lanes;
        tile.row += lanes;
        if (tile.row == tile.rows_end) tile.row = tile.rows;
    } while (--tile.steps > 0 && words <= tile.limit);
    tile.words = words;
}

template <unsigned lanes, size_t count, typename Table>
void decode(DecodeTile* const* tiles, const Table* tables) {
    for (size_t i = 0; i < count; ++i) decode_one<lanes>(*tiles[i], tables);
}

template <unsigned lanes>
void encode(EncodeTile& tile, const uint64_t* tables) {
    uint8_t* words = tile.words;
    const uint8_t* symbols = tile.symbols + tile.steps * lanes;
    for (; tile.steps > 0; --tile.steps) {
        symbols -= lanes;
        for (unsigned lane = lanes; lane-- > 0;) {
            const uint64_t entry = tables[tile.row[lane] | symbols[lane]];
            tile.missing |= !has_entry(entry);
            tile.state[lane] = encode_state(tile.state[lane], entry, words);
        }
        tile.row = (tile.row == tile.rows ? tile.rows_end : tile.row) - lanes;
    }
    tile.words = words;
}

}  // namespace

const Kernels kScalar{"scalar",
                      {{decode<8, 1>, decode<8, 2>, decode<8, 4>, decode<8, 8>},
                       {decode<16, 1>, decode<16, 2>, decode<16, 4>, nullptr},
                       {decode<32, 1>, decode<32, 2>, nullptr, nullptr}},
                      {{decode<8, 1>, decode<8, 2>, decode<8, 4>, decode<8, 8>},
                       {decode<16, 1>, decode<16, 2>, decode<16, 4>, nullptr},
                       {decode<32, 1>, decode<32, 2>, nullptr, nullptr}},
                      {encode<8>, encode<16>, encode<32>}};

}  // namespace kvstore::r32
