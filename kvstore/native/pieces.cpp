#include "pieces.h"

#include <cstring>

#include "xxh3.h"

namespace kvstore {

namespace {

// Bytes that were moved but not hashed yet never grow past this, so that the hash finds them in the first-level cache.
constexpr size_t kLagBytesMax = 8192;

template <typename Unit>
void copy_units(uint8_t* to, ptrdiff_t to_stride, const uint8_t* from, ptrdiff_t from_stride, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, sizeof(Unit));
}

void copy_elements(uint8_t* to, ptrdiff_t to_stride, const uint8_t* from, ptrdiff_t from_stride, ptrdiff_t count, size_t itemsize) {
    switch (itemsize) {
        case 1: return copy_units<uint8_t>(to, to_stride, from, from_stride, count);
        case 2: return copy_units<uint16_t>(to, to_stride, from, from_stride, count);
        case 4: return copy_units<uint32_t>(to, to_stride, from, from_stride, count);
        case 8: return copy_units<uint64_t>(to, to_stride, from, from_stride, count);
        default:
            for (ptrdiff_t i = 0; i < count; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, itemsize);
    }
}

// A piece of odd length leaves the stripes' boundary, so a fused pass over it pays only if it is this long.
constexpr size_t kFusedBytesMin = 1024;

// Rows of a token-major layout lie further apart than the hardware prefetchers look: ask for some rows ahead.
constexpr ptrdiff_t kPrefetchRows = 16;
constexpr size_t kPrefetchRowBytesMax = 4096;

void prefetch_row(const uint8_t* row, size_t length) {
    for (size_t at = 0; at < length; at += kStripeBytes) __builtin_prefetch(row + at);
}

// The stream along the contiguous side. Pieces are moved one after another; the hash follows, at most kLagBytesMax behind,
// and in the same pass where a piece starts at a stripe's boundary.
class Stream {
  public:
    Stream(uint8_t* flat, size_t nbytes, bool gathering)
        : flat_(flat), nbytes_(nbytes), gathering_(gathering), stripes_(nbytes > kShortBytesMax ? full_stripes(nbytes) : 0),
          streaming_(nbytes >= kStreamBytesMin) {}

    // Move `length` contiguous bytes.
    void move(uint8_t* piece, size_t length) {
        if (moved_ % kStripeBytes == 0 && (length % kStripeBytes == 0 || length >= kFusedBytesMin)) {
            hash_moved();
            size_t count = length / kStripeBytes;
            if (count > stripes_ - hashed_) count = stripes_ - hashed_;
            fused(piece, count);
            piece += count * kStripeBytes;
            length -= count * kStripeBytes;
        }
        if (!length) return;
        if (gathering_) std::memcpy(flat_ + moved_, piece, length);
        else std::memcpy(piece, flat_ + moved_, length);
        advance(length);
    }

    // Move `count` elements `stride` bytes apart.
    void move_elements(uint8_t* piece, ptrdiff_t stride, ptrdiff_t count, size_t itemsize) {
        const ptrdiff_t unit = ptrdiff_t(itemsize);
        if (gathering_) copy_elements(flat_ + moved_, unit, piece, stride, count, itemsize);
        else copy_elements(piece, stride, flat_ + moved_, unit, count, itemsize);
        advance(size_t(count) * itemsize);
    }

    uint64_t finish_hash() {
        if (streaming_) stream_fence();
        if (nbytes_ <= kShortBytesMax) return xxh3(flat_, nbytes_);
        hash_moved();
        return finish(acc_, flat_, nbytes_);
    }

  private:
    void fused(uint8_t* piece, size_t count) {
        uint8_t* target = gathering_ ? flat_ + moved_ : piece;
        const uint8_t* source = gathering_ ? piece : flat_ + moved_;
        consume(acc_, target, source, count, streaming_ && can_stream(target) ? Store::kStream : Store::kCached);
        hashed_ += count;
        moved_ += count * kStripeBytes;
    }

    void advance(size_t length) {
        moved_ += length;
        if (moved_ - hashed_ * kStripeBytes >= kLagBytesMax) hash_moved();
    }

    void hash_moved() {
        size_t count = moved_ / kStripeBytes;
        if (count > stripes_) count = stripes_;
        if (count <= hashed_) return;
        consume(acc_, nullptr, flat_ + hashed_ * kStripeBytes, count - hashed_, Store::kNone);
        hashed_ = count;
    }

    uint8_t* flat_;
    size_t nbytes_;
    bool gathering_;
    size_t stripes_;
    bool streaming_;
    size_t moved_ = 0;   // bytes
    size_t hashed_ = 0;  // stripes
    Accumulators acc_;
};

// Axes of one element, and axes that continue the next one without a gap, are merged into it.
Strided merged(const Strided& array) {
    Strided out = array;
    int last = 2;
    for (int axis = 1; axis >= 0; --axis) {
        const ptrdiff_t n = array.shape[axis], stride = array.strides[axis];
        if (n == 1) continue;
        if (out.shape[last] == 1) {
            out.shape[last] = n;
            out.strides[last] = stride;
        } else if (stride == out.strides[last] * out.shape[last]) {
            out.shape[last] *= n;
        } else {
            --last;
            out.shape[last] = n;
            out.strides[last] = stride;
        }
    }
    while (last > 0) {
        --last;
        out.shape[last] = 1;
        out.strides[last] = 0;
    }
    return out;
}

void walk(Stream& stream, const Strided& given, bool gathering) {
    if (!given.nbytes()) return;
    const Strided array = merged(given);
    const bool contiguous = array.strides[2] == ptrdiff_t(array.itemsize) || array.shape[2] == 1;
    const size_t row_bytes = size_t(array.shape[2]) * array.itemsize;
    const bool ahead = gathering && contiguous && row_bytes <= kPrefetchRowBytesMax;
    for (ptrdiff_t i = 0; i < array.shape[0]; ++i) {
        for (ptrdiff_t j = 0; j < array.shape[1]; ++j) {
            uint8_t* row = array.data + i * array.strides[0] + j * array.strides[1];
            if (ahead && j + kPrefetchRows < array.shape[1]) prefetch_row(row + kPrefetchRows * array.strides[1], row_bytes);
            if (contiguous) stream.move(row, row_bytes);
            else stream.move_elements(row, array.strides[2], array.shape[2], array.itemsize);
        }
    }
}

uint64_t walk_all(uint8_t* flat, size_t nbytes, const std::vector<Strided>& arrays, bool gathering) {
    Stream stream(flat, nbytes, gathering);
    for (const Strided& array : arrays) walk(stream, array, gathering);
    return stream.finish_hash();
}

}  // namespace

uint64_t gather_xxh3(uint8_t* target, size_t nbytes, const std::vector<Strided>& arrays) {
    return walk_all(target, nbytes, arrays, true);
}

uint64_t scatter_xxh3(const std::vector<Strided>& arrays, const uint8_t* source, size_t nbytes) {
    return walk_all(const_cast<uint8_t*>(source), nbytes, arrays, false);  // a scattering stream only reads its flat side
}

}  // namespace kvstore
