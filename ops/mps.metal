// Matrices times a few vectors, for Apple GPUs, in the formats of ops/formats.py or of 16 bits. Bound by ops/mps.py,
// which defines, before this text:
//   X      bfloat, half or float, the type of x and y; X4: four of them
//   ROWS   rows of the matrix that a simdgroup (32 lanes) works
//   XROWS  rows of x that it works at once, so that a weight, once read, serves them all
//
// In a step a lane reads 8 bytes of each of its rows, 16 if weights are of 16 bits; it sums in float, and simd_sum adds up the lanes at the end. The
// blocks of XROWS rows of x lie side by side in the grid, so that those after the first find the weights in the cache.
// A row past the end of the matrix or of x is read as the last one, and not written.
//
// Glossary: M rows of x, K inputs, N outputs (rows of the matrix), g columns to a scale; m, n first row of a block.
#include <metal_stdlib>
using namespace metal;

#define UNROLL _Pragma("clang loop unroll(full)")  // what is indexed by a loop's variable then stays in registers

struct Sums {
  float of[XROWS][ROWS];
};

// Four columns of x as float, from where no vector load may be aligned.
inline float4 four(device const X* x) {
  return float4(float(x[0]), float(x[1]), float(x[2]), float(x[3]));
}

// Four nibbles of 16 bits, left in place: the second is 16 times too large, the third 256 times, the last 4096 times.
inline float4 nibbles_in_place(ushort bits) {
  return float4(float(ushort(bits & 0x000f)), float(ushort(bits & 0x00f0)),
                float(ushort(bits & 0x0f00)), float(ushort(bits & 0xf000)));
}

// Sums over the lanes -> y [M, N], at rows from m, columns from n.
inline void store(device X* y, thread const Sums& sum, uint m, uint n, uint M, uint N, uint lane) {
  UNROLL for (uint b = 0; b < XROWS; b++) {
    UNROLL for (uint r = 0; r < ROWS; r++) {
      const float total = simd_sum(sum.of[b][r]);
      if (lane == 0 && m + b < M && n + r < N) {
        y[(m + b) * N + n + r] = X(total);
      }
    }
  }
}

// -- int4 -------------------------------------------------------------------------------------------------------------

// y[m, n] = sum over k of x[m, k] * (nibble[n, k] - 8) * scale[n, k / g]; g = 1 << shift.
// A lane takes 16 columns in a step, which are of one group. x is divided by the nibbles' places, and the 8 is taken
// from the sum of x, so that a weight costs a mask, a conversion and a multiply-add.
inline void int4_block(device const X* x, device const ushort4* weight, device const half* scale, device X* y,
                       uint m, uint n, uint M, uint K, uint N, uint shift, uint lane) {
  const float4 place = float4(1.0f, 1.0f / 16, 1.0f / 256, 1.0f / 4096);
  Sums sum = {};
  for (uint k = lane * 16; k < K; k += 512) {
    ushort4 bits[ROWS];
    float s[ROWS];
    UNROLL for (uint r = 0; r < ROWS; r++) {
      const uint row = min(n + r, N - 1);
      bits[r] = weight[row * (K / 16) + k / 16];
      s[r] = float(scale[row * (K >> shift) + (k >> shift)]);
    }
    float inner[XROWS][ROWS] = {};
    float plain[XROWS] = {};
    UNROLL for (uint i = 0; i < 4; i++) {
      float4 v[XROWS];
      UNROLL for (uint b = 0; b < XROWS; b++) {
        v[b] = four(x + min(m + b, M - 1) * K + k + 4 * i);
        plain[b] += v[b].x + v[b].y + v[b].z + v[b].w;
        v[b] = v[b] * place;
      }
      UNROLL for (uint r = 0; r < ROWS; r++) {
        const float4 w = nibbles_in_place(bits[r][i]);
        UNROLL for (uint b = 0; b < XROWS; b++) {
          inner[b][r] += dot(w, v[b]);
        }
      }
    }
    UNROLL for (uint b = 0; b < XROWS; b++) {
      UNROLL for (uint r = 0; r < ROWS; r++) {
        sum.of[b][r] += s[r] * (inner[b][r] - 8 * plain[b]);
      }
    }
  }
  store(y, sum, m, n, M, N, lane);
}

// x [M, K], weight [N, K / 2] bytes, scale [N, K / g] -> y [M, N]
kernel void int4_linear(device const X* x, device const ushort4* weight, device const half* scale, device X* y,
                        constant long& rows, constant long& inputs, constant long& outputs, constant long& shift,
                        uint3 at [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  int4_block(x, weight, scale, y, at.x / 32 * XROWS, at.y * ROWS, uint(rows), uint(inputs), uint(outputs),
             uint(shift), lane);
}

// x [M, K], weight [experts, N, K / 2] bytes, scale [experts, N, K / g], chosen [M] -> y [M, N]: row m with its matrix
kernel void int4_expert_linear(device const X* x, device const ushort4* weight, device const half* scale,
                               device const long* chosen, device X* y,
                               constant long& inputs, constant long& outputs, constant long& shift,
                               uint3 at [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  const uint m = at.x / 32, K = uint(inputs), N = uint(outputs);
  const ulong first = ulong(chosen[m]) * N;  // row; all experts together may pass 32 bits
  int4_block(x + m * K, weight + first * (K / 16), scale + first * (K >> shift), y + m * N, 0, at.y * ROWS, 1, K, N,
             uint(shift), lane);
}

// -- int8 and 16 bits -------------------------------------------------------------------------------------------------

// Adds the products of four columns, from k, to the sums. W: four weights.
template <class W>
inline void four_columns(device const X* x, device const W* weight, thread Sums& sum,
                         uint m, uint n, uint k, uint M, uint K, uint N) {
  float4 v[XROWS];
  UNROLL for (uint b = 0; b < XROWS; b++) {
    v[b] = four(x + min(m + b, M - 1) * K + k);
  }
  UNROLL for (uint r = 0; r < ROWS; r++) {
    const float4 w = float4(weight[min(n + r, N - 1) * (K / 4) + k / 4]);
    UNROLL for (uint b = 0; b < XROWS; b++) {
      sum.of[b][r] += dot(w, v[b]);
    }
  }
}

// Sums over k of x[m, k] * weight[n, k], each lane's part.
// K is a multiple of 4, so that one lane may end with half a step.
template <class W>
inline void all_columns(device const X* x, device const W* weight, thread Sums& sum,
                        uint m, uint n, uint M, uint K, uint N, uint lane) {
  uint k = lane * 8;
  for (; k + 8 <= K; k += 256) {
    four_columns(x, weight, sum, m, n, k, M, K, N);
    four_columns(x, weight, sum, m, n, k + 4, M, K, N);
  }
  if (k < K) {
    four_columns(x, weight, sum, m, n, k, M, K, N);
  }
}

// y[m, n] = scale[n] * sum over k of x[m, k] * weight[n, k].
inline void int8_block(device const X* x, device const char4* weight, device const float* scale, device X* y,
                       uint m, uint n, uint M, uint K, uint N, uint lane) {
  Sums sum = {};
  all_columns(x, weight, sum, m, n, M, K, N, lane);
  UNROLL for (uint r = 0; r < ROWS; r++) {
    const float s = scale[min(n + r, N - 1)];
    UNROLL for (uint b = 0; b < XROWS; b++) {
      sum.of[b][r] *= s;
    }
  }
  store(y, sum, m, n, M, N, lane);
}

// x [M, K], weight [N, K], scale [N] -> y [M, N]
kernel void int8_linear(device const X* x, device const char4* weight, device const float* scale, device X* y,
                        constant long& rows, constant long& inputs, constant long& outputs,
                        uint3 at [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  int8_block(x, weight, scale, y, at.x / 32 * XROWS, at.y * ROWS, uint(rows), uint(inputs), uint(outputs), lane);
}

// x [M, K], weight [experts, N, K], scale [experts, N], chosen [M] -> y [M, N]: row m with its matrix
kernel void int8_expert_linear(device const X* x, device const char4* weight, device const float* scale,
                               device const long* chosen, device X* y,
                               constant long& inputs, constant long& outputs,
                               uint3 at [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  const uint m = at.x / 32, K = uint(inputs), N = uint(outputs);
  const ulong first = ulong(chosen[m]) * N;  // row; all experts together may pass 32 bits
  int8_block(x + m * K, weight + first * (K / 4), scale + first, y + m * N, 0, at.y * ROWS, 1, K, N, lane);
}

// x [M, K], weight [N, K], both X -> y [M, N]
kernel void plain_linear(device const X* x, device const X4* weight, device X* y,
                         constant long& rows, constant long& inputs, constant long& outputs,
                         uint3 at [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  const uint m = at.x / 32 * XROWS, n = at.y * ROWS, M = uint(rows), K = uint(inputs), N = uint(outputs);
  Sums sum = {};
  all_columns(x, weight, sum, m, n, M, K, N, lane);
  store(y, sum, m, n, M, N, lane);
}

// -- quantized matrices made wide, for more rows of x than XROWS is for ----------------------------------------------

// weight [N, K / 2] bytes, scale [N, K / g] -> y [N, K]; a thread makes four numbers
kernel void int4_widen(device const ushort* weight, device const half* scale, device X* y,
                       constant long& inputs, constant long& shift, uint2 at [[thread_position_in_grid]]) {
  const uint K = uint(inputs), first = at.y * (K / 4) + at.x;
  const float s = float(scale[at.y * (K >> shift) + (at.x * 4 >> shift)]);
  const ushort bits = weight[first];
  UNROLL for (uint i = 0; i < 4; i++) {
    y[first * 4 + i] = X((float(bits >> (4 * i) & 15) - 8) * s);
  }
}

// weight [N, K], scale [N] -> y [N, K]
kernel void int8_widen(device const char* weight, device const float* scale, device X* y, constant long& inputs,
                       uint2 at [[thread_position_in_grid]]) {
  const uint i = at.y * uint(inputs) + at.x;
  y[i] = X(float(weight[i]) * scale[at.y]);
}
