// Decode attention on a CPU: a few queries over the filled part of a cache, of which keys and values are read once, as
// they lie in memory. ops/__init__.py declares the operator and has its plain form; ops/cpu.py compiles this file.
//
// Arithmetic. Scores, softmax and sums are float32; with AVX512_BF16 the probabilities for bfloat16 values are rounded
// to bfloat16, as in PyTorch's own attention, and so is what their total adds up. Positions are taken in blocks, which
// end at multiples of BLOCK and of L whatever the batch, other queries and threads are. So a row gives the same bits
// alone and among others, and the same numbers within rounding on every processor.
//
// Threads. A task is a kv head of a row of the batch, and CHUNK positions. It leaves sums relative to the largest score
// that it met (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867); the last task of a head adds them up.
//
// Glossary: B batch, S tokens, K kv heads, R = G * S query rows of a kv head, L slots, E head_dim; position p lives in
// slot p % L. A piece is what a register holds of the numbers of a cache; it becomes WIDE registers of float32.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu_common.h"
#include "cpu_floats.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

using at::Tensor;

namespace {

constexpr int BLOCK = 64;  // positions whose scores are at hand at a time
constexpr int64_t CHUNK = 4 * BLOCK;  // positions of a task
constexpr int ROWS_AT_ONCE = 4;
constexpr int SUMS_AT_ONCE = WIDTH == 64 ? 4 : 2;  // registers of sums of a row; 4 rows of them stay in registers
constexpr int64_t ALONE = 1 << 16;  // products that are not worth another thread
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// -- a block ----------------------------------------------------------------------------------------------------------

template <typename T> struct Call {  // what all tasks share; strides are in numbers
  const T *q, *k, *v;
  const int64_t* positions;
  const float* sinks;
  T* y;
  float scale;  // of a score, in powers of two
  int64_t heads, rows, tokens, slots, E, window;
  int64_t k_batch, k_head, v_batch, v_head;

  int64_t pieces() const { return (E + PIECE<T> - 1) / PIECE<T>; }
  int64_t lanes(int64_t piece) const { return std::min<int64_t>(LANES, (E - piece * PIECE<T>) * sizeof(T) / 4); }
};

struct Row {  // a query row on its way
  Floats total;
  float largest, weight;  // weight: of its sums among those of other tasks
  int64_t first, last;  // positions that it sees
};

template <typename T> INLINE void fetch(const T* p, int64_t first, int64_t numbers) {  // into the second cache
  if (p)
    for (int64_t i = 0; i < numbers * (int64_t)sizeof(T); i += LINE) __builtin_prefetch((char*)(p + first) + i, 0, 2);
}

template <typename T> using Query = std::conditional_t<PAIRED<T>, Bytes, Wide<T>>;
template <typename T> using Probability = std::conditional_t<PAIRED<T>, uint16_t, float>;

INLINE Floats store_probabilities(Floats x, float* p) { return std::memcpy(p, &x, sizeof x), x; }
INLINE Floats store_probabilities(Floats x, uint16_t* p) { return store_bfloat16(x, p); }  // what was stored

template <typename T> INLINE Query<T> query_piece(Bytes v) {
  if constexpr (PAIRED<T>) return v;
  else return widen<T>(v);
}

template <typename T, bool WHOLE> INLINE Bytes load_piece(const Call<T>& c, const T* p, int64_t piece) {
  if constexpr (WHOLE) return load<Bytes>(p + piece * PIECE<T>);
  else return load_lanes(p + piece * PIECE<T>, c.lanes(piece));
}

template <typename T> INLINE Floats add_products(Floats sum, const Query<T>& a, const Query<T>& b) {
  if constexpr (PAIRED<T>) return add_pairs(sum, a, b);
  else {
    UNROLL for (int i = 0; i < WIDE<T>; i++) sum = multiply_add(a.at[i], b.at[i], sum);
    return sum;
  }
}

// Rows q [ROWS][pieces] by n keys -> scores [ROWS][BLOCK]. `ahead`: what will be needed next, row for row.
template <typename T, int ROWS, bool WHOLE>
INLINE void score(const Call<T>& c, const Query<T>* q, const T* k, int64_t n, const T* ahead, float* scores) {
  constexpr int KEYS = LANES / ROWS;
  const int64_t pieces = c.pieces(), E = c.E;
  for (int64_t j = 0; j < n; j += KEYS) {
    const T* key[KEYS];
    UNROLL for (int i = 0; i < KEYS; i++) key[i] = k + std::min(j + i, n - 1) * E;
    fetch(ahead, j * E, KEYS * E);
    Floats sums[LANES] = {};
    ROLLED for (int64_t piece = 0; piece < pieces; piece++) {
      Query<T> x[KEYS];
      UNROLL for (int i = 0; i < KEYS; i++) x[i] = query_piece<T>(load_piece<T, WHOLE>(c, key[i], piece));
      UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int i = 0; i < KEYS; i++)
          sums[r * KEYS + i] = add_products<T>(sums[r * KEYS + i], x[i], q[r * pieces + piece]);
    }
    Floats total = totals(sums) * c.scale;
    UNROLL for (int r = 0; r < ROWS; r++) std::memcpy(scores + r * BLOCK + j, (float*)&total + r * KEYS, KEYS * 4);
  }
}

// Scores [ROWS][BLOCK] of n positions from `at` on -> probabilities, relative to each row's largest score so far.
// `keep`: what sums relative to the one before are to be multiplied by.
template <typename T, int ROWS>
INLINE void soften(Row* rows, int64_t at, int64_t n, float* scores, Probability<T>* p, float* keep) {
  const int64_t padded = round_up(n, LANES);
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
      total[r] += store_probabilities(x, p + r * BLOCK + j);
    }
  UNROLL for (int r = 0; r < ROWS; r++) rows[r].total = total[r];
}

// Adds PIECES pieces of n values times their probabilities p [ROWS][BLOCK] to `sums` [ROWS][columns].
template <typename T, int ROWS, bool WHOLE, int PIECES>
INLINE void add_values(const Call<T>& c, const Probability<T>* p, const float* keep, const T* v, int64_t n,
                       const T* ahead, int64_t first, float* sums) {
  constexpr int STEP = PAIRED<T> ? 2 : 1, REGISTERS = WIDE<T>;
  const int64_t columns = c.pieces() * PIECE<T>, E = c.E;
  Floats acc[ROWS][PIECES][REGISTERS];
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int i = 0; i < PIECES * REGISTERS; i++)
      acc[r][i / REGISTERS][i % REGISTERS] = load<Floats>(sums + r * columns + first * PIECE<T> + i * LANES) * keep[r];
  ROLLED for (int64_t j = 0; j < n; j += STEP) {
    const T *value = v + j * E, *other = v + std::min(j + 1, n - 1) * E;
    fetch(ahead, j * E, STEP * E);
    UNROLL for (int i = 0; i < PIECES; i++) {
      Bytes raw = load_piece<T, WHOLE>(c, value, first + i);
      if constexpr (PAIRED<T>) {
        Ints a = (Ints)raw, b = (Ints)load_piece<T, WHOLE>(c, other, first + i);
        Bytes even = (Bytes)((a & 0xffff) | (b << 16)), odd = (Bytes)(upper(a) | (b & ~0xffff));
        UNROLL for (int r = 0; r < ROWS; r++) {
          Bytes pair = (Bytes)(Ints{} + load<int32_t>(p + r * BLOCK + j));
          acc[r][i][0] = add_pairs(acc[r][i][0], even, pair);
          acc[r][i][1] = add_pairs(acc[r][i][1], odd, pair);
        }
      } else {
        Wide<T> x = widen<T>(raw);
        UNROLL for (int r = 0; r < ROWS; r++)
          UNROLL for (int h = 0; h < REGISTERS; h++)
            acc[r][i][h] = multiply_add(Floats{} + p[r * BLOCK + j], x.at[h], acc[r][i][h]);
      }
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int i = 0; i < PIECES * REGISTERS; i++)
      std::memcpy(sums + r * columns + first * PIECE<T> + i * LANES, &acc[r][i / REGISTERS][i % REGISTERS], WIDTH);
}

// ROWS query rows over the n positions from `at` on, whose keys and values lie one behind the other.
template <typename T, int ROWS, bool WHOLE>
__attribute__((noinline)) void attend_block(const Call<T>& c, const Query<T>* q, const T* k, const T* v, int64_t at,
                                            int64_t n, bool first, Row* rows, float* sums) {
  alignas(LINE) float scores[ROWS * BLOCK];
  alignas(LINE) Probability<T> p[ROWS * BLOCK];
  float keep[ROWS];
  constexpr int64_t PIECES = std::max(1, SUMS_AT_ONCE / WIDE<T>);
  score<T, ROWS, WHOLE>(c, q, k, n, first ? v : nullptr, scores);  // the values will be needed next, then more keys
  soften<T, ROWS>(rows, at, n, scores, p, keep);
  const T* ahead = first ? k + n * c.E : nullptr;
  int64_t piece = 0;
  for (; piece + PIECES <= c.pieces(); piece += PIECES, ahead = nullptr)
    add_values<T, ROWS, WHOLE, PIECES>(c, p, keep, v, n, ahead, piece, sums);
  for (; piece < c.pieces(); piece++, ahead = nullptr)
    add_values<T, ROWS, WHOLE, 1>(c, p, keep, v, n, ahead, piece, sums);
}

// -- a task -----------------------------------------------------------------------------------------------------------

struct Span {  // of the positions that a row of the batch looks at
  int64_t first, newest, oldest, task;  // first position read, last one, oldest one held; tasks of the rows before

  int64_t chunks() const { return newest / CHUNK - first / CHUNK + 1; }
};

template <typename T> Span span_of(const Call<T>& c, int64_t b, int64_t task) {
  const int64_t *p = c.positions + b * c.tokens, newest = *std::max_element(p, p + c.tokens);
  TORCH_CHECK(newest >= 0, "position ", newest);
  int64_t oldest = std::max<int64_t>(newest - c.slots + 1, 0);
  int64_t first = std::max(*std::min_element(p, p + c.tokens) - c.window + 1, oldest);
  int64_t block = std::max(first / BLOCK * BLOCK, first / c.slots * c.slots);
  return {first - (first - block) % LANES, newest, oldest, task};  // lanes stand as if all were read
}

// What a task leaves: rows, padded to whole groups of ROWS_AT_ONCE, and their sums.
template <typename T> struct Part {
  Row* rows;
  float* sums;

  static int64_t bytes(const Call<T>& c) {
    return round_up(c.rows, ROWS_AT_ONCE) * (int64_t)(sizeof(Row) + c.pieces() * PIECE<T> * sizeof(float));
  }
  Part(const Call<T>& c, uint8_t* memory, int64_t task) : rows((Row*)(memory + task * bytes(c))),
    sums((float*)(rows + round_up(c.rows, ROWS_AT_ONCE))) {}
};

template <typename T, bool WHOLE>
void attend_chunk(const Call<T>& c, const Span& span, int64_t b, int64_t head, int64_t chunk, const Query<T>* q,
                  const Part<T>& part) {
  const int64_t padded = round_up(c.rows, ROWS_AT_ONCE), columns = c.pieces() * PIECE<T>;
  for (int64_t r = 0; r < padded; r++) {
    int64_t position = r < c.rows ? c.positions[b * c.tokens + r % c.tokens] : -1;
    part.rows[r] = {Floats{}, NEVER, 1, std::max(position - c.window + 1, span.oldest), position};
  }
  std::memset(part.sums, 0, padded * columns * sizeof(float));
  const int64_t start = (span.first / CHUNK + chunk) * CHUNK, end = std::min(start + CHUNK, span.newest + 1);
  for (int64_t at = std::max(start, span.first), n; at < end; at += n) {
    int64_t slot = at % c.slots;
    n = std::min({BLOCK - at % BLOCK, c.slots - slot, end - at});
    const T* k = c.k + b * c.k_batch + head * c.k_head + slot * c.E;
    const T* v = c.v + b * c.v_batch + head * c.v_head + slot * c.E;
    for (int64_t r = 0, some; r < c.rows; r += some) {
      some = c.rows - r > 2 ? 4 : c.rows - r;
      auto attend = some == 4 ? attend_block<T, 4, WHOLE> : some == 2 ? attend_block<T, 2, WHOLE>
                                                                      : attend_block<T, 1, WHOLE>;
      attend(c, q + r * c.pieces(), k, v, at, n, r == 0, part.rows + r, part.sums + r * columns);
    }
  }
}

template <typename T> void prepare_queries(const Call<T>& c, int64_t b, int64_t head, Query<T>* q) {
  for (int64_t r = 0; r < round_up(c.rows, ROWS_AT_ONCE); r++)
    for (int64_t piece = 0; piece < c.pieces(); piece++, q++) {
      const T* row = c.q + ((b * c.heads + head) * c.rows + r) * c.E;
      *q = query_piece<T>(r < c.rows ? load_piece<T, false>(c, row, piece) : Bytes{});
    }
}

// Adds up what the tasks of a head have left.
template <typename T> void finish(const Call<T>& c, const Span& span, int64_t b, int64_t head, uint8_t* memory) {
  const int64_t first = span.task + head * span.chunks(), last = first + span.chunks();
  for (int64_t r = 0; r < c.rows; r++) {
    const int64_t index = (b * c.heads + head) * c.rows + r;
    const float sink = c.sinks ? c.sinks[head * c.rows + r] * (float)M_LOG2E : NEVER;
    float largest = sink;
    for (int64_t t = first; t < last; t++) largest = std::max(Part<T>(c, memory, t).rows[r].largest, largest);
    float total = c.sinks ? power_of_two(sink - largest) : 0;
    for (int64_t t = first; t < last; t++) {
      Row& row = Part<T>(c, memory, t).rows[r];
      row.weight = power_of_two(row.largest - largest);
      total += reduced(row.total, plus)[0] * row.weight;
    }
    for (int64_t piece = 0; piece < c.pieces(); piece++) {
      Wide<T> sum = {};
      for (int64_t t = first; t < last; t++) {
        Part<T> part(c, memory, t);
        const float* sums = part.sums + (r * c.pieces() + piece) * PIECE<T>;
        for (int i = 0; i < WIDE<T>; i++) sum.at[i] += load<Floats>(sums + i * LANES) * part.rows[r].weight;
      }
      for (int i = 0; i < WIDE<T>; i++) sum.at[i] /= Floats{} + total;
      store_piece<T>(c.y + index * c.E + piece * PIECE<T>, sum, c.E - piece * PIECE<T>);
    }
  }
}

template <typename T, bool WHOLE> void attend(const Call<T>& c, int64_t batch) {
  std::vector<Span> spans;
  int64_t tasks = 0, read = 0;
  for (int64_t b = 0; b < batch; b++) {
    spans.push_back(span_of(c, b, tasks));
    tasks += spans[b].chunks() * c.heads;
    read += (spans[b].newest + 1 - spans[b].first) * c.heads;
  }
  Tensor memory = at::empty({tasks * Part<T>::bytes(c)}, at::kByte);
  auto parts = (uint8_t*)memory.data_ptr();
  std::vector<std::atomic<int64_t>> done(batch * c.heads);
  const int64_t products = 2 * read * c.rows * c.E;
  split(tasks, std::max<int64_t>(1, tasks * ALONE / products), [&](int64_t begin, int64_t end) {
    Tensor queries = at::empty({round_up(c.rows, ROWS_AT_ONCE) * c.pieces() * (int64_t)sizeof(Query<T>)}, at::kByte);
    auto q = (Query<T>*)queries.data_ptr();
    for (int64_t t = begin, b = 0, prepared = -1; t < end; t++) {
      while (b + 1 < batch && t >= spans[b + 1].task) b++;
      const int64_t chunks = spans[b].chunks(), head = (t - spans[b].task) / chunks, index = b * c.heads + head;
      if (index != prepared) prepare_queries(c, b, head, q), prepared = index;
      attend_chunk<T, WHOLE>(c, spans[b], b, head, (t - spans[b].task) % chunks, q, Part<T>(c, parts, t));
      if (++done[index] == chunks) finish(c, spans[b], b, head, parts);
    }
  });
}

template <typename T>
void run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions, const float* sinks, double scale,
         int64_t window, Tensor& y) {
  Call<T> c{(const T*)q.data_ptr(), (const T*)k.data_ptr(), (const T*)v.data_ptr(), positions.const_data_ptr<int64_t>(),
            sinks, (T*)y.data_ptr(), (float)(scale * M_LOG2E), q.size(1), q.size(2), positions.size(1), k.size(2),
            q.size(3), window ? window : k.size(2), k.stride(0), k.stride(1), v.stride(0), v.stride(1)};
  TORCH_CHECK(c.E * sizeof(T) % 4 == 0, "head_dim ", c.E, " is odd");
  (c.E % PIECE<T> == 0 ? attend<T, true> : attend<T, false>)(c, q.size(0));
}

Tensor decode_attention(const Tensor& q_, const Tensor& k, const Tensor& v, const Tensor& positions_, double scale,
                        int64_t window, const std::optional<Tensor>& sinks_) {
  TORCH_CHECK(q_.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && positions_.dim() == 2, "a shape is wrong");
  TORCH_CHECK(k.size(0) == q_.size(0) && k.size(1) == q_.size(1) && k.size(3) == q_.size(3), "q ", q_.sizes(),
              " does not fit caches ", k.sizes());
  TORCH_CHECK(k.scalar_type() == q_.scalar_type() && v.scalar_type() == q_.scalar_type(),
              "q and caches differ in type");
  TORCH_CHECK(k.stride(3) == 1 && k.stride(2) == k.size(3) && v.stride(3) == 1 && v.stride(2) == v.size(3),
              "the slots of a head are not one behind the other");
  TORCH_CHECK(positions_.scalar_type() == at::kLong && positions_.size(0) == q_.size(0) && positions_.size(1) > 0 &&
              q_.size(2) % positions_.size(1) == 0, "positions ", positions_.sizes(), " do not fit q ", q_.sizes());
  Tensor q = q_.contiguous(), positions = positions_.contiguous(), sinks = sinks_ ? sinks_->contiguous() : Tensor();
  TORCH_CHECK(!sinks_ || (sinks.scalar_type() == at::kFloat && sinks.numel() == q.size(1) * q.size(2)),
              "sinks: a float32 for each row of a batch");
  Tensor y = at::empty(q.sizes(), q.options());
  if (y.numel() == 0) return y;
  const float* lost = sinks_ ? sinks.const_data_ptr<float>() : nullptr;
  if (q.scalar_type() == at::kFloat) run<float>(q, k, v, positions, lost, scale, window, y);
  else if (q.scalar_type() == at::kBFloat16) run<at::BFloat16>(q, k, v, positions, lost, scale, window, y);
  else if (q.scalar_type() == at::kHalf) run<at::Half>(q, k, v, positions, lost, scale, window, y);
  else TORCH_CHECK(false, "q is ", q.scalar_type(), ", not float32, bfloat16 or float16");
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(LIBRARY, CPU, m) { m.impl("decode_attention", &decode_attention); }
