"""How fast a card reads, multiplies, and runs our kernel for few rows, cut in every way that it allows.

    python -m scripts.tune_cuda                                        # the matrices of Llama-3.1-8B
    python -m scripts.tune_cuda --shape Qwen3.5-4B --rows 1,8 --output tune.jsonl

First the ceilings: bytes/s of plain reads, operations/s of matrix products. Then one layer's products in a row, 32
times, with each kernel begun when the one before has ended, and before (see ops/cuda_pdl.py). Last, for some matrices
of a layer, bf16, int8 and int4, the time of one product in a CUDA graph that walks over copies too many for any cache,
with each tile; `*` marks the one that is used, and what is faster shows how `ops/cuda_linear.tile` should choose.
"""
import functools
import importlib
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import device as machine
import ops
from errors import Parser, UserError, run_command
from families import config_of_shape
from layers import Linear
from model import Transformer
from scripts.rows import add_output, append, check, listed, origin

COLD = 1 << 28  # bytes of copies that are walked over: several times the L2 cache
GROUPS = {"none": None, "int8": 0, "int4": 32}


# -- what is timed ----------------------------------------------------------------------------------------------------

def matrices(shape: str) -> dict[str, tuple[int, int]]:
    """The different matrices [outputs, inputs] of a model's layers, and its head."""
    with torch.device("meta"):
        model = Transformer(config_of_shape(shape))
    return {name.rpartition(".")[2]: module.shape for name, module in reversed(list(model.named_modules()))
            if isinstance(module, Linear) and module.shape[0] >= 256}


def matrix(outputs: int, inputs: int, group: int | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """A matrix of random bytes, and its scales; group None: of random numbers, bfloat16, and none."""
    if group is None:
        return torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device), None
    if group:
        weight = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
        return weight, (torch.rand(outputs, inputs // group, device=device) / 99).half()
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
    return weight, torch.rand(outputs, device=device) / 999


def size_of(weight: Tensor, scale: Tensor | None) -> int:
    return weight.nbytes + (0 if scale is None else scale.nbytes)


def tiles(x: Tensor, weight: Tensor, scale: Tensor | None) -> Iterator:
    """The tile that is used, then all others that divide the matrix."""
    kernels = importlib.import_module("ops.cuda_linear")  # Triton's: on a machine with a GPU only
    used, group = kernels.tile_for(x, weight, scale), kernels.group_of(x, scale)
    yield used
    (outputs, length), rows = weight.shape, x.shape[1]
    for out, piece, step, warps in itertools.product((16, 32, 64), (32, 64, 128), (256, 512, 1024), (4, 8)):
        spans = piece * 2 // group if group else 1
        divides, held = outputs % out == 0 and length % step == 0, out * step * weight.itemsize // warps
        if spans and piece <= step and divides and held <= 1 << 12:
            M = max(1 << (rows - 1).bit_length(), -(-8 // spans))
            other = kernels.Tile(M, out, step // piece, piece, True, warps)
            if other != used and M * spans <= 32:
                yield other


def seconds(calls: list[Callable[[], object]], device: torch.device, repeats: int = 9) -> float:
    """Of all calls one after the other: the median over a CUDA graph's replays; elsewhere over plain runs."""
    def run() -> None:
        for call in calls:
            call()
    run()  # compiles
    if device.type == "cuda":
        machine.synchronize(device)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            run()
        run = graph.replay
    times = []
    for _ in range(repeats + 1):
        first = machine.mark(device)
        run()
        last = machine.mark(device)
        machine.synchronize(device)
        times.append(machine.seconds_between(first, last))
    return statistics.median(times[1:])


# -- the tables -------------------------------------------------------------------------------------------------------

def sweep(name: str, size: tuple[int, int], mode: str, rows: int, dtype: torch.dtype, device: torch.device,
          bandwidth: float) -> list[dict]:
    """One matrix with each tile, fastest first; a tile that cannot be compiled or does not fit is left out."""
    kernels = importlib.import_module("ops.cuda_linear")
    weight, scale = matrix(*size, GROUPS[mode], device)
    held = size_of(weight, scale)
    copies = [(weight.clone(), None if scale is None else scale.clone()) for _ in range(max(2, COLD // held))]
    x = torch.randn(1, rows, size[1], device=device, dtype=dtype)
    found = []
    for number, tile in enumerate(tiles(x, weight, scale)):
        try:
            took = seconds([functools.partial(kernels.multiply, x, *copy, None, tile) for copy in copies], device)
        except Exception as e:  # whatever Triton says of a tile, the others are still to be tried
            print(f"{name} {mode} {tuple(tile)}: {str(e).splitlines()[0][:100]}", file=sys.stderr)
            continue
        rate = held * len(copies) / took
        found.append({"kind": "tile", "matrix": name, "outputs": size[0], "inputs": size[1], "mode": mode, "rows": rows,
                      "tile": tile._asdict(), "used": number == 0, "us": took / len(copies) * 1e6,
                      "gb_s": rate / 1e9, "bandwidth_pct": 100 * rate / bandwidth})
    return sorted(found, key=lambda row: row["us"])


def chain(sizes: dict[str, tuple[int, int]], mode: str, dtype: torch.dtype, device: torch.device,
          bandwidth: float, layers: int = 32) -> Iterator[dict]:
    """The products of so many layers, each with weights of its own and with x of the same memory."""
    sizes = {name: size for name, size in sizes.items() if name != "output"}
    weights = [matrix(*size, GROUPS[mode], device) for _ in range(layers) for size in sizes.values()]
    inputs = {size[1]: torch.randn(1, size[1], device=device, dtype=dtype) for size in sizes.values()}
    held = sum(size_of(*both) for both in weights)
    widths = [size[1] for size in sizes.values()] * layers
    calls = [functools.partial(ops.linear, inputs[width], *weight)
             for width, weight in zip(widths, weights, strict=True)]
    for early in (False, True):
        os.environ["TORCHINDUCTOR_ENABLE_PDL"] = str(int(early))
        took = seconds(calls, device)
        yield {"kind": "chain", "mode": mode, "early": early, "kernels": len(calls), "us": took * 1e6,
               "gb_s": held / took / 1e9, "bandwidth_pct": 100 * held / took / bandwidth}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict:
    x = torch.randn(1, 4096, device=device, dtype=dtype)
    head = torch.randn(COLD // 4096 // 2, 4096, device=device, dtype=dtype)
    took = seconds([lambda: F.linear(x, head)], device)
    return {"kind": "ceilings", "bandwidth_gb_s": machine.measure_bandwidth(device) / 1e9,
            "matmul_tflops": machine.measure_matmul(device, dtype) / 1e12, "linear_gb_s": head.nbytes / took / 1e9}


def show(row: dict) -> str:
    if row["kind"] == "ceilings":
        return (f"reads {row['bandwidth_gb_s']:.0f} GB/s, products {row['matmul_tflops']:.0f} T operations/s, "
                f"a vector by F.linear {row['linear_gb_s']:.0f} GB/s")
    speed = f"{row['us']:9.2f} us {row['gb_s']:7.0f} GB/s {row['bandwidth_pct']:5.1f} %"
    if row["kind"] == "chain":
        return f"{row['mode']} {row['kernels']} in a row, {'begun early' if row['early'] else 'one by one':11} {speed}"
    return (f"{row['matrix']:8} {row['mode']} {row['outputs']:6} x {row['inputs']:5} rows {row['rows']:2} {speed} "
            f"{'*' if row['used'] else ' '} {' '.join(f'{k} {v}' for k, v in row['tile'].items() if k != 'EVEN')}")


# -- command line -----------------------------------------------------------------------------------------------------

def parser() -> Parser:
    p = Parser(prog="python -m scripts.tune_cuda", description=__doc__.splitlines()[0])
    p.add_argument("--shape", default="Llama-3.1-8B", help="whose matrices (default %(default)s)")
    p.add_argument("--rows", type=listed(int, least=1), default=[1], help="rows of x (default 1; commas)")
    p.add_argument("--matrices", type=listed(str), default=["w13", "wo"], help="by name, or all (default w13,wo)")
    p.add_argument("--quantize", type=listed(str), default=list(GROUPS),
                   help="none (bfloat16), int8 or int4 (default all; commas)")
    p.add_argument("--best", type=int, default=4, help="tiles shown for each matrix (default %(default)s)")
    add_output(p)
    return p


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    check(args)
    device = machine.choose_device()
    if device.type != "cuda":
        raise UserError(f"there is no CUDA device here, only {device}; this times the kernels of one")
    dtype, sizes = torch.bfloat16, matrices(args.shape)
    if unknown := [name for name in args.matrices if name not in (*sizes, "all")]:
        raise UserError(f"--matrices {unknown[0]!r}; {args.shape} has {', '.join(sizes)}, or say all")
    if unknown := [mode for mode in args.quantize if mode not in GROUPS]:
        raise UserError(f"--quantize {unknown[0]!r}; allowed: {', '.join(GROUPS)}")
    ops.bind("cuda")
    first = ceilings(device, dtype)
    about = origin("tune_cuda", argv, device) | {"shape": args.shape}
    bandwidth = first["bandwidth_gb_s"] * 1e9

    def report(rows: list[dict], shown: list[dict]) -> None:  # at once: who runs out of time keeps what there was
        print("\n".join(map(show, shown)), flush=True)
        append(args.output, *(about | row for row in rows))
    report([first], [first])
    for mode in args.quantize:
        rows = list(chain(sizes, mode, dtype, device, bandwidth))
        report(rows, rows)
    swept = list(sizes) if "all" in args.matrices else args.matrices
    for mode, name, n in itertools.product(args.quantize, swept, args.rows):
        found = sweep(name, sizes[name], mode, n, dtype, device, bandwidth)
        report(found, found[:args.best] + [row for row in found[args.best:] if row["used"]])


if __name__ == "__main__":
    run_command(main)
