// The quantized linear map on a CPU: weights are read once, in the order in which they lie in memory.
// ops/cpu.py compiles this file for the machine at hand, whose instructions are in cpu_vectors.h; ops/__init__.py
// declares the operators, ops/formats.py has the portable format.
//
// Arithmetic. A row of x is rounded to int8 in blocks of 32 columns: scale = largest |x| / 127, q = x * (127 / largest)
// to nearest even. Products of int8 by int4 or int8 are summed in int32, which is exact; the sums of blocks, times the
// scale of x and of the weight, are added up in float32 in order of column. So a row gives the same bits alone and in a
// batch, and the same numbers within float32 rounding on every processor.
//
// Layout. 16 rows of the matrix make a tile, rows and columns being padded with zeros:
//   int8  lines of 64 bytes = 16 rows x 4 columns, columns a multiple of 32; then 16 float32 scales end the tile
//   int4  units of 16 rows x 2 g columns: lines of 64 bytes = 16 rows x 8 columns, of each row the low halves of its 4
//         bytes first, after a line of 2 x 16 float16 scales, and another of shifts if there are such. Nibbles are
//         kept + 8, as in the portable format
// A line is what one instruction multiplies (4 adjacent bytes to a 32-bit lane), and a tile is one stream of memory,
// read strictly forwards: out of order by a few lines it loses a quarter of its speed, as prefetchers lose track.
//
// Glossary: M rows of x, g columns to a scale (0: int8), tile 16 rows of a matrix, block 32 columns, part one vector
// register of a line.
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include "cpu_common.h"
#include "cpu_operators.h"
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
  int64_t group, columns, head, unit, tile;  // columns with padding; bytes of the scales and shifts that a unit begins
                                             // with, of a unit (int8: of a block) and of a tile

  Layout(int64_t inputs, int64_t group, bool shifted = false) : group(group) {
    TORCH_CHECK(group == 0 || group == 32 || group == 64 || group == 128, "group ", group, " is not 0, 32, 64 or 128");
    TORCH_CHECK(inputs > 0 && (group == 0 || inputs % group == 0), inputs, " columns are no multiple of ", group);
    columns = round_up(inputs, group ? 2 * group : BLOCK);
    head = group ? LINE * (1 + shifted) : 0;
    unit = group ? TILE * group + head : TILE * BLOCK;
    tile = group ? columns / (2 * group) * unit : TILE * columns + LINE;
  }
  // Of packed weights, whose size tells if they have shifts.
  Layout(const Tensor& packed, int64_t dims, int64_t inputs, int64_t group) : Layout(inputs, group) {
    TORCH_CHECK(packed.dim() == dims && packed.is_contiguous(), "packed weights have ", dims, " dense dimensions");
    TORCH_CHECK(packed.scalar_type() == (group ? at::kByte : at::kChar), "packed weights: int8, or uint8 for int4");
    if (group && packed.size(-1) != tile) *this = Layout(inputs, group, true);
    TORCH_CHECK(packed.size(-1) == tile, "a tile has ", packed.size(-1), " bytes, not ", tile);
  }
  bool shifted() const { return head > LINE; }
};

// -- pack, unpack -----------------------------------------------------------------------------------------------------

Tensor empty_in_huge_pages(at::IntArrayRef shape, at::ScalarType dtype) {
#if defined(MADV_HUGEPAGE)  // small pages cost TLB misses; never touched before, as what malloc gives may have been
  constexpr size_t HUGE_PAGE = 1 << 21;
  const size_t bytes = c10::multiply_integers(shape) * c10::elementSize(dtype), mapped = bytes + HUGE_PAGE;
  if (bytes >= HUGE_PAGE) {
    void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, memory != MAP_FAILED, "no memory for ", bytes, " bytes");
    void* first = (void*)round_up((uintptr_t)memory, HUGE_PAGE);
    madvise(first, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    return at::from_blob(first, shape, [=](void*) { munmap(memory, mapped); }, dtype);
  }
#endif
  return empty(shape, dtype);
}

void pack_row_int4(const uint8_t* w, int64_t inputs, const Layout& l, uint8_t* out) {
  for (int64_t k = 0; k < inputs; k += 8, w += 4) {  // 8 columns: 4 bytes in, 4 bytes out
    int64_t unit = k / (2 * l.group), line = k % (2 * l.group) / 8;
    uint8_t* to = out + unit * l.unit + l.head + line * LINE;
    for (int i = 0; i < 2; i++) {
      to[2 * i] = (w[i] & 15) | (w[i + 2] & 15) << 4;
      to[2 * i + 1] = w[i] >> 4 | (w[i + 2] & 0xf0);
    }
  }
}

}  // namespace

Tensor LIBRARY::pack(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& shift) {
  bool int4 = weight.scalar_type() == at::kByte;
  TORCH_CHECK(int4 || weight.scalar_type() == at::kChar, "weights are int8, or uint8 for int4");
  TORCH_CHECK(scale.scalar_type() == (int4 ? at::kHalf : at::kFloat), "scales are float32, for int4 float16");
  TORCH_CHECK((weight.dim() == 2 || weight.dim() == 3) && scale.dim() == weight.dim() - !int4 &&
              scale.sizes().slice(0, weight.dim() - 1) == weight.sizes().slice(0, weight.dim() - 1),
              "weight ", weight.sizes(), " and scale ", scale.sizes(), " do not fit");
  TORCH_CHECK(!shift || (int4 && shift->scalar_type() == at::kHalf && shift->sizes() == scale.sizes()),
              "shifts are of int4, and like its scales");
  int64_t outputs = weight.size(-2), stored = weight.size(-1), inputs = stored * (int4 ? 2 : 1);
  TORCH_CHECK(inputs > 0 && (!int4 || (scale.size(-1) > 0 && inputs % scale.size(-1) == 0)), "not whole groups");
  int64_t groups = int4 ? scale.size(-1) : 1;
  Layout l(inputs, int4 ? inputs / groups : 0, shift.has_value());
  Tensor w = weight.contiguous(), s = scale.contiguous(), more = shift ? shift->contiguous() : s;
  std::vector<int64_t> shape = weight.sizes().vec();
  int64_t tiles = (outputs + TILE - 1) / TILE, matrices = weight.dim() == 3 ? shape[0] : 1;
  shape[shape.size() - 2] = tiles, shape.back() = l.tile;
  Tensor packed = empty_in_huge_pages(shape, weight.scalar_type());
  auto from = (const uint8_t*)w.data_ptr(), scales = (const uint8_t*)s.data_ptr();
  auto shifts = (const at::Half*)more.data_ptr();
  split(matrices * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      int64_t first = t / tiles * outputs + t % tiles * TILE;
      int64_t rows = std::min<int64_t>(TILE, outputs - t % tiles * TILE);
      uint8_t* tile = (uint8_t*)packed.data_ptr() + t * l.tile;
      std::memset(tile, int4 ? 0x88 : OFFSET, l.tile);  // weights of zero
      for (int64_t n = int4 ? 0 : l.tile - LINE; n < l.tile; n += l.unit)
        std::memset(tile + n, 0, int4 ? l.head : LINE);
      for (int64_t r = 0; r < rows; r++) {
        const uint8_t* row = from + (first + r) * stored;
        if (int4) {
          auto row_scales = (const at::Half*)scales + (first + r) * groups;
          pack_row_int4(row, inputs, l, tile + r * 4);
          for (int64_t i = 0; i < groups; i++) {
            auto head = (at::Half*)(tile + i / 2 * l.unit) + i % 2 * TILE + r;
            head[0] = row_scales[i];
            if (shift) head[LINE / sizeof(at::Half)] = shifts[(first + r) * groups + i];
          }
        } else {
          for (int64_t k = 0; k < inputs; k++) tile[k / 4 * LINE + r * 4 + k % 4] = row[k] + OFFSET;
          ((float*)(tile + l.tile - LINE))[r] = ((const float*)scales)[first + r];
        }
      }
    }
  });
  return packed;
}

namespace {

void unpack_row(const uint8_t* tile, int64_t r, int64_t inputs, const Layout& l, float* y) {
  for (int64_t k = 0; k < inputs; k += 4) {  // 4 columns: one lane, or the low or high halves of one
    const uint8_t* unit = l.group ? tile + k / (2 * l.group) * l.unit : tile;
    const uint8_t* w = unit + l.head + (l.group ? k % (2 * l.group) / 8 : k / 4) * LINE + r * 4;
    auto head = (const at::Half*)unit + (l.group ? k / l.group % 2 * TILE + r : 0);
    float scale = l.group ? (float)head[0] : ((const float*)(tile + l.tile - LINE))[r];
    float shift = l.shifted() ? (float)head[LINE / sizeof(at::Half)] : 0;
    for (int64_t i = 0; i < 4 && k + i < inputs; i++)
      y[k + i] = (l.group ? (k & 4 ? w[i] >> 4 : w[i] & 15) - 8 : (int8_t)(w[i] - OFFSET)) * scale + shift;
  }
}

}  // namespace

Tensor LIBRARY::unpack_rows(const Tensor& packed, const Tensor& rows, int64_t inputs, int64_t group) {
  Layout l(packed, 2, inputs, group);
  TORCH_CHECK(rows.scalar_type() == at::kLong, "rows are int64");
  Tensor index = rows.contiguous();
  std::vector<int64_t> shape = rows.sizes().vec();
  shape.push_back(inputs);
  Tensor out = empty(shape, at::kFloat);
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

namespace {

// -- rounding x -------------------------------------------------------------------------------------------------------

struct Rounded {  // [M, columns], [M, columns / 32] twice, [M, columns / g]
  int8_t* q;
  float* scale;
  int32_t* zero;  // what the offset of the weights has added to a block's sum, negative
  float* sum;  // of a group, for shifts; null if there are none
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

constexpr int MOST_ROWS = PARTS == 1 ? 6 : 4;  // rows of x multiplied at a time: their sums stay in registers
constexpr int FEW_ROWS = PARTS == 1 ? 3 : 4;  // and those of four tiles
constexpr int64_t AHEAD = 4608;  // bytes that are fetched before they are needed, of all streams together

// A block of TILES tiles, `stride` bytes apart, times ROWS rows of x.
template <int BITS, int TILES, int ROWS>
INLINE void add_block(const uint8_t* w, int64_t stride, const int64_t* ahead, const Floats (&scale)[TILES][PARTS],
                      const int8_t* const* q, const float* const* x_scale, const int32_t* const* zero, int64_t block,
                      Floats (*acc)[ROWS][PARTS]) {
  ROLLED for (int part = 0; part < PARTS; part++) {
    // For one row there are registers for the sums of high nibbles apart: 16 times too large, which saves a shift.
    constexpr uint8_t LOW = 0x0f, HIGH = 0xf0;
    constexpr bool APART = BITS == 4 && ROWS == 1 && PARTS == 1;
    Sums<BITS> sum[TILES][ROWS] = {}, high[TILES] = {};
    UNROLL for (int j = 0; j < 8; j++) {
      Bytes line[TILES];
      UNROLL for (int t = 0; t < TILES; t++) {
        const uint8_t* at = w + t * stride + (BITS == 4 ? j / 2 : j) * LINE;
        if ((BITS == 8 || j % 2 == 0) && part == 0) __builtin_prefetch(at + ahead[t], 0, 2);
        line[t] = load<Bytes>(at + part * WIDTH);
        if constexpr (BITS == 4) {
          if (j % 2 && !APART) line[t] = (Bytes)((Words)line[t] >> 4);
          line[t] &= j % 2 && APART ? Bytes{} + HIGH : Bytes{} + LOW;
        }
      }
      UNROLL for (int m = 0; m < ROWS; m++) {
        Bytes x = (Bytes)(Ints{} + load<int32_t>(q[m] + block * BLOCK + j * 4));
        UNROLL for (int t = 0; t < TILES; t++) {
          Sums<BITS>& to = APART && j % 2 ? high[t] : sum[t][m];
          to = dot(to, line[t], x);
        }
      }
    }
    UNROLL for (int m = 0; m < ROWS; m++)
      UNROLL for (int t = 0; t < TILES; t++) {
        Ints whole = total(sum[t][m]) + zero[m][block];
        if constexpr (APART) whole += (Ints)high[t] >> 4;
        Floats factor = Floats{} + x_scale[m][block];
        if constexpr (BITS == 4) factor *= scale[t][part];
        acc[t][m][part] = multiply_add(__builtin_convertvector(whole, Floats), factor, acc[t][m][part]);
      }
  }
}

// TILES tiles, `stride` bytes apart, times ROWS rows of x -> sums [TILES][ROWS][16]; tile t is fetched ahead[t] bytes
// before it is needed. Several tiles at once are several streams of memory: one alone does not reach the bandwidth of
// a core.
template <int BITS, int TILES, int ROWS>
void multiply(const uint8_t* w, int64_t stride, const int64_t* ahead, const Layout& l, const Rounded& x, int64_t row,
              float* sums) {
  constexpr int TOGETHER = PARTS == 1 ? TILES : 1;  // the sums of several would not fit in fewer registers
  const int8_t* q[ROWS];
  const float* x_scale[ROWS];
  const int32_t* zero[ROWS];
  for (int m = 0; m < ROWS; m++) {
    q[m] = x.q + (row + m) * l.columns;
    x_scale[m] = x.scale + (row + m) * (l.columns / BLOCK);
    zero[m] = x.zero + (row + m) * (l.columns / BLOCK);
  }
  Floats acc[TILES][ROWS][PARTS] = {}, scale[TOGETHER][PARTS] = {};
  const int64_t unit = l.unit, blocks = BITS == 4 ? l.group / BLOCK : 1;  // blocks to a scale
  for (int64_t block = 0; block < l.columns / BLOCK; block += (BITS == 4 ? 2 : 1) * blocks, w += unit) {
    ROLLED for (int t = 0; t < TILES; t += TOGETHER) {
      const uint8_t* at = w + t * stride;
      if constexpr (BITS == 8) {
        add_block<8, TOGETHER, ROWS>(at, stride, ahead + t, scale, q, x_scale, zero, block, acc + t);
      } else {
        UNROLL for (int i = 0; i < TOGETHER; i++) __builtin_prefetch(at + i * stride + ahead[t + i], 0, 2);
        at += l.head;
        ROLLED for (int half = 0; half < 2; half++) {
          UNROLL for (int i = 0; i < TOGETHER; i++)
            for (int p = 0; p < PARTS; p++)
              scale[i][p] = load_halves(w + (t + i) * stride + (half * TILE + p * LANES) * 2);
          for (int64_t b = half * blocks; b < (half + 1) * blocks; b++, at += BLOCK * TILE / 2)
            add_block<4, TOGETHER, ROWS>(at, stride, ahead + t, scale, q, x_scale, zero, block + b, acc + t);
        }
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

using Kernel = void (*)(const uint8_t*, int64_t, const int64_t*, const Layout&, const Rounded&, int64_t, float*);

template <int BITS, int TILES, int... I> constexpr auto kernels(std::integer_sequence<int, I...>) {
  return std::array<Kernel, sizeof...(I)>{multiply<BITS, TILES, I + 1>...};  // by number of rows
}

// What the shifts of a tile add to sums [rows][16]: a group's, times the sum of x there. Another pass, over lines that
// the cache still has: within `multiply`, registers would not do for both.
void add_shifts(const uint8_t* tile, const Layout& l, const Rounded& x, int64_t row, int64_t rows, float* sums) {
  const int64_t groups = l.columns / l.group;
  for (int64_t m = row; m < row + rows; m++)
    for (int p = 0; p < PARTS; p++, sums += LANES) {
      Floats acc = load<Floats>(sums);
      for (int64_t i = 0; i < groups; i++) {
        const uint8_t* shift = tile + i / 2 * l.unit + LINE + (i % 2 * TILE + p * LANES) * 2;
        acc = multiply_add(load_halves(shift), Floats{} + x.sum[m * groups + i], acc);
      }
      std::memcpy(sums, &acc, WIDTH);
    }
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
  constexpr int MOST = TILES == 4 ? FEW_ROWS : MOST_ROWS;
  static constexpr auto KERNELS = kernels<BITS, TILES>(std::make_integer_sequence<int, MOST>());
  int64_t passes = (rows.count + MOST - 1) / MOST, per = (rows.count + passes - 1) / passes, tile = p.layout.tile;
  float sums[TILES * MOST * TILE];
  for (int64_t i = first; i < first + count; i++)
    for (int64_t pass = 0; pass < passes; pass++) {  // past the first the tiles come from the cache
      int64_t ahead[TILES], m = rows.first + pass * per, n = std::min(per, rows.first + rows.count - m);
      for (int t = 0; t < TILES; t++)  // each of several passes fetches its share of the next tiles
        ahead[t] = passes == 1 ? AHEAD / TILES : t * passes / TILES == pass ? tile : 0;
      KERNELS[n - 1](rows.weight + i * tile, count * tile, ahead, p.layout, p.x, m, sums);
      for (int t = 0; t < TILES && p.x.sum; t++)
        add_shifts(rows.weight + (i + t * count) * tile, p.layout, p.x, m, n, sums + t * n * TILE);
      for (int64_t j = 0; j < TILES * n; j++) {
        int64_t output = (i + j / n * count) * TILE;
        p.store(p.y, p.order[m + j % n] * p.outputs + output, sums + j * TILE,
                std::min<int64_t>(TILE, p.outputs - output));
      }
    }
}

template <int BITS> void multiply_range(const Product& p, const Rows& rows, int64_t begin, int64_t end) {
  int64_t n = end - begin;
  if (rows.count <= FEW_ROWS) {
    multiply_tiles<BITS, 4>(p, rows, begin, n / 4);
    begin += n / 4 * 4;
  } else {
    multiply_tiles<BITS, 2>(p, rows, begin, n / 2);
    begin += n / 2 * 2;
  }
  multiply_tiles<BITS, 1>(p, rows, begin, end - begin);
}

template <typename T> void prepare(Product& p, const Tensor& x, int64_t inputs) {
  p.store = store<T>;
  const int64_t columns = p.layout.columns, blocks = columns / BLOCK, group = p.layout.group;
  split(p.order.size(), std::max<int64_t>(1, 32768 / columns), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      float* scale = p.x.scale + m * blocks;
      int32_t* zero = p.x.zero + m * blocks;
      round_row((const T*)x.data_ptr() + p.order[m] * inputs, inputs, columns, group ? 8 : OFFSET, p.x.q + m * columns,
                scale, zero);
      for (int64_t i = 0; i < blocks && p.x.sum; i++) {
        float& sum = p.x.sum[(m * columns + i * BLOCK) / group];
        sum = (i * BLOCK % group ? sum : 0) - zero[i] / 8.0f * scale[i];
      }
    }
  });
}

}  // namespace

Tensor LIBRARY::packed_linear(const Tensor& x_, const Tensor& packed, int64_t outputs, int64_t group,
                              const std::optional<Tensor>& chosen) {
  TORCH_CHECK(x_.dim() > 0, "x has no columns");
  Tensor x = x_.contiguous();
  int64_t inputs = x.size(-1);
  Product p{Layout(packed, chosen ? 3 : 2, inputs, group), {}, outputs, std::vector<int64_t>(x.numel() / inputs),
            nullptr, nullptr};
  int64_t tiles = packed.size(-2), M = x.numel() / inputs, blocks = p.layout.columns / BLOCK;
  TORCH_CHECK(outputs > 0 && tiles == (outputs + TILE - 1) / TILE, tiles, " tiles are not ", outputs, " rows");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  Tensor y = empty(shape, x.scalar_type());
  auto groups = rows_of(chosen, packed, packed.size(-2) * p.layout.tile, p.order);
  if (M == 0) return y;
  p.y = y.data_ptr();
  alignas(LINE) int8_t few[16384];  // where they are enough an allocation is saved
  Tensor many;
  int64_t groups_of_x = p.layout.shifted() ? p.layout.columns / group : 0;
  int64_t bytes = M * (p.layout.columns + 8 * blocks + 4 * groups_of_x);
  if (bytes > (int64_t)sizeof few) many = empty({bytes}, at::kByte);
  int8_t* q = many.defined() ? (int8_t*)many.data_ptr() : few;
  auto scale = (float*)(q + M * p.layout.columns);
  p.x = {q, scale, (int32_t*)(scale + M * blocks), groups_of_x ? scale + 2 * M * blocks : nullptr};
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
