// What a layer does between its matrices, on a CPU: norms, heads normalised and turned to be ready for attention, and
// all of Gated DeltaNet. ops/fused.py declares the operators and says what they compute, or for Gated DeltaNet
// ops/reference.py; ops/cpu.py compiles this file. (It is one file, as PyTorch's headers take a compiler two seconds in
// each.)
//
// Arithmetic is float32; norms and heads are rounded where the model's own steps round. A row of a batch gives the same
// bits alone and among others.
//
// Glossary: B batch, S tokens, H heads, E head_dim, K and V widths of keys and values, C channels of the convolution.
#include <ATen/core/Tensor.h>

#include "cpu_common.h"
#include "cpu_floats.h"
#include "cpu_operators.h"

#include <cmath>
#include <cstring>
#include <vector>

using at::Tensor;

// -- norms and heads --------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t NUMBERS_ALONE = 1 << 15;  // that are not worth another thread

struct Norm {
  bool there;
  const float* weight;  // null: all are one
  float eps, offset;
};

// n numbers over their root mean square, times the weight if there is one.
template <typename T> void normalize(const T* x, int64_t n, const Norm& norm, T* y) {
  Floats sum = {};
  for (int64_t i = 0; i < n; i += LANES) {
    const Floats v = load_some(x + i, n - i);
    sum = multiply_add(v, v, sum);
  }
  const float rate = 1 / std::sqrt(sum_lanes(sum) / n + norm.eps);
  for (int64_t i = 0; i < n; i += LANES) {
    Floats v = load_some(x + i, n - i) * rate;
    if (norm.weight) v *= load_some(norm.weight + i, n - i) + norm.offset;
    store_some(y + i, v, n - i);
  }
}

// Turns pairs (i, i + half) of a head.
template <typename T> void turn(const T* x, const float* cos, const float* sin, int64_t half, T* y) {
  for (int64_t i = 0; i < half; i += LANES) {
    const int64_t left = half - i;
    const Floats a = load_some(x + i, left), b = load_some(x + half + i, left);
    const Floats c = load_some(cos + i, left), s = load_some(sin + i, left);
    store_some(y + i, a * c - b * s, left);
    store_some(y + half + i, b * c + a * s, left);
  }
}

template <typename T> struct Heads {
  const T* qkv;
  const float *cos, *sin;
  Norm q_norm, k_norm, v_norm;
  T* y;
  int64_t heads, kv_heads, E, half, step, width;  // half: pairs that turn; step: heads from one query to the next

  // n heads of token t, so far apart, of which that many pairs turn -> behind the last.
  T* put(const T* x, int64_t n, int64_t apart, const Norm& norm, int64_t pairs, int64_t t, T* room, T* to) const {
    for (; n > 0; n--, x += apart * E, to += E) {
      T* at = pairs ? room : to;
      if (norm.there) normalize(x, E, norm, at);
      else std::memcpy((void*)at, x, E * sizeof(T));
      if (!pairs) continue;
      turn(room, cos + t * pairs, sin + t * pairs, pairs, to);
      std::memcpy((void*)(to + 2 * pairs), room + 2 * pairs, (E - 2 * pairs) * sizeof(T));
    }
    return to;
  }

  void token(int64_t t, T* room) const {
    const T *q = qkv + t * width * E, *k = q + heads * step * E;
    const T* v = width > heads * step + kv_heads ? k + kv_heads * E : k;  // or values are what keys were before
    T* to = put(q, heads, step, q_norm, half, t, room, y + t * (heads + 2 * kv_heads) * E);
    put(v, kv_heads, 1, v_norm, 0, t, room, put(k, kv_heads, 1, k_norm, half, t, room, to));
  }
};

Tensor floats(const std::optional<Tensor>& t) { return t ? t->to(at::kFloat).contiguous() : Tensor(); }
const float* data(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

template <typename F> void for_type(const Tensor& x, const F& f) {
  if (x.scalar_type() == at::kBFloat16) f((at::BFloat16*)nullptr);
  else if (x.scalar_type() == at::kHalf) f((at::Half*)nullptr);
  else TORCH_CHECK(false, "x is ", x.scalar_type(), ", not bfloat16 or float16");
}

}  // namespace

Tensor LIBRARY::rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  const int64_t n = x.size(-1), rows = n ? x.numel() / n : 0;
  TORCH_CHECK(weight.numel() == n, "weight ", weight.sizes(), " does not fit x ", x.sizes());
  const Tensor dense = x.contiguous(), factors = floats(weight);
  const Norm norm{true, data(factors), (float)eps, (float)offset};
  Tensor y = empty(x.sizes(), x.scalar_type());
  for_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = (const T*)dense.data_ptr();
    T* to = (T*)y.data_ptr();
    split(rows, std::max<int64_t>(1, NUMBERS_ALONE / n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) normalize(from + i * n, n, norm, to + i * n);
    });
  });
  return y;
}

Tensor LIBRARY::turn_heads(const Tensor& qkv, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                           const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                           double offset, bool v_norm, int64_t heads, int64_t kv_heads, bool gated) {
  TORCH_CHECK(qkv.dim() == 4 && heads > 0 && kv_heads > 0, "qkv ", qkv.sizes());
  const int64_t B = qkv.size(0), S = qkv.size(1), E = qkv.size(3), queries = heads * (1 + gated), tokens = B * S;
  const int64_t half = cos ? cos->size(-1) : 0;
  TORCH_CHECK(qkv.size(2) == queries + kv_heads || qkv.size(2) == queries + 2 * kv_heads, "qkv ", qkv.sizes());
  TORCH_CHECK(cos.has_value() == sin.has_value() && 2 * half <= E, "angles of ", half, " pairs");
  for (const auto* given : {&cos, &sin}) TORCH_CHECK(!*given || (*given)->numel() == tokens * half, "angles");
  for (const auto* given : {&q_norm, &k_norm}) TORCH_CHECK(!*given || (*given)->numel() == E, "norms");
  const Tensor dense = qkv.contiguous(), c = floats(cos), s = floats(sin), qn = floats(q_norm), kn = floats(k_norm);
  Tensor y = empty({B, S, heads + 2 * kv_heads, E}, qkv.scalar_type());
  for_type(qkv, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto norm = [&](bool there, const Tensor& weight) {
      return Norm{there, data(weight), (float)eps, (float)offset};
    };
    const Heads<T> call{(const T*)dense.data_ptr(), data(c), data(s), norm(q_norm.has_value(), qn),
                       norm(k_norm.has_value(), kn), norm(v_norm, Tensor()), (T*)y.data_ptr(), heads, kv_heads, E, half,
                       1 + gated, qkv.size(2)};
    split(tokens, std::max<int64_t>(1, NUMBERS_ALONE / (y.size(2) * E)), [&](int64_t begin, int64_t end) {
      std::vector<T> room(E);
      for (int64_t t = begin; t < end; t++) call.token(t, room.data());
    });
  });
  return y;
}

// -- Gated DeltaNet ---------------------------------------------------------------------------------------------------

// A head's state is read from memory once for a token and written once. What the old state says of the key and of the
// query is looked up together, with o = exp(g) q S + (q k^T) d; then, a block of columns at a time, which is still in
// the first cache, it fades and takes d in. A task is a value head of a row of the batch.

namespace {

constexpr int TAPS = 4, MOST_TAPS = 16;  // of the convolution: as all models have it, and at most
constexpr int AT_ONCE = 4;  // registers of a row of the state whose columns are taken together
constexpr int64_t STATE_ALONE = 1 << 16;  // numbers of states that are not worth another thread

template <typename T> struct Call {
  const T *qkvz, *ba, *taps;
  const int64_t* positions;
  T* conv;
  float* state;
  const float *decay, *shift, *norm;
  T* y;
  float eps;
  int64_t tokens, heads, K, V, channels, slots, states, window, sharing;  // window: taps; sharing: heads with one key

  int64_t width() const { return channels + heads * V; }
  float* state_at(int64_t b, int64_t position, int64_t head) const {
    return state + ((b * states + position % states) * heads + head) * K * V;
  }
};

// -- Gated DeltaNet: numbers ------------------------------------------------------------------------------------------

template <typename T> INLINE void transpose(const T* from, int64_t n, int64_t taps, float* to) {  // [n, taps]
  for (int64_t j = 0; j < n; j++)
    for (int64_t i = 0; i < taps; i++) to[i * LANES + j] = from[j * taps + i];
}

INLINE Floats sigmoid(Floats x) {
  Floats e = power_of_two((x < 0 ? x : -x) * (float)M_LOG2E);
  return (x < 0 ? e : Floats{} + 1) / (1 + e);
}

INLINE float dot(const float* a, const float* b, int64_t n) {  // of padded numbers
  Floats sum = {};
  for (int64_t i = 0; i < n; i += LANES) sum = multiply_add(load<Floats>(a + i), load<Floats>(b + i), sum);
  return reduced(sum, plus)[0];
}

void to_length(float* x, int64_t n, float length) {
  const float factor = length / std::sqrt(dot(x, x, n) + 1e-6f);
  for (int64_t i = 0; i < n; i += LANES) store_some(x + i, load<Floats>(x + i) * factor, LANES);
}

// -- Gated DeltaNet: a head -------------------------------------------------------------------------------------------

// silu of the short convolution at position p, token t of the call, for n channels from `first` on; zeros behind them.
template <typename T>
void convolve(const Call<T>& c, int64_t b, int64_t t, int64_t p, int64_t first, int64_t n, float* x) {
  const T* in[MOST_TAPS];  // of the token itself, and of those before it
  const int64_t there = std::min(c.window, p + 1);  // before a text there is nothing
  for (int64_t back = 0; back < there; back++)
    in[back] = back <= t ? c.qkvz + (b * c.tokens + t - back) * c.width() + first
                         : c.conv + (b * c.slots + (p - back) % c.slots) * c.channels + first;
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t left = std::min<int64_t>(LANES, n - i);
    alignas(LINE) float taps[MOST_TAPS * LANES];
    if (c.window == TAPS && left == LANES) transpose(c.taps + (first + i) * TAPS, LANES, TAPS, taps);  // unrolled
    else std::memset(taps, 0, sizeof taps), transpose(c.taps + (first + i) * c.window, left, c.window, taps);
    Floats sum = {};
    for (int64_t back = 0; back < there; back++)
      sum = multiply_add(load<Floats>(taps + (c.window - 1 - back) * LANES), load_some(in[back] + i, left), sum);
    store_some(x + i, sum * sigmoid(sum), LANES);
  }
}

struct Token {  // of a head; q and k have unit length, and q is scaled
  float *q, *k, *v, *o;  // zeros behind each
  float fade, beta, both;  // both: q k^T
};

// Columns of a state [K, V]: what it says of q goes to o, and it becomes the next one. Without an old one it was zero.
// WHOLE: all these columns are there; else there is one register of them, and `left` are.
template <int REGISTERS, bool WHOLE>
INLINE void columns(const Token& x, const float* old, float* next, int64_t K, int64_t V, int64_t first, int64_t left) {
  const auto row = [&](const float* from, int64_t k, int i) __attribute__((always_inline)) {
    const float* p = from + k * V + first + i * LANES;
    return WHOLE ? load<Floats>(p) : load_some(p, left);
  };
  Floats known[REGISTERS] = {}, asked[REGISTERS] = {}, d[REGISTERS];
  if (old)
    ROLLED for (int64_t k = 0; k < K; k++)
      UNROLL for (int i = 0; i < REGISTERS; i++) {
        Floats s = row(old, k, i);
        known[i] = multiply_add(Floats{} + x.k[k], s, known[i]);
        asked[i] = multiply_add(Floats{} + x.q[k], s, asked[i]);
      }
  UNROLL for (int i = 0; i < REGISTERS; i++) {
    const int64_t at = first + i * LANES;
    d[i] = (load<Floats>(x.v + at) - known[i] * x.fade) * x.beta;
    store_some(x.o + at, multiply_add(d[i], Floats{} + x.both, asked[i] * x.fade), LANES);
  }
  ROLLED for (int64_t k = 0; k < K; k++)
    UNROLL for (int i = 0; i < REGISTERS; i++) {
      Floats s = old ? row(old, k, i) * x.fade : Floats{};
      store_some(next + k * V + first + i * LANES, multiply_add(Floats{} + x.k[k], d[i], s), WHOLE ? LANES : left);
    }
}

__attribute__((noinline)) void advance(const Token& x, const float* old, float* next, int64_t K, int64_t V) {
  int64_t first = 0;
  for (; first + AT_ONCE * LANES <= V; first += AT_ONCE * LANES) columns<AT_ONCE, true>(x, old, next, K, V, first, 0);
  for (; first + LANES <= V; first += LANES) columns<1, true>(x, old, next, K, V, first, 0);
  if (first < V) columns<1, false>(x, old, next, K, V, first, V - first);
}

template <typename T> void step(const Call<T>& c, int64_t b, int64_t h, const Token& room) {
  const int64_t key = h / c.sharing, keys = c.heads / c.sharing, K = c.K, V = c.V;
  for (int64_t t = 0; t < c.tokens; t++) {
    Token x = room;
    const int64_t p = c.positions[b * c.tokens + t];
    TORCH_CHECK(p >= 0, "position ", p);
    convolve(c, b, t, p, key * K, K, x.q);
    convolve(c, b, t, p, (keys + key) * K, K, x.k);
    convolve(c, b, t, p, 2 * keys * K + h * V, V, x.v);
    to_length(x.q, K, 1 / std::sqrt((float)K)), to_length(x.k, K, 1);
    const T* gates = c.ba + (b * c.tokens + t) * 2 * c.heads + h;
    const float a = (float)gates[c.heads] + c.shift[h];
    const float softplus = std::max(a, 0.0f) + std::log1p(std::exp(-std::abs(a)));
    x.beta = 1 / (1 + std::exp(-(float)gates[0]));
    x.fade = std::exp(-std::exp(c.decay[h]) * softplus);
    x.both = dot(x.q, x.k, K);
    advance(x, p ? c.state_at(b, p, h) : nullptr, c.state_at(b, p + 1, h), K, V);
    const float rate = 1 / std::sqrt(dot(x.o, x.o, V) / V + c.eps);
    const T* z = c.qkvz + (b * c.tokens + t) * c.width() + c.channels + h * V;
    T* y = c.y + ((b * c.tokens + t) * c.heads + h) * V;
    for (int64_t i = 0; i < V; i += LANES) {
      Floats gate = load_some(z + i, V - i);
      Floats out = load<Floats>(x.o + i) * rate * load_some(c.norm + i, V - i) * gate * sigmoid(gate);
      for (int64_t j = 0; j < std::min<int64_t>(LANES, V - i); j++) y[i + j] = out[j];
    }
  }
}

template <typename T> void run(const Call<T>& c, int64_t batch) {
  const int64_t tasks = batch * c.heads, k = round_up(c.K, LANES), v = round_up(c.V, LANES);
  const int64_t grain = std::max<int64_t>(1, STATE_ALONE / (c.tokens * c.K * c.V));
  split(tasks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> room(2 * k + 2 * v);
    Token x{room.data(), room.data() + k, room.data() + 2 * k, room.data() + 2 * k + v, 0, 0, 0};
    for (int64_t task = begin; task < end; task++) step(c, task / c.heads, task % c.heads, x);
  });
  for (int64_t b = 0; b < batch; b++)  // inputs that later calls look back on; until now heads looked at older ones
    for (int64_t t = std::max<int64_t>(c.tokens - c.slots, 0), n = b * c.tokens; t < c.tokens; t++)
      std::memcpy((void*)(c.conv + (b * c.slots + c.positions[n + t] % c.slots) * c.channels),
                  c.qkvz + (n + t) * c.width(), c.channels * sizeof(T));
}

}  // namespace

Tensor LIBRARY::delta_step(const Tensor& qkvz, const Tensor& ba, const Tensor& positions, Tensor conv, Tensor state,
                           const Tensor& taps, const Tensor& decay, const Tensor& shift, const Tensor& norm,
                           double eps) {
  TORCH_CHECK(qkvz.dim() == 3 && conv.dim() == 3 && state.dim() == 5 && taps.dim() == 2, "a shape is wrong");
  const int64_t B = qkvz.size(0), S = qkvz.size(1), C = conv.size(2);
  const int64_t H = state.size(2), K = state.size(3), V = state.size(4);
  TORCH_CHECK(conv.is_contiguous() && state.is_contiguous() && state.scalar_type() == at::kFloat &&
              conv.scalar_type() == qkvz.scalar_type() && ba.scalar_type() == qkvz.scalar_type(),
              "what is remembered is not as it should be");
  const int64_t keys = (C - H * V) / (2 * K);
  TORCH_CHECK(keys > 0 && C == 2 * keys * K + H * V && H % keys == 0 && qkvz.size(2) == C + H * V &&
              ba.sizes() == at::IntArrayRef({B, S, 2 * H}) && positions.sizes() == at::IntArrayRef({B, S}) &&
              positions.scalar_type() == at::kLong && conv.size(0) == B && state.size(0) == B && taps.size(0) == C &&
              taps.size(1) <= MOST_TAPS &&
              norm.numel() == V && decay.numel() == H && shift.numel() == H, "shapes do not fit each other");
  TORCH_CHECK(conv.size(1) >= taps.size(1) - 1, "the convolution looks further back than is remembered");
  Tensor dense[] = {qkvz.contiguous(), ba.contiguous(), taps.to(qkvz.scalar_type()).contiguous(),
                    positions.contiguous(), decay.to(at::kFloat).contiguous(), shift.to(at::kFloat).contiguous(),
                    norm.to(at::kFloat).contiguous()};
  Tensor y = empty({B, S, H * V}, qkvz.scalar_type());
  const auto go = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run(Call<T>{(const T*)dense[0].data_ptr(), (const T*)dense[1].data_ptr(), (const T*)dense[2].data_ptr(),
                dense[3].const_data_ptr<int64_t>(), (T*)conv.data_ptr(), state.data_ptr<float>(),
                dense[4].const_data_ptr<float>(), dense[5].const_data_ptr<float>(), dense[6].const_data_ptr<float>(),
                (T*)y.data_ptr(), (float)eps, S, H, K, V, C, conv.size(1), state.size(1), taps.size(1),
                H / keys}, B);
  };
  if (qkvz.scalar_type() == at::kFloat) go((float*)nullptr);
  else if (qkvz.scalar_type() == at::kBFloat16) go((at::BFloat16*)nullptr);
  else if (qkvz.scalar_type() == at::kHalf) go((at::Half*)nullptr);
  else TORCH_CHECK(false, "qkvz is ", qkvz.scalar_type(), ", not float32, bfloat16 or float16");
  return y;
}
