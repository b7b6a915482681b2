"""int4 and int8 of other tools, where they say what ours say: symmetric, with a scale for each group of adjacent
columns, or in int8 for each row.

    GPTQ (AutoGPTQ, GPTQModel)             qweight int32 [in / 8, out], scales [in / g, out], qzeros, g_idx
    compressed-tensors (llm-compressor)    weight_packed int32 [out, in / 8], weight_scale [out, in / g], weight_shape
                                           or weight int8 [out, in], weight_scale [out, 1]

Eight numbers lie in an int32, the first in its lowest bits: taken as bytes, that is our format (ops/formats.py),
turned or not. So nothing is computed, and the numbers are the same; scales become float16. The layouts are those of
github.com/ModelCloud/GPTQModel and github.com/vllm-project/compressed-tensors.

Floats of 8 bits (E4M3 of the OCP 8-bit Floating Point Specification 1.0, 2023) are made wide as they are read, and may
then be rounded like any others: by DeepSeek's and Qwen's tools, FBGEMM, ModelOpt and llm-compressor. Whoever made them,
beside a matrix stands what its numbers are to be multiplied by: `_scale_inv` or `_scale`, one for all, for each row or
for each block.
"""
import math
from typing import Any

import torch
from torch import Tensor

from config import Quantization
from errors import UserError

LAYOUTS = {"qweight": ("weight", "turned bits"), "scales": ("weight_scale", "turned"),
           "weight_packed": ("weight", "bits")}  # by the end of a name: our end, and how it lies there
ASIDE = (".qzeros", ".g_idx", ".weight_shape")  # say only what `verify` looks at, or what shapes say
ZEROS = {"gptq": 0x77, "gptq_v2": 0x88}  # two zero points of 8 in a byte; the first format keeps one less
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
        require(found, tool, bits=(4,), sym=(True,), group_size=Quantization.GROUPS, lm_head=(None, False),
                checkpoint_format=(None, *ZEROS), dynamic=(None, {}))
        return Quantization("int4", found["group_size"], found.get("checkpoint_format") or tool)
    if tool != "compressed-tensors":
        raise UserError(f"config.json has a quantization_config of {tool!r}; supported: readonce, symmetric int4 of "
                        f"gptq, that, int8 and FP8 of compressed-tensors, and FP8 of {', '.join(FLOAT8_TOOLS)}; "
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
    require(weights, tool, num_bits=(8 if int8 else 4,), type=("int",), symmetric=(True,), dynamic=(None, False),
            strategy=("channel" if int8 else "group",), actorder=(None, "weight", "static"))
    if int8:  # whatever it says of activations: those are rounded, or not, as the device's kernels have it
        return Quantization("int8", tool=tool)
    require(group, tool, input_activations=(None,))
    require(weights, tool, group_size=Quantization.GROUPS)
    return Quantization("int4", weights["group_size"], tool)


def require(found: dict[str, Any], tool: str, **allowed: tuple) -> None:
    for key, values in allowed.items():
        have = found.get(key)
        if not any(have == value and type(have) is type(value) for value in values):  # 32.0 is no size
            said = " or ".join(repr(value) for value in values if value is not None)
            raise UserError(f"config.json has {key}={have!r} in its quantization_config of {tool}; supported: {said}; "
                            f"{INSTEAD}")


# -- what the files hold ----------------------------------------------------------------------------------------------

def renamed(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], str]:
    """A tensor of a file as ours: its name, its shape and how it lies there; "": as we have it."""
    owner, _, end = name.rpartition(".")
    if end not in LAYOUTS or len(shape) != 2:
        return name, shape, ""
    end, layout = LAYOUTS[end]
    rows, columns = shape[::-1] if "turned" in layout else shape
    return f"{owner}.{end}", (rows, columns * 4 if "bits" in layout else columns), layout  # bits: bytes


def read(part: Any, layout: str, rows: slice = slice(None), columns: slice | int = slice(None)) -> Tensor:
    """Rows and columns of what a safetensors slice holds, as ours [rows, columns]."""
    if "bits" in layout and columns != slice(None):
        assert columns.start % 4 == columns.stop % 4 == 0
        columns = slice(columns.start // 4, columns.stop // 4)
    found = part[columns, rows].T if "turned" in layout else part[rows, columns]
    return found.contiguous().view(torch.uint8) if "bits" in layout else found


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
    if name.endswith(".qzeros") and (numbers.view(torch.uint8) != ZEROS[quantization.tool]).any():
        problem = "has zero points that are not 8"
    if name.endswith(".g_idx") and (numbers != torch.arange(len(numbers)) // quantization.group).any():
        problem = "has groups of columns that are not adjacent (desc_act)"
    if problem:
        raise UserError(f"{name} {problem}, which is not supported; {INSTEAD}")
