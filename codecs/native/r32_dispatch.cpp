// The kernels for this processor, chosen once at run time.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "r32.h"
#include "r32_kernels.h"

namespace kvstore::r32 {

namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

Kernels avx512() {
    Kernels out = kAvx512;
    std::copy(std::begin(kAvx2.decode[0]), std::end(kAvx2.decode[0]), out.decode[0]);
    std::copy_n(kAvx2.decode_digits[0], 2, out.decode_digits[0]);
    out.encode[0] = kAvx2.encode[0];
    return out;
}
#endif

// The named kernels, or the fastest for nullptr; kernels without a name if the processor lacks them.
Kernels find(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if ((!name || std::strcmp(name, "avx512") == 0) && has_avx512()) return avx512();
    if ((!name || std::strcmp(name, "avx2") == 0) && has_avx2()) return kAvx2;
#elif defined(__aarch64__)
    if (!name || std::strcmp(name, "neon") == 0) return kNeon;
#endif
    if (!name || std::strcmp(name, "scalar") == 0) return kScalar;
    return {};
}

Kernels& chosen() {
    static Kernels kernels = find(nullptr);
    return kernels;
}

}  // namespace

const Kernels& kernels() { return chosen(); }

const char* isa() { return chosen().name; }

bool use_isa(const char* name) {
    const Kernels found = find(name);
    if (!found.name) return false;
    chosen() = found;
    return true;
}

}  // namespace kvstore::r32
