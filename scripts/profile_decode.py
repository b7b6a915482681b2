"""Where the time of one decode step goes: by part of the model, and by kernel.

    python -m scripts.profile_decode --random_weights Llama-3.2-1B --quantize int4
    python -m scripts.profile_decode --eager --trace demo.trace.json        # the demo, uncompiled; for chrome://tracing

First table: the step cut into parts that are run one after the other, in order, at the position behind a random prompt,
each compiled by itself (one graph for all layers of a kind); and the whole step as `generate` runs it, in the same
rounds. What the whole takes less than their sum is what compiling it as one is worth: a call less for each part, and
what is fused over their borders. Bytes are those that a part must read at batch 1: its weights (of experts the active
ones; a tied embedding is counted with the head) and its caches at that position. Off CUDA each part is waited for.

Second table: what PyTorch's profiler sees in whole steps fed with their own tokens. On CUDA the kernels of the device's
own timeline; on a CPU the outermost operators of the main thread, with inductor's fused loops. A gap is time in none
of them. The profiler costs time itself, a microsecond or so for every operator on a CPU.
Glossary: B batch, D dim, V vocabulary.
"""
import contextlib
import functools
import itertools
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import compiler
import device as machine
from decoding import Steps, compiled_steps, generate
from errors import Parser, UserError, run_command
from generate import DEMO, load_model, load_random
from layers import ExpertLinear
from model import Block, DenseAndExperts, Experts, Transformer
from sampling import Sampling, sample
from scripts.rows import check, commit

WARM_UP = 3  # uncounted rounds: a CUDA graph is compiled, recorded and replayed in three calls
STEP = "decode step"  # its name in a trace
GUARDS = "TorchDynamo Cache Lookup"  # is what was compiled for these inputs? the name of that in a trace
KERNELS = 25  # rows of the second table; what is left makes one more
RATE = f"{'MB read':>9} {'GB/s':>7} {'bandwidth':>9}"  # of both


# -- bytes of the parts -----------------------------------------------------------------------------------------------

class Part(NamedTuple):
    name: str
    layer: int | None
    bytes: int  # that it must read in one step


def nbytes(module: torch.nn.Module, n_active: int = 0) -> int:
    """Bytes of a module's weights that one token reads; of stacked matrices those of n_active experts."""
    total = sum(p.nbytes for p in module.parameters())
    for stack in module.modules():
        if isinstance(stack, ExpertLinear):
            total -= sum(p.nbytes - n_active * p[0].nbytes for p in stack.parameters())
    return total


def parts(model: Transformer, depth: int) -> list[Part]:
    """The parts in the order in which `step_in_parts` runs them, for a token that `depth` others came before."""
    config = model.config
    active = config.experts.n_active if config.experts else 0
    rows = sum(nbytes(table) // config.vocab_size for table in model.tables)
    told = (model.per_layer.projection, model.per_layer.norm) if model.per_layer else ()
    found = [Part("embedding", None, rows + sum(map(nbytes, told)))]
    for i, (layer, kind) in enumerate(zip(model.layers, config.layer_types, strict=True)):
        mixer = sum(map(nbytes, (layer.attention_norm, layer.attention, layer.attention_post_norm)))
        mixer += int(layer.attention.cache_bytes(depth, *model.cache_dtypes))
        rest = (layer.ffn_norm, layer.feed_forward, layer.ffn_post_norm, layer.per_layer)
        ffn = sum(nbytes(module, active) for module in rest if module)
        ffn += 0 if layer.scalar is None else layer.scalar.nbytes
        says = ("dense and experts" if isinstance(layer.feed_forward, DenseAndExperts) else
                "experts" if isinstance(layer.feed_forward, Experts) else "feed-forward")
        found += [Part(f"{kind} attention", i, mixer), Part(says, i, ffn)]
    found += [Part("norm and head", None, nbytes(model.norm) + nbytes(model.output)), Part("sampling", None, 0)]
    assert sum(part.bytes for part in found) == model.weight_bytes_per_token() + model.cache_bytes_read(depth), found
    return found


# -- the step, part by part -------------------------------------------------------------------------------------------

def embed(model: Transformer, token: Tensor, position: Tensor) -> tuple[Tensor, Sequence[Tensor | None], dict]:
    """token, position [B, 1] -> x [B, 1, D], what each layer is told besides, and what all layers of a kind share."""
    token = token.clamp_min(0)
    x = model.embed(token)
    return x, model.told(token, x), model.calls(position)


def mix(layer: Block, x: Tensor, call) -> Tensor:
    return x + layer.attention_post_norm(layer.attention(layer.attention_norm(x), call))


def feed(layer: Block, x: Tensor, told: Tensor | None) -> Tensor:
    x = x + layer.ffn_post_norm(layer.feed_forward(layer.ffn_norm(x)))
    x = x if told is None else x + layer.per_layer(x, told)
    return x if layer.scalar is None else x * layer.scalar.to(x.dtype)


def head(model: Transformer, x: Tensor) -> Tensor:  # [B, 1, D] -> [B, V]
    return model.logits(x[:, -1])


def choose(logits: Tensor, position: Tensor, sampling: dict) -> tuple[Tensor, Tensor]:
    return sample(logits, **sampling), position[:, -1:] + 1


def step_in_parts(model: Transformer, token: Tensor, position: Tensor, sampling: dict, call: Callable) -> tuple:
    """`decoding.decode`, with call(part, *inputs) for each part in order, which returns what the part does."""
    x, told, calls = call(embed, model, token, position)
    for layer, kind, its in zip(model.layers, model.config.layer_types, told, strict=True):
        x = call(mix, layer, x, calls[kind])
        x = call(feed, layer, x, its)
    return call(choose, call(head, model, x), position, sampling)


def runnable_parts(model: Transformer, token: Tensor, position: Tensor, sampling: dict, compile: bool) -> list:
    """The parts, each a call with the inputs that it has in this step: it can be run again, and alone.

    Weights are inputs of a compiled part, so that all layers of a kind share its graph. On CUDA each is then a CUDA
    graph of its own, as the whole step is one: launched one by one, kernels would wait for the host.
    """
    if compile:
        compiler.configure(model.device)
    ready = {part: torch.compile(part, fullgraph=True, dynamic=False) if compile else part
             for part in (embed, mix, feed, head, choose)}
    found = []

    def call(part: Callable, *inputs):
        found.append(functools.partial(ready[part], *inputs))
        return found[-1]()

    step_in_parts(model, token, position, sampling, call)
    return [cuda_graph(part) for part in found] if compile and model.device.type == "cuda" else found


def cuda_graph(function: Callable[[], object]) -> Callable[[], None]:
    function()  # once more: nothing may be compiled or tuned while it is recorded
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        function()
    return graph.replay


# -- times of the parts -----------------------------------------------------------------------------------------------

def stamp(device: torch.device):
    """A moment between two calls: on CUDA on the device's own clock, which nothing waits for."""
    if device.type != "cuda":
        machine.synchronize(device)
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def time_calls(calls: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[float]:
    """ms of each call, the median of so many rounds; in a round all run once, in order, as in a step: each finds the
    processor's caches as the one before left them."""
    stamps = []
    for _ in range(WARM_UP + rounds):
        stamps.append([stamp(device)])
        for call in calls:
            call()
            stamps[-1].append(stamp(device))
    machine.synchronize(device)
    times = [[a.elapsed_time(b) if device.type == "cuda" else (b - a) * 1e3 for a, b in itertools.pairwise(row)]
             for row in stamps[WARM_UP:]]
    return [statistics.median(column) for column in zip(*times, strict=True)]


@torch.no_grad()
def time_parts(model: Transformer, prompt: list[int], sampling: Sampling, steps: Steps, rounds: int,
               compile: bool) -> list[float]:
    """ms of each of `parts` at the position behind the prompt, and at last of the whole step there."""
    (token,) = generate(model, prompt, 1, sampling, seed=0)
    arguments = sampling.arguments(model.config.vocab_size, model.device)
    inputs = torch.tensor([[token]], device=model.device), torch.tensor([[len(prompt)]], device=model.device)
    calls = runnable_parts(model, *inputs, arguments, compile)
    calls.append(functools.partial(steps.decode, model, *inputs, arguments))
    return time_calls(calls, rounds, model.device)


# -- kernels ----------------------------------------------------------------------------------------------------------

class Event(NamedTuple):
    name: str
    start: float  # us
    end: float
    bytes: float | None = None  # that it reads, where that is known


class Kernel(NamedTuple):
    name: str
    calls: float  # in a step
    us: float  # a call, on average
    us_step: float
    bytes: float | None  # a call, on average


def kernel_table(events: Iterable[Event], steps: int) -> list[Kernel]:
    """A row for each name, the longest in all first."""
    named: dict[str, list[Event]] = {}
    for event in events:
        named.setdefault(event.name, []).append(event)
    rows = []
    for name, same in named.items():
        total = sum(e.end - e.start for e in same)
        known = None if any(e.bytes is None for e in same) else statistics.mean(e.bytes for e in same)
        rows.append(Kernel(name, len(same) / steps, total / len(same), total / steps, known))
    return sorted(rows, key=lambda row: -row.us_step)


def gaps(events: Iterable[Event], start: float, end: float) -> tuple[float, int]:
    """(us from start to end that no event covers, in how many pieces)."""
    idle, count, reached = 0.0, 0, start
    for event in sorted(events, key=lambda e: e.start):
        if (until := min(event.start, end)) > reached:
            idle, count = idle + until - reached, count + 1
        reached = max(reached, event.end)
    return (idle + end - reached, count + 1) if reached < end else (idle, count)


# operators that read large tensors, and how many of their inputs are such
READERS = {"aten::mm": 2, "aten::bmm": 2, "aten::matmul": 2, "aten::linear": 2, "aten::addmm": 3,
           "aten::scaled_dot_product_attention": 3, "aten::_scaled_dot_product_flash_attention_for_cpu": 3,
           "readonce::linear16": 2, "readonce::grouped_linear": 2, "readonce::packed_linear": 2,
           "readonce::quantized_linear": 3, "readonce::quantized_expert_linear": 3}
ITEMSIZE = {"c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8, "signed char": 1, "unsigned char": 1}


def bytes_read(name: str, shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> float | None:
    """Bytes of an operator's inputs, of stacked experts those of one for each row of x; None where not known."""
    tensors = itertools.islice(zip(shapes, dtypes, strict=False), READERS.get(name, 0))
    sizes = [math.prod(shape) * ITEMSIZE[dtype] for shape, dtype in tensors if dtype in ITEMSIZE]
    if not sizes or not name.startswith("readonce::") or len(shapes[1]) < 3:
        return sum(sizes) or None
    return sizes[0] + sum(sizes[1:]) * shapes[0][0] / shapes[1][0]


def label(event) -> str:
    """A name for the table: without running numbers, and for a matrix with its shape."""
    name = re.sub(r"_\d+$", "", re.sub(r"^graph_\d+_", "", event.name)) if "_fused_" in event.name else event.name
    if name not in READERS or "scaled_dot_product" in name:
        return name
    shape = max(event.input_shapes[:READERS[name]], key=math.prod)
    if name == "readonce::packed_linear":  # the third argument says how many outputs the tiles hold
        shape = [*shape[:-2], event.concrete_inputs[2], event.input_shapes[0][-1]]
    return f"{name} [{', '.join(map(str, shape))}]"


def operators(events: Sequence, first) -> tuple[list[Event], float, float]:
    """Of the profiler's events the outermost operators from the first step on, when that began, when the last ended."""
    found, reached = [], first.time_range.start
    end = max(e.time_range.end for e in events if e.name == STEP)
    for e in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        named = "::" in e.name or e.name.startswith("graph_") or e.name == GUARDS  # the rest are ranges around them
        if named and e.thread == first.thread and reached <= e.time_range.start <= end:
            reached = e.time_range.end
            found.append(Event(label(e), e.time_range.start, reached,
                               bytes_read(e.name, e.input_shapes, getattr(e, "input_dtypes", ()))))
    return found, first.time_range.start, end


def device_kernels(events: Sequence, first) -> tuple[list[Event], float, float]:
    """The same from the timeline of a GPU: all kernels and copies, the start of the first and the end of the last."""
    found = [Event(label(e), e.time_range.start, e.time_range.end) for e in events if e.device_type.name == "CUDA"
             and not e.is_user_annotation and e.time_range.start >= first.time_range.start]
    return found, min((e.start for e in found), default=0), max((e.end for e in found), default=0)


def run_steps(tokens: Iterator[int], steps: int, device: torch.device) -> float:
    """ms a step by the wall clock."""
    machine.synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        with torch.profiler.record_function(STEP):
            next(tokens)
    machine.synchronize(device)
    return (time.perf_counter() - start) * 1e3 / steps


def profile(tokens: Iterator[int], count: int, device: torch.device):
    """So many steps of `generate` without the profiler, and as many under it: ms a step of each, and the profile."""
    with contextlib.closing(tokens):
        run_steps(tokens, 1 + WARM_UP, device)  # the first reads the prompt
        plain = run_steps(tokens, count, device)
        with torch.profiler.profile(record_shapes=True) as seen:
            run_steps(tokens, 1, device)
            profiled = run_steps(tokens, count, device)
    return plain, profiled, seen


# -- tables -----------------------------------------------------------------------------------------------------------

def rate(read: float | None, ms: float, bandwidth: float) -> str:
    """The three columns of RATE; bandwidth in bytes/s."""
    if not read or ms <= 0:
        return f"{'-':>9} {'-':>7} {'-':>9}"
    return f"{read / 1e6:9.3f} {read / ms / 1e6:7.1f} {100 * read / ms * 1e3 / bandwidth:7.0f} %"


def parts_table(found: list[Part], times: list[float], bandwidth: float, all_layers: bool) -> str:
    """Parts of one name in one row ("ms each": the median over layers), or each layer's in its own."""
    *each, whole = times
    groups: dict[str, list[tuple[int, float]]] = {}
    for part, ms in zip(found, each, strict=True):
        name = part.name if part.layer is None or not all_layers else f"{part.layer:3} {part.name}"
        groups.setdefault(name, []).append((part.bytes, ms))
    rows = [(name, len(same), f"{statistics.median(ms for _, ms in same):.3f}", *map(sum, zip(*same, strict=True)))
            for name, same in groups.items()]
    read = sum(part.bytes for part in found)
    rows += [("sum of the parts", "", "", read, sum(each)), ("whole step", "", "", read, whole),
             ("rest: whole less parts", "", "", 0, whole - sum(each))]
    return "\n".join([f"{'part':26} {'times':>5} {'ms each':>9} {'ms':>9} {'of whole':>8} {RATE}",
                      *(f"{name:26} {count:>5} {median:>9} {ms:9.3f} {100 * ms / whole:6.1f} % "
                        f"{rate(read, ms, bandwidth)}" for name, count, median, read, ms in rows)])


def kernels_table(events: list[Event], start: float, end: float, steps: int, bandwidth: float) -> str:
    """The longest kernels, all others as one, and the gaps."""
    rows, (idle, pieces), whole = kernel_table(events, steps), gaps(events, start, end), (end - start) / steps
    shown, others = rows[:KERNELS], rows[KERNELS:]
    for name, calls, us in ((f"{len(others)} others", sum(r.calls for r in others), sum(r.us_step for r in others)),
                            ("gaps: no kernel runs", pieces / steps, idle / steps)):
        if calls:
            shown.append(Kernel(name, calls, us / calls, us, None))
    return "\n".join([f"{'calls':>6} {'us each':>9} {'us':>9} {'of step':>7} {RATE}  kernel",
                      *(f"{row.calls:6.1f} {row.us:9.1f} {row.us_step:9.1f} {100 * row.us_step / whole:5.1f} % "
                        f"{rate(row.bytes, row.us / 1e3, bandwidth)}  {row.name[:90]}" for row in shown)])


# -- command line -----------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    p = Parser(prog="python -m scripts.profile_decode", description=__doc__.splitlines()[0])
    p.add_argument("--checkpoint_path", help="default: the demo")
    p.add_argument("--random_weights", metavar="SHAPE", help="a named shape or a config.json instead")
    p.add_argument("--prompt_length", type=int, default=5, help="random tokens before the step (default %(default)s)")
    p.add_argument("--steps", type=int, default=20, help="of each measurement (default %(default)s)")
    for name in ("--device", "--dtype"):
        p.add_argument(name, default="auto")
    p.add_argument("--quantize", help="int8, int4 or int4-pure, rounded while loading")
    p.add_argument("--eager", action="store_true", help="neither the step nor its parts are compiled")
    p.add_argument("--all_layers", action="store_true", help="a row for each layer, not for each kind")
    p.add_argument("--trace", type=Path, metavar="FILE", help="write the steps of the second table as a Chrome trace")
    args = p.parse_args(argv)
    check(args, prompt_length=1, steps=1)
    if args.trace and (args.trace.is_dir() or not args.trace.absolute().parent.is_dir()):
        raise UserError(f"--trace {args.trace}: no such folder, or it is one; a file is expected")
    if not args.eager and (missing := compiler.missing(machine.choose_device(args.device))):
        raise UserError(f"compiling needs {missing}, not found here; install that, or give --eager")
    how = dict(device=args.device, dtype=args.dtype, quantize=args.quantize)
    report(args, load_random(args.random_weights, **how) if args.random_weights else
           load_model(args.checkpoint_path or DEMO, **how)[0])


def named_loops(device: torch.device) -> dict:
    """The setting with which inductor's loops for a CPU are compiled to report to the profiler (which it can on Linux).
    """
    return {"cpp.enable_kernel_profile": True} if device.type == "cpu" and sys.platform == "linux" else {}


def report(args, model: Transformer) -> None:
    """Measure, and print both tables."""
    device, config, sampling = model.device, model.config, Sampling()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(config.vocab_size, (args.prompt_length,), generator=generator).tolist()
    bandwidth = machine.measure_bandwidth(device)
    steps = Steps() if args.eager else compiled_steps(device, **named_loops(device))
    new_tokens = 2 + WARM_UP + 2 * args.steps + machine.read_ahead(device)  # so each `next` starts one more step
    tokens = generate(model, prompt, new_tokens, sampling, seed=0, steps=steps)  # makes room in the caches, no more
    times = time_parts(model, prompt, sampling, steps, args.steps, not args.eager)
    plain, profiled, seen = profile(tokens, args.steps, device)
    if args.trace:
        temporary = args.trace.with_name(f"{os.getpid()}.{args.trace.name}")
        seen.export_chrome_trace(str(temporary))
        temporary.replace(args.trace)
    bandwidth = max(bandwidth, machine.measure_bandwidth(device))
    name, dtype = args.random_weights or args.checkpoint_path or "demo", str(model.dtype).removeprefix("torch.")
    print(f"{name}, {dtype}, {config.quantization or 'not quantized'}, {'eager' if args.eager else 'compiled'}, on "
          f"{machine.device_name(device)} ({device}, {torch.get_num_threads()} threads, torch {torch.__version__}), "
          f"commit {commit()}\nread bandwidth {bandwidth / 1e9:.1f} GB/s in this run; batch 1, temperature "
          f"{sampling.temperature}, top_k {sampling.top_k}\n\none step at position {len(prompt)}, medians of "
          f"{args.steps}\n{parts_table(parts(model, len(prompt)), times, bandwidth, args.all_layers)}\n")
    first = [e for e in seen.events() if e.name == STEP and e.device_type.name == "CPU"][1]  # 0 pays for the start
    events, start, end = (operators if device.type == "cpu" else device_kernels)(seen.events(), first)
    print(f"{args.steps} whole steps of {profiled:.3f} ms each under the profiler, {plain:.3f} ms without\n" + (
        kernels_table(events, start, end, args.steps, bandwidth) if events else
        f"no table of kernels: PyTorch's profiler records none on {device}"))


if __name__ == "__main__":
    run_command(main)
