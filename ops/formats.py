"""The two formats of quantized weights, told apart by the dtype of the weight; on disk, and on a device that does not
lay them out anew.

  int8  weight int8 [..., out, in], scale float32 [..., out]:              w = weight * scale
  int4  weight uint8 [..., out, in / 2], scale float16 [..., out, in / g]: w = (nibble - 8) * scale, a scale for
        g = 32, 64 or 128 columns; of a byte, the low half is the even column, the high half the odd one. What other
        tools made may have a shift beside it, in the dtype of activations [..., out, in / g], to be added to that
"""
import torch
from torch import Tensor


def pack_int4(q: Tensor) -> Tensor:
    """Whole numbers -8 .. 7 [..., in] -> bytes [..., in / 2]."""
    nibbles = (q + 8).to(torch.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack_int4(weight: Tensor) -> Tensor:
    """Bytes [..., in / 2] -> int8 -8 .. 7 [..., in]."""
    return torch.stack([weight & 15, weight >> 4], -1).flatten(-2).to(torch.int8) - 8


def dequantize(weight: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Either format -> float32 [..., out, in]."""
    if weight.dtype == torch.int8:
        return weight * scale[..., None]
    groups = unpack_int4(weight).unflatten(-1, (scale.shape[-1], -1))
    wide = groups * scale.float()[..., None]
    return (wide if shift is None else wide + shift.float()[..., None]).flatten(-2)
