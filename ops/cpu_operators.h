// The operators of ops/__init__.py that have kernels in ops/cpu*.cpp; cpu_ranks.cpp hands them to PyTorch.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace LIBRARY {

at::Tensor pack(const at::Tensor& weight, const at::Tensor& scale, const std::optional<at::Tensor>& shift);
at::Tensor unpack_rows(const at::Tensor& packed, const at::Tensor& rows, int64_t inputs, int64_t group);
at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, int64_t outputs, int64_t group,
                         const std::optional<at::Tensor>& chosen);
at::Tensor linear16(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& chosen);
at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& positions,
                            double scale, int64_t window, const std::optional<at::Tensor>& sinks,
                            const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale);

struct Attention {  // a call: queries, positions and all that is not a cache are dense; y is to be written
  at::Tensor q, k, v, positions, sinks, k_scale, v_scale, y;
  double scale;
  int64_t window;
};
void attend_prompt(const Attention& call);

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, double offset);
at::Tensor turn_heads(const at::Tensor& qkv, const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin,
                      const std::optional<at::Tensor>& q_norm, const std::optional<at::Tensor>& k_norm, double eps,
                      double offset, bool v_norm, int64_t heads, int64_t kv_heads, bool gated);
at::Tensor delta_step(const at::Tensor& qkvz, const at::Tensor& ba, const at::Tensor& positions, at::Tensor conv,
                      at::Tensor state, const at::Tensor& taps, const at::Tensor& decay, const at::Tensor& shift,
                      const at::Tensor& norm, double eps);
at::Tensor exchange(const at::Tensor& shared, const at::Tensor& x, int64_t rank, int64_t ranks, int64_t round,
                    bool fresh, bool sum);

}  // namespace LIBRARY
