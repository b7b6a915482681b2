"""Weights from a Hugging Face folder, checked and read straight into the fused layout of model.py.

Nothing is converted or written: names are translated, q/k/v and gate/up are joined, dtypes are widened or narrowed on
the way in, and numbers rounded if the model is quantized and the folder is not. Every name, shape and dtype is checked
against the headers before the first byte of a weight is read.
"""
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import device as machine
from checkpoint import QUANTIZED, Checkpoint, Part, Stored, is_column, matrix
from config import Quantization
from errors import UserError
from foreign import INSTEAD, ZEROS, verify

ENDS = ("tok_embeddings.scale", "output.scale", "per_layer.table.scale")  # of what other tools leave as it was
TABLE = "per_layer.table.weight"  # has a row for each token and layer; in files those of a token are one
PACKED = ("weight", "scale", "shift")  # what becomes one where a device has a layout of its own
UNUSED = ("k_proj", "v_proj", "k_norm", "v_norm")  # files have them, of layers that borrow

# -- what is read from where ------------------------------------------------------------------------------------------

def plan(model: nn.Module, checkpoint: Checkpoint, rounded: bool = False) -> dict[str, list[str]]:
    """Parameter -> the tensors it is read from. Missing, extra or wrongly shaped tensors are errors that name them.

    `rounded`: the model is quantized and the file is not; a scale is then read from nothing. So are those of embedding
    and head where another tool made the file.
    """
    experts = model.config.experts.n_experts if model.config.experts else 0
    quantization = model.config.quantization
    others = quantization is not None and quantization.tool != "readonce"
    left = ENDS if others and quantization.mode != "int4-pure" else ()
    parameters = {name: p for name, p in model.named_parameters()
                  if not (name.endswith(".scale") and (rounded or name in left))}
    found = {name: checkpoint.sources(name, experts) for name in parameters}
    expected = {name: parameters[parameter] for parameter, names in found.items() for name in names}
    borrowers = range(model.lenders, len(model.layers))
    unused = tuple(f"model.layers.{i}.self_attn.{part}." for i in borrowers for part in UNUSED)
    for held in (checkpoint.tensors, checkpoint.aside):
        for name in [name for name in held if name.startswith(unused)]:
            del held[name]
    if others:
        look_at_foreign(checkpoint, expected, quantization)
    repeated = {f"lm_head.weight{end}" for end in ("", "_scale", "_shift")}  # some exports repeat the embedding
    tied = repeated if model.config.tie_embeddings else set()
    extra = sorted(stored.name for name, stored in checkpoint.tensors.items() if name not in {*expected, *tied})
    extra += sorted(stored.name for stored in checkpoint.aside.values()) if not others else []
    missing = sorted(expected.keys() - checkpoint.tensors.keys())
    for problem, names in (("lacks", missing), ("has unknown", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            cause = "the weights do not belong to this config.json"
            if all(name.startswith("mtp.") for name in names):
                cause = ("its multi-token-prediction head cannot be used: get a checkpoint that has it whole, or go "
                         "without (mtp_num_hidden_layers 0 in config.json)")
            elif others and all(name.endswith("_scale") for name in names):
                cause = f"but for embedding and head all matrices must be quantized; {INSTEAD}"
            raise UserError(f"{checkpoint.folder} {problem} tensors {', '.join(names[:3])}{more}; {cause}")
    for parameter, p in parameters.items():
        parts = [checkpoint.tensors[name] for name in found[parameter]]
        if not p.is_floating_point() and f"{parameter.removesuffix('weight')}scale" not in parameters:
            p = torch.empty(model.get_submodule(parameter.rpartition(".")[0]).shape, device="meta")
        if parameter == TABLE and p.is_floating_point():
            p = p.view(model.config.vocab_size, -1)
        check(checkpoint.folder, parts, p, is_column(parameter, p), turned(model, checkpoint, parameter))
    return found


def look_at_foreign(checkpoint: Checkpoint, expected: dict[str, torch.Tensor], quantization: Quantization) -> None:
    """Check what another tool says of its numbers, and make shifts of it. Forget biases of zeros, which old GPTQ files
    have everywhere, and make wide what is `expected` to be, as MLX rounds routers too."""
    for name, stored in checkpoint.aside.items():
        if quantization.shifted and name.endswith(ZEROS):
            checkpoint.shift(name, stored)
        else:
            verify(name, checkpoint.whole(name), quantization)
    for name in [name for name in checkpoint.tensors.keys() - expected.keys() if name.endswith(".bias")]:
        if not checkpoint.whole(name).any():
            del checkpoint.tensors[name]
    for name, p in expected.items() if quantization.tool == "mlx" else ():
        if p.is_floating_point() and name in checkpoint.tensors and checkpoint.tensors[name].layout == "bits":
            checkpoint.widen(name, p.shape[-1])


def check(folder: Path, parts: list[Stored], p: torch.Tensor, column: bool, is_turned: bool) -> None:
    """That tensors of a file have together the shape of a parameter, and numbers of its kind."""
    if is_turned:
        return check_turned(parts, p)
    rows, width = matrix(tuple(p.shape), column)
    shapes = [matrix(part.shape, column) for part in parts]
    named = " + ".join(part.name for part in parts[:3]) + (f" (and {len(parts) - 3} more)" if len(parts) > 3 else "")
    if any(w != width for _, w in shapes) or sum(r for r, _ in shapes) != rows:
        raise UserError(f"{folder}: {named} has shape {' + '.join(str(list(part.shape)) for part in parts[:3])}; "
                        f"config.json wants {list(p.shape)} in all")
    kinds = {part.dtype for part in parts}
    if {QUANTIZED.get(kind) for kind in kinds} != {None if p.is_floating_point() else p.dtype}:
        raise UserError(f"{folder}: {named} has dtype {', '.join(sorted(kinds))}, not what config.json says of its "
                        f"quantization")


# -- gpt-oss ----------------------------------------------------------------------------------------------------------

def turned(model: nn.Module, checkpoint: Checkpoint, parameter: str) -> bool:
    """Whether the file holds the experts as gpt-oss has them: [in, out] or packed, rows of gate and up taking turns."""
    if not (model.config.experts and model.config.experts.bias and re.search(r"\.w(13|2)\.", parameter)):
        return False
    name = checkpoint.sources(parameter, model.config.experts.n_experts)[0]
    return parameter.endswith("bias") or (f"{name}_scale" not in checkpoint.tensors and not name.endswith("_scale"))


def check_turned(parts: list[Stored], p: torch.Tensor) -> None:
    E, *rest = p.shape
    packed = (E, rest[0], rest[-1] // 32)
    wanted = [(E, *reversed(rest))] if len(parts) == 1 else [(*packed, 16), packed]
    for part, shape in zip(parts, wanted, strict=False):  # experts one by one are too many, and fail at the first
        if part.shape != shape:
            raise UserError(f"{part.path}: {part.name} has shape {list(part.shape)}; config.json wants {list(shape)}")
        if (part.dtype == "U8") != (len(parts) == 2) or part.dtype == "I8":
            raise UserError(f"{part.path}: {part.name} has dtype {part.dtype}, not what config.json says of its "
                            f"quantization")


def read_turned(checkpoint: Checkpoint, names: list[str], wanted: Part = Part()) -> Iterator[torch.Tensor]:
    """An expert at a time, [out, in] or [out]; rows of gate and up, where they are, in two halves."""
    _, *shape = checkpoint.tensors[names[0]].shape
    columns = wanted.columns_of(shape[1] * 32 if len(names) == 2 else shape[0])
    blocks = slice(columns.start // 32, -(-columns.stop // 32))  # of 32 columns, which a part need not end with

    def inner(name: str) -> tuple[slice, ...]:
        first = wanted.rows[0] if wanted.rows else None  # of gate; those of up stand between them
        rows = slice(2 * first.start, 2 * first.stop) if first else slice(None)
        if len(shape) == 1:  # [out]
            return (rows,)
        if len(names) == 2:  # [out, in / 32, ...]
            return rows, blocks
        return columns, rows  # [in, out]

    for e in range(checkpoint.tensors[names[0]].shape[0]):
        parts = [checkpoint.part(name, e, *inner(name)) for name in names]
        if len(parts) == 2:
            part = widen_mxfp4(*parts)[:, columns.start - 32 * blocks.start:columns.stop - 32 * blocks.start]
        else:
            part = parts[0].mT if parts[0].dim() == 2 else parts[0]
        yield torch.cat([part[0::2], part[1::2]]) if "gate_up_proj" in names[0] else part


def widen_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks uint8 [rows, n / 32, 16], scales uint8 [rows, n / 32] -> float32 [rows, n].

    E2M1 numbers, the low half of each byte first, times 2 ** (scale - 127) (OCP Microscaling Formats 1.0, 2023).
    """
    half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([half, -half])
    pairs = torch.stack([numbers[(blocks & 15).long()], numbers[(blocks >> 4).long()]], -1)  # [rows, n / 32, 16, 2]
    return torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - 127).flatten(-2)


# -- Qwen3-Next -------------------------------------------------------------------------------------------------------

def by_kind(model: nn.Module, names: list[str], wanted: Part) -> Part:
    """Where a file has the rows of linear attention key head by key head: the same part, queries of all heads first,
    then keys and so on, as they are here. A part holds whole heads."""
    joined = next((kind for kind in ("qkvz", "ba") if f".in_proj_{kind}." in names[0]), None)
    if joined is None:
        return wanted
    mixer = (model.cut if hasattr(model, "cut") else model).config.mixers["linear"]
    values = mixer.n_v_heads // mixer.n_k_heads  # of a key head
    heights = {"qkvz": [mixer.k_dim] * 2 + [values * mixer.v_dim] * 2, "ba": [values] * 2}[joined]
    rows, here = [], 0
    for start, height in zip(itertools.accumulate(heights, initial=0), heights, strict=False):
        for head in range(mixer.n_k_heads):
            if wanted.rows is None or any(part.start <= here < part.stop for part in wanted.rows):
                rows.append(slice(first := head * sum(heights) + start, first + height))
            here += height
    return wanted._replace(rows=rows)


# -- into the model ---------------------------------------------------------------------------------------------------

def materialize(model: nn.Module, device: torch.device, dtype: torch.dtype,
                pack: bool = False) -> Iterator[tuple[str, nn.Module, dict[str, torch.Tensor]]]:
    """Replace meta parameters by memory on `device`, the few of one module at a time, and hand them out to be filled:
    (name, module, its tensors by name). With `pack`, what was filled gets the device's layout.

    Vectors are float32 whatever the dtype: norms, biases and decays, which are computed with as such and weigh nothing.
    """
    bench = Bench(model) if pack else None
    seen: set[int] = set()  # a tied head is filled with the embedding
    for name, module in list(model.named_modules()):
        own = {leaf: p for leaf, p in module.named_parameters(recurse=False) if id(p) not in seen}
        seen |= {id(p) for p in own.values()}
        if not own:
            continue
        packs = pack and "scale" in own and module.multiplies
        tensors = {leaf: machine.empty(tuple(p.shape), kept_dtype(leaf, p, dtype), device) for leaf, p in own.items()
                   if not (packs and leaf in PACKED)}
        if packs:
            tensors |= bench.lay({leaf: p for leaf, p in own.items() if leaf in PACKED})
        yield name, module, tensors
        for leaf, tensor in tensors.items():
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
        if packs:
            module.pack()
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))


class Bench:
    """Memory for one quantized matrix at a time, on its way to a packed layout: fresh pages would cost more than it."""

    def __init__(self, model: nn.Module) -> None:
        sizes = [sum(p.nbytes + 64 for p in m.parameters()) for m in model.modules()
                 if getattr(m, "scale", None) is not None and m.multiplies]
        self.memory = torch.empty(max(sizes, default=0), dtype=torch.uint8)

    def lay(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found, start = {}, 0
        for leaf, p in own.items():
            dtype = torch.float16 if leaf == "shift" else p.dtype
            found[leaf] = self.memory[start:start + p.numel() * dtype.itemsize].view(dtype).view(p.shape)
            start += -(-found[leaf].nbytes // 64) * 64
        return found


def kept_dtype(leaf: str, p: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    if leaf == "scale" or not p.is_floating_point():
        return p.dtype
    return torch.float32 if p.dim() == 1 else dtype


def needed_memory(model: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() * kept_dtype(name.rpartition(".")[2], p, dtype).itemsize
               for name, p in model.named_parameters())


def load_weights(model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype, rounded: bool = False,
                 pack: bool = False, whole: nn.Module | None = None) -> None:
    """Fill a model built on the meta device. Peak memory: the weights plus one tensor of the file.

    `rounded`: the model is quantized and the folder is not, so its numbers are rounded on the way in. `pack`: quantized
    matrices get the device's layout. `whole`: the model, on the meta device, that this one is a rank's share of; only
    that share is read.
    """
    quantization = model.config.quantization
    checkpoint = Checkpoint(folder, model.config.mtp, quantization.tool if quantization else "")
    found = plan(whole or model, checkpoint, rounded)
    machine.require_memory(needed_memory(model, dtype), device)
    load_module(model, "", checkpoint, found, device, dtype, pack)
    model.settle(dtype)


def load_module(model: nn.Module, prefix: str, checkpoint: Checkpoint, found: dict[str, list[str]],
                device: torch.device, dtype: torch.dtype, pack: bool = False) -> None:
    """Fill the part of a model under `prefix` ("" or "layers.3.") as `plan` found it."""
    part = model.get_submodule(prefix.removesuffix("."))
    rounds = any(name.endswith(".scale") and f"{prefix}{name}" not in found for name, _ in part.named_parameters())
    for name, module, tensors in tqdm(materialize(part, device, dtype, pack), desc="quantize", unit=" modules",
                                      leave=False, disable=None if rounds else True):  # None: if stderr is no terminal
        for leaf, tensor in tensors.items():
            parameter = f"{prefix}{name}.{leaf}" if name else f"{prefix}{leaf}"
            if leaf == "weight" and "scale" in tensors and f"{parameter.removesuffix('weight')}scale" not in found:
                wanted = part_of(model, parameter)
                if wanted.columns and not module.group:  # int8 has one scale to a row, whoever holds which part of it
                    read, columns = Part(wanted.rows), wanted.columns_of(module.shape[-1] * wanted.columns[1])
                else:
                    read, columns = wanted, slice(None)
                fill_rounded(parameter, module, tensors, blocks(model, checkpoint, found, parameter, read), device,
                             columns)
            elif parameter in found:
                fill(model, checkpoint, found, parameter, tensor)
    checkpoint.held = None


def fill(model: nn.Module, checkpoint: Checkpoint, found: dict[str, list[str]], parameter: str,
         target: torch.Tensor) -> None:
    """Read one parameter, or this rank's part, as it is, tensor by tensor of the file."""
    wanted = by_kind(model, found[parameter], part_of(model, parameter))
    if wanted.absent:
        target.zero_()
        return
    if turned(model, checkpoint, parameter):
        for part, expert in zip(read_turned(checkpoint, found[parameter], wanted), target, strict=True):
            expert.copy_(part)
        return
    column = is_column(parameter, target)
    row, matrices = 0, target.shape[0] if target.dim() == (2 if column else 3) else 1
    target = target.view(matrix(tuple(target.shape), column))
    if wanted != Part():
        for block in checkpoint.parts(found[parameter], matrices, wanted, column):
            target[row:(row := row + len(block))].copy_(block)
        target[row:].zero_()  # of the vocabulary's last part
        return
    for name in found[parameter]:
        rows = math.prod(checkpoint.tensors[name].shape) // target.shape[1]
        checkpoint.copy(name, target[row:row + rows])
        row += rows


def part_of(model: nn.Module, parameter: str) -> Part:
    """What of it is wanted: all, or this rank's part."""
    return model.cut.part(parameter) if hasattr(model, "cut") else Part()


def blocks(model: nn.Module, checkpoint: Checkpoint, found: dict[str, list[str]], parameter: str,
           wanted: Part = Part()) -> Iterator[torch.Tensor]:
    """A matrix, or several on top of each other, in blocks of rows [r, inputs] as the file has them."""
    if turned(model, checkpoint, parameter):
        yield from read_turned(checkpoint, found[parameter], wanted)
        return
    wanted = by_kind(model, found[parameter], wanted)
    if wanted != Part():
        shape = model.get_submodule(parameter.removesuffix(".weight")).shape
        yield from checkpoint.parts(found[parameter], shape[0] if len(shape) == 3 else 1, wanted)
        return
    for name in found[parameter]:
        for block in checkpoint.rows(name):
            yield block.view(-1, model.config.per_layer_dim) if parameter == TABLE else block


def fill_rounded(parameter: str, module: nn.Module, tensors: dict[str, torch.Tensor], rows: Iterator[torch.Tensor],
                 device: torch.device, columns: slice = slice(None)) -> None:
    """Round rows as they come into the weight and the scale of a quantized matrix, of which only some columns are kept.
    UserError if they cannot be rounded."""
    weight = tensors["weight"].flatten(0, -2)
    scale = tensors["scale"].view(len(weight), *([-1] if module.group else []))
    start = 0
    for block in rows:
        part = slice(start, start := start + len(block))
        numbers, scales = module.round(block.to(device))
        weight[part].copy_(numbers[:, columns])
        scale[part].copy_(scales)
    weight[start:].zero_(), scale[start:].zero_()  # of the vocabulary's last part
    require_finite(parameter, scale)


def require_finite(what: str, numbers: torch.Tensor) -> None:
    """`numbers`: the scales of a matrix, say, which show what its numbers are."""
    if not numbers.isfinite().all():
        raise UserError(f"{what} holds numbers that are NaN, infinite or too large to be quantized; get the checkpoint "
                        f"again")


def random_weights(model: nn.Module, device: torch.device, dtype: torch.dtype, seed: int = 0,
                   pack: bool = False) -> None:
    """Fill a model built on the meta device with reproducible weights that keep activations near unit size.

    Values repeat from one pool: drawing billions of numbers takes minutes, copying them seconds, and speed depends on
    neither (all-zero or denormal weights it would depend on).
    """
    machine.require_memory(needed_memory(model, dtype), device)
    normal = torch.randn((1 << 22) + 7, generator=torch.Generator().manual_seed(seed))
    pools = {dtype: normal.to(device, dtype), torch.int8: (normal * 40).round().clamp(-127, 127).to(device, torch.int8),
             torch.uint8: ((normal * 2.5).round().clamp(-8, 7) * 17 + 136).to(device, torch.uint8)}  # both halves alike
    unit, offset = {torch.int8: 1 / 40, torch.uint8: 1 / 2.5}, 0
    for _, module, tensors in materialize(model, device, dtype, pack):
        for leaf, tensor in tensors.items():
            size = getattr(module, "shape", tensor.shape)[-1] ** -0.5  # of a number, so that a row's sum is near 1
            if leaf == "scale":
                tensor.fill_(unit[tensors["weight"].dtype] * size)
            elif tensor.dim() == 1 or leaf == "shift":  # norms multiply by one, biases and shifts add nothing
                tensor.fill_(0.0 if "bias" in leaf or leaf == "shift" else 1.0 - getattr(module, "offset", 0.0))
            else:
                offset = repeat(pools[tensor.dtype], tensor.view(-1), offset)
                if tensor.is_floating_point():
                    tensor.mul_(size)
    model.settle(dtype)


def repeat(pool: torch.Tensor, flat: torch.Tensor, offset: int) -> int:
    """Fill `flat` from the pool, from `offset` on and each time from another place; where to go on."""
    for start in range(0, len(flat), len(pool)):
        part = flat[start:start + len(pool)]
        split = min(len(part), len(pool) - offset)
        part[:split] = pool[offset:offset + split]
        part[split:] = pool[:len(part) - split]
        offset = (offset + len(part) + 12345) % len(pool)
    return offset
