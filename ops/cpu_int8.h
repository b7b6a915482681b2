// Attention over caches of int8 in whole numbers, for ops/cpu_attention.cpp: many products an instruction, of bytes as
// they lie in memory. The scale of a key goes to its score, that of a value to its probability.
//
// A query is rounded to 8 bits too, as the rows are that ops/cpu.cpp multiplies; the model has turned it so that no
// number of it stands out (kv_cache.py). Probabilities, times the scales of the values, are 16 bits, relative to the
// largest of a block.
//
// A piece is what a register holds, WIDTH numbers; of its sums register c has the columns c, 4 + c, 8 + c ...
#pragma once

#include "cpu_floats.h"

#include <cmath>

namespace {

struct Start8 {  // of a row's sums
  Ints sum;  // less what keys + OFFSET add too much
  float scale;
};

// A row of E numbers, or none, in 8 bits.
template <typename T> void round_query(const T* row, int64_t E, int64_t pieces, Bytes* q, Start8& start) {
  float largest = 0, poison = 0;  // poison: not a number if any is not finite
  for (int64_t e = 0; row && e < E; e++)
    largest = std::max(largest, std::abs((float)row[e])), poison += (float)row[e] * 0;
  const float inverse = largest > 0 && poison == 0 ? 127 / largest : 0;
  start = {Ints{}, largest / 127 + poison};
  for (int64_t piece = 0; piece < pieces; piece++) {
    int8_t bytes[WIDTH] = {};
    for (int64_t i = 0; row && inverse > 0 && i < std::min<int64_t>(WIDTH, E - piece * WIDTH); i++) {
      bytes[i] = (int8_t)std::lrint((float)row[piece * WIDTH + i] * inverse);
      start.sum[i / 4] -= OFFSET * bytes[i];
    }
    q[piece] = load<Bytes>(bytes);
  }
}

// Rows q [ROWS][pieces] by KEYS keys -> sums [ROWS][KEYS], to be multiplied by both scales.
template <int ROWS, int KEYS, bool WHOLE>
INLINE Floats multiply_keys(const Bytes* q, const Start8* start, const int8_t* const* key, int64_t E, int64_t pieces) {
  Ints sums[ROWS * KEYS];
  UNROLL for (int i = 0; i < ROWS * KEYS; i++) sums[i] = start[i / KEYS].sum;
  ROLLED for (int64_t piece = 0; piece < pieces; piece++)
    UNROLL for (int i = 0; i < KEYS; i++) {
      Bytes x = load_piece<int8_t, WHOLE>(E, key[i], piece) ^ (uint8_t)OFFSET;  // the same as + OFFSET
      UNROLL for (int r = 0; r < ROWS; r++) sums[r * KEYS + i] = dot(sums[r * KEYS + i], x, q[r * pieces + piece]);
    }
  return __builtin_convertvector(totals(sums), Floats);
}

// Probabilities times scales [ROWS][block], of which n count and zeros follow -> words, and what 1 means in each row.
template <int ROWS>
INLINE void round_probabilities(const float* p, int64_t block, int64_t n, int16_t* words, float* unit) {
  UNROLL for (int r = 0; r < ROWS; r++) {
    Floats most = {}, sum = {};
    ROLLED for (int64_t j = 0; j < n; j += LANES) {
      Floats x = load<Floats>(p + r * block + j);
      most = greater(x, most), sum += x;
    }
    const float largest = reduced(most, greater)[0], inverse = largest > 0 ? 32767 / largest : 0;
    unit[r] = largest / 32767 + reduced(sum, plus)[0] * 0;  // what is not a number stays so
    ROLLED for (int64_t j = 0; j < n; j += LANES) {
      Floats x = load<Floats>(p + r * block + j) * inverse + 0.5f;
      store_words(__builtin_convertvector(x, Ints), words + r * block + j);
    }
  }
}

// Adds a piece of n values times their words [ROWS][block] to sums [ROWS][columns].
template <int ROWS, bool WHOLE>
INLINE void add_values8(const int16_t* words, int64_t block, const float* unit, const float* keep, const int8_t* v,
                        int64_t n, int64_t E, int64_t piece, const int8_t* ahead, float* sums, int64_t columns) {
  Ints acc[ROWS][4] = {};
  ROLLED for (int64_t j = 0; j < n; j += 2) {  // behind the last comes a word of zero
    fetch(ahead, j * E, 2 * E);
    Bytes a = load_piece<int8_t, WHOLE>(E, v + j * E, piece);
    Bytes b = load_piece<int8_t, WHOLE>(E, v + std::min(j + 1, n - 1) * E, piece);
    Ints a_even = (Ints)((Shorts)((Words)a << 8) >> 8), a_odd = (Ints)((Shorts)a >> 8);
    Ints b_even = (Ints)((Shorts)((Words)b << 8) >> 8), b_odd = (Ints)((Shorts)b >> 8);
    const Ints pairs[4] = {(a_even & 0xffff) | (b_even << 16), (a_odd & 0xffff) | (b_odd << 16),
                           upper(a_even) | (b_even & ~0xffff), upper(a_odd) | (b_odd & ~0xffff)};
    UNROLL for (int r = 0; r < ROWS; r++) {
      Ints word = Ints{} + load<int32_t>(words + r * block + j);
      UNROLL for (int c = 0; c < 4; c++) acc[r][c] = dot_words(acc[r][c], pairs[c], word);
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int c = 0; c < 4; c++) {
      float* at = sums + r * columns + piece * WIDTH + c * LANES;
      Floats sum = load<Floats>(at) * keep[r] + __builtin_convertvector(acc[r][c], Floats) * unit[r];
      std::memcpy(at, &sum, sizeof sum);
    }
}

}  // namespace
