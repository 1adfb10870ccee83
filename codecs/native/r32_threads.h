// Run the same work on several threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

#include "r32.h"

namespace kvstore::r32 {

// Threads worth starting for that many tiles.
inline size_t threads_for(size_t tiles, size_t wanted) {
    return std::max<size_t>(1, std::min({wanted, tiles, kThreadsMax}));
}

// Call `work(i)` for i < threads, the first on this thread. `work` takes what it does from a shared counter and does not
// throw, so it does not matter if the system grants fewer threads.
template <typename Work>
void in_parallel(size_t threads, const Work& work) {
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    try {
        for (size_t i = 1; i < threads; ++i) others.emplace_back(work, i);
    } catch (const std::system_error&) {
    }
    work(size_t{0});
    for (std::thread& other : others) other.join();
}

}  // namespace kvstore::r32
