"""int4 and int8 of other tools, where they say what ours say: a scale for each group of adjacent columns, or in int8
for each row.

    GPTQ (AutoGPTQ, GPTQModel)             qweight int32 [in / 8, out], scales [in / g, out], qzeros int32 [in / g,
                                           out / 8], g_idx
    AWQ (AutoAWQ)                          qweight int32 [in, out / 8], scales and qzeros as GPTQ
    compressed-tensors (llm-compressor)    weight_packed int32 [out, in / 8], weight_scale [out, in / g], weight_shape,
                                           weight_zero_point int32 [out / 8, in / g]
                                           or weight int8 [out, in], weight_scale [out, 1]
    MLX (mlx-lm)                           weight uint32 [out, in / 8], scales and biases [out, in / g]; embedding and
                                           head too; of all experts together in switch_mlp

Eight numbers lie in an int32, the first in its lowest bits: taken as bytes, that is our format (ops/formats.py),
turned or not; AWQ's lie across it, in an order of their own. So the numbers are the same; scales become float16. Where
zero points z are not all 8, (n - z) * scale is our (n - 8) * scale and a shift of (8 - z) * scale; so is MLX's
n * scale + bias, with a shift of 8 * scale + bias. The layouts are those of github.com/ModelCloud/GPTQModel,
casper-hansen/AutoAWQ, vllm-project/compressed-tensors and ml-explore/mlx-lm.

Floats of 8 bits (E4M3 of the OCP 8-bit Floating Point Specification 1.0, 2023) are made wide as they are read, and may
then be rounded like any others: by DeepSeek's and Qwen's tools, FBGEMM, ModelOpt and llm-compressor. Whoever made them,
beside a matrix stands what its numbers are to be multiplied by: `_scale_inv` or `_scale`, one for all, for each row or
for each block.
"""
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import Quantization
from errors import UserError

LAYOUTS = {"qweight": ("weight", "turned bits"), "scales": ("weight_scale", "turned"),
           "weight_packed": ("weight", "bits")}  # by the end of a name: our end, and how it lies there
ZEROS = (".qzeros", ".weight_zero_point", ".biases")  # where they are not all 8 they become shifts
ASIDE = (*ZEROS, ".g_idx", ".weight_shape")  # say else only what `verify` looks at, or what shapes say
EIGHTS = {"gptq": 0x77}  # two zero points of 8 in a byte, elsewhere 0x88; the first format keeps one less
ACROSS = [0, 4, 1, 5, 2, 6, 3, 7]  # AWQ: where in an int32 the numbers of eight rows are
SWITCHED = re.compile(r"(.*\.)(mlp|block_sparse_moe)\.switch_mlp\.(gate|up|down)_proj\.(\w+)")  # of MLX
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
ROUTER = re.compile(r".*\.(mlp|block_sparse_moe)\.gate")
FLOAT8 = "F8_E4M3"
FLOAT8_TOOLS: dict[str, dict[str, tuple]] = {  # quant_method -> what else must be so
    "fp8": dict(fmt=(None, "e4m3"), scale_fmt=(None, "float"), expert_dtype=(None, "fp8")), "fbgemm_fp8": {},
    "modelopt": dict(quant_algo=("FP8",))}
FLOAT8_SCALES = ("_scale_inv", "_scale")  # behind the name of a matrix
FLOAT8_ASIDE = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")  # of what is computed with, not of weights
INSTEAD = "take another, or the checkpoint before quantization with --quantize"


# -- what a config.json says ------------------------------------------------------------------------------------------

def quantization_of(found: dict[str, Any]) -> Quantization | None:
    """Of another tool's quantization_config; None where all is made wide. UserError that names what ours cannot say."""
    tool = found.get("quant_method")
    if isinstance(tool, str) and tool in FLOAT8_TOOLS:
        require(found, tool, **FLOAT8_TOOLS[tool])
        return None
    if tool == "gptq":
        require(found, tool, bits=(4,), sym=(True, False), group_size=Quantization.GROUPS, lm_head=(None, False),
                checkpoint_format=(None, "gptq", "gptq_v2"), dynamic=(None, {}))
        return Quantization("int4", found["group_size"], found.get("checkpoint_format") or tool, not found["sym"])
    if tool == "awq":
        require(found, tool, bits=(4,), zero_point=(True,), group_size=Quantization.GROUPS,
                version=(None, "gemm", "GEMM"))
        return Quantization("int4", found["group_size"], tool, shifted=True)
    if tool == "mlx":
        return quantization_of_mlx(found, tool)
    if tool != "compressed-tensors":
        raise UserError(f"config.json has a quantization_config of {tool!r}; supported: readonce, int4 of gptq, "
                        f"awq and mlx, that, int8 and FP8 of compressed-tensors, and FP8 of {', '.join(FLOAT8_TOOLS)}; "
                        f"{INSTEAD}")
    groups = found.get("config_groups")
    group, *more = groups.values() if isinstance(groups, dict) and groups else [None]
    if more or not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        raise UserError(f"config.json has config_groups={str(groups)[:99]} of {tool}; supported: one group, of "
                        f"weights; {INSTEAD}")
    require(found, tool, format=("pack-quantized", "int-quantized", "float-quantized"), sparsity_config=(None, {}),
            transform_config=(None, {}))
    if found["format"] == "float-quantized":
        require(weights, tool, num_bits=(8,), type=("float",), symmetric=(None, True), dynamic=(None, False))
        return None
    int8 = found["format"] == "int-quantized"
    require(found, tool, kv_cache_scheme=(None,))
    require(group, tool, targets=(["Linear"],), format=(None, found["format"]), output_activations=(None,))
    require(weights, tool, num_bits=(8 if int8 else 4,), type=("int",), symmetric=(True,) if int8 else (True, False),
            dynamic=(None, False), strategy=("channel" if int8 else "group",), actorder=(None, "weight", "static"))
    if int8:  # whatever it says of activations: those are rounded, or not, as the device's kernels have it
        return Quantization("int8", tool=tool)
    require(group, tool, input_activations=(None,))
    require(weights, tool, group_size=Quantization.GROUPS)
    return Quantization("int4", weights["group_size"], tool, not weights["symmetric"])


def quantization_of_mlx(found: dict[str, Any], tool: str) -> Quantization:
    """One width and group size for all; routers, which are made wide, may have others."""
    require(found, tool, bits=(4,), group_size=Quantization.GROUPS, mode=(None, "affine"))
    for path, own in found.items():
        if not isinstance(own, dict | bool) or own is True:
            continue
        if own is False or not ROUTER.fullmatch(path):
            own = own or {}
            require({f"{key} of {path}": own.get(key) for key in ("bits", "group_size")}, tool,
                    **{f"{key} of {path}": (found[key],) for key in ("bits", "group_size")})
        require(own, tool, mode=(None, "affine"))
    return Quantization("int4-pure", found["group_size"], tool, shifted=True)


def require(found: dict[str, Any], tool: str, **allowed: tuple) -> None:
    for key, values in allowed.items():
        have = found.get(key)
        if not any(have == value and type(have) is type(value) for value in values):  # 32.0 is no size
            said = " or ".join(repr(value) for value in values if value is not None)
            raise UserError(f"config.json has {key}={have!r} in its quantization_config of {tool}; supported: {said}; "
                            f"{INSTEAD}")


# -- what the files hold ----------------------------------------------------------------------------------------------

class Slice(NamedTuple):
    """The e-th of a tensor's leading dimension, to be cut like a tensor of a file."""
    whole: Any
    e: int

    def __getitem__(self, where: Any) -> Tensor:
        return self.whole[(self.e, *where)]

    def get_shape(self) -> list[int]:
        return self.whole.get_shape()[1:]


def apart(name: str, shape: tuple[int, ...], tool: str) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """A tensor, or those of each expert that it holds: (name, shape, which of the leading dimension)."""
    if tool != "mlx" or not (found := SWITCHED.fullmatch(name)):
        yield name, shape, None
        return
    before, kind, part, end = found.groups()
    part = f"{part}_proj" if kind == "mlp" else MIXTRAL[part]
    for e in range(shape[0] if shape else 0):
        yield f"{before}{kind}.experts.{e}.{part}.{end}", shape[1:], e


def renamed(name: str, shape: tuple[int, ...], dtype: str, tool: str = "") -> tuple[str, tuple[int, ...], str, str]:
    """A tensor of a file as ours: its name, shape and dtype, and how it lies there; "": as we have it."""
    owner, _, end = name.rpartition(".")
    if tool == "mlx":
        if dtype == "U32" and end == "weight" and len(shape) == 2:
            return name, (shape[0], shape[1] * 4), "U8", "bits"
        return f"{owner}.weight_scale" if end == "scales" else name, shape, dtype, ""
    if end not in LAYOUTS or len(shape) != 2:
        return name, shape, dtype, ""
    end, layout = LAYOUTS[end]
    rows, columns = shape[::-1] if "turned" in layout else shape
    bits = "bits" in layout
    if tool == "awq" and bits:
        rows, columns, layout = rows * 8, columns // 8, "bits across"
    dtype = "U8" if bits and dtype == "I32" else dtype
    return f"{owner}.{end}", (rows, columns * 4 if bits else columns), dtype, layout  # bits: bytes


def read(part: Any, layout: str, rows: slice = slice(None), columns: slice | int = slice(None)) -> Tensor:
    """Rows and columns of what a safetensors slice holds, as ours [rows, columns]."""
    if layout == "bits across":
        return read_across(part, rows, columns)
    if "bits" in layout and columns != slice(None):
        assert columns.start % 4 == columns.stop % 4 == 0
        columns = slice(columns.start // 4, columns.stop // 4)
    found = part[columns, rows].T if "turned" in layout else part[rows, columns]
    return found.contiguous().view(torch.uint8) if "bits" in layout else found


def read_across(part: Any, rows: slice, columns: slice) -> Tensor:
    """The same of AWQ's int32 [in, out / 8] -> bytes [rows, in / 2]; of the int32s at both ends rows may be left."""
    inputs, words = part.get_shape()
    first, last, _ = rows.indices(words * 8)
    start, stop, _ = columns.indices(inputs // 2)
    found = part[2 * start:2 * stop, first // 8:-(-last // 8)].contiguous()
    found = found.view(torch.uint8).unflatten(1, (-1, 4))  # [in, n, 4]
    taken = torch.empty(found.shape[1], 8, stop - start, dtype=torch.uint8)
    for row, place in enumerate(ACROSS):  # one by one: as whole numbers all would take eight times the memory
        numbers = found[..., place // 2] >> 4 * (place % 2) & 15
        taken[:, row] = (numbers[0::2] | numbers[1::2] << 4).T
    return taken.flatten(0, 1)[first % 8:first % 8 + last - first]


def eight(words: Tensor) -> Tensor:
    """The numbers 0 .. 15 in each int32 [...], from its lowest bits on: int32 [..., 8]."""
    return words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15


def shape_of_zeros(shape: tuple[int, ...], tool: str) -> tuple[int, ...]:
    """[out, in / g] of zero points, or MLX's biases, as a tool keeps them."""
    if len(shape) != 2 or tool == "mlx":
        return shape
    return (shape[0] * 8, shape[1]) if tool == "compressed-tensors" else (shape[1] * 8, shape[0])


def shifts(zeros: Tensor, scale: Tensor, tool: str) -> Tensor:
    """A tool's zero points or biases, and scales [out, in / g] -> float32 [out, in / g]."""
    if tool == "mlx":
        return zeros.float() + 8 * scale.float()
    if tool == "gptq":
        zeros = zeros + 0x11111111
    numbers = eight(zeros)
    if tool == "compressed-tensors":
        numbers = numbers.transpose(1, 2).flatten(0, 1)
    else:
        numbers = (numbers[..., ACROSS] if tool == "awq" else numbers).flatten(1).T
    return (8 - numbers) * scale.float()


def wide(words: Tensor, scale: Tensor, shift: Tensor, inputs: int) -> Tensor:
    """uint32 [out, n] with numbers of 4 or 8 bits, and scales and shifts [out, in / g] -> float32 [out, in]."""
    bits = 32 * words.shape[1] // inputs
    numbers = words.view(torch.int32)[..., None] >> torch.arange(0, 32, bits, dtype=torch.int32) & (1 << bits) - 1
    groups = numbers.view(len(words), scale.shape[1], -1)
    return ((groups - 8) * scale.float()[..., None] + shift[..., None]).flatten(1)


def blocks(scale: tuple[int, ...], shape: tuple[int, ...]) -> list[int] | None:
    """How many rows and columns of a matrix [..., out, in] have one number of its scale; None: no scale of it."""
    scale = (1,) * (len(shape) - len(scale)) + scale if math.prod(scale) == 1 else scale
    if len(scale) == 1:
        scale = (*scale, 1)  # one for each row
    if len(scale) != len(shape) or scale[:-2] not in (shape[:-2], (1,) * (len(shape) - 2)) or 0 in scale:
        return None
    pairs = list(zip(scale[-2:], shape[-2:], strict=True))
    sizes = [n if count == 1 else 1 if count == n else 128 for count, n in pairs]
    return sizes if all(-(-n // size) == count for (count, n), size in zip(pairs, sizes, strict=True)) else None


def widen(numbers: Tensor, scale: Tensor, shape: tuple[int, ...], where: tuple[int | slice, ...] = ()) -> Tensor:
    """Floats of 8 bits, which were read at `where` of a matrix of a shape [..., out, in] -> what they mean, float32."""
    sizes, scale = blocks(tuple(scale.shape), shape), scale.float()
    scale = scale.view((1,) * len(shape)) if scale.numel() == 1 else scale[:, None] if scale.dim() == 1 else scale
    where = (*where, *[slice(None)] * (len(shape) - len(where)))
    leading = zip(where[:-2], scale.shape, strict=False)
    scale = scale[tuple(at if n > 1 else 0 if isinstance(at, int) else slice(None) for at, n in leading)]
    rows, columns = (torch.arange(n)[at] // size for at, n, size in zip(where[-2:], shape[-2:], sizes, strict=True))
    return numbers.float() * scale[..., rows, :][..., columns]


def verify(name: str, numbers: Tensor, quantization: Quantization) -> None:
    """UserError if a tensor of those `ASIDE` says that the numbers are not what ours would mean."""
    problem, numbers = "", numbers.flatten()
    eights = EIGHTS.get(quantization.tool, 0x88)
    if name.endswith(".biases"):
        problem = "is of MLX, which the config.json does not name"
    elif name.endswith(ZEROS) and (numbers.view(torch.uint8) != eights).any():
        problem = "has zero points that are not 8"
    if name.endswith(".g_idx") and (numbers != torch.arange(len(numbers)) // quantization.group).any():
        problem = "has groups of columns that are not adjacent (desc_act)"
    if problem:
        raise UserError(f"{name} {problem}, which is not supported; {INSTEAD}")
