#include "chunk_table.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace kvstore {

namespace {

constexpr Key kRoot{};
constexpr size_t kLooksPerTaken = 16;

}  // namespace

size_t ChunkTable::nbytes() const {
    return buckets_.capacity() * sizeof(Bucket) + blocks_.size() * kBlockSlots * sizeof(ChunkSlot);
}

// Keys may be chosen by somebody who wants them to collide, so the seed is secret.
uint64_t ChunkTable::hash_of(const Key& key) const {
    uint64_t words[4];
    std::memcpy(words, key.data(), sizeof words);
    uint64_t hash = seed_;
    for (const uint64_t word : words) {
        hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
    }
    return hash;
}

uint32_t ChunkTable::find_any(const Key& key) const {
    const uint64_t hash = hash_of(key);
    const uint32_t tag = uint32_t(hash >> 32);
    for (size_t bucket = home(hash);; bucket = next(bucket)) {
        const auto [slot, its_tag] = buckets_[bucket];
        if (slot == kNoSlot || (its_tag == tag && (*this)[slot].key == key)) return slot;
    }
}

uint32_t ChunkTable::find(const Key& key) const {
    const uint32_t slot = find_any(key);
    return slot != kNoSlot && (*this)[slot].present ? slot : kNoSlot;
}

// A new slot with a name and nothing else. The key must not be there.
uint32_t ChunkTable::insert(const Key& key) {
    if (4 * (named_ + 1) > 3 * buckets_.size()) rehash(buckets_.size() * 2);
    uint32_t slot = free_;
    if (slot == kNoSlot) {
        if (slots_ == kNoSlot) throw std::length_error("more chunks than slot numbers");
        if (slots_ % kBlockSlots == 0) blocks_.emplace_back(new ChunkSlot[kBlockSlots]);
        slot = slots_++;
    } else {
        free_ = at(slot).newer;
    }
    at(slot) = ChunkSlot{key, 0, 0, 0, kNoSlot, 0, kNoSlot, kNoSlot, false, false};
    place(slot, hash_of(key));
    ++named_;
    return slot;
}

void ChunkTable::place(uint32_t slot, uint64_t hash) {
    size_t bucket = home(hash);
    while (buckets_[bucket].slot != kNoSlot) bucket = next(bucket);
    buckets_[bucket] = {slot, uint32_t(hash >> 32)};
}

void ChunkTable::rehash(size_t buckets) {
    std::vector<Bucket> old(buckets);
    old.swap(buckets_);
    for (const Bucket& bucket : old) {
        if (bucket.slot != kNoSlot) place(bucket.slot, hash_of(at(bucket.slot).key));
    }
}

void ChunkTable::reserve(size_t chunks) {
    size_t buckets = buckets_.size();
    while (4 * chunks > 3 * buckets) buckets *= 2;
    if (buckets > buckets_.size()) rehash(buckets);
}

// Frees a slot and closes the gap it leaves in its run of buckets.
void ChunkTable::erase(uint32_t slot) {
    const size_t mask = buckets_.size() - 1;
    size_t gap = home(hash_of(at(slot).key));
    while (buckets_[gap].slot != slot) gap = next(gap);
    for (size_t other = next(gap); buckets_[other].slot != kNoSlot; other = next(other)) {
        const size_t its_home = home(hash_of(at(buckets_[other].slot).key));
        if (((other - its_home) & mask) >= ((other - gap) & mask)) {
            buckets_[gap] = buckets_[other];
            gap = other;
        }
    }
    buckets_[gap].slot = kNoSlot;
    at(slot).newer = free_;
    free_ = slot;
    --named_;
}

void ChunkTable::link(uint32_t slot) {
    ChunkSlot& chunk = at(slot);
    chunk.older = newest_;
    chunk.newer = kNoSlot;
    (newest_ == kNoSlot ? oldest_ : at(newest_).newer) = slot;
    newest_ = slot;
}

void ChunkTable::unlink(uint32_t slot) {
    const ChunkSlot& chunk = at(slot);
    (chunk.older == kNoSlot ? oldest_ : at(chunk.older).newer) = chunk.newer;
    (chunk.newer == kNoSlot ? newest_ : at(chunk.newer).older) = chunk.older;
}

bool ChunkTable::add(const Key& key, const Key& parent, uint64_t offset, uint64_t nbytes, uint64_t access) {
    uint32_t slot = find_any(key);
    if (slot == kNoSlot) slot = insert(key);
    if (at(slot).present) return false;
    uint32_t parent_slot = kNoSlot;
    if (parent != kRoot) {
        parent_slot = find_any(parent);
        if (parent_slot == kNoSlot) parent_slot = insert(parent);
        ++at(parent_slot).children;
    }
    ChunkSlot& chunk = at(slot);
    chunk.offset = offset;
    chunk.nbytes = nbytes;
    chunk.access = access;
    chunk.parent = parent_slot;
    chunk.present = true;
    ++present_;
    link(slot);
    return true;
}

void ChunkTable::remove(uint32_t slot) {
    unlink(slot);
    ChunkSlot& chunk = at(slot);
    used_ -= chunk.used;
    --present_;
    chunk.present = chunk.used = false;
    const uint32_t parent = chunk.parent;
    chunk.parent = kNoSlot;
    if (parent != kNoSlot) {
        --at(parent).children;
        if (parent != slot && !at(parent).children && !at(parent).present) erase(parent);
    }
    if (!chunk.children) erase(slot);
}

void ChunkTable::use(uint32_t slot, uint64_t access) {
    unlink(slot);
    link(slot);
    ChunkSlot& chunk = at(slot);
    chunk.access = access;
    used_ += !chunk.used;
    chunk.used = true;
}

std::vector<uint32_t> ChunkTable::take_used(size_t limit) {
    std::vector<uint32_t> taken;
    size_t looks = limit > SIZE_MAX / kLooksPerTaken ? SIZE_MAX : limit * kLooksPerTaken;
    for (uint32_t slot = newest_; slot != kNoSlot && used_ && taken.size() < limit && looks--; slot = at(slot).older) {
        ChunkSlot& chunk = at(slot);
        if (!chunk.used) continue;
        chunk.used = false;
        --used_;
        taken.push_back(slot);
    }
    return taken;
}

std::vector<uint32_t> ChunkTable::by_offset(uint64_t offset, size_t limit) const {
    const auto before = [this](uint32_t a, uint32_t b) { return (*this)[a].offset < (*this)[b].offset; };
    std::vector<uint32_t> nearest;  // a heap, the farthest first
    for (uint32_t slot = 0; slot < slots_ && limit; ++slot) {
        const ChunkSlot& chunk = (*this)[slot];
        if (!chunk.present || chunk.offset < offset) continue;
        if (nearest.size() == limit) {
            if (!before(slot, nearest.front())) continue;
            std::pop_heap(nearest.begin(), nearest.end(), before);
            nearest.pop_back();
        }
        nearest.push_back(slot);
        std::push_heap(nearest.begin(), nearest.end(), before);
    }
    std::sort_heap(nearest.begin(), nearest.end(), before);
    return nearest;
}

void ChunkTable::sort_by_access() {
    std::vector<std::pair<uint64_t, uint32_t>> order;
    order.reserve(present_);
    for (uint32_t slot = oldest_; slot != kNoSlot; slot = at(slot).newer) order.emplace_back(at(slot).access, slot);
    std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    oldest_ = newest_ = kNoSlot;
    for (const auto& [access, slot] : order) link(slot);
}

}  // namespace kvstore
