// What a tier holds, packed: every chunk's place and the order of use, about 100 bytes a chunk.
//
// A slot is one chunk, or the mere name of a chunk that is not there but is the parent of some that are (a ghost), so
// that a parent's key is stored once and its children are counted whether or not it is there. Slots lie in blocks that
// never move; a hash table of slot numbers finds them by key, with a part of the hash beside each number so that a slot is
// looked at only when it is very likely the right one.
//
// Nothing here is safe to use from two threads at once; Python's lock serialises calls.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace kvstore {

using Key = std::array<uint8_t, 32>;

constexpr uint32_t kNoSlot = 0xFFFFFFFFu;

struct ChunkSlot {
    Key key;
    uint64_t offset, nbytes, access;
    uint32_t parent;    // slot; kNoSlot for the first chunk of a chain
    uint32_t children;  // chunks that are there and name this one as their parent
    uint32_t older, newer;  // neighbours in the order of use; of a free slot, `newer` is the next free one
    bool present, used;  // there, and used since `take_used`
};

class ChunkTable {
  public:
    explicit ChunkTable(uint64_t seed) : seed_(seed), buckets_(kBucketsMin) {}

    // Makes room for so many chunks at once.
    void reserve(size_t chunks);

    size_t size() const { return present_; }
    size_t nbytes() const;
    uint32_t oldest() const { return oldest_; }
    uint32_t newest() const { return newest_; }
    const ChunkSlot& operator[](uint32_t slot) const { return blocks_[slot / kBlockSlots][slot % kBlockSlots]; }

    // The slot of a chunk that is there, else kNoSlot.
    uint32_t find(const Key& key) const;

    // True if a number that comes from outside is a slot with a chunk that is there.
    bool is_there(uint64_t slot) const { return slot < slots_ && (*this)[uint32_t(slot)].present; }

    // Adds a chunk as the most recently used; false if it is there already. A parent of zeros is none.
    bool add(const Key& key, const Key& parent, uint64_t offset, uint64_t nbytes, uint64_t access);
    void remove(uint32_t slot);
    void use(uint32_t slot, uint64_t access);

    // Up to `limit` slots used since they were last taken, the most recently used first; looks at a bounded number.
    std::vector<uint32_t> take_used(size_t limit);

    // Up to `limit` slots of chunks at `offset` or behind, by offset; looks at every chunk.
    std::vector<uint32_t> by_offset(uint64_t offset, size_t limit) const;

    // Puts all chunks into the order of their access numbers; those with equal ones stay in their order.
    void sort_by_access();

  private:
    static constexpr size_t kBlockSlots = 4096;
    static constexpr size_t kBucketsMin = 64;

    ChunkSlot& at(uint32_t slot) { return blocks_[slot / kBlockSlots][slot % kBlockSlots]; }
    struct Bucket {
        uint32_t slot = kNoSlot;
        uint32_t tag = 0;
    };

    uint64_t hash_of(const Key& key) const;
    size_t next(size_t bucket) const { return (bucket + 1) & (buckets_.size() - 1); }
    size_t home(uint64_t hash) const { return hash & (buckets_.size() - 1); }
    void place(uint32_t slot, uint64_t hash);
    void rehash(size_t buckets);
    uint32_t find_any(const Key& key) const;
    uint32_t insert(const Key& key);
    void erase(uint32_t slot);
    void link(uint32_t slot);
    void unlink(uint32_t slot);

    uint64_t seed_;
    std::vector<Bucket> buckets_;
    std::vector<std::unique_ptr<ChunkSlot[]>> blocks_;
    uint32_t slots_ = 0, free_ = kNoSlot, oldest_ = kNoSlot, newest_ = kNoSlot;
    size_t named_ = 0, present_ = 0, used_ = 0;
};

}  // namespace kvstore
