// Attention of a prompt on a CPU: many queries over the filled part of a cache, of which none looks at what is masked.
// ops/cpu_attention.cpp has the operator, and the call of a few tokens.
//
// Arithmetic. As there, but for caches of int8, which are widened. Keys and values become a block at a time what two
// small matrix products want, with positions, or columns, in the lanes of a register: nothing is added up across lanes.
// For that each block is laid out anew, once for GROUP rows.
//
// Threads. A task is GROUP rows of a kv head, over all blocks that any of them sees (FlashAttention-2: Dao 2023, arXiv
// 2307.08691). So tasks have nothing to tell each other.
//
// Glossary: see cpu_attention.cpp. H is the type that is multiplied, a number N of it what one lane takes.
#include <ATen/core/Tensor.h>

#include "cpu_softmax.h"

#include <vector>

using at::Tensor;

namespace {

constexpr int64_t GROUP = 256;
constexpr int TILE = 4;  // rows whose sums are in registers
constexpr int REGISTERS = WIDTH == 64 ? 4 : 2;  // of each

template <typename C> using Held = std::conditional_t<PAIRED<C>, C, float>;
template <typename H> using Number = std::conditional_t<PAIRED<H>, int32_t, float>;
template <typename H> constexpr int EACH = PAIRED<H> ? 2 : 1;  // numbers of H in one N

template <typename H> struct Layout {  // of what a task has at hand, in numbers N
  int64_t depth, columns;  // of a query or key, of a value

  explicit Layout(int64_t E) : depth((E + EACH<H> - 1) / EACH<H>), columns(round_up(E, LANES)) {}
  int64_t queries() const { return round_up(GROUP * depth, LANES); }
  int64_t keys() const { return depth * BLOCK; }
  int64_t values() const { return BLOCK / EACH<H> * columns; }
  int64_t sums() const { return GROUP * columns; }
  int64_t bytes() const { return (queries() + keys() + values() + sums()) * sizeof(float) + GROUP * sizeof(Row); }
};

template <typename H> struct Task {
  Row* rows;
  Number<H> *queries, *keys, *values;  // [GROUP][depth], [depth][BLOCK], [BLOCK / EACH][columns]
  float* sums;  // [GROUP][columns]

  Task(const Layout<H>& l, void* memory) : rows((Row*)memory), queries((Number<H>*)(rows + GROUP)),
    keys(queries + l.queries()), values(keys + l.keys()), sums((float*)(values + l.values())) {}
};

// -- layouts ----------------------------------------------------------------------------------------------------------

template <typename T, typename H> void lay_queries(const T* q, int64_t E, int64_t rows, Number<H>* to) {
  if constexpr (PAIRED<H>) std::memcpy(to, q, rows * E * sizeof(T));
  else for (int64_t i = 0; i < rows * E; i++) to[i] = (float)q[i];
}

template <typename C, typename H>
void lay_block(const Layout<H>& l, const C* k, const C* v, const float* k_scale, const float* v_scale, int64_t E,
               int64_t n, Number<H>* keys, Number<H>* values) {
  for (int64_t i = 0; i < l.depth; i++)
    for (int64_t j = 0; j < n; j++)
      if constexpr (PAIRED<H>) keys[i * BLOCK + j] = load<int32_t>(k + j * E + 2 * i);
      else keys[i * BLOCK + j] = (float)k[j * E + i] * (ROUNDED<C> ? k_scale[j] : 1);
  for (int64_t j = 0; j < n; j += EACH<H>)
    for (int64_t e = 0; e < E; e++)
      if constexpr (PAIRED<H>) {
        uint32_t even = load<uint16_t>(v + j * E + e), odd = j + 1 < n ? load<uint16_t>(v + (j + 1) * E + e) : 0;
        values[j / 2 * l.columns + e] = even | odd << 16;
      } else {
        values[j * l.columns + e] = (float)v[j * E + e] * (ROUNDED<C> ? v_scale[j] : 1);
      }
}

// -- a block ----------------------------------------------------------------------------------------------------------

INLINE Floats add_product(Floats sum, float a, Bytes b) { return multiply_add(Floats{} + a, (Floats)b, sum); }
INLINE Floats add_product(Floats sum, int32_t a, Bytes b) { return add_pairs(sum, b, (Bytes)(Ints{} + a)); }

// Adds rows a [TILE][depth] times COUNT registers of each row of b [depth][width] to `sums`.
template <typename N, int COUNT>
INLINE void add_products(const N* a, int64_t stride, const N* b, int64_t width, int64_t depth,
                         Floats (&sums)[TILE][COUNT]) {
  ROLLED for (int64_t i = 0; i < depth; i++) {
    Bytes x[COUNT];
    UNROLL for (int c = 0; c < COUNT; c++) x[c] = load<Bytes>(b + i * width + c * LANES);
    UNROLL for (int r = 0; r < TILE; r++) {
      const N factor = load<N>(a + r * stride + i);
      UNROLL for (int c = 0; c < COUNT; c++) sums[r][c] = add_product(sums[r][c], factor, x[c]);
    }
  }
}

// Adds COUNT registers of n values, from b on, times their probabilities to sums [TILE][columns].
template <typename H, int COUNT>
INLINE void add_values(const Layout<H>& l, const Number<H>* p, const float* keep, const Number<H>* b, int64_t n,
                       float* sums) {
  Floats acc[TILE][COUNT];
  UNROLL for (int r = 0; r < TILE; r++)
    UNROLL for (int c = 0; c < COUNT; c++) acc[r][c] = load<Floats>(sums + r * l.columns + c * LANES) * keep[r];
  add_products(p, BLOCK / EACH<H>, b, l.columns, (n + EACH<H> - 1) / EACH<H>, acc);
  UNROLL for (int r = 0; r < TILE; r++)
    UNROLL for (int c = 0; c < COUNT; c++) std::memcpy(sums + r * l.columns + c * LANES, &acc[r][c], WIDTH);
}

// TILE rows over the n positions from `at` on.
template <typename H>
__attribute__((noinline)) void attend_tile(const Layout<H>& l, const Task<H>& task, int64_t row, float scale,
                                           int64_t at, int64_t n) {
  alignas(LINE) float scores[TILE * BLOCK];
  alignas(LINE) Probability<H> p[TILE * BLOCK];
  float keep[TILE], *sums = task.sums + row * l.columns;
  for (int64_t j = 0; j < n; j += REGISTERS * LANES) {
    Floats score[TILE][REGISTERS] = {};
    add_products(task.queries + row * l.depth, l.depth, task.keys + j, BLOCK, l.depth, score);
    UNROLL for (int r = 0; r < TILE; r++)
      UNROLL for (int c = 0; c < REGISTERS; c++) {
        score[r][c] *= scale;
        std::memcpy(scores + r * BLOCK + j + c * LANES, &score[r][c], WIDTH);
      }
  }
  soften<H, TILE>(task.rows + row, at, n, nullptr, nullptr, scores, p, keep);
  int64_t e = 0;
  for (; e + REGISTERS * LANES <= l.columns; e += REGISTERS * LANES)
    add_values<H, REGISTERS>(l, (const Number<H>*)p, keep, task.values + e, n, sums + e);
  for (; e < l.columns; e += LANES) add_values<H, 1>(l, (const Number<H>*)p, keep, task.values + e, n, sums + e);
}

// -- a task -----------------------------------------------------------------------------------------------------------

INLINE bool sees(const Row* rows, int64_t count, int64_t at, int64_t n) {
  for (int64_t r = 0; r < count; r++)
    if (rows[r].first < at + n && rows[r].last >= at) return true;
  return false;
}

// The GROUP rows of a kv head, or those that are left, from `first` on.
template <typename T, typename C>
void attend_group(const Call<C>& c, const Span& span, int64_t b, int64_t head, int64_t first,
                  const Layout<Held<C>>& l, const Task<Held<C>>& task) {
  const int64_t count = std::min(GROUP, c.rows - first), padded = round_up(count, TILE), number = b * c.heads + head;
  for (int64_t r = 0; r < padded; r++) task.rows[r] = row_of(c, span, b, first + r);
  lay_queries<T, Held<C>>((const T*)c.q + (number * c.rows + first) * c.E, c.E, count, task.queries);
  std::memset(task.sums, 0, padded * l.columns * sizeof(float));
  for (int64_t at = span.first, n; at <= span.newest; at += n) {
    const int64_t slot = at % c.slots;
    n = std::min({BLOCK - at % BLOCK, c.slots - slot, span.newest + 1 - at});
    if (!sees(task.rows, count, at, n)) continue;
    const float* scales[] = {c.k_scale + number * c.slots + slot, c.v_scale + number * c.slots + slot};
    const int64_t k = b * c.k_batch + head * c.k_head, v = b * c.v_batch + head * c.v_head, held = number * c.slots;
    lay_block(l, c.k + k + slot * c.E, c.v + v + slot * c.E, ROUNDED<C> ? c.k_scale + held + slot : nullptr,
              ROUNDED<C> ? c.v_scale + held + slot : nullptr, c.E, n, task.keys, task.values);
    for (int64_t r = 0; r < count; r += TILE)
      if (sees(task.rows + r, TILE, at, n)) attend_tile(l, task, r, c.scale, at, n);
  }
  for (int64_t r = 0; r < count; r++) {
    const Row& row = task.rows[r];
    const float sink = c.sinks ? c.sinks[head * c.rows + first + r] * (float)M_LOG2E : NEVER;
    const float largest = std::max(row.largest, sink), weight = power_of_two(row.largest - largest);
    const float total = reduced(row.total, plus)[0] * weight + (c.sinks ? power_of_two(sink - largest) : 0);
    T* y = (T*)c.y + (number * c.rows + first + r) * c.E;
    for (int64_t e = 0; e < c.E; e += LANES)
      store_some(y + e, load<Floats>(task.sums + r * l.columns + e) * weight / total, c.E - e);
  }
}

template <typename T, typename C> void attend(const Call<C>& c, int64_t batch) {
  std::vector<Span> spans;
  int64_t seen = 0;
  for (int64_t b = 0; b < batch; b++) spans.push_back(span_of(c, b)), seen += spans[b].newest + 1 - spans[b].first;
  const int64_t groups = (c.rows + GROUP - 1) / GROUP, tasks = batch * c.heads * groups;
  const int64_t products = std::max<int64_t>(1, 2 * seen * c.heads * c.rows * c.E);
  const Layout<Held<C>> l(c.E);
  split(tasks, std::max<int64_t>(1, tasks * ALONE / products), [&](int64_t begin, int64_t end) {
    Tensor memory = empty({l.bytes()}, at::kByte);
    std::memset(memory.data_ptr(), 0, l.bytes());  // columns of values behind the last stay so
    const Task<Held<C>> task(l, memory.data_ptr());
    for (int64_t t = begin; t < end; t++)
      attend_group<T>(c, spans[t / groups / c.heads], t / groups / c.heads, t / groups % c.heads, t % groups * GROUP,
                      l, task);
  });
}

}  // namespace

void LIBRARY::attend_prompt(const Attention& t) {
  with_types(t, [&]<typename T, typename C>() { attend<T>(Call<C>(t), t.q.size(0)); });
}
