// From components, or channels, to the elements of the caller's arrays.
#include <cstring>

#include "ladder_decode.h"

namespace kvstore::ladder {

namespace {

// Rotates a token's channels and writes them as elements.
class Writer {
  public:
    explicit Writer(const Target& target) : target_(target), loops_(loops()), dim_(size_t(target.array.shape[2])) {
        contiguous_ = target.array.strides[2] == ptrdiff_t(target.array.itemsize);
        if (!contiguous_) elements_.resize(dim_ * target.array.itemsize);
    }

    void write(size_t head, size_t token, float* channels) {
        if (!dim_) return;
        if (const Rotation* turn = target_.rotation) {
            const size_t at = token * turn->half;
            loops_.rotate(channels, channels + turn->half, turn->cosine + at, turn->sine + at, turn->half);
        }
        const Strided& array = target_.array;
        uint8_t* out = array.data + ptrdiff_t(head) * array.strides[0] + ptrdiff_t(token) * array.strides[1];
        loops_.convert[size_t(target_.format)](contiguous_ ? out : elements_.data(), channels, dim_);
        if (contiguous_) return;
        for (size_t i = 0; i < dim_; ++i) std::memcpy(out + ptrdiff_t(i) * array.strides[2], elements_.data() + i * array.itemsize, array.itemsize);
    }

  private:
    const Target& target_;
    const Loops& loops_;
    size_t dim_;
    bool contiguous_;
    std::vector<uint8_t> elements_;
};

}  // namespace

const char* decode_heads(const Blocks& blocks, const Source& source, const Scales& scales, const std::vector<Target>& targets) {
    GroupReader reader(blocks, source);
    if (const char* wrong = reader.open()) return wrong;
    const size_t heads = targets.empty() ? 1 : size_t(targets[0].array.shape[0]);
    std::vector<uint16_t> sources;
    std::vector<float> centroids, channels;
    for (size_t first = 0; first < blocks.count; first += reader.together) {
        const size_t count = std::min(reader.together, blocks.count - first);
        if (const char* wrong = reader.read(first, count)) return wrong;
        for (size_t i = 0; i < count; ++i) {
            const size_t block = first + i, width = blocks.widths[block], column = reader.first_column(block);
            const std::vector<float> by_component = reader.centroids(block);
            channels.resize(width);
            sources.assign(width, 0);
            centroids.assign(width, 0.0f);
            for (size_t j = 0; j < width; ++j) {
                const uint32_t place = scales.places[column + j];
                sources[place] = uint16_t(j);
                centroids[place] = by_component[j];
            }
            const ChannelScales how{sources.data(), centroids.data(), scales.gains + column, scales.centres + column};
            Writer writer(targets[block / heads]);
            for (size_t token = 0; token < blocks.tokens; ++token) {
                loops().channels(channels.data(), reader.values(i) + token * width, how, width, reader.unit(), scales.steps[block]);
                writer.write(block % heads, token, channels.data());
            }
        }
    }
    return nullptr;
}

void write_channels(const std::vector<Target>& targets, const std::vector<Strided>& channels, const std::vector<const float*>& means) {
    std::vector<float> row;
    for (size_t i = 0; i < targets.size(); ++i) {
        const Strided& from = channels[i];
        const size_t dim = size_t(from.shape[2]);
        if (!dim) continue;
        Writer writer(targets[i]);
        row.resize(dim);
        for (ptrdiff_t head = 0; head < from.shape[0]; ++head) {
            for (ptrdiff_t token = 0; token < from.shape[1]; ++token) {
                std::memcpy(row.data(), from.data + head * from.strides[0] + token * from.strides[1], dim * sizeof(float));
                loops().add(row.data(), means[i] + size_t(head) * dim, dim);
                writer.write(size_t(head), size_t(token), row.data());
            }
        }
    }
}

}  // namespace kvstore::ladder
