// Decode attention on a CPU: a few queries over the filled part of a cache, of which keys and values are read once, as
// they lie in memory. ops/__init__.py declares the operator and has its plain form; ops/cpu.py compiles this file.
//
// Arithmetic. Scores, softmax and sums are float32; with AVX512_BF16 the probabilities for bfloat16 values are rounded
// to bfloat16, as in PyTorch's own attention, and so is what their total adds up. Positions are taken in blocks, which
// end at multiples of BLOCK and of L whatever the batch, other queries and threads are. So a row gives the same bits
// alone and among others, and the same numbers within rounding on every processor.
//
// cpu_int8.h has the arithmetic of caches of int8. Of more than FEW tokens cpu_prompts.cpp takes care.
//
// Threads. A task is a kv head of a row of the batch, and CHUNK positions. It leaves sums relative to the largest score
// that it met (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867); the last task of a head adds them up.
//
// Glossary: B batch, S tokens, K kv heads, R = G * S query rows of a kv head, L slots, E head_dim; position p lives in
// slot p % L. T is the type of queries and results, C that of the caches. A piece is what a register holds of the
// numbers of a cache; it becomes WIDE registers of float32.
#include <ATen/core/Tensor.h>

#include "cpu_softmax.h"

#include <atomic>
#include <optional>
#include <vector>

using at::Tensor;

namespace {

constexpr int64_t FEW = 16;  // tokens, as in ops/__init__.py
constexpr int64_t CHUNK = 4 * BLOCK;  // positions of a task
constexpr int ROWS_AT_ONCE = 4;
constexpr int SUMS_AT_ONCE = WIDTH == 64 ? 4 : 2;  // registers of sums of a row; 4 rows of them stay in registers

// -- a block ----------------------------------------------------------------------------------------------------------

template <typename C> using Query = std::conditional_t<PAIRED<C> || ROUNDED<C>, Bytes, Wide<C>>;

template <typename C> struct Queries {  // rows [padded][pieces] of a kv head
  Query<C>* piece;
  Start8* start;  // of each row, for int8

  Queries at(int64_t row, int64_t pieces) const { return {piece + row * pieces, start + row}; }
};

template <typename C> INLINE Query<C> query_piece(Bytes v) {
  if constexpr (PAIRED<C>) return v;
  else return widen<C>(v);
}

template <typename C> INLINE Floats add_products(Floats sum, const Query<C>& a, const Query<C>& b) {
  if constexpr (PAIRED<C>) return add_pairs(sum, a, b);
  else {
    UNROLL for (int i = 0; i < WIDE<C>; i++) sum = multiply_add(a.at[i], b.at[i], sum);
    return sum;
  }
}

// Rows q [ROWS][pieces] by n keys -> scores [ROWS][BLOCK]. `ahead`: what will be needed next, row for row.
template <typename C, int ROWS, bool WHOLE>
INLINE void score(const Call<C>& c, const Queries<C>& q, const C* k, int64_t n, const C* ahead, float* scores) {
  constexpr int KEYS = LANES / ROWS;
  const int64_t pieces = c.pieces(), E = c.E;
  for (int64_t j = 0; j < n; j += KEYS) {
    const C* key[KEYS];
    UNROLL for (int i = 0; i < KEYS; i++) key[i] = k + std::min(j + i, n - 1) * E;
    fetch(ahead, j * E, KEYS * E);
    Floats sums[LANES] = {}, total;
    if constexpr (!ROUNDED<C>) ROLLED for (int64_t piece = 0; piece < pieces; piece++) {
      Query<C> x[KEYS];
      UNROLL for (int i = 0; i < KEYS; i++) x[i] = query_piece<C>(load_piece<C, WHOLE>(E, key[i], piece));
      UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int i = 0; i < KEYS; i++)
          sums[r * KEYS + i] = add_products<C>(sums[r * KEYS + i], x[i], q.piece[r * pieces + piece]);
    }
    if constexpr (ROUNDED<C>) total = multiply_keys<ROWS, KEYS, WHOLE>(q.piece, q.start, key, E, pieces);
    else total = totals(sums);
    total *= c.scale;
    UNROLL for (int r = 0; r < ROWS; r++) std::memcpy(scores + r * BLOCK + j, (float*)&total + r * KEYS, KEYS * 4);
  }
}

// Adds PIECES pieces of n values times their probabilities p [ROWS][BLOCK] to `sums` [ROWS][columns].
template <typename C, int ROWS, bool WHOLE, int PIECES>
INLINE void add_values(const Call<C>& c, const Probability<C>* p, const float* keep, const C* v, int64_t n,
                       const C* ahead, int64_t first, float* sums) {
  constexpr int STEP = PAIRED<C> ? 2 : 1, REGISTERS = WIDE<C>;
  const int64_t columns = c.pieces() * PIECE<C>, E = c.E;
  Floats acc[ROWS][PIECES][REGISTERS];
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int i = 0; i < PIECES * REGISTERS; i++)
      acc[r][i / REGISTERS][i % REGISTERS] = load<Floats>(sums + r * columns + first * PIECE<C> + i * LANES) * keep[r];
  ROLLED for (int64_t j = 0; j < n; j += STEP) {
    const C *value = v + j * E, *other = v + std::min(j + 1, n - 1) * E;
    fetch(ahead, j * E, STEP * E);
    UNROLL for (int i = 0; i < PIECES; i++) {
      Bytes raw = load_piece<C, WHOLE>(E, value, first + i);
      if constexpr (PAIRED<C>) {
        Ints a = (Ints)raw, b = (Ints)load_piece<C, WHOLE>(E, other, first + i);
        Bytes even = (Bytes)((a & 0xffff) | (b << 16)), odd = (Bytes)(upper(a) | (b & ~0xffff));
        UNROLL for (int r = 0; r < ROWS; r++) {
          Bytes pair = (Bytes)(Ints{} + load<int32_t>(p + r * BLOCK + j));
          acc[r][i][0] = add_pairs(acc[r][i][0], even, pair);
          acc[r][i][1] = add_pairs(acc[r][i][1], odd, pair);
        }
      } else {
        Wide<C> x = widen<C>(raw);
        UNROLL for (int r = 0; r < ROWS; r++)
          UNROLL for (int h = 0; h < REGISTERS; h++)
            acc[r][i][h] = multiply_add(Floats{} + p[r * BLOCK + j], x.at[h], acc[r][i][h]);
      }
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int i = 0; i < PIECES * REGISTERS; i++)
      std::memcpy(sums + r * columns + first * PIECE<C> + i * LANES, &acc[r][i / REGISTERS][i % REGISTERS], WIDTH);
}

// ROWS query rows over the n positions from `at` on, whose keys and values lie one behind the other.
template <typename C, int ROWS, bool WHOLE>
__attribute__((noinline)) void attend_block(const Call<C>& c, const Queries<C>& q, const C* k, const C* v,
                                            const Scales* scales, int64_t at, int64_t n, bool first, Row* rows,
                                            float* sums) {
  alignas(LINE) float scores[ROWS * BLOCK];
  alignas(LINE) Probability<C> p[ROWS * BLOCK];
  float keep[ROWS];
  score<C, ROWS, WHOLE>(c, q, k, n, first ? v : nullptr, scores);  // the values will be needed next, then more keys
  soften<C, ROWS>(rows, at, n, scales, q.start, scores, p, keep);
  const C* ahead = first ? k + n * c.E : nullptr;
  int64_t piece = 0;
  if constexpr (ROUNDED<C>) {
    alignas(LINE) int16_t words[ROWS * BLOCK];
    float unit[ROWS];
    round_probabilities<ROWS>(p, BLOCK, n, words, unit);
    for (; piece < c.pieces(); piece++, ahead = nullptr)
      add_values8<ROWS, WHOLE>(words, BLOCK, unit, keep, v, n, c.E, piece, ahead, sums, c.pieces() * PIECE<C>);
  } else {
    constexpr int64_t PIECES = std::max(1, SUMS_AT_ONCE / WIDE<C>);
    for (; piece + PIECES <= c.pieces(); piece += PIECES, ahead = nullptr)
      add_values<C, ROWS, WHOLE, PIECES>(c, p, keep, v, n, ahead, piece, sums);
    for (; piece < c.pieces(); piece++, ahead = nullptr)
      add_values<C, ROWS, WHOLE, 1>(c, p, keep, v, n, ahead, piece, sums);
  }
}

// -- a task -----------------------------------------------------------------------------------------------------------

struct Share : Span {
  int64_t task;  // tasks of the rows of the batch before

  int64_t chunks() const { return newest / CHUNK - first / CHUNK + 1; }
};

// What a task leaves: rows, padded to whole groups of ROWS_AT_ONCE, and their sums.
template <typename C> struct Part {
  Row* rows;
  float* sums;

  static int64_t bytes(const Call<C>& c) {
    return round_up(c.rows, ROWS_AT_ONCE) * (int64_t)(sizeof(Row) + c.pieces() * PIECE<C> * sizeof(float));
  }
  Part(const Call<C>& c, uint8_t* memory, int64_t task) : rows((Row*)(memory + task * bytes(c))),
    sums((float*)(rows + round_up(c.rows, ROWS_AT_ONCE))) {}
};

template <typename C, bool WHOLE>
void attend_chunk(const Call<C>& c, const Share& span, int64_t b, int64_t head, int64_t chunk,
                  const Queries<C>& q, const Part<C>& part) {
  const int64_t padded = round_up(c.rows, ROWS_AT_ONCE), columns = c.pieces() * PIECE<C>;
  for (int64_t r = 0; r < padded; r++) part.rows[r] = row_of(c, span, b, r);
  std::memset(part.sums, 0, padded * columns * sizeof(float));
  const int64_t start = (span.first / CHUNK + chunk) * CHUNK, end = std::min(start + CHUNK, span.newest + 1);
  for (int64_t at = std::max(start, span.first), n; at < end; at += n) {
    int64_t slot = at % c.slots;
    n = std::min({BLOCK - at % BLOCK, c.slots - slot, end - at});
    const C* k = c.k + b * c.k_batch + head * c.k_head + slot * c.E;
    const C* v = c.v + b * c.v_batch + head * c.v_head + slot * c.E;
    std::optional<Scales> scales;
    const int64_t number = (b * c.heads + head) * c.slots + slot;
    if constexpr (ROUNDED<C>) scales.emplace(c.k_scale + number, c.v_scale + number, n);
    for (int64_t r = 0, some; r < c.rows; r += some) {
      some = c.rows - r > 2 || !WHOLE ? 4 : c.rows - r;
      auto attend = attend_block<C, 4, WHOLE>;
      if constexpr (WHOLE) attend = some == 4 ? attend : some == 2 ? attend_block<C, 2, true> : attend_block<C, 1, true>;
      attend(c, q.at(r, c.pieces()), k, v, scales ? &*scales : nullptr, at, n, r == 0, part.rows + r,
             part.sums + r * columns);
    }
  }
}

template <typename T, typename C>
void prepare_queries(const Call<C>& c, int64_t b, int64_t head, const Queries<C>& q) {
  for (int64_t r = 0; r < round_up(c.rows, ROWS_AT_ONCE); r++) {
    const T* row = r < c.rows ? (const T*)c.q + ((b * c.heads + head) * c.rows + r) * c.E : nullptr;
    Query<C>* to = q.piece + r * c.pieces();
    if constexpr (ROUNDED<C>) round_query(row, c.E, c.pieces(), to, q.start[r]);
    else for (int64_t i = 0; i < c.pieces(); i++)
      to[i] = query_piece<C>(row ? load_piece<C, false>(c.E, row, i) : Bytes{});
  }
}

// Adds up what the tasks of a head have left.
template <typename T, typename C>
void finish(const Call<C>& c, const Share& span, int64_t b, int64_t head, uint8_t* memory) {
  const int64_t first = span.task + head * span.chunks(), last = first + span.chunks();
  for (int64_t r = 0; r < c.rows; r++) {
    const int64_t index = (b * c.heads + head) * c.rows + r;
    const float sink = c.sinks ? c.sinks[head * c.rows + r] * (float)M_LOG2E : NEVER;
    float largest = sink;
    for (int64_t t = first; t < last; t++) largest = std::max(Part<C>(c, memory, t).rows[r].largest, largest);
    float total = c.sinks ? power_of_two(sink - largest) : 0;
    for (int64_t t = first; t < last; t++) {
      Row& row = Part<C>(c, memory, t).rows[r];
      row.weight = power_of_two(row.largest - largest);
      total += reduced(row.total, plus)[0] * row.weight;
    }
    for (int64_t piece = 0; piece < c.pieces(); piece++) {
      Wide<C> sum = {};
      for (int64_t t = first; t < last; t++) {
        Part<C> part(c, memory, t);
        const float* sums = part.sums + (r * c.pieces() + piece) * PIECE<C>;
        for (int i = 0; i < WIDE<C>; i++) sum.at[i] += load<Floats>(sums + i * LANES) * part.rows[r].weight;
      }
      for (int i = 0; i < WIDE<C>; i++) sum.at[i] /= Floats{} + total;
      T* y = (T*)c.y + index * c.E + piece * PIECE<C>;
      const int64_t left = std::min<int64_t>(PIECE<C>, c.E - piece * PIECE<C>);
      if constexpr (ROUNDED<C>) for (int i = 0; i < left; i++) y[i] = sum.at[i % 4][i / 4];
      else store_piece<T>(y, sum, left);
    }
  }
}

template <typename T, typename C, bool WHOLE> void attend(const Call<C>& c, int64_t batch) {
  std::vector<Share> spans;
  int64_t tasks = 0, read = 0;
  for (int64_t b = 0; b < batch; b++) {
    spans.push_back({span_of(c, b), tasks});
    tasks += spans[b].chunks() * c.heads;
    read += (spans[b].newest + 1 - spans[b].first) * c.heads;
  }
  Tensor memory = empty({tasks * Part<C>::bytes(c)}, at::kByte);
  auto parts = (uint8_t*)memory.data_ptr();
  std::vector<std::atomic<int64_t>> done(batch * c.heads);
  const int64_t products = 2 * read * c.rows * c.E;
  split(tasks, std::max<int64_t>(1, tasks * ALONE / products), [&](int64_t begin, int64_t end) {
    const int64_t padded = round_up(c.rows, ROWS_AT_ONCE);
    Tensor pieces = empty({padded * c.pieces() * (int64_t)sizeof(Query<C>)}, at::kByte);
    Tensor starts = empty({padded * (int64_t)sizeof(Start8)}, at::kByte);
    Queries<C> q{(Query<C>*)pieces.data_ptr(), (Start8*)starts.data_ptr()};
    for (int64_t t = begin, b = 0, prepared = -1; t < end; t++) {
      while (b + 1 < batch && t >= spans[b + 1].task) b++;
      const int64_t chunks = spans[b].chunks(), head = (t - spans[b].task) / chunks, index = b * c.heads + head;
      if (index != prepared) prepare_queries<T>(c, b, head, q), prepared = index;
      attend_chunk<C, WHOLE>(c, spans[b], b, head, (t - spans[b].task) % chunks, q, Part<C>(c, parts, t));
      if (++done[index] == chunks) finish<T>(c, spans[b], b, head, parts);
    }
  });
}

}  // namespace

Tensor LIBRARY::decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions,
                                 double scale, int64_t window, const std::optional<Tensor>& sinks,
                                 const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && positions.dim() == 2, "a shape is wrong");
  TORCH_CHECK(k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3), "q ", q.sizes(),
              " does not fit caches ", k.sizes());
  const bool rounded = k.scalar_type() == at::kChar;
  TORCH_CHECK(k.scalar_type() == v.scalar_type() && (rounded || k.scalar_type() == q.scalar_type()),
              "q and caches differ in type");
  TORCH_CHECK(k.stride(3) == 1 && k.stride(2) == k.size(3) && v.stride(3) == 1 && v.stride(2) == v.size(3),
              "the slots of a head are not one behind the other");
  TORCH_CHECK(positions.scalar_type() == at::kLong && positions.size(0) == q.size(0) && positions.size(1) > 0 &&
              q.size(2) % positions.size(1) == 0, "positions ", positions.sizes(), " do not fit q ", q.sizes());
  TORCH_CHECK(!sinks || (sinks->scalar_type() == at::kFloat && sinks->numel() == q.size(1) * q.size(2)),
              "sinks: a float32 for each row of a batch");
  for (const auto* given : {&k_scale, &v_scale})
    TORCH_CHECK(given->has_value() == rounded && (!rounded || ((*given)->scalar_type() == at::kFloat &&
                (*given)->sizes() == k.sizes().slice(0, 3))), "scales: a float32 for each slot of an int8 cache");
  TORCH_CHECK(q.size(3) * q.element_size() % 4 == 0, "head_dim ", q.size(3), " is odd");
  auto dense = [](const std::optional<Tensor>& given) { return given ? given->contiguous() : Tensor(); };
  Attention t{q.contiguous(), k, v, positions.contiguous(), dense(sinks), dense(k_scale), dense(v_scale),
              empty(q.sizes(), q.scalar_type()), scale, window};
  if (t.y.numel() == 0) return t.y;
  if (t.positions.size(1) > FEW) attend_prompt(t);
  else with_types(t, [&]<typename T, typename C>() {
    Call<C> c(t);
    (c.E % PIECE<C> == 0 ? attend<T, C, true> : attend<T, C, false>)(c, q.size(0));
  });
  return t.y;
}
