"""A model as scripts/why_cpu.py compares it with itself: the same numbers behind other products, in other matrices, in
other memory. Packed and quantized matrices are as ops/__init__.py and ops/formats.py say.

Glossary: K columns, N rows of a matrix; M rows of x.
"""
import copy
import json
import mmap
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import device as machine
from checkpoint import BLOCK_NAMES, NAMES
from layers import Linear
from model import Transformer
from ops.formats import unpack_int4
from ops.fused import activate

TILE = 16  # rows: a packed matrix can be cut between tiles


def twin(model: Transformer, change: Callable[[nn.Parameter], nn.Parameter] = lambda p: p) -> Transformer:
    """Another model with caches of its own, and with these parameters or what `change` makes of each."""
    return copy.deepcopy(model, {id(p): change(p) for p in model.parameters()})


# -- products of PyTorch's --------------------------------------------------------------------------------------------

def with_linears(model: Transformer, make: Callable[[Linear], nn.Module]) -> Transformer:
    """The model, changed: another module for each of its matrices but the embedding."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            model.set_submodule(name, make(module))
    return model


def fixed(tensor: Tensor) -> nn.Parameter:
    """A copy in the kind of memory that all weights are in."""
    memory = machine.empty(tuple(tensor.shape), tensor.dtype, tensor.device)
    return nn.Parameter(memory.copy_(tensor), requires_grad=False)


class StandIn(nn.Module):
    """In the place of a Linear; `times` is another way to multiply."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:  # [..., K] -> [..., N], or half of that
        y = self.times(x)
        return y if activation is None else activate(activation, y)

    def times(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        raise NotImplementedError


class Stock(StandIn):
    """In the place of a Linear that is not packed: F.linear, for 16 bits."""

    packed = False

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.shape, self.group, self.weight = linear.shape, linear.group, linear.weight

    def times(self, x: Tensor) -> Tensor:
        return self.product(x.flatten(0, -2)).view(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        return nn.functional.linear(x, self.weight)


class StockInt8(Stock):
    """Of weights in int8 and activations in bfloat16."""

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear)
        self.scale = fixed(linear.scale.bfloat16())

    def product(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.weight, self.scale)


class StockInt8Both(Stock):
    """Of weights and activations in int8; the latter are rounded here, with a scale for each row of x."""

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear)
        self.scale = fixed(linear.scale.detach())

    def product(self, x: Tensor) -> Tensor:
        scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        sums = torch._int_mm((x / scale).round().to(torch.int8), self.weight.t())
        return (sums * (scale * self.scale)).to(x.dtype)  # two products one by one Inductor would take for its own form


class StockInt4(Stock):
    """Of weights in int4 and activations in bfloat16. A group has a scale and a zero, both bfloat16: for 32 columns
    that makes 5 bits a weight, where ours has 4.5."""

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear)
        q = unpack_int4(linear.weight) + 8
        self.weight = fixed(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1))
        scale = linear.scale.t().bfloat16()  # [K / group, N]
        self.scale = fixed(torch.stack([scale, torch.zeros_like(scale)], -1))

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.group, self.scale)


# -- other matrices, other memory -------------------------------------------------------------------------------------

class Cut(StandIn):
    """A packed Linear as several, each called by itself."""

    def __init__(self, linear: Linear, sizes: list[int]) -> None:
        super().__init__()
        assert all(size % TILE == 0 for size in sizes) and sum(sizes) == linear.shape[0], sizes
        self.parts, start = nn.ModuleList(), 0
        for size in sizes:
            with torch.device("meta"):
                part = Linear(linear.shape[1], size)
            tiles = linear.weight.detach()[start // TILE:(start := start + size) // TILE]
            part.weight, part.group, part.packed = nn.Parameter(tiles, requires_grad=False), linear.group, True
            self.parts.append(part)

    def times(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def apart(model: Transformer) -> Transformer:
    """The packed model, changed: q, k, v, gate and up are matrices of their own."""
    for layer in model.layers:
        attention, feed = layer.attention, layer.feed_forward
        attention.wqkv = Cut(attention.wqkv, [heads * attention.config.head_dim for heads in attention.widths])
        feed.w13 = Cut(feed.w13, [feed.w13.shape[0] // 2] * 2)
    return model


def small_pages(p: nn.Parameter) -> nn.Parameter:
    """A copy in pages of 4 KB, whatever the system's setting for huge ones is."""
    memory = mmap.mmap(-1, p.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    copied = torch.frombuffer(memory, dtype=p.dtype).view(p.shape).copy_(p.detach())
    return nn.Parameter(copied, requires_grad=False)


def write_folder(model: Transformer, document: dict, tokenizer: Path, folder: Path) -> None:
    """A quantized, not packed model of Llama's kind as a folder; `document`: the config.json without quantization."""
    tensors, attention = {}, model.layers[0].attention
    for parameter, p in model.named_parameters():
        owner, _, leaf = parameter.rpartition(".")
        layer = re.match(r"layers\.\d+\.|", owner)[0]
        lines = (BLOCK_NAMES if layer else NAMES)[f"{owner.removeprefix(layer)}.weight"]
        names = next(line for line in lines if "pre_feedforward" not in line[0])  # which is Gemma's
        sizes = [heads * attention.config.head_dim for heads in attention.widths] if owner.endswith("wqkv") \
            else [len(p) // len(names)] * len(names)
        for name, part in zip(names, p.detach().split(sizes), strict=True):
            name = f"model.{layer}{name}" if layer else name
            tensors[f"{name}_scale" if leaf == "scale" else name] = part.contiguous()
    quantization = model.config.quantization
    said = {"quant_method": "readonce", "mode": quantization.mode, "groupsize": quantization.group}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(document | {"quantization_config": said}))
    shutil.copy(tokenizer, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
