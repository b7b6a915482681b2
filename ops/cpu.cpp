// The quantized linear map on a CPU: weights are read once, in the order in which they lie in memory.
// ops/cpu.py compiles this file for the machine at hand, whose instructions are in cpu_vectors.h; ops/__init__.py
// declares the operators and the portable format.
//
// Arithmetic. A row of x is rounded to int8 in blocks of 32 columns: scale = largest |x| / 127, q = x * (127 / largest)
// to nearest even. Products of int8 by int4 or int8 are summed in int32, which is exact; the sums of blocks, times the
// scale of x and of the weight, are added up in float32 in order of column. So a row gives the same bits alone and in a
// batch, and the same numbers within float32 rounding on every processor.
//
// Layout. 16 rows of the matrix make a tile, rows and columns being padded with zeros:
//   int8  lines of 64 bytes = 16 rows x 4 columns, columns a multiple of 32; then 16 float32 scales end the tile
//   int4  units of 16 rows x 2 g columns: lines of 64 bytes = 16 rows x 8 columns, of each row the low halves of its 4
//         bytes first; then 2 x 16 float16 scales end the unit. Nibbles are kept + 8, as in the portable format
// A line is what one instruction multiplies (4 adjacent bytes to a 32-bit lane), and a tile is one stream of memory.
//
// Glossary: M rows of x, g columns to a scale (0: int8), tile 16 rows of a matrix, block 32 columns, part one vector
// register of a line.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu_common.h"
#include "cpu_vectors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

using at::Tensor;

namespace {

// -- layout -----------------------------------------------------------------------------------------------------------

constexpr int TILE = 16, BLOCK = 32;

struct Layout {
  int64_t group, columns, unit, tile;  // columns with padding; bytes of a unit (int8: of a block) and of a tile

  Layout(int64_t inputs, int64_t group) : group(group) {
    TORCH_CHECK(group == 0 || group == 32 || group == 64 || group == 128, "group ", group, " is not 0, 32, 64 or 128");
    TORCH_CHECK(inputs > 0 && (group == 0 || inputs % group == 0), inputs, " columns are no multiple of ", group);
    columns = round_up(inputs, group ? 2 * group : BLOCK);
    unit = group ? TILE * group + LINE : TILE * BLOCK;
    tile = group ? columns / (2 * group) * unit : TILE * columns + LINE;
  }
  void check(const Tensor& packed, int64_t dims) const {
    TORCH_CHECK(packed.dim() == dims && packed.is_contiguous(), "packed weights have ", dims, " dense dimensions");
    TORCH_CHECK(packed.scalar_type() == (group ? at::kByte : at::kChar), "packed weights: int8, or uint8 for int4");
    TORCH_CHECK(packed.size(-1) == tile, "a tile has ", packed.size(-1), " bytes, not ", tile);
  }
};

// -- pack, unpack -----------------------------------------------------------------------------------------------------

Tensor empty_in_huge_pages(at::IntArrayRef shape, at::ScalarType dtype) {
  Tensor out = at::empty(shape, dtype);
#if defined(MADV_HUGEPAGE)  // to be asked for before memory is first touched; 4 KB pages would cost TLB misses
  uintptr_t first = round_up((uintptr_t)out.data_ptr(), 4096), end = (uintptr_t)out.data_ptr() + out.nbytes();
  if (out.nbytes() >= 1 << 22) madvise((void*)first, (end - first) & ~4095ull, MADV_HUGEPAGE);
#endif
  return out;
}

void pack_row_int4(const uint8_t* w, int64_t inputs, const Layout& l, uint8_t* out) {
  for (int64_t k = 0; k < inputs; k += 8, w += 4) {  // 8 columns: 4 bytes in, 4 bytes out
    int64_t unit = k / (2 * l.group), line = k % (2 * l.group) / 8;
    uint8_t* to = out + unit * l.unit + line * LINE;
    for (int i = 0; i < 2; i++) {
      to[2 * i] = (w[i] & 15) | (w[i + 2] & 15) << 4;
      to[2 * i + 1] = w[i] >> 4 | (w[i + 2] & 0xf0);
    }
  }
}

Tensor pack(const Tensor& weight, const Tensor& scale) {
  bool int4 = weight.scalar_type() == at::kByte;
  TORCH_CHECK(int4 || weight.scalar_type() == at::kChar, "weights are int8, or uint8 for int4");
  TORCH_CHECK(scale.scalar_type() == (int4 ? at::kHalf : at::kFloat), "scales are float32, for int4 float16");
  TORCH_CHECK((weight.dim() == 2 || weight.dim() == 3) && scale.dim() == weight.dim() - !int4 &&
              scale.sizes().slice(0, weight.dim() - 1) == weight.sizes().slice(0, weight.dim() - 1),
              "weight ", weight.sizes(), " and scale ", scale.sizes(), " do not fit");
  int64_t outputs = weight.size(-2), stored = weight.size(-1), inputs = stored * (int4 ? 2 : 1);
  TORCH_CHECK(inputs > 0 && (!int4 || (scale.size(-1) > 0 && inputs % scale.size(-1) == 0)), "not whole groups");
  int64_t groups = int4 ? scale.size(-1) : 1;
  Layout l(inputs, int4 ? inputs / groups : 0);
  Tensor w = weight.contiguous(), s = scale.contiguous();
  std::vector<int64_t> shape = weight.sizes().vec();
  int64_t tiles = (outputs + TILE - 1) / TILE, matrices = weight.dim() == 3 ? shape[0] : 1;
  shape[shape.size() - 2] = tiles, shape.back() = l.tile;
  Tensor packed = empty_in_huge_pages(shape, weight.scalar_type());
  auto from = (const uint8_t*)w.data_ptr(), scales = (const uint8_t*)s.data_ptr();
  split(matrices * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      int64_t first = t / tiles * outputs + t % tiles * TILE;
      int64_t rows = std::min<int64_t>(TILE, outputs - t % tiles * TILE);
      uint8_t* tile = (uint8_t*)packed.data_ptr() + t * l.tile;
      std::memset(tile, int4 ? 0x88 : OFFSET, l.tile);  // weights of zero
      for (int64_t n = int4 ? l.unit : l.tile; n <= l.tile; n += l.unit) std::memset(tile + n - LINE, 0, LINE);
      for (int64_t r = 0; r < rows; r++) {
        const uint8_t* row = from + (first + r) * stored;
        if (int4) {
          auto row_scales = (const at::Half*)scales + (first + r) * groups;
          pack_row_int4(row, inputs, l, tile + r * 4);
          for (int64_t i = 0; i < groups; i++)
            ((at::Half*)(tile + (i / 2 + 1) * l.unit - LINE))[i % 2 * TILE + r] = row_scales[i];
        } else {
          for (int64_t k = 0; k < inputs; k++) tile[k / 4 * LINE + r * 4 + k % 4] = row[k] + OFFSET;
          ((float*)(tile + l.tile - LINE))[r] = ((const float*)scales)[first + r];
        }
      }
    }
  });
  return packed;
}

void unpack_row(const uint8_t* tile, int64_t r, int64_t inputs, const Layout& l, float* y) {
  for (int64_t k = 0; k < inputs; k += 4) {  // 4 columns: one lane, or the low or high halves of one
    const uint8_t* unit = l.group ? tile + k / (2 * l.group) * l.unit : tile;
    const uint8_t* w = unit + (l.group ? k % (2 * l.group) / 8 : k / 4) * LINE + r * 4;
    float scale = l.group ? (float)((const at::Half*)(unit + l.unit - LINE))[k / l.group % 2 * TILE + r]
                          : ((const float*)(tile + l.tile - LINE))[r];
    for (int64_t i = 0; i < 4 && k + i < inputs; i++)
      y[k + i] = (l.group ? (k & 4 ? w[i] >> 4 : w[i] & 15) - 8 : (int8_t)(w[i] - OFFSET)) * scale;
  }
}

Tensor unpack_rows(const Tensor& packed, const Tensor& rows, int64_t inputs, int64_t group) {
  Layout l(inputs, group);
  l.check(packed, 2);
  TORCH_CHECK(rows.scalar_type() == at::kLong, "rows are int64");
  Tensor index = rows.contiguous();
  std::vector<int64_t> shape = rows.sizes().vec();
  shape.push_back(inputs);
  Tensor out = at::empty(shape, at::kFloat);
  auto wanted = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); i++)
    TORCH_CHECK(wanted[i] >= 0 && wanted[i] < packed.size(0) * TILE, "row ", wanted[i], " of ", packed.size(0) * TILE);
  split(index.numel(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      unpack_row((const uint8_t*)packed.data_ptr() + wanted[i] / TILE * l.tile, wanted[i] % TILE, inputs, l,
                 out.data_ptr<float>() + i * inputs);
  });
  return out;
}

// -- rounding x -------------------------------------------------------------------------------------------------------

struct Rounded {  // [M, columns], [M, columns / 32] twice
  int8_t* q;
  float* scale;
  int32_t* zero;  // what the offset of the weights has added to a block's sum, negative
};

template <typename T>
void round_row(const T* x, int64_t inputs, int64_t columns, int offset, int8_t* q, float* scale, int32_t* zero) {
  constexpr float MAGIC = 12582912;  // 1.5 * 2^23: a small number added to it is rounded, in its lowest bits
  constexpr int MAGIC_BITS = 0x4b400000;
  for (int64_t k = 0; k < columns; k += BLOCK, q += BLOCK) {
    float v[BLOCK] = {};
    if (k + BLOCK <= inputs) for (int i = 0; i < BLOCK; i++) v[i] = x[k + i];
    else for (int i = 0; k + i < inputs; i++) v[i] = x[k + i];
    int32_t bits[BLOCK], largest = 0, sum = 0;
    std::memcpy(bits, v, sizeof v);
    for (int i = 0; i < BLOCK; i++) largest = std::max(largest, bits[i] & 0x7fffffff);  // as bits NaN is the largest
    float most;
    std::memcpy(&most, &largest, sizeof most);
    float inverse = most > 1e-36f ? 127 / most : 0;  // below, 127 / most would overflow
    for (int i = 0; i < BLOCK; i++) v[i] = v[i] * inverse + MAGIC;
    std::memcpy(bits, v, sizeof v);
    for (int i = 0; i < BLOCK; i++) sum += q[i] = bits[i] - MAGIC_BITS;
    scale[k / BLOCK] = most / 127;
    zero[k / BLOCK] = -offset * sum;
  }
}

// -- kernel -----------------------------------------------------------------------------------------------------------

constexpr int MOST_ROWS = PARTS == 1 ? 8 : 4;  // rows of x multiplied at a time: their sums stay in registers
constexpr int64_t AHEAD = 2304;  // bytes that are fetched before they are needed

template <int BITS, int ROWS>
INLINE void add_block(const uint8_t* w, const Floats* scale, const int8_t* const* q, const float* const* x_scale,
                      const int32_t* const* zero, int64_t block, Floats (&acc)[ROWS][PARTS]) {
  UNROLL for (int j = 0; j < BITS; j++) __builtin_prefetch(w + AHEAD + j * LINE);  // BITS lines make a block
  ROLLED for (int part = 0; part < PARTS; part++) {
    Bytes line[8];
    UNROLL for (int j = 0; j < 8; j++) {
      if constexpr (BITS == 8) {
        line[j] = load<Bytes>(w + j * LINE + part * WIDTH);
      } else {
        Bytes pairs = load<Bytes>(w + j / 2 * LINE + part * WIDTH);
        line[j] = (j % 2 ? (Bytes)((Words)pairs >> 4) : pairs) & 15;
      }
    }
    UNROLL for (int m = 0; m < ROWS; m++) {
      Sums<BITS> sum = {};
      UNROLL for (int j = 0; j < 8; j++)
        sum = dot(sum, line[j], (Bytes)(Ints{} + load<int32_t>(q[m] + block * BLOCK + j * 4)));
      Floats product = __builtin_convertvector(total(sum) + zero[m][block], Floats);
      Floats factor = Floats{} + x_scale[m][block];
      if constexpr (BITS == 4) factor *= scale[part];
      acc[m][part] = multiply_add(product, factor, acc[m][part]);
    }
  }
}

// TILES tiles, `stride` bytes apart, times ROWS rows of x -> sums [TILES][ROWS][16]. Several tiles at once are several
// streams of memory: one alone does not reach the bandwidth of a core.
template <int BITS, int TILES, int ROWS>
void multiply(const uint8_t* w, int64_t stride, const Layout& l, const Rounded& x, int64_t row, float* sums) {
  const int8_t* q[ROWS];
  const float* x_scale[ROWS];
  const int32_t* zero[ROWS];
  for (int m = 0; m < ROWS; m++) {
    q[m] = x.q + (row + m) * l.columns;
    x_scale[m] = x.scale + (row + m) * (l.columns / BLOCK);
    zero[m] = x.zero + (row + m) * (l.columns / BLOCK);
  }
  Floats acc[TILES][ROWS][PARTS] = {};
  const int64_t unit = l.unit, blocks = BITS == 4 ? l.group / BLOCK : 1;  // blocks to a scale
  for (int64_t block = 0; block < l.columns / BLOCK; block += (BITS == 4 ? 2 : 1) * blocks, w += unit) {
    UNROLL_TILES for (int t = 0; t < TILES; t++) {
      const uint8_t* at = w + t * stride;
      if constexpr (BITS == 8) {
        add_block<8, ROWS>(at, nullptr, q, x_scale, zero, block, acc[t]);
      } else {
        ROLLED for (int half = 0; half < 2; half++) {
          Floats scale[PARTS];
          const uint8_t* halves = w + t * stride + unit - LINE + half * TILE * 2;
          for (int p = 0; p < PARTS; p++) scale[p] = load_halves(halves + p * LANES * 2);
          for (int64_t b = half * blocks; b < (half + 1) * blocks; b++, at += BLOCK * TILE / 2)
            add_block<4, ROWS>(at, scale, q, x_scale, zero, block + b, acc[t]);
        }
        __builtin_prefetch(at + AHEAD);  // the line of scales
      }
    }
  }
  for (int t = 0; t < TILES; t++)
    for (int m = 0; m < ROWS; m++)
      for (int p = 0; p < PARTS; p++, sums += LANES) {
        if (BITS == 8) acc[t][m][p] *= load<Floats>(w + t * stride + p * WIDTH);  // the end of the tile
        std::memcpy(sums, &acc[t][m][p], WIDTH);
      }
}

using Kernel = void (*)(const uint8_t*, int64_t, const Layout&, const Rounded&, int64_t, float*);

template <int BITS, int TILES, int... I> constexpr auto kernels(std::integer_sequence<int, I...>) {
  return std::array<Kernel, sizeof...(I)>{multiply<BITS, TILES, I + 1>...};  // by number of rows
}

// -- linear -----------------------------------------------------------------------------------------------------------

struct Product {  // what all threads share
  Layout layout;
  Rounded x;
  int64_t outputs;
  std::vector<int64_t> order;  // x has been rounded in this order of rows
  void (*store)(void* y, int64_t at, const float* sums, int64_t n);
  void* y;
};

template <typename T> void store(void* y, int64_t at, const float* sums, int64_t n) {
  for (int64_t i = 0; i < n; i++) ((T*)y)[at + i] = sums[i];
}

// Tiles [first, first + TILES * count) of one matrix, as TILES streams of `count` tiles.
template <int BITS, int TILES> void multiply_tiles(const Product& p, const Rows& rows, int64_t first, int64_t count) {
  static constexpr auto KERNELS = kernels<BITS, TILES>(std::make_integer_sequence<int, TILES == 4 ? 4 : MOST_ROWS>());
  int64_t blocks = (rows.count + MOST_ROWS - 1) / MOST_ROWS, per = (rows.count + blocks - 1) / blocks;
  float sums[TILES * MOST_ROWS * TILE];
  for (int64_t t = first; t < first + count; t++)
    for (int64_t m = 0; m < rows.count; m += per) {  // past the first rows the tiles come from the cache
      int64_t n = std::min(per, rows.count - m);
      KERNELS[n - 1](rows.weight + t * p.layout.tile, count * p.layout.tile, p.layout, p.x, rows.first + m, sums);
      for (int64_t i = 0; i < TILES * n; i++) {
        int64_t output = (t + i / n * count) * TILE;
        p.store(p.y, p.order[rows.first + m + i % n] * p.outputs + output, sums + i * TILE,
                std::min<int64_t>(TILE, p.outputs - output));
      }
    }
}

template <int BITS> void multiply_range(const Product& p, const Rows& rows, int64_t begin, int64_t end) {
  int64_t n = end - begin, blocks = (rows.count + MOST_ROWS - 1) / MOST_ROWS;
  if (blocks <= 4 && rows.count <= 4 * blocks) {
    multiply_tiles<BITS, 4>(p, rows, begin, n / 4);
    begin += n / 4 * 4;
  } else if constexpr (MOST_ROWS > 4) {
    multiply_tiles<BITS, 2>(p, rows, begin, n / 2);
    begin += n / 2 * 2;
  }
  multiply_tiles<BITS, 1>(p, rows, begin, end - begin);
}

template <typename T> void prepare(Product& p, const Tensor& x, int64_t inputs) {
  p.store = store<T>;
  const int64_t columns = p.layout.columns, blocks = columns / BLOCK;
  split(p.order.size(), std::max<int64_t>(1, 32768 / columns), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++)
      round_row((const T*)x.data_ptr() + p.order[m] * inputs, inputs, columns, p.layout.group ? 8 : OFFSET,
                p.x.q + m * columns, p.x.scale + m * blocks, p.x.zero + m * blocks);
  });
}

Tensor packed_linear(const Tensor& x_, const Tensor& packed, int64_t outputs, int64_t group,
                     const std::optional<Tensor>& chosen) {
  TORCH_CHECK(x_.dim() > 0, "x has no columns");
  Tensor x = x_.contiguous();
  int64_t inputs = x.size(-1);
  Product p{Layout(inputs, group), {}, outputs, std::vector<int64_t>(x.numel() / inputs), nullptr, nullptr};
  p.layout.check(packed, chosen ? 3 : 2);
  int64_t tiles = packed.size(-2), M = x.numel() / inputs, blocks = p.layout.columns / BLOCK;
  TORCH_CHECK(outputs > 0 && tiles == (outputs + TILE - 1) / TILE, tiles, " tiles are not ", outputs, " rows");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  Tensor y = at::empty(shape, x.options());
  auto groups = rows_of(chosen, packed, packed.size(-2) * p.layout.tile, p.order);
  if (M == 0) return y;
  p.y = y.data_ptr();
  Tensor memory = at::empty({M * (p.layout.columns + 8 * blocks)}, at::kByte);
  auto q = (int8_t*)memory.data_ptr();
  auto scale = (float*)(q + M * p.layout.columns);
  p.x = {q, scale, (int32_t*)(scale + M * blocks)};
  if (x.scalar_type() == at::kFloat) prepare<float>(p, x, inputs);
  else if (x.scalar_type() == at::kBFloat16) prepare<at::BFloat16>(p, x, inputs);
  else if (x.scalar_type() == at::kHalf) prepare<at::Half>(p, x, inputs);
  else TORCH_CHECK(false, "x is ", x.scalar_type(), ", not float32, bfloat16 or float16");
  int64_t work = p.layout.tile * M / (int64_t)groups.size();  // of a tile; 65536 are not worth a thread
  int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work));
  split(tiles * groups.size(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {  // the part of each matrix that is in this thread's share
      int64_t last = std::min(end, (i / tiles + 1) * tiles), first = i % tiles;
      (group ? multiply_range<4> : multiply_range<8>)(p, groups[i / tiles], first, first + last - i);
      i = last;
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(LIBRARY, CPU, m) {
  m.impl("pack", &pack);
  m.impl("unpack_rows", &unpack_rows);
  m.impl("packed_linear", &packed_linear);
}
