"""Fewer bytes to read: int8 or int4 weights, in a folder of their own or while loading.

    python quantize.py --checkpoint_path DIR --mode int4 --output DIR
    python quantize.py --checkpoint_path DIR --mode int4 --output DIR --calibrate TEXT_FILE

The folder is a Hugging Face folder still: safetensors, the same config.json with a `quantization_config`, the
tokenizer. A quantized matrix keeps its name (gpt-oss's experts and Qwen3-Next's linear attention get a plainer one),
and beside it stands `<name>_scale`; ops/ says what the numbers mean.
A multi-token-prediction head goes along, rounded like the rest but never calibrated, as it only drafts.
Weights are read and written a matrix at a time. With --calibrate, int4 is rounded so that the outputs on such a text
change least.
`generate.py --quantize MODE` rounds while loading, to the same numbers as without --calibrate.
"""
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import device as machine
from calibration import Calibration, windows
from checkpoint import Checkpoint, resolve_checkpoint
from config import Quantization, read_json
from errors import Parser, UserError, run_command
from families import config_from_dict
from layers import Embedding, Matrix
from linear_attention import conv_width
from loader import blocks, fill_rounded, plan, turned
from model import Transformer
from tokenizer import load_tokenizer

# Small, and what they say decides much: routers, the gate of the shared expert, decays and rates of linear attention.
KEPT = re.compile(r".*\.(router|shared_gate|w_ba)")
SHARD = 500_000_000  # bytes of tensors to a file, kept in memory until it is written
COPIED = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*")

Numbers = tuple[Tensor, Tensor]  # the weight and the scale of a quantized matrix


# -- which matrices ---------------------------------------------------------------------------------------------------

def groups(model: Transformer, quantization: Quantization) -> dict[str, int]:
    """The matrices to be quantized, by name, and the group size of each (0: int8)."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Matrix) and not KEPT.fullmatch(name):
            end = isinstance(module, Embedding) or name == "output"
            int8 = quantization.mode == "int8" or (end and quantization.mode == "int4")
            found[name] = 0 if int8 else quantization.group
    if model.config.tie_embeddings:
        del found["output"]
    return found


def quantize_(model: Transformer, quantization: Quantization) -> None:
    """Make a model on the meta device a quantized one, to be loaded as such."""
    for name, group in groups(model, quantization).items():
        matrix = model.get_submodule(name)
        if group and matrix.shape[-1] % group:
            fitting = [str(g) for g in Quantization.GROUPS if not matrix.shape[-1] % g]
            raise UserError(f"{name} has {matrix.shape[-1]} columns, which groups of {group} do not divide; take "
                            f"{f'groups of {fitting[-1]}' if fitting else 'int8'}")
        matrix.quantize(group, quantization.shifted and group > 0)
    model.settle(model.dtype)


# -- folder to folder -------------------------------------------------------------------------------------------------

def pieces(shapes: dict[str, tuple[int, ...]], numbers: Numbers) -> Iterator[tuple[str, Tensor]]:
    """A quantized matrix cut into the tensors [..., out, in] of the file that it came from, each with its scale."""
    weight = numbers[0].flatten(0, -2)
    scale = numbers[1].reshape(len(weight), *([-1] if numbers[1].dtype == torch.float16 else []))
    start = 0
    for name, shape in shapes.items():
        part = slice(start, start := start + math.prod(shape[:-1]))
        yield name, weight[part].view(*shape[:-1], -1)
        yield f"{name}_scale", scale[part].view(*shape[:-1], *scale.shape[1:])


def tensors(model: Transformer, checkpoint: Checkpoint, found: dict[str, list[str]],
            layer: Callable[[int], Iterator[tuple[str, Tensor, Tensor]]] | None) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new folder by name. `layer` gives the calibrated matrices of a layer, if there are such."""
    calibrated: dict[str, Numbers] = {}
    asked = -1
    for parameter, names in found.items():
        owner, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(owner)
        if getattr(module, "scale", None) is None or leaf != "weight":
            for name in names:
                yield name, checkpoint.whole(name)
            continue
        index = re.match(r"layers\.(\d+)\.", parameter)
        if layer and index and asked < int(index[1]):
            asked = int(index[1])
            calibrated = {name: (weight, scale) for name, weight, scale in layer(asked)}
        if owner not in calibrated:
            both = {"weight": torch.empty_like(module.weight, device="cpu"),
                    "scale": torch.empty_like(module.scale, device="cpu")}
            fill_rounded(parameter, module, both, blocks(model, checkpoint, found, parameter), torch.device("cpu"))
            calibrated[owner] = both["weight"], both["scale"]
        shapes = {name: checkpoint.tensors[name].shape for name in names}
        if turned(model, checkpoint, parameter):
            shapes = {names[0].removesuffix("_blocks"): module.shape}
        if parameter == "per_layer.table.weight":  # a row for each token and layer, and so its scales
            shapes = {names[0]: module.shape}
        if names[0].endswith("in_proj_qkvz.weight"):  # in our order of rows, under the names that mean it
            mixer = model.config.mixers["linear"]
            shapes = {names[0].replace("qkvz", "qkv"): (conv_width(mixer), model.config.dim),
                      names[0].replace("qkvz", "z"): (mixer.n_v_heads * mixer.v_dim, model.config.dim)}
        yield from pieces(shapes, calibrated.pop(owner))


def write_shards(folder: Path, all_tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Files of up to SHARD bytes and the index over them; a single one if that is enough."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        shards.append(list(held))
        save_file({name: t.contiguous() for name, t in held.items()}, folder / str(len(shards)), {"format": "pt"})
        held.clear()

    for name, tensor in all_tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD:
            write()
        held[name] = tensor
        total += tensor.nbytes
    write()
    for i in range(len(shards)):  # safetensors lets only the owner read
        shutil.copymode(folder / "config.json", folder / str(i + 1))
    if len(shards) == 1:
        (folder / "1").rename(folder / "model.safetensors")
        return
    named = {name: f"model-{i:05}-of-{len(shards):05}.safetensors"
             for i, names in enumerate(shards, 1) for name in names}
    for i, names in enumerate(shards, 1):
        (folder / str(i)).rename(folder / named[names[0]])
    index = {"metadata": {"total_size": total}, "weight_map": named}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def quantize_folder(source: Path, output: Path, quantization: Quantization, text: str | None = None,
                    device: torch.device = torch.device("cpu")) -> None:
    """Write the quantized twin of a folder; what is not finished leaves nothing behind.

    Raises UserError for a folder that is quantized already, an output that exists, and a disk that is full.
    """
    output = output.resolve()
    check_output(source, output)
    document = read_json(source / "config.json")
    config = config_from_dict(document)
    if config.quantization:
        raise UserError(f"{source} is quantized already ({config.quantization}); give the folder it was made from")
    checkpoint = Checkpoint(source, config.mtp_layers == 1)
    config = replace(config, mtp=any(name.startswith("mtp.") for name in checkpoint.tensors))
    with torch.device("meta"):
        model, plain = Transformer(config).eval(), Transformer(config).eval()
    found = plan(plain, checkpoint)
    quantize_(model, quantization)
    layer = None
    if text is not None:
        tokens = windows(text, load_tokenizer(source), config.max_seq_len)
        sizes = {name: group for name, group in groups(plain, quantization).items() if group}
        layer = Calibration(plain, checkpoint, found, sizes, tokens, device, machine.DTYPES[config.dtype]).layer
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for path in {path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}:
            if path.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copy(path, partial)
        document["quantization_config"] = {"quant_method": "readonce", "mode": quantization.mode,
                                           "groupsize": quantization.group, "calibrated": text is not None}
        (partial / "config.json").write_text(json.dumps(document, indent=2) + "\n")
        progress = tqdm(tensors(model, checkpoint, found, layer), desc="quantize", unit=" tensors",
                        total=sum(len(names) for names in found.values()) + sum(
                            len(found[f"{name}.weight"]) for name in groups(plain, quantization)))
        write_shards(partial, progress)
        partial.rename(output)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{output} could not be written ({e}); nothing was left there") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(source: Path, output: Path) -> None:
    if output == source.resolve():
        raise UserError(f"--output is the checkpoint's own folder, {source}; give another one")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists; give a new folder, or remove it first")


# -- command line -----------------------------------------------------------------------------------------------------

def parser() -> Parser:
    p = Parser(prog="quantize.py", description="Write a checkpoint folder with int8 or int4 weights.")
    p.add_argument("--checkpoint_path", required=True, help="Hugging Face folder, or ORG/NAME on the hub")
    p.add_argument("--mode", required=True, help=f"{', '.join(Quantization.MODES)}; int4 but for embedding and head")
    p.add_argument("--output", required=True, type=Path, help="the folder to be written")
    p.add_argument("--groupsize", type=int, default=Quantization.group, help="of int4 (default %(default)s)")
    p.add_argument("--calibrate", metavar="TEXT_FILE", type=Path, help="round int4 by what the model does with a text")
    p.add_argument("--device", default="auto", help="where --calibrate computes: auto, cuda, cuda:N or cpu")
    return p


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    quantization = Quantization(args.mode, args.groupsize)
    for name in ("calibrate", "groupsize") if args.mode == "int8" else ():
        if getattr(args, name) != parser().get_default(name):
            raise UserError(f"--{name} is for int4; int8 needs none, leave it out")
    try:
        text = args.calibrate.read_text("utf-8") if args.calibrate else None
    except (OSError, ValueError) as e:
        raise UserError(f"--calibrate {args.calibrate} cannot be read as text ({e})") from None
    device = machine.choose_device(args.device)
    if device.type == "mps":  # has no Cholesky factorisation
        device = torch.device("cpu")
    quantize_folder(resolve_checkpoint(args.checkpoint_path), args.output, quantization, text, device)
    size = sum(path.stat().st_size for path in args.output.glob("*.safetensors"))
    print(f"{args.output}: {quantization}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
