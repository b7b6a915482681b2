"""The plan for machines that are not here: memory, caches, all-reduces and the floor in tokens/s of a model.

    python -m scripts.roofline Llama-2-70B --device A100-80GB --tp 8 --dtype int4 --context 4096
    python -m scripts.roofline Llama-3.1-8B --dtype int8                 # every device, a line each
    python -m scripts.roofline --check                                   # the floors beside all that was measured

Bytes are counted on the model itself, built without memory. A step reads the weights once and the caches of each row
(of experts, what rows that choose freely are expected to read), so a step takes

    max(bytes that a rank reads / bandwidth, 2 x active weights x rows / matmul rate) + all-reduces

The floor takes the datasheet's bandwidth and nothing else (no launches, no sampling); beside it stands the bandwidth
that plain reads were seen to reach, where a source says so. All figures with sources: `devices.json`.

N ranks share each layer by heads and by columns of the feed-forward, experts too, and the vocabulary; key/value heads
fewer than ranks are repeated, norms and routers are everywhere. There are two all-reduces a layer, after `wo` and `w2`,
each of latency + 2 (N - 1) / N x message / link: the latency of small messages as measured by others, the bytes of a
ring, which ranks among themselves cannot undercut (Patarasuk & Yuan 2009). The vocabulary's cut is taken as free.
"""
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import device as machine
from config import ModelConfig, Quantization
from errors import Parser, UserError, run_command
from families import config_of_shape, shapes
from generate import DEMO
from layers import Embedding, ExpertLinear, Matrix
from loader import materialize
from model import Transformer
from quantize import quantize_
from scripts.dispatches import KernelCost, kernels_of_step
from tp import CutTransformer

FILE = Path(__file__).with_name("devices.json")
ROOT = FILE.parent.parent
WIDTHS = ("bf16", "fp16", "fp32", *Quantization.MODES)
CACHED = 300e6  # bytes: what the caches of a server's processor hold, so that a small model may outrun the memory
NOISE = 0.05  # of the bandwidth probe: a measurement may exceed its floor by so much


# -- devices ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Link:
    """What joins the ranks."""
    name: str
    bandwidth: float  # bytes/s out of one rank; to one peer, if `per_peer`
    latency: dict[int, float]  # ranks -> seconds of a small all-reduce
    ranks: int  # at most
    per_peer: bool = False

    def all_reduce(self, ranks: int, size: int) -> float:
        """Seconds for `size` bytes; for numbers of ranks that nobody measured, the least latency known."""
        latency = self.latency.get(ranks, min(self.latency.values(), default=0.0))
        return latency + 2 * (ranks - 1) / ranks * size / (self.bandwidth * (ranks - 1 if self.per_peer else 1))


@dataclass(frozen=True)
class Device:
    name: str
    memory: float | None  # bytes
    bandwidth: float  # bytes/s of the datasheet
    read: float | None = None  # bytes/s that plain reads reach
    matmul: float | None = None  # bf16 operations/s, dense
    link: Link | None = None  # None: one device only
    note: str = ""
    kernels: KernelCost | None = None  # where a step is predicted by counting its kernels


def devices() -> dict[str, Device]:
    """All of devices.json, by the names that --device takes."""
    return {key: read_device(entry) for key, entry in json.loads(FILE.read_text("utf-8"))["devices"].items()}


def read_device(entry: dict) -> Device:
    def figure(key: str, unit: float) -> float | None:
        return entry[key]["value"] * unit if key in entry else None
    if link := entry.get("link"):
        latency = {int(ranks): us * 1e-6 for ranks, us in link["latency_us"]["value"].items()}
        link = Link(link["name"], link["gb_s"]["value"] * 1e9, latency, link["ranks"], link.get("per_peer", False))
    return Device(entry["name"], figure("memory_gb", 1e9), figure("bandwidth_gb_s", 1e9), figure("read_gb_s", 1e9),
                  figure("bf16_tflops", 1e12), link, entry.get("note", ""), KernelCost.read(entry))


def find_device(name: str) -> Device:
    """A name of devices.json in any case, or `here`."""
    if name.lower() == "here":
        where = machine.choose_device()
        return Device(machine.device_name(where), machine.available_memory(where), machine.read_bandwidth(where),
                      note="here the bandwidth is measured, and the memory is what is free now")
    known = {key.lower(): found for key, found in devices().items()}
    if name.lower() not in known:
        raise UserError(f"unknown device {name!r}; allowed: {', '.join(devices())}, or here")
    return known[name.lower()]


# -- what one rank holds and reads ------------------------------------------------------------------------------------

def weightless(config: ModelConfig, dtype: torch.dtype, ranks: int = 1) -> Transformer:
    """The model, or one rank's share of it, on the meta device, with the dtypes that it has once loaded."""
    with torch.device("meta"):
        model = Transformer(config).eval() if ranks == 1 else CutTransformer(config, 0, ranks).eval()
    if config.quantization:
        quantize_(model, config.quantization)
    list(materialize(model, torch.device("meta"), dtype))
    model.settle(dtype)
    return model


@dataclass(frozen=True)
class Load:
    """Bytes and operations of one rank, for a step of the whole batch."""
    weight_bytes: int  # held
    cache_bytes: int  # held, all rows
    weight_bytes_read: int
    cache_bytes_read: int
    operations: float  # multiplications and additions with weights
    all_reduces: int
    all_reduce_bytes: int  # of each

    memory = property(lambda self: self.weight_bytes + self.cache_bytes)
    read = property(lambda self: self.weight_bytes_read + self.cache_bytes_read)


def load_of(config: ModelConfig, dtype: torch.dtype, ranks: int, batch: int, context: int, depth: float,
            kv_dtype: torch.dtype | None = None) -> Load:
    """What a rank holds, for `context` positions a row, and reads, for a token that attends to `depth` of them."""
    model = weightless(config, dtype, ranks)
    model.kv_dtype = kv_dtype
    share = config.experts.n_active / config.experts.n_experts if config.experts else 1.0
    operations = sum(2 * batch * math.prod(module.shape) * (share if isinstance(module, ExpertLinear) else 1)
                     for module in model.modules() if isinstance(module, Matrix) and not isinstance(module, Embedding))
    # Those beside a dense feed-forward have a norm each before they are added. Two more: embedding, best logits.
    sums = 3 if config.experts and config.experts.beside_dense else 2
    return Load(sum(p.nbytes for p in model.parameters()), batch * model.cache_bytes(context),
                model.weight_bytes_per_token(batch), batch * model.cache_bytes_read(depth), operations,
                sums * len(config.layer_types) + 2 if ranks > 1 else 0, batch * config.dim * dtype.itemsize)


# -- the plan ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """One device, or several that share a model."""
    device: Device
    ranks: int
    batch: int
    load: Load
    would_do: int | None  # the fewest ranks that hold it
    matmul: float | None  # operations/s, where they are known for this width
    kernels: int | None = None  # of a step, where they were counted
    dtype: str = "bf16"

    fits = property(lambda self: self.device.memory is None or self.load.memory <= self.device.memory)
    compute_s = property(lambda self: self.load.operations / self.matmul if self.matmul else 0.0)

    @property
    def remark(self) -> str:
        """What the numbers alone do not say."""
        if not self.fits:
            return f"does not fit: {f'{self.would_do} ranks' if self.would_do else 'no number of ranks here'} would do"
        if self.ranks == 1 or self.ranks in self.device.link.latency:
            return ""
        known = ", ".join(map(str, self.device.link.latency))
        return f"latency: the least known, of {known} ranks" if known else "latency of all-reduces: unknown, left out"

    @property
    def reduce_s(self) -> float:
        n = self.load.all_reduces
        return n * self.device.link.all_reduce(self.ranks, self.load.all_reduce_bytes) if n else 0.0

    def tok_s(self, bandwidth: float | None) -> float | None:
        """Tokens/s of all rows together, at so many bytes/s; None if it does not fit, or those are not known."""
        return self.batch / (max(self.load.read / bandwidth, self.compute_s) + self.reduce_s) \
            if bandwidth and self.fits else None

    @property
    def predicted(self) -> list[float]:
        """Tokens/s at the least, the likely and the largest cost of a kernel: a model's, of one row on one device."""
        alone = self.ranks == self.batch == 1 and self.fits and self.kernels and self.device.kernels
        return self.device.kernels.tok_s(self.load.read, self.device.bandwidth, self.kernels, self.dtype) \
            if alone else []

    def document(self, **about) -> dict:
        """The fields of --json; bytes and seconds are those of one rank and one step."""
        of = self.device
        return {**about, "device": of.name, "ranks": self.ranks, "batch": self.batch, **dataclasses.asdict(self.load),
                "memory_bytes": self.load.memory, "device_memory_bytes": of.memory, "fits": self.fits,
                "ranks_that_would_do": self.would_do, "all_reduce_s": self.reduce_s,
                "compute_s": self.compute_s or None, "bandwidth_gb_s": of.bandwidth / 1e9,
                "floor_tok_s": self.tok_s(of.bandwidth), "read_tok_s": self.tok_s(of.read),
                "predicted_tok_s": self.predicted or None, "kernels": self.kernels if self.predicted else None}


def plan(device: Device, ranks: int | None, batch: int, dtype: torch.dtype, load: Callable[[int], Load]) -> Plan:
    """`load` gives a rank's share by the number of ranks; None takes the fewest that hold the model."""
    limit = device.link.ranks if device.link else 1
    if ranks and ranks > limit:
        raise UserError(f"--tp is {ranks}; of {device.name} at most {limit} can share a model, as far as known here")

    def holds(n: int) -> bool:
        try:
            return device.memory is None or load(n).memory <= device.memory
        except UserError:  # so many cannot share it
            return False
    enough = next(filter(holds, (1 << i for i in range(limit.bit_length()))), None)
    n = ranks or enough or 1
    return Plan(device, n, batch, load(n), enough, device.matmul if dtype.itemsize == 2 else None)


def describe(found: Plan, context: int, depth: int) -> str:
    """The plan of one device, for people."""
    load, of, n = found.load, found.device, found.ranks
    there = f" of {of.memory / 1e9:.0f}" if of.memory else ""
    lines = [f"{n} x {of.name}",
             f"{'a rank' if n > 1 else 'it'} holds {load.weight_bytes / 1e9:.2f} GB of weights and "
             f"{load.cache_bytes / 1e9:.3f} GB of caches for {found.batch} x {context} positions: "
             f"{load.memory / 1e9:.1f}{there} GB",
             f"and reads in a step {load.weight_bytes_read / 1e9:.3f} GB of weights and "
             f"{load.cache_bytes_read / 1e9:.3f} GB of caches, at depth {depth}"]
    if n > 1:
        lines.append(f"{load.all_reduces} all-reduces of {load.all_reduce_bytes / 1e3:.1f} kB over {of.link.name}: "
                     f"{found.reduce_s * 1e3:.3f} ms")
    lines += [f"{load.operations / 1e9:.1f} G operations: {found.compute_s * 1e3:.3f} ms"] if found.compute_s else []
    for bandwidth, what in ((of.bandwidth, "floor"), (of.read, "at what plain reads reach")):
        if speed := found.tok_s(bandwidth):
            lines.append(f"{what}: {found.batch / speed * 1e3:.3f} ms at {bandwidth / 1e9:.0f} GB/s, {speed:.1f} tok/s")
    if found.predicted:
        lines.append(of.kernels.describe(found.predicted, found.kernels, found.dtype))
    return "\n".join([*lines, *filter(None, (found.remark, of.note))])


def table(plans: dict[str, Plan]) -> str:
    """A line for each device."""
    lines = ["device       ranks  GB needed  GB there  GB/step  all-reduces  floor tok/s  at seen GB/s"]
    for name, found in plans.items():
        load, of = found.load, found.device
        floors = [f"{speed:.1f}" if speed else "-" for speed in map(found.tok_s, (of.bandwidth, of.read))]
        lines.append(f"{name:12} {found.ranks:5} {load.memory / 1e9:10.2f} {of.memory / 1e9:9.0f} "
                     f"{load.read / 1e9:8.3f} {found.reduce_s * 1e3:9.3f} ms {floors[0]:>12} {floors[1]:>13}  "
                     f"{found.remark}".rstrip())
    return "\n".join(lines)


# -- against what was measured ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Compared:
    """A measurement and its floor, both in tokens/s."""
    what: str
    read: float  # bytes of a step that we count, of one rank
    implied: float | None  # bytes that the measurement counted
    floor: float
    measured: float

    allowed = property(lambda self: self.measured <= self.floor * (1 + NOISE) or self.read < CACHED)

    def line(self) -> str:
        mark = " (may sit in a cache)" if self.read < CACHED else "" if self.allowed else " ABOVE ITS FLOOR"
        theirs = f"{self.implied / 1e6:9.1f}" if self.implied else f"{'-':>9}"
        return (f"{self.what:62} {self.read / 1e6:9.1f} {theirs} {self.floor:9.1f} {self.measured:9.1f} "
                f"{100 * self.measured / self.floor:5.0f} %{mark}")


def width(dtype: str) -> tuple[torch.dtype, Quantization | None]:
    """What --dtype means: of the numbers that are not quantized, and how the others are. UserError if unknown."""
    if dtype not in WIDTHS:
        raise UserError(f"unknown --dtype {dtype!r}; allowed: {', '.join(WIDTHS)}")
    return (torch.bfloat16, Quantization(dtype)) if dtype in Quantization.MODES else (machine.DTYPES[dtype], None)


def ours(row: dict) -> Compared | None:
    """A row of scripts/benchmark.py beside the bandwidth of its own run; None for other rows, models that are not at
    hand, and weights that are a peer's.

    decode_tok_s is of all rows of a batch together, and a depth is what the caches held before the prompt.
    """
    if "decode_tok_s" not in row:  # another script's
        return None
    name = row["model"]
    path = DEMO / "config.json" if name == "demo" else ROOT / name
    if row["system"] in ("llama.cpp", "gpt-fast") or (name not in shapes() and not path.is_file()):
        return None
    config = config_of_shape(name if name in shapes() else str(path))
    if row.get("quantization") and not config.quantization:
        mode, _, group = row["quantization"].partition(" g")
        config = dataclasses.replace(config, quantization=Quantization(mode, int(group or 32)))
    batch = row.get("batch") or 1
    depth = (row.get("depth") or 0) + row["prompt_tokens"] + row["new_tokens"] / 2
    kv_dtype = machine.choose_kv_dtype(row.get("kv_dtype", "auto"))
    load = load_of(config, machine.DTYPES[row["dtype"]], 1, batch, math.ceil(depth), depth, kv_dtype)
    what = f"{row['system']}, {name.rpartition('/')[2].removesuffix('.json')}, " \
           f"{row.get('quantization') or row['dtype']}, {row['prompt_tokens']}+{row['new_tokens']}, batch {batch}"
    return Compared(what, load.read, row["gb_s"] * 1e9 * batch / row["decode_tok_s"],
                    row["bandwidth_gb_s"] * 1e9 * batch / load.read, row["decode_tok_s"])


def published() -> list[Compared]:
    """What others say they reached, beside the floor of the datasheet for our bytes."""
    found, known = [], devices()
    for source in json.loads(FILE.read_text("utf-8"))["published"]:
        of, depth = known[source["device"]], source["positions"]
        for model, mode, ranks, tok_s, gb_s in source["rows"]:
            dtype, quantization = width(mode)
            config = dataclasses.replace(config_of_shape(model), quantization=quantization)
            load = load_of(config, dtype, ranks, 1, depth, depth)
            floor = Plan(of, ranks, 1, load, ranks, of.matmul).tok_s(of.bandwidth)
            found.append(Compared(f"{source['system']}, {source['device']} x {ranks}, {model}, {mode}", load.read,
                                  gb_s and gb_s * 1e9 / tok_s, floor, tok_s))
    return found


def check() -> int:
    """Print all measurements beside their floors. 1 if one is above its own, which would show a wrong count."""
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "benchmarks").glob("*.jsonl"))]
    rows = [json.loads(line) for text in texts for line in text.splitlines() if line]
    found = [ours(row) for row in rows if "decode_tok_s" in row]
    parts = {"benchmarks/, floors at the read bandwidth measured in the same run": [c for c in found if c],
             f"published, floors at the datasheet's bandwidth (sources: {FILE.name})": published()}
    for title, compared in parts.items():
        print(f"{title}\n{'MB a step and rank: ours,':>72} {'theirs':>9} {'floor':>9} {'tok/s':>9}")
        print("\n".join(c.line() for c in compared), end="\n\n")
    wrong = sum(not c.allowed for compared in parts.values() for c in compared)
    print(f"{wrong} are above their floors; {found.count(None)} rows, of peers' weights or of models not at hand, were "
          f"passed over")
    return 1 if wrong else 0


# -- command line -----------------------------------------------------------------------------------------------------

def parser() -> Parser:
    p = Parser(prog="python -m scripts.roofline", description=__doc__.splitlines()[0])
    p.add_argument("shape", nargs="?", metavar="SHAPE", help="a named shape (Llama-3.1-8B, ...) or a config.json")
    p.add_argument("--device", help="a name of devices.json, or here (default: a table of all)")
    p.add_argument("--tp", type=int, help="ranks that share the model (default: the fewest that hold it)")
    p.add_argument("--dtype", default="bf16", help=f"{', '.join(WIDTHS)} (default %(default)s)")
    p.add_argument("--kv_dtype", default="auto", help="of keys and values: auto (as activations) or int8")
    p.add_argument("--batch", type=int, default=1, help="rows decoded together (default %(default)s)")
    p.add_argument("--context", type=int, default=2048, help="positions a row has room for (default %(default)s)")
    p.add_argument("--depth", type=int, help="positions the token attends to (default: --context)")
    p.add_argument("--json", action="store_true", help="one line of JSON instead")
    p.add_argument("--check", action="store_true", help="no plan: all measurements beside their floors")
    return p


def checked(args) -> ModelConfig:
    """The model that is asked for, once all options are known to be possible."""
    if args.shape is None:
        raise UserError(f"no SHAPE was given; allowed: {', '.join(shapes())}, or the path of a config.json")
    for name in ("tp", "batch", "context", "depth"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    config, (_, quantization) = config_of_shape(args.shape), width(args.dtype)
    if not args.depth <= args.context <= config.max_seq_len:
        raise UserError(f"--context is {args.context} and --depth {args.depth}; the model has {config.max_seq_len} "
                        f"positions, and the depth is at most the context")
    if config.quantization:
        raise UserError(f"{args.shape} is quantized already ({config.quantization}); give the one it was made from")
    return dataclasses.replace(config, quantization=quantization)


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.check:
        return check()
    args.depth = args.context if args.depth is None else args.depth
    config, dtype = checked(args), width(args.dtype)[0]
    kv_dtype = machine.choose_kv_dtype(args.kv_dtype)
    load = functools.cache(lambda ranks: load_of(config, dtype, ranks, args.batch, args.context, args.depth, kv_dtype))
    chosen = {args.device: find_device(args.device)} if args.device else {
        name: of for name, of in devices().items() if of.link or (args.tp or 1) == 1}
    step = dict(kernels=kernels_of_step(config, args.context), dtype=args.dtype)
    plans = {name: dataclasses.replace(plan(of, args.tp, args.batch, dtype, load), **step)
             for name, of in chosen.items()}
    title = f"{args.shape}, {config.quantization or args.dtype}, batch {args.batch}"
    if args.json:
        about = dict(model=args.shape, dtype=args.dtype, context=args.context, depth=args.depth)
        print(json.dumps({"plans": [found.document(**about) for found in plans.values()]}))
    elif args.device:
        print(f"{title}, {describe(plans[args.device], args.context, args.depth)}")
    else:
        print(f"{title}, {args.context} positions\n{table(plans)}")
    return 0


if __name__ == "__main__":
    run_command(main)
