#include "planes.h"

#include <cstring>

namespace kvstore {

namespace {

// The loops are plain so that the compiler vectorises them for each instruction set below.
#define KVSTORE_INLINE inline __attribute__((always_inline))

template <size_t itemsize>
KVSTORE_INLINE void split(uint8_t* __restrict target, const uint8_t* __restrict source, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        for (size_t plane = 0; plane < itemsize; ++plane) target[plane * count + i] = source[i * itemsize + plane];
    }
}

template <size_t itemsize>
KVSTORE_INLINE void merge(uint8_t* __restrict target, const uint8_t* __restrict source, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        for (size_t plane = 0; plane < itemsize; ++plane) target[i * itemsize + plane] = source[plane * count + i];
    }
}

struct Planes {
    void (*split2)(uint8_t*, const uint8_t*, size_t);
    void (*split4)(uint8_t*, const uint8_t*, size_t);
    void (*merge2)(uint8_t*, const uint8_t*, size_t);
    void (*merge4)(uint8_t*, const uint8_t*, size_t);
};

#define KVSTORE_PLANES(isa, attribute)                                                                       \
    attribute void split2_##isa(uint8_t* to, const uint8_t* from, size_t count) { split<2>(to, from, count); } \
    attribute void split4_##isa(uint8_t* to, const uint8_t* from, size_t count) { split<4>(to, from, count); } \
    attribute void merge2_##isa(uint8_t* to, const uint8_t* from, size_t count) { merge<2>(to, from, count); } \
    attribute void merge4_##isa(uint8_t* to, const uint8_t* from, size_t count) { merge<4>(to, from, count); } \
    constexpr Planes planes_##isa{split2_##isa, split4_##isa, merge2_##isa, merge4_##isa};

KVSTORE_PLANES(portable, )
#if defined(__x86_64__)
KVSTORE_PLANES(avx2, __attribute__((target("avx2"))))
#endif

const Planes& best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) return planes_avx2;
#endif
    return planes_portable;
}

const Planes& planes = best();

}  // namespace

void split_planes(uint8_t* target, const uint8_t* source, size_t count, size_t itemsize) {
    if (!count) return;
    if (itemsize == 2) return planes.split2(target, source, count);
    if (itemsize == 4) return planes.split4(target, source, count);
    if (itemsize == 1) {
        std::memcpy(target, source, count);
        return;
    }
    for (size_t plane = 0; plane < itemsize; ++plane) {
        for (size_t i = 0; i < count; ++i) target[plane * count + i] = source[i * itemsize + plane];
    }
}

void merge_planes(uint8_t* target, const uint8_t* source, size_t count, size_t itemsize) {
    if (!count) return;
    if (itemsize == 2) return planes.merge2(target, source, count);
    if (itemsize == 4) return planes.merge4(target, source, count);
    if (itemsize == 1) {
        std::memcpy(target, source, count);
        return;
    }
    for (size_t plane = 0; plane < itemsize; ++plane) {
        for (size_t i = 0; i < count; ++i) target[i * itemsize + plane] = source[plane * count + i];
    }
}

}  // namespace kvstore
