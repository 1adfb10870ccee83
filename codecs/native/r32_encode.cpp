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

// Encode one tile of at least one symbol so that it ends at `room_end`; answers its bytes, or 0 if a symbol has no entry.
size_t encode_tile(const Batch& batch, size_t index, Rows& rows, const Kernels& kernels, const uint64_t* tables, const uint8_t* symbols, uint8_t* room_end) {
    const size_t count = batch.counts[index], stored = std::min<size_t>(count, batch.lanes);
    EncodeTile tile;
    std::fill(tile.state, tile.state + kLanesMax, kStateMin);
    tile.words = room_end;
    tile.symbols = symbols;
    tile.steps = count / batch.lanes;
    tile.missing = false;
    rows.use(index);
    tile.rows = rows.begin();
    tile.rows_end = rows.end();
    const uint8_t* last = symbols + tile.steps * batch.lanes;
    const uint32_t* last_row = rows.of_step(tile.steps);
    for (size_t lane = count % batch.lanes; lane-- > 0;) {
        const uint64_t entry = tables[last_row[lane] | last[lane]];
        tile.missing |= !has_entry(entry);
        tile.state[lane] = encode_state(tile.state[lane], entry, tile.words);
    }
    if (tile.steps) {
        tile.row = rows.of_step(tile.steps - 1);
        kernels.encode[batch.lanes / 16](tile, tables);
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
            lengths[i] = uint32_t(encode_tile(batch, i, *rows[thread], chosen, tables, symbols + symbol_starts[i], stream + room_ends[i]));
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

}  // namespace kvstore::r32
