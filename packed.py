"""Packed weights as they lie in memory: a file beside the checkpoint, which the next start maps instead of loading.

Made only if asked for, as it is a second copy of the weights. It is a safetensors file in which large tensors begin at
multiples of 64 bytes, a line of the processor's cache; its name is another, as programs that read all safetensors of a
folder would take it for weights. It is made anew whenever the checkpoint or the layout has changed.
"""
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import ops

LINE = 64
DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def packed_file(model: nn.Module, folder: Path, dtype: torch.dtype) -> tuple[Path, str]:
    """The file for a model as it was built on the meta device, and what it must say that it was made of."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    facts += [repr(model.config), str(dtype), ops.packed_layout()]
    share = f"-{model.cut.rank + 1}-of-{model.cut.ranks}" if hasattr(model, "cut") else ""
    name = f"{model.config.quantization}-{dtype}{share}.packed".replace(" ", "-").replace("torch.", "")
    return folder / name, hashlib.sha256(repr(facts).encode()).hexdigest()


def map_packed(model: nn.Module, path: Path, made_of: str, dtype: torch.dtype) -> bool:
    """Let the parameters be what the file holds, without reading it; False, and nothing done, if it does not serve."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("made_of") != made_of:
                return False
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):  # not there, or cut short
        return False
    for name, module in model.named_modules():
        for leaf in [leaf for leaf, p in module.named_parameters(recurse=False) if p is not None]:
            if (parameter := f"{name}.{leaf}".removeprefix(".")) in found:
                setattr(module, leaf, nn.Parameter(found[parameter], requires_grad=False))
            elif leaf in ("scale", "shift"):  # which are part of a packed weight
                setattr(module, leaf, None)
                module.packed = True
    model.settle(dtype)
    return True


def save_packed(model: nn.Module, path: Path, made_of: str) -> None:
    """Write the parameters, whole or not at all; where that cannot be done a line says so."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}  # a tied head is one with the embedding
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(header(tensors, made_of))
            for name in order(tensors):
                file.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())
        temporary.replace(path)
    except OSError as e:
        print(f"note: {path} cannot be written ({e.strerror}); going on without", file=sys.stderr)
    finally:
        temporary.unlink(missing_ok=True)


def order(tensors: dict[str, Tensor]) -> list[str]:
    """Whole lines first, so that all of them begin with one: the format has no gaps."""
    return sorted(tensors, key=lambda name: (tensors[name].nbytes % LINE > 0, name))


def header(tensors: dict[str, Tensor], made_of: str) -> bytes:
    """A length and JSON, as github.com/huggingface/safetensors says, with blanks up to a whole line."""
    entries: dict = {"__metadata__": {"made_of": made_of}}
    end = 0
    for name in order(tensors):
        start, end = end, end + tensors[name].nbytes
        entries[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                         "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    return len(text).to_bytes(8, "little") + text
