// Hands the kernels to PyTorch. A file of its own: its header takes a compiler as long as a kernel does.
#include <torch/library.h>

#include "cpu_operators.h"

TORCH_LIBRARY_IMPL(LIBRARY, CPU, m) {
  m.impl("pack", &LIBRARY::pack);
  m.impl("unpack_rows", &LIBRARY::unpack_rows);
  m.impl("packed_linear", &LIBRARY::packed_linear);
  m.impl("linear16", &LIBRARY::linear16);
  m.impl("decode_attention", &LIBRARY::decode_attention);
  m.impl("exchange", &LIBRARY::exchange);
}
