// Sums and gathers of the ranks on one machine, through memory that all of them see: a rank that waits asks again and
// again whether the others have come, which takes a microsecond where a socket takes hundreds.
//
// Layout of the memory, for each rank a block: a line with the number of the last round it has come to, then two slots
// of `capacity` bytes. Round t is in slot t % 2. A rank that has come to round t has read all of round t - 2, since it
// waited for all others in round t - 1: so nothing that is still to be read is written over.
// Ranks are added up in their order, so that each has the same bits.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "cpu_common.h"
#include "cpu_operators.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define PAUSE() asm volatile("yield")
#else
#define PAUSE()
#endif

using at::Tensor;

namespace {

constexpr int64_t LINE = 64;
constexpr auto SPIN = std::chrono::microseconds(500);      // then the core is given to others between two looks
constexpr auto PATIENCE = std::chrono::milliseconds(200);  // then the caller is to see whether all are alive

}  // namespace

// x float32 [n]: this rank's part of a round, already written if not `fresh`. Returns the sum [n], or all parts
// [ranks, n]; nothing if the others have not come, and then it is to be called again.
Tensor LIBRARY::exchange(const Tensor& shared, const Tensor& x, int64_t rank, int64_t ranks, int64_t round, bool fresh,
                         bool sum) {
  const int64_t n = x.numel(), block = shared.numel() / ranks, capacity = (block - LINE) / 2;
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat && n * 4 <= capacity, "exchange: ", n, " numbers");
  auto* const base = static_cast<char*>(shared.data_ptr());
  const auto come = [&](int64_t r) {
    return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(base + r * block));
  };
  const auto slot = [&](int64_t r) { return base + r * block + LINE + (round % 2) * capacity; };
  if (fresh) {
    std::memcpy(slot(rank), x.data_ptr(), n * 4);
    come(rank).store(round, std::memory_order_release);
  }
  static const int64_t cores = std::thread::hardware_concurrency();
  const bool crowded = ranks > cores;  // who waits for the others then keeps them from coming
  const auto start = std::chrono::steady_clock::now();
  for (int64_t r = 0; r < ranks; ++r)
    for (int looks = 0; come(r).load(std::memory_order_acquire) < static_cast<uint64_t>(round); ++looks) {
      PAUSE();
      if (looks % 64) continue;
      const auto waited = std::chrono::steady_clock::now() - start;
      if (waited > PATIENCE) return empty({0}, x.scalar_type());
      if (waited > SPIN || crowded) std::this_thread::yield();
    }
  if (!sum) {
    Tensor all = empty({ranks, n}, x.scalar_type());
    for (int64_t r = 0; r < ranks; ++r) std::memcpy(all.data_ptr<float>() + r * n, slot(r), n * 4);
    return all;
  }
  Tensor total = empty({n}, x.scalar_type());
  float* const out = total.data_ptr<float>();
  std::memcpy(out, slot(0), n * 4);
  for (int64_t r = 1; r < ranks; ++r) {
    const auto* const part = reinterpret_cast<const float*>(slot(r));
    for (int64_t i = 0; i < n; ++i) out[i] += part[i];
  }
  return total;
}

// All kernels are handed to PyTorch here: the header for that takes a compiler as long as a kernel does, and the others
// are long enough.
TORCH_LIBRARY_IMPL(LIBRARY, CPU, m) {
  m.impl("pack", &LIBRARY::pack);
  m.impl("unpack_rows", &LIBRARY::unpack_rows);
  m.impl("packed_linear", &LIBRARY::packed_linear);
  m.impl("linear16", &LIBRARY::linear16);
  m.impl("decode_attention", &LIBRARY::decode_attention);
  m.impl("rms_norm", &LIBRARY::rms_norm);
  m.impl("turn_heads", &LIBRARY::turn_heads);
  m.impl("delta_step", &LIBRARY::delta_step);
  m.impl("exchange", &LIBRARY::exchange);
}
