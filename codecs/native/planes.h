// Byte planes: all first bytes of a run of elements, then all second bytes, ...
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore {

// Regroup `count` elements of `itemsize` bytes into `itemsize` planes of `count` bytes. No overlap.
void split_planes(uint8_t* target, const uint8_t* source, size_t count, size_t itemsize);

// Undo split_planes.
void merge_planes(uint8_t* target, const uint8_t* source, size_t count, size_t itemsize);

}  // namespace kvstore
