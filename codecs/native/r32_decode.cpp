// R32 decoding of batches: where tiles start and end, and bounds. The steps themselves are in the kernels.
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

// One tile after another, each as whole steps for the kernels.
class TileDecoder {
  public:
    TileDecoder(const Batch& batch, const uint32_t* tables) : batch_(batch), tables_(tables), rows_(batch, kSlotBits) {}

    // Begin a tile; false if it has ended already, whole or not.
    bool start(size_t index, const uint8_t* stream, size_t nbytes, uint8_t* symbols) {
        const size_t count = batch_.counts[index], stored = std::min<size_t>(count, batch_.lanes);
        ok = false;
        if (nbytes % 2 != 0 || nbytes < 4 * stored) return false;
        if (stored) std::memcpy(tile.state, stream, 4 * stored);
        std::fill(tile.state + stored, tile.state + kLanesMax, kStateMin);
        if (*std::min_element(tile.state, tile.state + kLanesMax) < kStateMin) return false;
        rows_.use(index);
        tile.rows = tile.row = rows_.begin();
        tile.rows_end = rows_.end();
        tile.symbols = symbols;
        tile.steps = count / batch_.lanes;
        rest_ = unsigned(count % batch_.lanes);
        tile.words = stream + 4 * stored;
        end_ = stream + nbytes;
        padded_ = false;
        if (size_t(end_ - tile.words) < step_bytes()) {
            pad();
        } else {
            tile.limit = end_ - step_bytes();
        }
        return tile.steps > 0 || finish();
    }

    // Go on after a kernel has stopped; false if the tile has ended, whole or not.
    bool go_on() {
        if (tile.words > tile.limit) {
            if (padded_) return false;  // it read beyond the end
            pad();
        }
        return tile.steps > 0 || finish();
    }

    DecodeTile tile;
    bool ok = false;

  private:
    size_t step_bytes() const { return 2 * size_t{batch_.lanes}; }

    // Move the last words, fewer than a step may read, to where a step may read beyond them.
    void pad() {
        const size_t left = size_t(end_ - tile.words);
        if (left) std::memcpy(padding_, tile.words, left);
        std::memset(padding_ + left, 0, sizeof padding_ - left);
        tile.words = padding_;
        tile.limit = end_ = padding_ + left;
        padded_ = true;
    }

    // Decode the last, partial step and check the end. Always false.
    bool finish() {
        for (unsigned lane = 0; lane < rest_; ++lane) {
            const uint32_t entry = tables_[tile.row[lane] | (tile.state[lane] & (kSlots - 1))];
            uint32_t next = decode_state(tile.state[lane], entry);
            if (next < kStateMin) {
                if (tile.words == end_) return false;
                uint16_t word;
                std::memcpy(&word, tile.words, sizeof word);
                tile.words += sizeof word;
                next = next << 16 | word;
            }
            tile.state[lane] = next;
            tile.symbols[lane] = uint8_t(entry);
        }
        ok = tile.words == end_ && std::all_of(tile.state, tile.state + kLanesMax, [](uint32_t state) { return state == kStateMin; });
        return false;
    }

    const Batch& batch_;
    const uint32_t* tables_;
    Rows rows_;
    const uint8_t* end_ = nullptr;
    unsigned rest_ = 0;
    bool padded_ = false;
    uint8_t padding_[4 * kLanesMax];
};

size_t tiles_together(const Batch& batch) { return kLanesTogether / batch.lanes; }

// What all threads share.
struct Shared {
    const Batch& batch;
    const uint32_t* tables;
    const uint8_t* stream;
    const uint32_t* lengths;
    std::vector<size_t> starts;  // of each tile in the stream
    uint8_t* ok;
    std::atomic<size_t> next{0};

    Shared(const Batch& batch, const uint32_t* tables, const uint8_t* stream, const uint32_t* lengths, uint8_t* ok)
        : batch(batch), tables(tables), stream(stream), lengths(lengths), starts(batch.tiles), ok(ok) {
        size_t start = 0;
        for (size_t i = 0; i < batch.tiles; ++i) {
            starts[i] = start;
            start += lengths[i];
        }
    }
};

// Where symbols go: straight to the caller.
struct ToSymbols {
    std::vector<size_t> starts;
    uint8_t* symbols;

    ToSymbols(const Batch& batch, uint8_t* symbols) : starts(batch.tiles), symbols(symbols) {
        size_t start = 0;
        for (size_t i = 0; i < batch.tiles; ++i) {
            starts[i] = start;
            start += batch.counts[i];
        }
    }
    uint8_t* place(size_t index, size_t) const { return symbols + starts[index]; }
    void done(size_t, size_t) const {}
};

// Where symbols go: to a buffer that stays in cache, and from there unpacked to the caller.
struct ToValues {
    const Unpacking& unpacking;
    int8_t* values;
    std::vector<uint8_t> buffers;
    size_t buffer_bytes;

    ToValues(const Batch& batch, const Unpacking& unpacking, int8_t* values, size_t slots) : unpacking(unpacking), values(values) {
        buffer_bytes = batch.tiles ? batch.counts[0] : 0;
        buffers.resize(slots * buffer_bytes);
    }
    uint8_t* place(size_t, size_t slot) { return buffers.data() + slot * buffer_bytes; }
    void done(size_t index, size_t slot) { unpack(unpacking, place(index, slot), values + index * unpacking.tokens * unpacking.channels); }
};

// One thread's share: tiles that are decoded together, each replaced by the next when it ends.
template <typename Sink>
class Worker {
  public:
    Worker(Shared& shared, Sink& sink, size_t first_slot)
        : shared_(shared), sink_(sink), first_slot_(first_slot), together_(tiles_together(shared.batch)) {
        decoders_.reserve(together_);
        for (size_t i = 0; i < together_; ++i) decoders_.emplace_back(shared.batch, shared.tables);
    }

    void run(const Kernels& kernels) {
        const unsigned by_lanes = shared_.batch.lanes / 16;
        DecodeTile* tiles[kTilesTogetherMax];
        bool live[kTilesTogetherMax];
        bool all = true;
        for (size_t i = 0; i < together_; ++i) {
            tiles[i] = &decoders_[i].tile;
            all &= live[i] = take(i);
        }
        while (all) {
            kernels.decode_together[by_lanes](tiles, shared_.tables);
            for (size_t i = 0; i < together_; ++i) all &= live[i] = go_on(i);
        }
        for (size_t i = 0; i < together_; ++i) {
            while (live[i]) {
                kernels.decode_one[by_lanes](tiles + i, shared_.tables);
                live[i] = go_on(i);
            }
        }
    }

  private:
    bool go_on(size_t i) {
        if (decoders_[i].go_on()) return true;
        close(i);
        return take(i);
    }

    bool take(size_t i) {
        while ((index_[i] = shared_.next.fetch_add(1, std::memory_order_relaxed)) < shared_.batch.tiles) {
            const size_t index = index_[i];
            if (decoders_[i].start(index, shared_.stream + shared_.starts[index], shared_.lengths[index], sink_.place(index, first_slot_ + i))) return true;
            close(i);
        }
        return false;
    }

    void close(size_t i) {
        shared_.ok[index_[i]] = decoders_[i].ok;
        if (decoders_[i].ok) sink_.done(index_[i], first_slot_ + i);
    }

    Shared& shared_;
    Sink& sink_;
    size_t first_slot_;
    size_t together_;
    std::vector<TileDecoder> decoders_;
    size_t index_[kTilesTogetherMax];
};

template <typename Sink>
void run(Shared& shared, Sink& sink, size_t threads) {
    std::vector<std::unique_ptr<Worker<Sink>>> workers(threads);
    for (size_t i = 0; i < threads; ++i) workers[i] = std::make_unique<Worker<Sink>>(shared, sink, i * tiles_together(shared.batch));
    const Kernels& chosen = kernels();
    in_parallel(threads, [&](size_t i) { workers[i]->run(chosen); });
}

}  // namespace

void decode(const Batch& batch, const uint32_t* tables, const uint8_t* stream, const uint32_t* lengths, uint8_t* symbols, uint8_t* ok, size_t threads) {
    Shared shared(batch, tables, stream, lengths, ok);
    ToSymbols sink(batch, symbols);
    run(shared, sink, threads_for(batch.tiles, threads));
}

void decode_values(const Batch& batch, const uint32_t* tables, const uint8_t* stream, const uint32_t* lengths, const Unpacking& unpacking, int8_t* values, uint8_t* ok, size_t threads) {
    threads = threads_for(batch.tiles, threads);
    Shared shared(batch, tables, stream, lengths, ok);
    ToValues sink(batch, unpacking, values, threads * tiles_together(batch));
    run(shared, sink, threads);
}

}  // namespace kvstore::r32
