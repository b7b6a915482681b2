"""The operations PyTorch lacks or does slowly, bound per device.

`reference.py` holds the truth of each in plain PyTorch; a file per device holds its fast twin. Model code imports from
here and never asks which device it runs on.

Glossary: B batch, S tokens in this call, L positions in the cache, n positions attended to, H heads, K kv heads,
G = H / K query heads per kv head, E head_dim.
"""
import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.formats import dequantize

LIBRARY = torch.library.Library("readonce", "DEF")


def processor_has(feature: str) -> bool:
    """Whether the CPU has an instruction set; False where the torch at hand cannot tell."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get(feature))


AVX512 = processor_has("avx512_bw")
MPS_STREAMS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)  # a matrix times one vector, in PyTorch


def bind(device_type: str, dtype: torch.dtype = torch.float32) -> None:
    """Make the fast twins of a device known, for activations of `dtype`. Without Triton, or a compiler for
    ops/cpu*.cpp, the plain forms serve. On a CPU float32 is for exactness, which plain PyTorch has."""
    if device_type == "cuda" and importlib.util.find_spec("triton"):
        for room in ("cuda_linear", "cuda_heads", "cuda_attention", "cuda_delta"):
            importlib.import_module(f"ops.{room}")
    elif device_type == "mps":
        importlib.import_module("ops.mps")
    elif device_type == "cpu" and dtype.itemsize == 2:
        importlib.import_module("ops.cpu").load()


def packs(device_type: str) -> bool:
    """Whether quantized matrices get a layout of their own on such a device. Builds the code for it, once."""
    return device_type == "cpu" and importlib.import_module("ops.cpu").load()


def packed_layout() -> str:
    """What a packed layout's bytes depend on: the build of the code that makes and reads it."""
    return importlib.import_module("ops.cpu").build().stem


def loaded(operator: str, device_type: str) -> bool:
    """Whether a device's own kernel for an operator is there."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"readonce::{operator}", device_type.upper())


loaded._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import the compiler


# -- linear -----------------------------------------------------------------------------------------------------------

def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed -> [..., out]; with a scale, of a quantized weight."""
    if scale is not None:
        return torch.ops.readonce.quantized_linear(x, weight, scale)
    if streams16(x, weight):
        return torch.ops.readonce.linear16(x, weight, None)
    if x.device.type == "mps":  # there PyTorch takes slower ways for more dimensions than two
        return F.linear(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return F.linear(x, weight)


def streams16(x: Tensor, weight: Tensor) -> bool:
    """Whether a device has a kernel of ours for 16-bit weights, or in the CPU's case a better way than F.linear."""
    device, here = x.device.type, {"cpu": True, "mps": not MPS_STREAMS}
    return weight.itemsize == 2 and here.get(device, device == "cuda" and loaded("linear16", device))


LIBRARY.define("linear16(Tensor x, Tensor weight, Tensor? chosen) -> Tensor")


@torch.library.impl(LIBRARY, "linear16", "CompositeExplicitAutograd")
def linear16(x: Tensor, weight: Tensor, chosen: Tensor | None) -> Tensor:
    """`linear`, or with `chosen` `expert_linear`, of 16-bit weights on a CPU: ops/cpu_linear16.cpp in plain PyTorch.

    For one row of bfloat16 and AVX-512 the vector goes to the right of the matrix: PyTorch then takes a matrix-vector
    kernel, which streams a large weight about 1.4 times faster than the matrix-matrix one behind F.linear, but starts
    20 us later: below a megabyte that is not worth it. (Without AVX-512 it is six times slower.) Where the processor
    has no bfloat16 arithmetic its float32 matmul is about four times faster, so from 8 rows up the weight is widened on
    the way, a block of rows at a time that stays in the cache.
    """
    if chosen is not None:
        return grouped_linear(x, weight, chosen)
    if x.numel() == x.shape[-1] and weight.dtype == torch.bfloat16 and weight.nbytes >= 1 << 20 and AVX512:
        return torch.mm(weight, x.reshape(-1, 1)).view(*x.shape[:-1], -1)
    if x.numel() < 8 * x.shape[-1] or not lacks_bfloat16():
        return F.linear(x, weight)
    wide = x.float()
    return torch.cat([F.linear(wide, block.float()).to(x.dtype) for block in weight.split(512)], -1)


@torch.library.register_fake("readonce::linear16")
def _(x: Tensor, weight: Tensor, chosen: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[-2])


def lacks_bfloat16() -> bool:
    """True on x86 processors with neither AVX512_BF16 nor AMX; False where the torch at hand cannot tell."""
    return processor_has("sse2") and not (processor_has("avx512_bf16") or processor_has("amx_bf16"))


# -- experts ----------------------------------------------------------------------------------------------------------

EXPERT_ROWS = 64  # up to so many rows a GPU reads an expert's matrix anew for each; a batch of 8 with 8 experts has 64


def expert_linear(x: Tensor, weight: Tensor, chosen: Tensor, scale: Tensor | None = None) -> Tensor:
    """Row n of x [N, in] times weight[chosen[n]] [out, in] transposed -> [N, out]; only chosen matrices are read.

    For a few rows where there is no kernel for it: a product and a sum, which the compiler makes one kernel that reads
    the matrices where they lie, and which never waits for the device (a matmul would first gather them).
    """
    if scale is not None:
        return torch.ops.readonce.quantized_expert_linear(x, weight, scale, chosen)
    if x.device.type in ("cpu", "cuda") and streams16(x, weight):
        return torch.ops.readonce.linear16(x, weight, chosen)
    if x.device.type != "cpu" and x.shape[0] <= EXPERT_ROWS:
        return (weight[chosen] * x[:, None]).sum(-1, dtype=torch.float32).to(x.dtype)
    return torch.ops.readonce.grouped_linear(x, weight, chosen)


def by_expert(x: Tensor, outputs: int, chosen: Tensor, multiply: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Rows x [N, in] sorted by their expert, multiply(rows, e) for each that has any -> [N, outputs]. Reads `chosen`
    back."""
    order = chosen.argsort()
    counts = torch.bincount(chosen).tolist()
    groups = x[order].split([n for n in counts if n])
    parts = [multiply(rows, e) for e, rows in zip((e for e, n in enumerate(counts) if n), groups, strict=True)]
    return x.new_empty(x.shape[0], outputs).index_copy_(0, order, torch.cat(parts))


LIBRARY.define("grouped_linear(Tensor x, Tensor weight, Tensor chosen) -> Tensor")


@torch.library.impl(LIBRARY, "grouped_linear", "CompositeExplicitAutograd")
def grouped_linear(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """`expert_linear` expert by expert, with a matmul for each."""
    return by_expert(x, weight.shape[1], chosen, lambda rows, e: linear(rows, weight[e]))


@torch.library.register_fake("readonce::grouped_linear")
def _(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


# -- quantized --------------------------------------------------------------------------------------------------------

WIDENED = 1 << 22  # numbers of a matrix made wide at a time

LIBRARY.define("quantized_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor")


@torch.library.impl(LIBRARY, "quantized_linear", "CompositeExplicitAutograd")
def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., in] times a quantized matrix transposed -> [..., out]: made wide and multiplied, in blocks of rows.

    For bfloat16 times int8 a CPU has something better of PyTorch's own, far faster, for where there is no compiler
    for ops/cpu.cpp; for int4 it has nothing that reads this format.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and weight.dtype == torch.int8:
        one = torch.ones(len(weight), dtype=x.dtype)  # the scales come after, in float32
        y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight.contiguous(), one) * scale
        return y.to(x.dtype).view(*x.shape[:-1], -1)
    return linear_by_blocks(x, weight, scale, WIDENED, lambda *block: dequantize(*block).to(x.dtype))


def linear_by_blocks(x: Tensor, weight: Tensor, scale: Tensor, numbers: int,
                     widen: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """x times a matrix, of which so many numbers at a time are made wide, rows [r, in] of both its tensors."""
    rows = max(1, numbers // x.shape[-1])
    parts = [F.linear(x, widen(*block)) for block in zip(weight.split(rows), scale.split(rows), strict=True)]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


@torch.library.register_fake("readonce::quantized_linear")
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


LIBRARY.define("quantized_expert_linear(Tensor x, Tensor weight, Tensor scale, Tensor chosen) -> Tensor")


@torch.library.impl(LIBRARY, "quantized_expert_linear", "CompositeExplicitAutograd")
def quantized_expert_linear(x: Tensor, weight: Tensor, scale: Tensor, chosen: Tensor) -> Tensor:
    """Row n of x [N, in] times quantized weight[chosen[n]] transposed -> [N, out]. Reads `chosen` back."""
    return by_expert(x, weight.shape[1], chosen, lambda rows, e: quantized_linear(rows, weight[e], scale[e]))


@torch.library.register_fake("readonce::quantized_expert_linear")
def _(x: Tensor, weight: Tensor, scale: Tensor, chosen: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


# -- packed -----------------------------------------------------------------------------------------------------------

# On a CPU a quantized matrix is laid out anew once it is loaded (ops/cpu.cpp says how), if there is a compiler for the
# code that reads it. `group` is 0 for int8.

LIBRARY.define("pack(Tensor weight, Tensor scale, Tensor? shift=None) -> Tensor")
LIBRARY.define("unpack_rows(Tensor packed, Tensor rows, int inputs, int group) -> Tensor")
LIBRARY.define("packed_linear(Tensor x, Tensor packed, int outputs, int group, Tensor? chosen) -> Tensor")


@torch.library.register_fake("readonce::unpack_rows")
def _(packed: Tensor, rows: Tensor, inputs: int, group: int) -> Tensor:
    return packed.new_empty(*rows.shape, inputs, dtype=torch.float32)


@torch.library.register_fake("readonce::packed_linear")
def _(x: Tensor, packed: Tensor, outputs: int, group: int, chosen: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


# -- attention --------------------------------------------------------------------------------------------------------

FEW = 16  # tokens in a call that a GPU's kernel takes; for more, a matmul over all of them is faster


class Attended(NamedTuple):
    """Which part of the cache a call attends to; made once and used by every layer of a kind."""
    positions: Tensor  # [B, S] position of each query
    span: int | None = None  # slots [0, span) are read; None: known only on the device
    mask: Tensor | None = None  # [B, 1, 1, S, span], True where a query may look; None: everywhere
    window: int | None = None  # a query sees itself and window - 1 positions before it
    causal: bool = False  # the queries are the last S of the span: no mask is needed
    beside: Tensor | None = None  # [B, n] slots to be read before the new keys; None: these are in the cache


def slot_positions(newest: Tensor, slots: Tensor, size: int) -> Tensor:
    """The position that each slot holds, [B, len(slots)], once `newest` [B, 1] is stored; below 0: nothing yet.

    Position p lives in slot p % size, so a slot holds the last such position that is not after the newest.
    """
    return newest - (newest - slots) % size


def visible(keys: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Keys at [B, n] that queries at [B, S] may look at: [B, S, n]."""
    keys, queries = keys[:, None], positions[..., None]
    seen = (keys >= 0) & (keys <= queries)
    return seen if window is None else seen & (keys > queries - window)


def cpu_attends() -> bool:
    """Whether ops/cpu_attention.cpp is loaded."""
    return loaded("decode_attention", "cpu")


def kernel_reads_positions(positions: Tensor) -> bool:
    """Whether the kernel for a call at positions [B, S] finds the filled part itself: a CPU's if it is there, others'
    for a few tokens. A graph for prompts of all lengths has no choice by length."""
    if positions.device.type == "cpu":
        return cpu_attends()
    few = positions.shape[1] <= FEW
    return torch.fx.experimental.symbolic_shapes.statically_known_true(few) if torch.compiler.is_compiling() else few


def flashes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch has FlashAttention-2 there, which knows by itself that the last query looks at all keys and those
    before it at fewer: a mask takes twice the work, and memory for each query and key."""
    if device.type != "cuda" or torch.version.hip or dtype.itemsize != 2 or head_dim > 256 or head_dim % 8:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attended(positions: Tensor, size: int, window: int | None = None, flash: bool = False) -> Attended:
    """The attended part of a cache of `size` slots that will hold `positions`, so that cost follows the filled part.
    flash: where a call needs no mask, it shall have none.

    For a prompt a GPU reads the last position back, once a chunk. For a token that would stall it and break its graph,
    and costs a CPU as much as attention itself: there the kernel reads the position, a CPU's of prompts too. A CPU
    without its kernels reads it back (a graph keeps it as an unknown size: one graph for all lengths).
    """
    if kernel_reads_positions(positions):
        return Attended(positions, window=window)
    span = positions.max().clamp_max(size - 1).item() + 1
    if torch.compiler.is_compiling():  # what the graph may assume of a size it does not know
        several = torch.fx.experimental.symbolic_shapes.statically_known_true(positions.shape[1] > 1)
        torch._check(span >= (2 if several else 1))
        torch._check(span <= size)
    if positions.numel() == 1 and window in (None, size):
        return Attended(positions, span)
    if flash and not torch.compiler.is_compiling() and span - int(positions.min()) == positions.shape[1]:
        return Attended(positions, span, causal=True)  # of rows that begin at one position, all read so far
    keys = slot_positions(positions[:, -1:], torch.arange(span, device=positions.device), size)
    return Attended(positions, span, visible(keys, positions, window)[:, None, None])


def attended_beside(positions: Tensor, size: int, window: int) -> Attended:
    """For a prompt whose keys would overwrite what its first queries look at: the old window, then the new keys. Of
    the window a CPU's kernel is given what there is, if all rows have as much."""
    first, kept = positions[:, :1], window - 1
    if positions.device.type == "cpu" and cpu_attends() and not torch.compiler.is_compiling():
        least, most = first.clamp_max(kept).aminmax()
        if least == most:
            return Attended(positions, window=window, beside=(first - torch.arange(least, 0, -1, device="cpu")) % size)
    old = first - torch.arange(kept, 0, -1, device=positions.device)  # [B, window - 1]
    mask = visible(torch.cat([old, positions], 1), positions, window)
    return Attended(positions, kept + positions.shape[1], mask[:, None, None], beside=old % size)


def widened(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values [B, K, n, E]; of int8 with scales [B, K, n], what they mean. One head at a time is float32."""
    if scale is None:
        return x
    heads = zip(x.split(1, 1), scale[..., None].split(1, 1), strict=True)
    return torch.cat([(head * its).to(dtype) for head, its in heads], 1)


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, where: Attended, scale: float | None = None,
              sinks: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Tensor:
    """Attention of queries [B, S, H, E] over keys and values [B, K, L, E] -> [B, S, H, E]; scale None: E ** -0.5.

    The G query heads that share a kv head are folded into the rows of one matrix, so that keys and values are read
    once and never expanded. `sinks` [H] float32: one more score for each head, that belongs to no value. Caches of int8
    have a scale for each key and each value, [B, K, L] float32.
    """
    B, S, H, E = q.shape
    K = k_cache.shape[1]
    G = H // K
    scale = E ** -0.5 if scale is None else scale
    if where.span is not None:
        k, v, k_scale, v_scale = (None if t is None else t.narrow(2, 0, where.span)
                                  for t in (k_cache, v_cache, k_scale, v_scale))
        k, v = widened(k, k_scale, q.dtype), widened(v, v_scale, q.dtype)  # [B, K, n, E]
        if where.causal:  # by a kernel that shares keys by itself, too
            return causal_attention(q.transpose(1, 2), k, v, scale).transpose(1, 2)
    q = q.view(B, S, K, G, E).permute(0, 2, 3, 1, 4).reshape(B, K, G * S, E)
    if sinks is not None:
        sinks = sinks.view(K, G, 1).expand(K, G, S).reshape(K, G * S)
    if where.span is None:
        k, v, positions, n = k_cache, v_cache, where.positions, k_cache.shape[2]
        if where.beside is not None:  # all that there is to look at lies in order
            k, v, positions = k.contiguous(), v.contiguous(), torch.arange(n - S, n, device=q.device).expand(B, S)
        y = torch.ops.readonce.decode_attention(q, k, v, positions, scale, where.window or 0, sinks, k_scale, v_scale)
    else:
        mask = where.mask
        if mask is not None:
            mask = mask.expand(B, 1, G, S, where.span).reshape(B, 1, G * S, where.span)
        y = softmax_attention(q, k, v, mask, scale, sinks)
    return y.view(B, K, G, S, E).permute(0, 3, 1, 2, 4).reshape(B, S, H, E)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Queries [B, H, S, E], the last of n positions, over all keys and values [B, K, n, E]."""
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    from torch.nn.attention.bias import causal_lower_right  # which imports the compiler, a second of time
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float,
                      sinks: Tensor | None) -> Tensor:
    """Rows q [B, K, R, E] over keys and values [B, K, n, E], with sinks [K, R]: SDPA, which has none, or plainly."""
    if sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q @ k.mT).float() * scale  # [B, K, R, n]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    scores = torch.cat([scores, sinks[..., None].expand(*scores.shape[:-1], 1)], -1)
    return scores.softmax(-1)[..., :-1].to(v.dtype) @ v


LIBRARY.define("decode_attention(Tensor q, Tensor k, Tensor v, Tensor positions, float scale, int window, "
               "Tensor? sinks, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor")


@torch.library.impl(LIBRARY, "decode_attention", "CompositeExplicitAutograd")
def masked_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int,
                     sinks: Tensor | None, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Tensor:
    """Rows q [B, K, R, E] over whole caches [B, K, L, E]; row r stands at positions[:, r % S] -> [B, K, R, E].

    Position p lives in slot p % L; window 0: none; caches of int8 have scales [B, K, L]. Cost follows L; the devices'
    files have forms whose cost follows the filled part.
    """
    keys = slot_positions(positions[:, -1:], torch.arange(k.shape[2], device=q.device), k.shape[2])
    seen = visible(keys, positions, window or None)  # [B, S, L]
    groups = q.shape[2] // positions.shape[1]
    k, v = widened(k, k_scale, q.dtype), widened(v, v_scale, q.dtype)
    return softmax_attention(q, k, v, seen.repeat(1, groups, 1)[:, None], scale, sinks)


@torch.library.register_fake("readonce::decode_attention")
def _(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int, sinks: Tensor | None,
      k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
