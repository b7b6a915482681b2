// What the CPU kernels of ops/cpu*.cpp share: threads, and the rows that go through each of several matrices. LIBRARY
// is the namespace of the operators, which ops/cpu.py gives on the compiler's command line.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>
#if defined(__APPLE__)
#include <dispatch/dispatch.h>
#endif

namespace {

// By what at::empty comes to, whose own header takes a compiler two seconds, in each file anew.
inline at::Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) { return at::detail::empty_cpu(shape, dtype); }

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

struct Rows {  // that go through one matrix
  const uint8_t* weight;
  int64_t first, count;
};

// The rows of each matrix of `bytes` bytes that was chosen, or all of the only one; `order` brings them together.
inline std::vector<Rows> rows_of(const std::optional<at::Tensor>& chosen, const at::Tensor& weight, int64_t bytes,
                                 std::vector<int64_t>& order) {
  const int64_t M = order.size();
  auto base = (const uint8_t*)weight.data_ptr();
  if (!chosen) {
    std::iota(order.begin(), order.end(), 0);
    return {{base, 0, M}};
  }
  TORCH_CHECK(chosen->scalar_type() == at::kLong && chosen->numel() == M, "chosen: an int64 for each row");
  at::Tensor dense = chosen->contiguous();
  auto e = dense.const_data_ptr<int64_t>();
  const int64_t experts = weight.size(0);
  std::vector<int64_t> start(experts + 1);
  for (int64_t m = 0; m < M; m++) {
    TORCH_CHECK(e[m] >= 0 && e[m] < experts, "expert ", e[m], " of ", experts);
    start[e[m] + 1]++;
  }
  std::vector<Rows> groups;
  for (int64_t i = 0; i < experts; i++) {
    if (start[i + 1]) groups.push_back({base + i * bytes, start[i], start[i + 1]});
    start[i + 1] += start[i];
  }
  for (int64_t m = 0; m < M; m++) order[start[e[m]]++] = m;
  return groups;
}

}  // namespace
