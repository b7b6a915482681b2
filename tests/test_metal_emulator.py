"""The emulator of Metal computes as a GPU would, and notices kernels that would go wrong there."""
import shutil
import sys

import pytest
import torch
from metal import emulator
from torch import Tensor

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="the emulator needs g++")

ROW_SUM = """
kernel void row_sum(device const float* x, device float* y, constant long& columns,
                    uint row [[threadgroup_position_in_grid]], uint at [[thread_index_in_threadgroup]],
                    uint size [[threads_per_threadgroup]], uint group [[simdgroup_index_in_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float part[32];
  float sum = 0;
  for (uint i = at; i < columns; i += size) sum += x[row * columns + i];
  sum = simd_sum(sum);
  if (lane == 0) part[group] = sum;
  BARRIER
  if (group == 0) {
    sum = simd_sum(lane < size / 32 ? part[lane] : 0.0f);
    if (lane == 0) y[row] = sum;
  }
}
"""


def row_sum(barrier: str, order: str, x: Tensor) -> Tensor:
    source = "#include <metal_stdlib>\nusing namespace metal;\n" + ROW_SUM.replace("BARRIER", barrier)
    y = torch.empty(len(x))
    emulator.compile_shader(source, order).row_sum(x, y, x.shape[1], threads=[128 * len(x)], group_size=[128])
    return y


def test_a_missing_barrier_is_caught_in_some_order():
    x = torch.rand(5, 300)
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"

    def right(barrier: str) -> list[bool]:
        return [torch.allclose(row_sum(barrier, order, x), x.sum(1), rtol=1e-5) for order in emulator.ORDERS]

    assert all(right(barrier))
    assert not all(right(""))


def test_threads_that_wait_at_different_lines_are_caught():
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    with pytest.raises(RuntimeError, match="different lines"):
        row_sum(f"if (group) {barrier} else {barrier}", "forward", torch.rand(2, 64))


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_lanes_exchange_values_in_smaller_groups_at_the_edge(order):
    """A grid of 5 x 3 groups of 32 x 2 threads cut to 150 x 5: what each lane gets of others, against plain PyTorch."""
    kernel = """
    kernel void lanes(device const int* x, device int* y, constant long& wide, uint2 at [[thread_position_in_grid]],
                      uint lane [[thread_index_in_simdgroup]], uint2 size [[threads_per_threadgroup]]) {
      const int v = x[at.y * wide + at.x];
      const int before = simd_prefix_exclusive_sum(v), down = simd_shuffle_down(v, 1), most = simd_max(v);
      device int* to = y + (at.y * wide + at.x) * 4;
      to[0] = size.x == 32 ? before : 0; to[1] = lane < 31 ? down : 0; to[2] = size.x == 32 ? most : 0; to[3] = size.y;
    }"""
    x = torch.randint(-99, 99, (5, 160), dtype=torch.int32)
    y = torch.empty(5, 160, 4, dtype=torch.int32)
    source = "#include <metal_stdlib>\nusing namespace metal;\n" + kernel
    emulator.compile_shader(source, order).lanes(x, y, 160, threads=[160, 5, 1], group_size=[32, 2, 1])
    parts = x.view(5, 5, 32)
    assert torch.equal(y[..., 0].view_as(parts), (parts.cumsum(-1) - parts).int())
    assert torch.equal(y[..., 1].view_as(parts)[..., :-1], parts[..., 1:])
    assert torch.equal(y[..., 2].view_as(parts), parts.amax(-1, keepdim=True).expand_as(parts))
    assert (y[:4, :, 3] == 2).all() and (y[4, :, 3] == 1).all()


def test_bfloat_is_rounded_as_pytorch_rounds_it():
    source = """#include <metal_stdlib>
    using namespace metal;
    kernel void add(device const bfloat* a, device const bfloat* b, device bfloat* y,
                    uint i [[thread_position_in_grid]]) { y[i] = a[i] + b[i]; }"""
    a, b = torch.randn(2, 1000).bfloat16()
    y = torch.empty_like(a)
    emulator.compile_shader(source).add(a, b, y, threads=[1000])
    assert torch.equal(y, a + b)
