// What attention of a few tokens (cpu_attention.cpp) and that of prompts (cpu_prompts.cpp) share: a call, the positions
// that it looks at, and the softmax of a block of them.
//
// Glossary: see cpu_attention.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu_common.h"
#include "cpu_floats.h"
#include "cpu_int8.h"
#include "cpu_operators.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace {

constexpr int BLOCK = 64;  // positions whose scores are at hand at a time
constexpr int64_t ALONE = 1 << 16;  // products that are not worth another thread
constexpr float NEVER = -std::numeric_limits<float>::infinity();

template <typename C> struct Call {  // what all tasks share; strides are in numbers
  const void* q;  // of T
  const C *k, *v;
  const float *k_scale, *v_scale;
  const int64_t* positions;
  const float* sinks;
  void* y;
  float scale;  // of a score, in powers of two
  int64_t heads, rows, tokens, slots, E, window;
  int64_t k_batch, k_head, v_batch, v_head;

  int64_t pieces() const { return (E + PIECE<C> - 1) / PIECE<C>; }

  Call(const LIBRARY::Attention& t) :
    q(t.q.data_ptr()), k((const C*)t.k.data_ptr()), v((const C*)t.v.data_ptr()), k_scale(floats_of(t.k_scale)),
    v_scale(floats_of(t.v_scale)), positions(t.positions.const_data_ptr<int64_t>()), sinks(floats_of(t.sinks)),
    y(t.y.data_ptr()), scale(t.scale * M_LOG2E), heads(t.q.size(1)), rows(t.q.size(2)), tokens(t.positions.size(1)),
    slots(t.k.size(2)), E(t.q.size(3)), window(t.window ? t.window : slots), k_batch(t.k.stride(0)),
    k_head(t.k.stride(1)), v_batch(t.v.stride(0)), v_head(t.v.stride(1)) {}

  static const float* floats_of(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }
};

struct Row {  // a query row on its way
  Floats total;
  float largest, weight;  // weight: of its sums among those of other tasks
  int64_t first, last;  // positions that it sees
};

struct Scales {  // of a block's keys and values, zeros behind them
  alignas(LINE) float k[BLOCK], v[BLOCK];

  Scales(const float* keys, const float* values, int64_t n) : k{}, v{} {
    std::memcpy(k, keys, n * sizeof(float)), std::memcpy(v, values, n * sizeof(float));
  }
};

template <typename C> constexpr bool ROUNDED = std::is_same_v<C, int8_t>;

template <typename T> using Probability = std::conditional_t<PAIRED<T>, uint16_t, float>;

INLINE Floats store_probabilities(Floats x, float* p) { return std::memcpy(p, &x, sizeof x), x; }
INLINE Floats store_probabilities(Floats x, uint16_t* p) { return store_bfloat16(x, p); }  // what was stored

struct Span {  // of the positions that a row of the batch looks at
  int64_t first, newest, oldest;  // first position read, last one, oldest one held
};

template <typename C> Span span_of(const Call<C>& c, int64_t b) {
  const int64_t *p = c.positions + b * c.tokens, newest = *std::max_element(p, p + c.tokens);
  TORCH_CHECK(newest >= 0, "position ", newest);
  int64_t oldest = std::max<int64_t>(newest - c.slots + 1, 0);
  int64_t first = std::max(*std::min_element(p, p + c.tokens) - c.window + 1, oldest);
  int64_t block = std::max(first / BLOCK * BLOCK, first / c.slots * c.slots);
  return {first - (first - block) % LANES, newest, oldest};  // lanes stand as if all were read
}

// Row r of a kv head; one behind the last sees nothing.
template <typename C> INLINE Row row_of(const Call<C>& c, const Span& span, int64_t b, int64_t r) {
  int64_t position = r < c.rows ? c.positions[b * c.tokens + r % c.tokens] : -1;
  return {Floats{}, NEVER, 1, std::max(position - c.window + 1, span.oldest), position};
}

// Scores [ROWS][BLOCK] of n positions from `at` on -> probabilities, relative to each row's largest score so far.
// `keep`: what sums relative to the one before are to be multiplied by; `scales`, `start`: for int8.
template <typename C, int ROWS>
INLINE void soften(Row* rows, int64_t at, int64_t n, const Scales* scales, const Start8* start, float* scores,
                   Probability<C>* p, float* keep) {
  const int64_t padded = round_up(n, LANES);
  if constexpr (ROUNDED<C>)
    for (int r = 0; r < ROWS; r++)
      for (int64_t j = 0; j < padded; j++) scores[r * BLOCK + j] *= scales->k[j] * start[r].scale;
  for (int r = 0; r < ROWS; r++) {
    const int64_t begin = std::min(rows[r].first - at, padded), end = std::min(rows[r].last + 1 - at, n);
    for (int64_t j = 0; j < begin; j++) scores[r * BLOCK + j] = NEVER;
    for (int64_t j = std::max<int64_t>(end, 0); j < padded; j++) scores[r * BLOCK + j] = NEVER;
  }
  Floats base[ROWS], total[ROWS];
  UNROLL for (int r = 0; r < ROWS; r++) base[r] = Floats{} + rows[r].largest;
  ROLLED for (int64_t j = 0; j < padded; j += LANES)
    UNROLL for (int r = 0; r < ROWS; r++) base[r] = greater(load<Floats>(scores + r * BLOCK + j), base[r]);
  UNROLL for (int r = 0; r < ROWS; r++) {
    Floats largest = reduced(base[r], greater);
    base[r] = largest == NEVER ? Floats{} : largest;  // a row that sees nothing of this block
    Floats factor = power_of_two(rows[r].largest - base[r]);
    rows[r].largest = largest[0], keep[r] = factor[0], total[r] = rows[r].total * factor;
  }
  ROLLED for (int64_t j = 0; j < padded; j += LANES)
    UNROLL for (int r = 0; r < ROWS; r++) {
      Floats x = power_of_two(load<Floats>(scores + r * BLOCK + j) - base[r]);
      if constexpr (ROUNDED<C>)
        total[r] += x, store_probabilities(x * load<Floats>(scales->v + j), p + r * BLOCK + j);
      else total[r] += store_probabilities(x, p + r * BLOCK + j);
    }
  UNROLL for (int r = 0; r < ROWS; r++) rows[r].total = total[r];
}

// f<T, C>() for the types of queries and caches.
template <typename F> void with_types(const LIBRARY::Attention& t, const F& f) {
  auto both = [&]<typename T>() {
    t.k.scalar_type() == at::kChar ? f.template operator()<T, int8_t>() : f.template operator()<T, T>();
  };
  if (t.q.scalar_type() == at::kFloat) both.template operator()<float>();
  else if (t.q.scalar_type() == at::kBFloat16) both.template operator()<at::BFloat16>();
  else if (t.q.scalar_type() == at::kHalf) both.template operator()<at::Half>();
  else TORCH_CHECK(false, "q is ", t.q.scalar_type(), ", not float32, bfloat16 or float16");
}

}  // namespace
