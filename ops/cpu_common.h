// What the CPU kernels of ops/cpu*.cpp share: threads, and rounding up. LIBRARY is the namespace of the operators, which
// ops/cpu.py gives on the compiler's command line.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#if defined(__APPLE__)
#include <dispatch/dispatch.h>
#endif

namespace {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// f(begin, end) in each thread, over parts of [0, n); in the calling thread alone if n is no more than `grain`.
template <typename F> void split(int64_t n, int64_t grain, const F& f) {
#if defined(__APPLE__)  // whose compiler has no OpenMP, without which parallel_for is a plain loop
  int64_t shares = std::min<int64_t>((n + grain - 1) / grain, 2 * at::get_num_threads());
  dispatch_apply(shares, dispatch_get_global_queue(QOS_CLASS_USER_INTERACTIVE, 0),
                 ^(size_t i) { f(n * i / shares, n * (i + 1) / shares); });
#else
  at::parallel_for(0, n, grain, f);
#endif
}

}  // namespace
