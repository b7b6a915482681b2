// The linear map on a CPU with weights of 16 bits, bfloat16 or float16, as they lie in the checkpoint: row after row.
// ops/cpu.py compiles this file for the machine at hand, whose instructions are in cpu_vectors.h; ops/__init__.py
// declares the operator and has its plain form.
//
// Each output is one sum in float32, or rather LANES of them, over the columns in order, then added up: so a row of x
// gives the same bits alone and in a batch. Several rows of the matrix at once are several streams of memory, of which
// one alone does not reach the bandwidth of a core; each stream is a part of the matrix without gaps.
//
// Glossary: M rows of x, step the columns in a register of weights, pass some rows of x through the same weights,
// panel the rows of the matrix that all passes go through before the next, as many as stay in the cache.
#include <ATen/core/Tensor.h>
#include <ATen/ops/linear_ops.h>

#include "cpu_common.h"
#include "cpu_operators.h"
#include "cpu_vectors.h"

#include <array>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

using at::Tensor;

namespace {

constexpr int STREAMS = 4, STEP = WIDTH / 2;
#if defined(AVX512)
constexpr int MOST_ROWS = 6;  // of x multiplied at a time: their sums stay in registers
#elif defined(NEON)
constexpr int MOST_ROWS = 4;
#else
constexpr int MOST_ROWS = 2;
#endif
constexpr int64_t AHEAD = 4608;  // bytes that are fetched before they are needed, of all streams together
constexpr int64_t PANEL = 1 << 18, LONGEST = 64;  // bytes, rows of a stream

// -- kernel -----------------------------------------------------------------------------------------------------------

template <typename T> struct Weights;  // a register of them, and x in the form that it is multiplied by

#if defined(BF16_DOT)
template <> struct Weights<at::BFloat16> {
  using Prepared = at::BFloat16;
  Bytes w;
  INLINE_MEMBER Weights(const at::BFloat16* p) : w(load<Bytes>(p)) {}
  INLINE_MEMBER Floats times(const Prepared* x, Floats sum) const { return dot_bf16(sum, w, load<Bytes>(x)); }
  static void prepare(const at::BFloat16* x, Prepared* to) { std::memcpy(to, x, STEP * 2); }
};
#else
template <> struct Weights<at::BFloat16> {  // the even columns of a step, then the odd ones
  using Prepared = float;
  Floats even, odd;
  INLINE_MEMBER Weights(const at::BFloat16* p) {
    Ints pairs = load<Ints>(p);
    even = (Floats)(pairs << 16), odd = (Floats)(pairs & (int32_t)0xffff0000);
  }
  INLINE_MEMBER Floats times(const float* x, Floats sum) const {
    return multiply_add(odd, load<Floats>(x + LANES), multiply_add(even, load<Floats>(x), sum));
  }
  static void prepare(const at::BFloat16* x, float* to) {
    for (int i = 0; i < LANES; i++) to[i] = x[2 * i], to[LANES + i] = x[2 * i + 1];
  }
};
#endif

template <> struct Weights<at::Half> {
  using Prepared = float;
  Floats first, second;
  INLINE_MEMBER Weights(const at::Half* p) : first(load_halves(p)), second(load_halves(p + LANES)) {}
  INLINE_MEMBER Floats times(const float* x, Floats sum) const {
    return multiply_add(second, load<Floats>(x + LANES), multiply_add(first, load<Floats>(x), sum));
  }
  static void prepare(const at::Half* x, float* to) {
    for (int i = 0; i < STEP; i++) to[i] = x[i];
  }
};

template <typename T> using Prepared = typename Weights<T>::Prepared;

// Rows w, w + stride, ... of the matrix times ROWS rows of x -> sums [streams][ROWS]; stream s is fetched ahead[s]
// numbers before it is needed.
template <typename T, int N, int ROWS>
void multiply(const T* w, int64_t stride, int64_t inputs, const Prepared<T>* const* rows, const int64_t* ahead,
              float* sums) {
  Floats acc[N][ROWS] = {};
  const Prepared<T>* x[ROWS];
  for (int m = 0; m < ROWS; m++) x[m] = rows[m];
  int64_t k = 0;
  for (; k + STEP <= inputs; k += STEP)
    UNROLL for (int s = 0; s < N; s++) {
      __builtin_prefetch(w + s * stride + k + ahead[s], 0, 2);
      Weights<T> weights(w + s * stride + k);
      UNROLL for (int m = 0; m < ROWS; m++) acc[s][m] = weights.times(x[m] + k, acc[s][m]);
    }
  for (int s = 0; s < N && k < inputs; s++) {
    T rest[STEP] = {};
    std::memcpy(rest, w + s * stride + k, (inputs - k) * sizeof(T));
    for (int m = 0; m < ROWS; m++) acc[s][m] = Weights<T>(rest).times(x[m] + k, acc[s][m]);
  }
  for (int s = 0; s < N; s++)
    for (int m = 0; m < ROWS; m++) *sums++ = sum_lanes(acc[s][m]);
}

template <typename T> using Kernel = void (*)(const T*, int64_t, int64_t, const Prepared<T>* const*, const int64_t*,
                                              float*);

template <typename T, int N, int... I> constexpr auto kernels(std::integer_sequence<int, I...>) {
  return std::array<Kernel<T>, sizeof...(I)>{multiply<T, N, I + 1>...};  // by number of rows
}

// -- linear -----------------------------------------------------------------------------------------------------------

template <typename T> struct Product {  // what all threads share
  int64_t inputs, outputs;
  std::vector<const Prepared<T>*> x;
  std::vector<int64_t> order;  // x[i] belongs to this row of y
  T* y;
};

// Rows [first, first + N * count) of one matrix, as N streams of `count` rows.
template <typename T, int N>
void multiply_streams(const Product<T>& p, const Rows& rows, int64_t first, int64_t count) {
  static constexpr auto KERNELS = kernels<T, N>(std::make_integer_sequence<int, MOST_ROWS>());
  int64_t passes = (rows.count + MOST_ROWS - 1) / MOST_ROWS, per = (rows.count + passes - 1) / passes;
  int64_t panel = std::clamp<int64_t>(PANEL / (N * p.inputs * (int64_t)sizeof(T)), 1, LONGEST);
  auto weight = (const T*)rows.weight + first * p.inputs;
  float sums[LONGEST * N * MOST_ROWS];
  for (int64_t begin = 0; begin < count; begin += panel)
    for (int64_t pass = 0; pass < passes; pass++) {
      int64_t ahead[N], m = rows.first + pass * per, n = std::min(per, rows.first + rows.count - m);
      for (int s = 0; s < N; s++)  // each of several passes fetches its share of the next panel
        ahead[s] = passes == 1 ? AHEAD / N / (int64_t)sizeof(T) : s * passes / N == pass ? panel * p.inputs : 0;
      const int64_t length = std::min(panel, count - begin);
      for (int64_t i = 0; i < length; i++)
        KERNELS[n - 1](weight + (begin + i) * p.inputs, count * p.inputs, p.inputs, p.x.data() + m, ahead,
                       sums + i * N * n);
      for (int64_t j = 0; j < n; j++)  // together: rows of y often share their place in the caches
        for (int s = 0; s < N; s++)
          for (int64_t i = 0; i < length; i++)
            p.y[p.order[m + j] * p.outputs + first + s * count + begin + i] = sums[(i * N + s) * n + j];
    }
}

template <typename T>
void run(Tensor& y, const Tensor& x, const Tensor& weight, const std::vector<Rows>& groups,
         std::vector<int64_t> order) {
  int64_t M = order.size(), inputs = x.size(-1), outputs = weight.size(-2), columns = round_up(inputs, STEP);
  Product<T> p{inputs, outputs, std::vector<const Prepared<T>*>(M), std::move(order), y.data_ptr<T>()};
  auto from = x.const_data_ptr<T>();
  Tensor memory;
  if (std::is_same_v<T, Prepared<T>> && columns == inputs) {
    for (int64_t m = 0; m < M; m++) p.x[m] = (const Prepared<T>*)(from + p.order[m] * inputs);
  } else {
    memory = empty({M * columns * (int64_t)sizeof(Prepared<T>)}, at::kByte);
    split(M, std::max<int64_t>(1, 32768 / columns), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) {
        auto row = (Prepared<T>*)memory.data_ptr() + m * columns;
        p.x[m] = row;
        for (int64_t k = 0; k < columns; k += STEP) {
          T step[STEP] = {};
          std::memcpy(step, from + p.order[m] * inputs + k, std::min<int64_t>(STEP, inputs - k) * sizeof(T));
          Weights<T>::prepare(step, row + k);
        }
      }
    });
  }
  int64_t work = inputs * (int64_t)sizeof(T) * std::max<int64_t>(1, M / (int64_t)groups.size());
  split(outputs * groups.size(), std::max<int64_t>(1, 65536 / work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {  // the part of each matrix that is in this thread's share
      int64_t last = std::min(end, (i / outputs + 1) * outputs), streams = (last - i) / STREAMS;
      const Rows& rows = groups[i / outputs];
      multiply_streams<T, STREAMS>(p, rows, i % outputs, streams);
      multiply_streams<T, 1>(p, rows, i % outputs + streams * STREAMS, last - i - streams * STREAMS);
      i = last;
    }
  });
}

bool better_in_pytorch(const Tensor& x, int64_t M) {  // which has blocks for more caches, and tiles (AMX)
#if defined(BF16_DOT)
  return x.scalar_type() == at::kBFloat16 && M > 32;
#else
  return false;  // without such instructions it is slower at any length, also in float32 on a widened copy
#endif
}

}  // namespace

Tensor LIBRARY::linear16(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& chosen) {
  TORCH_CHECK(x_.dim() > 0 && weight_.dim() == (chosen ? 3 : 2) && x_.size(-1) == weight_.size(-1) && x_.size(-1) > 0,
              "x ", x_.sizes(), " and weight ", weight_.sizes(), " do not fit");
  TORCH_CHECK(x_.scalar_type() == weight_.scalar_type(), "x is ", x_.scalar_type(), ", weight ", weight_.scalar_type());
  if (!chosen && better_in_pytorch(x_, x_.numel() / x_.size(-1))) return at::_ops::linear::call(x_, weight_, {});
  Tensor x = x_.contiguous(), weight = weight_.contiguous();
  std::vector<int64_t> shape = x.sizes().vec(), order(x.numel() / x.size(-1));
  shape.back() = weight.size(-2);
  Tensor y = empty(shape, x.scalar_type());
  auto groups = rows_of(chosen, weight, weight.size(-2) * weight.size(-1) * 2, order);
  if (y.numel() == 0) return y;
  if (x.scalar_type() == at::kBFloat16) run<at::BFloat16>(y, x, weight, groups, std::move(order));
  else if (x.scalar_type() == at::kHalf) run<at::Half>(y, x, weight, groups, std::move(order));
  else TORCH_CHECK(false, "x is ", x.scalar_type(), ", not bfloat16 or float16");
  return y;
}
