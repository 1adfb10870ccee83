// R32 encoding of batches. Each tile is written backwards into room for its worst case, then all are moved together.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "r32.h"
#include "r32_kernels.h"
#include "r32_step.h"
#include "r32_threads.h"

namespace kvstore::r32 {

namespace {

constexpr unsigned kEntryBits = 8;

// Encode one tile of at least one symbol with rows of table bases that repeat when they end.
size_t encode_rows(size_t count, unsigned lanes, const uint32_t* rows, const uint32_t* rows_end, const Kernels& kernels, const uint64_t* tables, const uint8_t* symbols, uint8_t* room_end) {
    const size_t stored = std::min<size_t>(count, lanes);
    EncodeTile tile;
    std::fill(tile.state, tile.state + kLanesMax, kStateMin);
    tile.words = room_end;
    tile.symbols = symbols;
    tile.steps = count / lanes;
    tile.missing = false;
    tile.rows = rows;
    tile.rows_end = rows_end;
    const auto row_of = [&](size_t step) { return rows + step * lanes % size_t(rows_end - rows); };
    const uint8_t* last = symbols + tile.steps * lanes;
    const uint32_t* last_row = row_of(tile.steps);
    for (size_t lane = count % lanes; lane-- > 0;) {
        const uint64_t entry = tables[last_row[lane] | last[lane]];
        tile.missing |= !has_entry(entry);
        tile.state[lane] = encode_state(tile.state[lane], entry, tile.words);
    }
    if (tile.steps) {
        tile.row = row_of(tile.steps - 1);
        kernels.encode[lanes / 16](tile, tables);
    }
    if (tile.missing) return 0;
    std::memcpy(tile.words - 4 * stored, tile.state, 4 * stored);
    return size_t(room_end - tile.words) + 4 * stored;
}

}  // namespace

size_t encode(const Batch& batch, const uint64_t* tables, const uint8_t* symbols, uint8_t* stream, uint32_t* lengths, size_t threads) {
    threads = threads_for(batch.tiles, threads);
    std::vector<size_t> symbol_starts(batch.tiles), room_ends(batch.tiles);
    size_t symbol_start = 0, room_end = 0;
    for (size_t i = 0; i < batch.tiles; ++i) {
        symbol_starts[i] = symbol_start;
        symbol_start += batch.counts[i];
        room_ends[i] = room_end += tile_bytes_max(batch.counts[i], batch.lanes);
    }
    std::vector<std::unique_ptr<Rows>> rows(threads);
    for (auto& own : rows) own = std::make_unique<Rows>(batch, kEntryBits);
    const Kernels& chosen = kernels();
    std::atomic<size_t> next{0};
    std::atomic<bool> missing{false};
    in_parallel(threads, [&](size_t thread) {
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < batch.tiles;) {
            lengths[i] = 0;
            if (!batch.counts[i]) continue;
            Rows& own = *rows[thread];
            own.use(i);
            lengths[i] = uint32_t(encode_rows(batch.counts[i], batch.lanes, own.begin(), own.end(), chosen, tables, symbols + symbol_starts[i], stream + room_ends[i]));
            if (!lengths[i]) missing = true;
        }
    });
    if (missing) return SIZE_MAX;
    size_t end = 0;
    for (size_t i = 0; i < batch.tiles; ++i) {
        if (lengths[i]) std::memmove(stream + end, stream + room_ends[i] - lengths[i], lengths[i]);
        end += lengths[i];
    }
    return end;
}

size_t encode_tile(size_t count, unsigned lanes, const uint32_t* bases, const uint64_t* tables, const uint8_t* symbols, uint8_t* room_end) {
    return encode_rows(count, lanes, bases, bases + (count + lanes - 1) / lanes * lanes, kernels(), tables, symbols, room_end);
}

}  // namespace kvstore::r32
