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

// One tile after another, each as whole steps for the kernels. The table bases of its steps repeat when they end.
class TileDecoder {
  public:
    TileDecoder(unsigned lanes, const uint32_t* tables) : lanes_(lanes), tables_(tables) {}

    // Begin a tile; false if it has ended already, whole or not.
    bool start(const Tile& input, const uint32_t* rows_end) {
        const size_t stored = std::min<size_t>(input.count, lanes_);
        ok = false;
        if (input.nbytes % 2 != 0 || input.nbytes < 4 * stored) return false;
        if (stored) std::memcpy(tile.state, input.stream, 4 * stored);
        std::fill(tile.state + stored, tile.state + kLanesMax, kStateMin);
        if (*std::min_element(tile.state, tile.state + kLanesMax) < kStateMin) return false;
        tile.rows = tile.row = input.bases;
        tile.rows_end = rows_end;
        tile.symbols = input.symbols;
        tile.steps = input.digits / lanes_;
        later_ = input.count / lanes_ - tile.steps;
        rest_ = unsigned(input.count % lanes_);
        tile.words = input.stream + 4 * stored;
        end_ = input.stream + input.nbytes;
        padded_ = false;
        if (size_t(end_ - tile.words) < step_bytes()) {
            pad();
        } else {
            tile.limit = end_ - step_bytes();
        }
        in_digits = tile.steps > 0;
        return in_digits || leave_digits();
    }

    // Go on after a kernel has stopped; false if the tile has ended, whole or not.
    bool go_on() {
        if (tile.words > tile.limit) {
            if (padded_) return false;  // it read beyond the end
            pad();
        }
        if (tile.steps > 0) return true;
        return in_digits ? leave_digits() : finish();
    }

    DecodeTile tile;
    bool in_digits = false;  // whether its next steps are for a kernel of digits
    bool ok = false;

  private:
    size_t step_bytes() const { return 2 * size_t{lanes_}; }

    // Move the last words, fewer than a step may read, to where a step may read beyond them.
    void pad() {
        const size_t left = size_t(end_ - tile.words);
        if (left) std::memcpy(padding_, tile.words, left);
        std::memset(padding_ + left, 0, sizeof padding_ - left);
        tile.words = padding_;
        tile.limit = end_ = padding_ + left;
        padded_ = true;
    }

    bool leave_digits() {
        in_digits = false;
        tile.steps = later_;
        return tile.steps > 0 || finish();
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

    unsigned lanes_;
    const uint32_t* tables_;
    const uint8_t* end_ = nullptr;
    size_t later_ = 0;
    unsigned rest_ = 0;
    bool padded_ = false;
    uint8_t padding_[4 * kLanesMax];
};

size_t tiles_together(unsigned lanes) { return kLanesTogether / lanes; }

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

// The largest i for which 2^i is at most `count`.
size_t log2_of(size_t count) {
    size_t out = 0;
    while (count >> (out + 1)) ++out;
    return out;
}

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
        : shared_(shared), sink_(sink), first_slot_(first_slot), together_(tiles_together(shared.batch.lanes)) {
        decoders_.assign(together_, TileDecoder(shared.batch.lanes, shared.tables));
        rows_.reserve(together_);
        for (size_t i = 0; i < together_; ++i) rows_.emplace_back(shared.batch, kSlotBits);
    }

    void run(const Kernels& kernels) {
        const DecodeKernel<uint32_t>* decode = kernels.decode[shared_.batch.lanes / 16];
        DecodeTile* tiles[kTilesTogetherMax];
        bool live[kTilesTogetherMax];
        bool all = true;
        for (size_t i = 0; i < together_; ++i) {
            tiles[i] = &decoders_[i].tile;
            all &= live[i] = take(i);
        }
        while (all) {
            decode[log2_of(together_)](tiles, shared_.tables);
            for (size_t i = 0; i < together_; ++i) all &= live[i] = go_on(i);
        }
        for (size_t i = 0; i < together_; ++i) {
            while (live[i]) {
                decode[0](tiles + i, shared_.tables);
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
            rows_[i].use(index);
            const Tile input{shared_.stream + shared_.starts[index], shared_.lengths[index], shared_.batch.counts[index], 0, rows_[i].begin(), sink_.place(index, first_slot_ + i), false};
            if (decoders_[i].start(input, rows_[i].end())) return true;
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
    std::vector<Rows> rows_;
    size_t index_[kTilesTogetherMax];
};

template <typename Sink>
void run(Shared& shared, Sink& sink, size_t threads) {
    std::vector<std::unique_ptr<Worker<Sink>>> workers(threads);
    for (size_t i = 0; i < threads; ++i) workers[i] = std::make_unique<Worker<Sink>>(shared, sink, i * tiles_together(shared.batch.lanes));
    const Kernels& chosen = kernels();
    in_parallel(threads, [&](size_t i) { workers[i]->run(chosen); });
}

// Some tiles, at most as many as are decoded together: the steps of digits of all of them, then the other ones.
class Round {
  public:
    Round(Tile* tiles, size_t count, unsigned lanes, const uint32_t* tables, const DigitTables& digit_tables)
        : tiles_(tiles), count_(count), lanes_(lanes), tables_(tables), digit_tables_(digit_tables) {}

    void run(const Kernels& kernels, std::vector<TileDecoder>& decoders) {
        for (size_t i = 0; i < count_; ++i) {
            const Tile& tile = tiles_[i];
            live_[i] = decoders[i].start(tile, tile.bases + (tile.count + lanes_ - 1) / lanes_ * lanes_);
        }
        steps(decoders, true, &digit_tables_, kernels.decode_digits[lanes_ / 16]);
        steps(decoders, false, tables_, kernels.decode[lanes_ / 16]);
        for (size_t i = 0; i < count_; ++i) tiles_[i].ok = decoders[i].ok;
    }

  private:
    // All steps of one kind, as many tiles at once as there are and a kernel takes.
    template <typename Table>
    void steps(std::vector<TileDecoder>& decoders, bool digits, const Table* tables, const DecodeKernel<Table>* decode) {
        size_t waiting[kTilesTogetherMax];
        DecodeTile* decoding[kTilesTogetherMax];
        for (;;) {
            size_t count = 0;
            for (size_t i = 0; i < count_; ++i) {
                if (!live_[i] || decoders[i].in_digits != digits) continue;
                waiting[count] = i;
                decoding[count++] = &decoders[i].tile;
            }
            if (!count) return;
            const size_t kernel = log2_of(count);
            decode[kernel](decoding, tables);
            for (size_t i = 0; i < size_t{1} << kernel; ++i) live_[waiting[i]] = decoders[waiting[i]].go_on();
        }
    }

    Tile* tiles_;
    size_t count_;
    unsigned lanes_;
    const uint32_t* tables_;
    const DigitTables& digit_tables_;
    bool live_[kTilesTogetherMax];
};

}  // namespace

bool DigitTables::set(size_t number, const uint32_t* table) {
    DigitTable& out = rows[number];
    for (int16_t& below : out.below) below = int16_t(kSlots);
    for (uint32_t slot = 0; slot < kSlots;) {
        const uint32_t symbol = table[slot] & 0xFF, frequency = (table[slot] >> 8 & (kSlots - 1)) + 1;
        if (symbol >= kDigitSymbols || table[slot] >> 20 != 0) return false;
        out.entries[symbol] = table[slot] - (slot << 20);
        for (size_t i = symbol; i > 0 && out.below[i - 1] == int16_t(kSlots); --i) out.below[i - 1] = int16_t(slot) - 1;
        slot += frequency;
    }
    for (size_t i = 0; i < kDigitSymbols - 1; ++i) cuts[i][number] = uint16_t(out.below[i] + 1);
    return true;
}

void decode(const Batch& batch, const uint32_t* tables, const uint8_t* stream, const uint32_t* lengths, uint8_t* symbols, uint8_t* ok, size_t threads) {
    Shared shared(batch, tables, stream, lengths, ok);
    ToSymbols sink(batch, symbols);
    run(shared, sink, threads_for(batch.tiles, threads));
}

void decode_values(const Batch& batch, const uint32_t* tables, const uint8_t* stream, const uint32_t* lengths, const Unpacking& unpacking, int8_t* values, uint8_t* ok, size_t threads) {
    threads = threads_for(batch.tiles, threads);
    Shared shared(batch, tables, stream, lengths, ok);
    ToValues sink(batch, unpacking, values, threads * tiles_together(batch.lanes));
    run(shared, sink, threads);
}

void decode_tiles(Tile* tiles, size_t count, unsigned lanes, const uint32_t* tables, const DigitTables& digit_tables) {
    const size_t together = tiles_together(lanes);
    std::vector<TileDecoder> decoders(together, TileDecoder(lanes, tables));
    for (size_t first = 0; first < count; first += together) {
        Round(tiles + first, std::min(together, count - first), lanes, tables, digit_tables).run(kernels(), decoders);
    }
}

}  // namespace kvstore::r32
