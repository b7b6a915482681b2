// All of a Gated DeltaNet layer that stands between its matrices, for a few tokens on Apple GPUs: short convolution, unit
// lengths, gates, delta rule, gated norm, and what is remembered of them. linear_attention.py has it in plain PyTorch;
// ops/reference.py has its truth. Bound by ops/mps.py, which defines, before this text:
//   X             bfloat, half or float, the type of activations and of the convolution
//   KEY, VALUE    numbers of a key and of a value
//   TAPS          of the convolution
//   PARTS         threads that share a column of the state, KEY / PARTS rows of it each
//
// A threadgroup has a value head of a row of the batch: VALUE * PARTS threads, which hold the head's state in registers
// from token to token, so that it is read once and written once for each token.
//
// Glossary: B batch, S tokens, H value heads, G key heads, C channels of the convolution (all q, all k, all v), R states
// kept; the state after t tokens lies in slot t % R, the channels at position p in slot p % slots.
#include <metal_stdlib>
using namespace metal;

#define UNROLL _Pragma("clang loop unroll(full)")  // what is indexed by a loop's variable then stays in registers
#define THREADS (VALUE * PARTS)
#define SIMDGROUPS ((THREADS + 31) / 32)
#define HELD (KEY / PARTS)  // rows of the state in a thread

inline float sigmoid(float x) {
  return 1 / (1 + exp(-x));
}

inline float silu(float x) {
  return x * sigmoid(x);
}

inline float softplus(float x) {
  return max(x, 0.0f) + log(1 + exp(-abs(x)));
}

// The sum of a number of every thread, for all of them.
inline float sum_of_threads(float number, threadgroup float* room, uint simd_number, uint lane) {
  const float part = simd_sum(number);
  if (lane == 0) {
    room[simd_number] = part;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = 0;
  for (uint s = 0; s < SIMDGROUPS; s++) {
    sum += room[s];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // before the room is used again
  return sum;
}

// Where the convolution of a row of the batch finds its inputs.
struct Inputs {
  device const X* now;  // [S, width], C channels of each token first
  device const X* past;  // [slots, C]
  uint first, width, channels, slots;  // first: position of the first token
};

// One channel at a token's position, after the convolution.
inline float convolve(thread const Inputs& from, device const X* taps, uint token, uint channel) {
  float sum = 0;
  UNROLL for (uint i = 0; i < TAPS; i++) {  // the last tap is the token's own
    const uint back = TAPS - 1 - i;
    float input = 0;
    if (back <= token) {
      input = float(from.now[(token - back) * from.width + channel]);
    } else if (back <= from.first + token) {
      input = float(from.past[(from.first + token - back) % from.slots * from.channels + channel]);
    }
    sum += float(taps[channel * TAPS + i]) * input;
  }
  return silu(sum);
}

// qkvz [B, S, C + H * VALUE], ba [B, S, 2 * H] (all b, all a), positions [B, S], conv [B, slots, C],
// state [B, R, H, KEY, VALUE], taps [C, TAPS], decay and shift [H], norm [VALUE] -> y [B, S, H * VALUE].
// slots is at least TAPS - 1 + S, so that no threadgroup writes what another still reads.
[[max_total_threads_per_threadgroup(THREADS)]]
kernel void delta_step(device const X* qkvz, device const X* ba, device const long* positions, device X* conv,
                       device float* state, device const X* taps, device const float* decay, device const float* shift,
                       device const float* norm, device X* y, constant float& eps, constant long& tokens,
                       constant long& heads, constant long& key_heads, constant long& slots, constant long& states,
                       uint3 at [[threadgroup_position_in_grid]], uint thread_number [[thread_index_in_threadgroup]],
                       uint simd_number [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float room[SIMDGROUPS];
  threadgroup float q[KEY];
  threadgroup float k[KEY];
  threadgroup float v[VALUE];
  threadgroup float known_of[PARTS][VALUE];
  threadgroup float asked_of[PARTS][VALUE];
  const uint head = at.x, b = at.y, S = uint(tokens), H = uint(heads), G = uint(key_heads), R = uint(states);
  const uint column = thread_number % VALUE, part = thread_number / VALUE;
  const uint C = 2 * G * KEY + H * VALUE, width = C + H * VALUE, key_head = head / (H / G);
  const Inputs from = {qkvz + b * S * width, conv + b * uint(slots) * C, uint(positions[b * S]), width, C, uint(slots)};
  const uint q_first = key_head * KEY, k_first = G * KEY + key_head * KEY, v_first = 2 * G * KEY + head * VALUE;

  float held[HELD];
  device const float* before = state + ((b * R + from.first % R) * H + head) * KEY * VALUE;
  UNROLL for (uint i = 0; i < HELD; i++) {
    held[i] = from.first == 0 ? 0.0f : before[(part * HELD + i) * VALUE + column];
  }
  for (uint t = 0; t < S; t++) {
    float q_square = 0, k_square = 0;
    for (uint i = thread_number; i < KEY; i += THREADS) {
      q[i] = convolve(from, taps, t, q_first + i);
      k[i] = convolve(from, taps, t, k_first + i);
      q_square += q[i] * q[i];
      k_square += k[i] * k[i];
    }
    for (uint i = thread_number; i < VALUE; i += THREADS) {
      v[i] = convolve(from, taps, t, v_first + i);
    }
    const float q_scale = rsqrt((sum_of_threads(q_square, room, simd_number, lane) + 1e-6f) * KEY);
    const float k_scale = rsqrt(sum_of_threads(k_square, room, simd_number, lane) + 1e-6f);

    device const X* gates = ba + (b * S + t) * 2 * H;
    const float fade = exp(-exp(decay[head]) * softplus(float(gates[H + head]) + shift[head]));
    float known = 0, asked = 0, both = 0;  // k S, q S and q k, of this thread's rows
    UNROLL for (uint i = 0; i < HELD; i++) {
      const float key = k[part * HELD + i] * k_scale, query = q[part * HELD + i] * q_scale;
      known += key * held[i];
      asked += query * held[i];
      both += column == 0 ? query * key : 0.0f;
    }
    known_of[part][column] = known;
    asked_of[part][column] = asked;
    both = sum_of_threads(both, room, simd_number, lane);
    known = 0, asked = 0;
    for (uint i = 0; i < PARTS; i++) {
      known += known_of[i][column];
      asked += asked_of[i][column];
    }
    const float difference = sigmoid(float(gates[head])) * (v[column] - fade * known);
    device float* after = state + ((b * R + (from.first + t + 1) % R) * H + head) * KEY * VALUE;
    UNROLL for (uint i = 0; i < HELD; i++) {
      held[i] = fade * held[i] + k[part * HELD + i] * k_scale * difference;
      after[(part * HELD + i) * VALUE + column] = held[i];
    }
    const float o = fade * asked + both * difference;
    const float square = sum_of_threads(part == 0 ? o * o : 0.0f, room, simd_number, lane);
    if (part == 0) {
      const float gate = silu(float(from.now[t * width + C + head * VALUE + column]));
      y[((b * S + t) * H + head) * VALUE + column] = X(o * rsqrt(square / VALUE + eps) * norm[column] * gate);
    }
  }
  // What later calls will need of the inputs; of keys and queries the first of the value heads that share them tells.
  for (uint t = 0; t < S; t++) {
    device X* slot = conv + (b * uint(slots) + (from.first + t) % uint(slots)) * C;
    device const X* input = from.now + t * width;
    for (uint i = thread_number; i < KEY && head % (H / G) == 0; i += THREADS) {
      slot[q_first + i] = input[q_first + i];
      slot[k_first + i] = input[k_first + i];
    }
    for (uint i = thread_number; i < VALUE; i += THREADS) {
      slot[v_first + i] = input[v_first + i];
    }
  }
}
