// Attention of a few query rows over the filled part of a static cache, for Apple GPUs: the twin of
// ops/cpu_attention.cpp. Bound by ops/mps.py, which defines, before this text:
//   X           bfloat, half or float, the type of queries and results, and of keys and values
//   ROUNDED     1 if keys and values are int8 instead, with a scale for each
//   E           numbers in a head
//   ROWS        query rows that share one reading of keys and values
//   SIMDGROUPS  of a threadgroup
//
// The positions lie on the device, so that one graph serves texts of all lengths, and only slots that are filled and in
// the window are read. The simdgroups of a threadgroup take positions in turns; their sums, relative to the largest
// score that each has met (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867), are added in threadgroup
// memory. Long caches are cut into splits, a threadgroup each, whose results `add_splits` brings together.
//
// Glossary: B batch, S tokens, K kv heads, R = G * S query rows of a kv head, L slots; position p lies in slot p % L. A
// lane holds PER neighbouring numbers of a head, those past E as zeros. Scores are in powers of two.
#include <metal_stdlib>
using namespace metal;

#define UNROLL _Pragma("clang loop unroll(full)")  // what is indexed by a loop's variable then stays in registers
#define PER ((E + 31) / 32)
#define WHOLE (PER * 32 == E)
#if ROUNDED
#define CACHED char
#else
#define CACHED X
#endif
#define NEVER (-3.0e38f)  // below all scores; finite, as fast mathematics may take infinity for anything

// A lane's numbers of a head.
struct Part {
  float of[PER];
};

template <typename T> inline Part part_of(device const T* from, uint lane) {
  Part part;
  UNROLL for (uint i = 0; i < PER; i++) {
    part.of[i] = WHOLE || lane * PER + i < E ? float(from[lane * PER + i]) : 0.0f;
  }
  return part;
}

// A query row on its way through the positions.
struct Row {
  Part query, sum;
  float largest, total;
  uint position;
};

// One position's key and value with their scales, for a row that sees it.
inline void take(thread Row& row, thread const Part& key, thread const Part& value, float key_scale,
                 float value_scale) {
  float inner = 0;
  UNROLL for (uint i = 0; i < PER; i++) {
    inner += row.query.of[i] * key.of[i];
  }
  const float score = simd_sum(inner) * key_scale, largest = max(row.largest, score);
  const float keep = exp2(row.largest - largest), weight = exp2(score - largest);
  row.largest = largest;
  row.total = row.total * keep + weight;
  UNROLL for (uint i = 0; i < PER; i++) {
    row.sum.of[i] = row.sum.of[i] * keep + weight * value_scale * value.of[i];
  }
}

// q [B * K, R, E], k and v [B * K, L, E], positions [B, S], row r at positions[b, r % S] -> y [B * K, R, E]; or, of
// several splits, partial [B * K, splits, R, E], sums relative to 2 ** tops[.., 0], whose weights add up to tops[.., 1].
// A threadgroup for each ROWS rows, kv head and split. window 0: none; sinks [K, R], not read unless `sunk`, nor
// k_scale and v_scale [B * K, L] unless ROUNDED.
[[max_total_threads_per_threadgroup(32 * SIMDGROUPS)]]
kernel void attend(device const X* q, device const CACHED* k, device const CACHED* v, device const float* k_scale,
                   device const float* v_scale, device const long* positions,
                   device const float* sinks, device X* y, device float* partial, device float* tops,
                   constant float& scale, constant long& heads, constant long& rows, constant long& tokens,
                   constant long& slots, constant long& window, constant long& sunk, constant long& splits,
                   uint3 at [[threadgroup_position_in_grid]], uint thread_number [[thread_index_in_threadgroup]],
                   uint simd_number [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[SIMDGROUPS][32 * PER];
  threadgroup float most[SIMDGROUPS];
  threadgroup float totals[SIMDGROUPS];
  const uint head = at.y, R = uint(rows), S = uint(tokens), L = uint(slots), W = uint(window);
  device const long* position = positions + head / uint(heads) * S;
  const uint newest = uint(position[S - 1]), oldest = uint(position[0]);
  uint first = newest + 1 > L ? newest + 1 - L : 0;  // position
  first = W != 0 && oldest + 1 > W ? max(first, oldest + 1 - W) : first;
  const uint count = newest + 1 - first, share = (count + uint(splits) - 1) / uint(splits);
  const uint last = min(count, (at.z + 1) * share), first_slot = first % L;
  k += ulong(head) * L * E;
  v += ulong(head) * L * E;

  Row row[ROWS];
  UNROLL for (uint r = 0; r < ROWS; r++) {
    const uint number = min(at.x * ROWS + r, R - 1);  // past the end: as the last one, and not written
    row[r].query = part_of(q + (head * R + number) * E, lane);
    UNROLL for (uint i = 0; i < PER; i++) {
      row[r].query.of[i] *= scale;
      row[r].sum.of[i] = 0;
    }
    row[r].largest = NEVER;
    row[r].total = 0;
    row[r].position = uint(position[number % S]);
  }
  for (uint i = at.z * share + simd_number; i < last; i += SIMDGROUPS) {
    const uint p = first + i, slot = first_slot + i < L ? first_slot + i : first_slot + i - L;
    const Part key = part_of(k + slot * E, lane), value = part_of(v + slot * E, lane);
    const float key_scale = ROUNDED ? k_scale[head * L + slot] : 1.0f;
    const float value_scale = ROUNDED ? v_scale[head * L + slot] : 1.0f;
    UNROLL for (uint r = 0; r < ROWS; r++) {
      if (p <= row[r].position && (W == 0 || p + W > row[r].position)) {
        take(row[r], key, value, key_scale, value_scale);
      }
    }
  }

  UNROLL for (uint r = 0; r < ROWS; r++) {
    const uint number = at.x * ROWS + r, result = head * R + number;
    if (lane == 0) {
      most[simd_number] = row[r].largest;
      totals[simd_number] = row[r].total;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float top = NEVER, total = 0;
    const bool sinks_too = sunk != 0 && splits == 1 && number < R;
    const float sink = sinks_too ? sinks[head % uint(heads) * R + number] * M_LOG2E_F : NEVER;
    for (uint s = 0; s < SIMDGROUPS; s++) {
      top = max(top, most[s]);
    }
    top = max(top, sink);
    for (uint s = 0; s < SIMDGROUPS; s++) {
      total += totals[s] * exp2(most[s] - top);
    }
    total += sinks_too ? exp2(sink - top) : 0.0f;
    UNROLL for (uint i = 0; i < PER; i++) {
      sums[simd_number][lane * PER + i] = row[r].sum.of[i] * exp2(row[r].largest - top);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = thread_number; e < E && number < R; e += 32 * SIMDGROUPS) {
      float sum = 0;
      for (uint s = 0; s < SIMDGROUPS; s++) {
        sum += sums[s][e];
      }
      if (splits == 1) {
        y[result * E + e] = X(sum / total);
      } else {
        partial[((head * uint(splits) + at.z) * R + number) * E + e] = sum;
      }
    }
    if (splits > 1 && thread_number == 0 && number < R) {
      tops[((head * uint(splits) + at.z) * R + number) * 2] = top;
      tops[((head * uint(splits) + at.z) * R + number) * 2 + 1] = total;
    }
  }
}

// What `attend` left of its splits -> y [B * K, R, E]. A thread for each number.
kernel void add_splits(device const float* partial, device const float* tops, device const float* sinks, device X* y,
                       constant long& heads, constant long& rows, constant long& sunk, constant long& splits,
                       uint3 at [[thread_position_in_grid]]) {
  const uint e = at.x, number = at.y, head = at.z, R = uint(rows);
  device const float* top_of = tops + (head * uint(splits) * R + number) * 2;
  device const float* sum_of = partial + (head * uint(splits) * R + number) * E + e;
  const float sink = sunk != 0 ? sinks[head % uint(heads) * R + number] * M_LOG2E_F : NEVER;
  float top = sink, sum = 0;
  for (uint s = 0; s < uint(splits); s++) {
    top = max(top, top_of[s * R * 2]);
  }
  float total = sunk != 0 ? exp2(sink - top) : 0.0f;
  for (uint s = 0; s < uint(splits); s++) {
    const float weight = exp2(top_of[s * R * 2] - top);
    sum += sum_of[s * R * E] * weight;
    total += top_of[s * R * 2 + 1] * weight;
  }
  y[(head * R + number) * E + e] = X(sum / total);
}
