"""What each thing that makes decoding on a CPU fast is worth: the figures of docs/why-cpu.md.

    python -m scripts.why_cpu --output benchmarks/why-cpu.jsonl          # all points; llama-bench is looked for on PATH
    python -m scripts.why_cpu --points kernels,fusion --repeats 5

A point compares ways to do the same thing, all else equal: they take turns in rounds after an uncounted one, a row has
the median of each and, as `worth_pct`, how much faster it is than the point's base: the median over the pairs of each
round. Weights are random, of one shape; decoding is greedy, at batch 1, in bfloat16 but for what a kernel rounds.
"""
import functools
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import compiler
import device as machine
from config import read_json
from decoding import Steps, compiled_steps, decode, generate
from errors import Parser, UserError, run_command
from families import config_of_shape, shapes
from generate import DEMO, DEMO_PROMPT, build, load_model, load_random
from layers import Linear
from model import Transformer
from packed import map_packed, save_packed
from scripts import peers, stand_ins
from scripts.benchmark import GREEDY, Ours
from scripts.peers import Case, Run
from scripts.profile_decode import STEP, WARM_UP, gaps, named_loops, operators, profile
from scripts.rows import add_output, append, check, origin
from tokenizer import load_tokenizer

MODES = {"bf16": None, "int8": "int8", "int4": "int4-pure"}  # widths of all matrices
PACKED = "int4.packed"
PROFILED = 20  # steps
OFTEN = 4  # times as many rounds where all ways are int4 or the demo, and short


# -- ways and rows ----------------------------------------------------------------------------------------------------

@dataclass
class Way:
    """One way to do what a point is about. `run` takes a turn: seconds of each thing that is timed ("token", "prompt",
    "start" or a matrix). `read`: bytes that each must read; `tokens` in each; `base`: the way it is compared with."""
    what: str
    run: Callable[[], dict[str, float]]
    base: str | None = None
    read: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


def take_turns(ways: list[Way], repeats: int) -> dict[str, list[dict[str, float]]]:
    """What each way took in each counted round. One that fails as a peer may is left out, with a line."""
    turns: dict[str, list[dict[str, float]]] = {way.what: [] for way in ways}
    for i in tqdm(range(1 + repeats), desc="rounds", leave=False, disable=None):
        for way in [way for way in ways if way.what in turns]:
            try:
                seconds = way.run()
            except peers.Absent as e:
                print(f"{way.what} is left out: {e}", file=sys.stderr)
                del turns[way.what]
                continue
            if i:
                turns[way.what].append(seconds)
    return turns


def rows_of(ways: list[Way], turns: dict[str, list[dict[str, float]]]) -> Iterator[dict]:
    """A row for each way and thing: ms, tokens and gigabytes a second, and what it is worth against its base."""
    for way in [way for way in ways if way.what in turns]:
        for thing in turns[way.what][0]:
            times = [turn[thing] for turn in turns[way.what]]
            row = {"what": way.what, "thing": thing, "ms": 1e3 * statistics.median(times),
                   "ms_all": [1e3 * seconds for seconds in times]}
            if thing in way.tokens:
                row["tok_s"] = 1e3 * way.tokens[thing] / row["ms"]
            if thing in way.read:
                row["gb_s"] = way.read[thing] / row["ms"] / 1e6
            if way.base in turns:
                faster = [base[thing] / seconds for base, seconds in zip(turns[way.base], times, strict=True)]
                row |= {"base": way.base, "worth_pct": 100 * (statistics.median(faster) - 1)}
            yield row


def compare(args: Namespace, ways: list[Way], often: int = 1) -> Iterator[dict]:
    """`often`: more rounds, for short turns."""
    yield from rows_of(ways, take_turns(ways, often * args.repeats))


# -- models -----------------------------------------------------------------------------------------------------------

def load(args: Namespace, width: str) -> Transformer:
    """As it is decoded here: quantized matrices are packed."""
    return load_random(args.random_weights, "cpu", "bf16", quantize=MODES[width])


def load_unpacked(args: Namespace, width: str, **_) -> Transformer:
    """The same numbers as files have them."""
    model = load_random(args.random_weights, "cpu", "fp32" if MODES[width] else "bf16", quantize=MODES[width])
    model.settle(torch.bfloat16)
    return model


# -- ways of ours -----------------------------------------------------------------------------------------------------

def seconds_of(run: Run, case: Case) -> dict[str, float]:
    """A short prompt is no measurement of prompts."""
    return {"token": run.decode_s / (case.new_tokens - 1)} | ({"prompt": run.ttft_s} if case.prompt_length > 32 else {})


def step_bytes(model: Transformer, case: Case) -> float:
    """That a token reads; a stand-in for a tied head has a weight of its own, and the embedding is then a row of it."""
    table = model.tok_embeddings
    beside = getattr(model.output, "weight", None) is not table.weight and model.config.tie_embeddings
    return peers.step_bytes(model, case) - (sum(p.nbytes for p in table.parameters()) if beside else 0)


def ours(what: str, model: Transformer, case: Case, steps: Steps, base: str | None = None) -> Way:
    timed = Ours(model, case)
    return Way(what, lambda: seconds_of(timed.run(steps), case), base, {"token": step_bytes(model, case)},
               {"token": 1, "prompt": case.prompt_length})


def quantization(args: Namespace, folder: Path) -> Iterator[dict]:
    """Widths of weights, and llama.cpp's of the same."""
    case, ways = Case(args.prompt_length, args.new_tokens), []
    for width in MODES:
        model = load(args, width)
        ways.append(ours(width, model, case, compiled_steps(model.device), None if width == "bf16" else "bf16"))
        exact = functools.partial(load_unpacked, args, width)
        for peer in peers.peers(["llama.cpp"], args.random_weights, model, exact, case, args.llama_bench, None,
                                str(folder)):
            ways.append(Way(f"llama.cpp's {peer.quantization or 'BF16'}",
                            lambda peer=peer: seconds_of(peer.run(), case), width, {"token": peer.step_bytes},
                            {"token": 1, "prompt": case.prompt_length}))
    os.sync()  # what was written should not go to the disk while others are timed
    yield from compare(args, ways)


STOCK = {"bf16": {"F.linear": stand_ins.Stock}, "int4": {"_weight_int4pack_mm_for_cpu": stand_ins.StockInt4},
         "int8": {"_weight_int8pack_mm": stand_ins.StockInt8, "_int_mm, 8-bit activations": stand_ins.StockInt8Both}}


def products(args: Namespace, width: str) -> Iterator[tuple[str, Transformer, str | None]]:
    """(what, model, base) of PyTorch's products and of ours, for the same numbers; the first is the base."""
    plain, base = load_unpacked(args, width), None
    for name, stand_in in STOCK[width].items():
        what = f"{width}, {name}"
        yield what, stand_ins.with_linears(stand_ins.twin(plain), stand_in), base
        base = base or what
    yield f"{width}, ours", plain if width == "bf16" else load(args, width), base


def kernels(args: Namespace, folder: Path) -> Iterator[dict]:
    """The same numbers through PyTorch's products and ours; and each matrix by itself."""
    case = Case(args.prompt_length, args.new_tokens)
    for width in MODES:
        found = list(products(args, width))  # aot.py cannot give a package the constants that PyTorch's int4 wants
        steps = jit_steps() if width == "int4" else compiled_steps(torch.device("cpu"))
        yield from compare(args, [ours(what, model, case, steps, base) for what, model, base in found])
        yield from compare(args, [matrices(what, model, base) for what, model, base in found
                                  if "8-bit" not in what])  # whose rounding of x is fused in a step only


def jit_steps() -> Steps:
    """As PyTorch's users compile a step."""
    compiler.configure(torch.device("cpu"))
    return Steps(decode=torch.compile(decode, mode="reduce-overhead", fullgraph=True))


def matrices(what: str, model: Transformer, base: str | None) -> Way:
    """All matrices of a step one after the other, called from Python with one row of x."""
    found = [(name.rpartition(".")[2], module) for name, module in model.named_modules()
             if isinstance(module, Linear | stand_ins.Stock)]
    rows = {module.shape[-1]: torch.randn(1, 1, module.shape[-1], dtype=torch.bfloat16) for _, module in found}
    read: dict[str, float] = {}
    for name, module in found:
        read[name] = read.get(name, 0) + sum(p.nbytes for p in module.parameters())

    @torch.no_grad()
    def run() -> dict[str, float]:
        seconds = dict.fromkeys(read, 0.0)
        for name, module in found:
            start = time.perf_counter()
            module(rows[module.shape[-1]])
            seconds[name] += time.perf_counter() - start
        return seconds
    return Way(what, run, base, read)


def dispatch(args: Namespace, folder: Path) -> Iterator[dict]:
    """The same kernels, called in three ways: for a large model and for one that fits the processor's cache."""
    for name, model in (("", load(args, "int4")), ("the demo: ", load_model(DEMO, "cpu", "bf16")[0])):
        case, base = Case(5, args.new_tokens), f"{name}eager"
        yield from compare(args, [ours(base, model, case, Steps()),
                                  ours(f"{name}torch.compile", model, case, jit_steps(), base),
                                  ours(f"{name}package", model, case, compiled_steps(model.device), base)], OFTEN)


def memory(args: Namespace, folder: Path) -> Iterator[dict]:
    """Where the weights lie."""
    case, steps = Case(5, args.new_tokens), compiled_steps(torch.device("cpu"))
    model, base = load(args, "int4"), "4 KB pages"
    save_packed(model, folder / PACKED, "")
    os.sync()
    yield from compare(args, [ours(base, stand_ins.twin(model, stand_ins.small_pages), case, steps),
                              ours("a mapped file", map_model(args, folder / PACKED), case, steps, base),
                              ours("huge pages", model, case, steps, base)], OFTEN)


def map_model(args: Namespace, path: Path) -> Transformer:
    model, how = build(config_of_shape(args.random_weights), "cpu", "bf16", MODES["int4"])
    assert map_packed(model, path, "", how["dtype"])
    return model


def fusion(args: Namespace, folder: Path) -> Iterator[dict]:
    """Matrices that read the same x as one."""
    case, model = Case(5, args.new_tokens), load(args, "int4")
    base, steps = "q, k, v, gate, up apart", compiled_steps(model.device)
    yield from compare(args, [ours(base, stand_ins.apart(stand_ins.twin(model)), case, steps),
                              ours("two matrices of them", model, case, steps, base)], OFTEN)


# -- ways that are processes ------------------------------------------------------------------------------------------

def child(asked: dict) -> None:
    """In a process of its own: the median of a few turns of decoding, after an uncounted one; the seconds as JSON."""
    args, case = Namespace(random_weights=asked["shape"]), Case(5, asked["new_tokens"])
    torch.set_num_threads(asked["threads"])
    way = ours("", map_model(args, Path(asked["packed"])), case, compiled_steps(torch.device("cpu")))
    print(json.dumps({"token": statistics.median([way.run()["token"] for _ in range(4)][1:])}))


def threads(args: Namespace, folder: Path) -> Iterator[dict]:
    """How many, and what OpenMP is told before it starts."""
    cores, ways = args.threads, []
    if not (folder / PACKED).exists():
        save_packed(load(args, "int4"), folder / PACKED, "")
    shape = str(Path(args.random_weights).resolve()) if Path(args.random_weights).is_file() else args.random_weights
    base = f"{cores} threads on {cores} cores"
    for what, count, said in ((base, cores, {}), ("1 thread", 1, {}), (f"{2 * cores} threads", 2 * cores, {}),
                              ("OMP_PROC_BIND=close", cores, {"OMP_PROC_BIND": "close"}),
                              ("OMP_WAIT_POLICY=ACTIVE", cores, {"OMP_WAIT_POLICY": "ACTIVE"}),
                              ("OMP_WAIT_POLICY=PASSIVE", cores, {"OMP_WAIT_POLICY": "PASSIVE"})):
        asked = {"shape": shape, "packed": str(folder / PACKED), "new_tokens": args.new_tokens, "threads": count}
        command = [sys.executable, "-m", "scripts.why_cpu", "--child", json.dumps(asked)]
        ways.append(Way(what, functools.partial(ask, command, said), None if what == base else base,
                        tokens={"token": 1}))
    yield from compare(args, ways)


def ask(command: list[str], said: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, cwd=DEMO.parent.parent, env=os.environ | said)
    if done.returncode:
        raise UserError(f"{shlex.join(command)} ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def start(args: Namespace, folder: Path) -> Iterator[dict]:
    """From a process's start to its first token, behind a prompt of a few; files are in the system's cache."""
    shape, exact = args.random_weights, load_unpacked(args, "int4")
    document = shapes()[shape] if shape in shapes() else read_json(Path(shape))
    stand_ins.write_folder(exact, document, DEMO / "tokenizer.json", folder / "checkpoint")
    command = [sys.executable, "generate.py", "--compile", "--max_new_tokens", "2", "--device", "cpu", "--threads",
               str(args.threads), "--checkpoint_path", str(folder / "checkpoint"), "--prompt", DEMO_PROMPT]
    base = "loaded and packed"
    ways = [Way(base, functools.partial(until_first, command)),
            Way("--cache_packed, mapped", functools.partial(until_first, [*command, "--cache_packed"]), base)]
    case = Case(len(load_tokenizer(DEMO).encode(DEMO_PROMPT)), 2)
    file = folder / f"{exact.config.quantization}.gguf"
    if list(peers.peers(["llama.cpp"], folder, exact, lambda **_: exact, case, args.llama_bench, None, str(folder))):
        ways.append(Way("llama-bench, to its end",
                        lambda: {"start": peers.start_llama(args.llama_bench, file, case)}, base))
    os.sync()
    yield from compare(args, ways)


def until_first(command: list[str]) -> dict[str, float]:
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=DEMO.parent.parent) as process:
        said = process.stdout.read(1)
        seconds = time.perf_counter() - began
        _, problem = process.communicate()
    if not said or process.returncode:
        raise UserError(f"{shlex.join(command)} ended with exit code {process.returncode}: {problem.decode()[-300:]}")
    return {"start": seconds}


# -- what a step consists of ------------------------------------------------------------------------------------------

def step(args: Namespace, folder: Path) -> Iterator[dict]:
    """Where the time of a step goes, as PyTorch's profiler sees it (a microsecond or so dearer for each operator)."""
    for width in ("bf16", "int4"):
        model = load(args, width)
        prompt, = Case(args.prompt_length, 1).prompts(model.config.vocab_size)
        steps = compiled_steps(model.device, **named_loops(model.device))
        tokens = generate(model, prompt, 2 + WARM_UP + 2 * PROFILED, GREEDY, steps=steps)
        _, _, seen = profile(tokens, PROFILED, model.device)
        first = [e for e in seen.events() if e.name == STEP and e.device_type.name == "CPU"][1]  # 0 pays for the start
        events, begin, end = operators(seen.events(), first)
        parts = dict.fromkeys(("matrices", "attention", "fused loops", "other operators"), 0.0)
        for event in events:
            parts[part_of(event.name)] += event.end - event.start
        parts["between them"], _ = gaps(events, begin, end)
        for part, us in parts.items():
            yield {"what": f"{width}: {part}", "thing": "part", "ms": us / 1e3 / PROFILED,
                   "share_pct": 100 * us / (end - begin)}


def part_of(name: str) -> str:
    if "_fused_" in name:
        return "fused loops"
    return "attention" if "attention" in name else "matrices" if "linear" in name or "mm" in name else "other operators"


# -- command line -----------------------------------------------------------------------------------------------------

POINTS = {"quantization": quantization, "kernels": kernels, "dispatch": dispatch, "memory": memory, "start": start,
          "threads": threads, "fusion": fusion, "step": step}


def parse(argv: list[str]) -> Namespace:
    p = Parser(prog="python -m scripts.why_cpu", description=__doc__.splitlines()[0])
    p.add_argument("--points", default=",".join(POINTS), help="of %(default)s (commas)")
    p.add_argument("--random_weights", metavar="SHAPE", default="Llama-3.2-1B",
                   help="a named shape of Llama's kind or a config.json (default %(default)s)")
    p.add_argument("--prompt_length", type=int, default=128, help="where prompts are timed (default %(default)s)")
    p.add_argument("--new_tokens", type=int, default=17, help="default %(default)s")
    p.add_argument("--repeats", type=int, default=4, help="counted rounds (default %(default)s)")
    p.add_argument("--llama_bench", default="llama-bench", metavar="FILE", help="default: the one on PATH")
    p.add_argument("--threads", type=int, help="default: one for each core")
    add_output(p)
    p.add_argument("--child", help=SUPPRESS)  # what a process of its own is to do
    args = p.parse_args(argv)
    args.points = args.points.split(",")
    for point in args.points:
        if point not in POINTS:
            raise UserError(f"--points has {point!r}; allowed: {', '.join(POINTS)}, with commas between them")
    check(args, prompt_length=1, new_tokens=2, repeats=1)
    if not peers.llama_shaped(config_of_shape(args.random_weights)):
        raise UserError(f"--random_weights {args.random_weights} is not of Llama's architecture; name one that is")
    if missing := compiler.missing(torch.device("cpu")):
        raise UserError(f"compiling needs {missing}, not found here; install that")
    args.threads = machine.choose_threads(args.threads)
    return args


def show(row: dict) -> str:
    """One row for people."""
    speed = f"{row['tok_s']:8.1f} tok/s" if "tok_s" in row else ""
    rate = f"{row['gb_s']:6.1f} GB/s" if "gb_s" in row else ""
    worth = f"{row['worth_pct']:+.0f} % on {row['base']}" if "base" in row else ""
    worth = f"{row['share_pct']:.0f} % of the step" if "share_pct" in row else worth
    return f"{row['point']:13} {row['what']:33} {row['thing']:7} {row['ms']:9.3f} ms {speed:14} {rate:11} {worth}"


def main(argv: list[str]) -> None:
    if argv[:1] == ["--child"] and len(argv) == 2:
        return child(json.loads(argv[1]))
    args, device = parse(argv), torch.device("cpu")
    torch.set_num_threads(args.threads)
    common = {"kind": "why", "model": args.random_weights, **origin("why_cpu", argv, device)}
    with tempfile.TemporaryDirectory() as folder:
        for point in args.points:
            bandwidth = machine.measure_bandwidth(device)
            rows = [common | {"point": point} | row for row in POINTS[point](args, Path(folder))]
            bandwidth = max(bandwidth, machine.measure_bandwidth(device))
            for row in rows:
                print(show(row), flush=True)
                append(args.output, row | {"bandwidth_gb_s": bandwidth / 1e9})
            gc.collect()


if __name__ == "__main__":
    run_command(main)
