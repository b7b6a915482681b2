"""Other programs beside ours: the same shape, the same numbers where they can hold them, timed call by call.

A peer is made once per case and then run in turns with ours. One that is absent, or cannot hold the case, is skipped
with a line that says why; peers are extras and their programs are the user's.
"""
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import device as machine
from config import ModelConfig, read_json
from errors import UserError
from families import document_of_shape
from layers import Embedding, ExpertLinear, Matrix
from model import Transformer
from scripts.export_gguf import export

NAMES = ("transformers", "transformers-eager", "llama.cpp", "gpt-fast")


@dataclass(frozen=True)
class Case:
    """What is timed: `batch` rows read `prompt_length` tokens behind `depth` old ones, and make `new_tokens` more,
    greedily."""
    prompt_length: int
    new_tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def length(self) -> int:
        return self.depth + self.prompt_length + self.new_tokens

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The same each time, other tokens in each row."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.depth + self.prompt_length)
        return torch.randint(vocab_size, shape, generator=generator).tolist()


@dataclass
class Run:
    """One timed run: seconds to the first token (None if old tokens were read again), seconds for the rest, and what
    each step of the rest took, if the peer tells."""
    ttft_s: float | None
    decode_s: float
    steps_s: list[float] = field(default_factory=list)

    @classmethod
    def at(cls, start: float, times: Sequence[float]) -> "Run":
        """From the time each step's tokens were known on the host."""
        return cls(times[0] - start, times[-1] - times[0], [b - a for a, b in itertools.pairwise(times)])


@dataclass
class System:
    """Something that runs the case. `step_bytes`: of weights and caches that one step must read."""
    name: str
    run: Callable[[], Run]
    step_bytes: float
    dtype: str
    quantization: str | None
    facts: dict = field(default_factory=dict)  # more fields for its row
    close: Callable[[], None] = lambda: None


class Absent(Exception):
    """A peer that is not here, or cannot hold the case."""


def unrounded(model: Transformer, positions: float) -> float:
    """Bytes of the caches of so many positions of a peer with this shape, which has no int8."""
    return sum(layer.attention.cache_bytes(positions, model.dtype, model.dtype) for layer in model.layers)


def step_bytes(model: Transformer, case: Case, ours: bool = True) -> float:
    """Bytes of weights and caches that a step reads, on average over the tokens that are made."""
    attended = case.depth + case.prompt_length + case.new_tokens / 2
    caches = model.cache_bytes_read(attended) if ours else unrounded(model, attended)
    return model.weight_bytes_per_token(case.batch) + case.batch * caches


def prefill_operations(model: Transformer, case: Case) -> int:
    """Multiplications and additions with weights that reading the prompt takes, the head for its last token alone."""
    config = model.config
    share = config.experts.n_active / config.experts.n_experts if config.experts else 1
    sizes = {module: math.prod(module.shape) * (share if isinstance(module, ExpertLinear) else 1)
             for module in model.modules() if isinstance(module, Matrix) and not isinstance(module, Embedding)}
    tokens = {module: 1 if module is model.output else case.prompt_length for module in sizes}
    return int(sum(2 * case.batch * tokens[module] * size for module, size in sizes.items()))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def llama_shaped(c: ModelConfig) -> bool:
    """Whether a model is what all peers know: Llama's, its rope unscaled, scaled linearly or as Llama 3's."""
    attention = c.mixers.get("full")
    simple = ModelConfig(c.vocab_size, c.dim, c.ffn_dim, c.max_seq_len, c.layer_types, c.mixers, norm_eps=c.norm_eps,
                         tie_embeddings=c.tie_embeddings, dtype=c.dtype, quantization=c.quantization)
    return c == simple and set(c.layer_types) == {"full"} and not (attention.qk_norm or attention.qkv_bias) \
        and attention.rope is not None and attention.rope.kind in ("default", "linear", "llama3")


# -- transformers -----------------------------------------------------------------------------------------------------

def as_transformers(source: str | Path, model: Transformer):
    """A model of transformers beside ours, in its dtype and on its device: a checkpoint's folder with its numbers, or a
    shape (a name of shapes.json, a config.json) with random ones."""
    if importlib.util.find_spec("transformers") is None:
        raise Absent("it is not installed; pip install -r requirements-dev.txt")
    import transformers
    own = unquantized(model)
    machine.require_memory(sum(p.nbytes for p in own.parameters()), model.device)
    if Path(source).is_dir():
        if "quantization_config" in read_json(Path(source) / "config.json"):
            raise Absent("it is compared on checkpoints that are not quantized")
        peer = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=own.dtype)
    else:
        document = document_of_shape(str(source))
        config = getattr(transformers, document["architectures"][0]).config_class(**document).get_text_config()
        with model.device:  # billions of random numbers take a CPU minutes
            peer = transformers.AutoModelForCausalLM.from_config(config, dtype=own.dtype)
    peer.generation_config = transformers.GenerationConfig(pad_token_id=0)  # no text ends before its time
    return peer.to(model.device).eval()


def unquantized(model: Transformer) -> Transformer:
    """A model with no memory, in the shape of this one and its dtype."""
    with torch.device("meta"):
        own = Transformer(dataclasses.replace(model.config, quantization=None, mtp=False)).to(model.dtype)
    own.settle(model.dtype)
    return own


def run_transformers(peer, prompts: list[list[int]], case: Case, **settings) -> Run:
    """generate() as a user calls it."""
    times: list[float] = []

    def note(ids: torch.Tensor, _) -> torch.Tensor:  # called after each step, as a criterion to stop
        machine.synchronize(peer.device)
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ids = torch.tensor(prompts, device=peer.device)
    machine.synchronize(peer.device)
    start = time.perf_counter()
    peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.new_tokens, do_sample=False,
                  stopping_criteria=[note], **settings)
    run = Run.at(start, times)
    return Run(None, run.decode_s, run.steps_s) if case.depth else run


def transformers(source: str | Path, model: Transformer, case: Case, compile: bool) -> Iterator[System]:
    """Eager with its default cache, and with a static cache and its own compilation."""
    peer, prompts = as_transformers(source, model), case.prompts(model.config.vocab_size)
    from transformers import CompileConfig, __version__
    compiled = CompileConfig(mode="reduce-overhead", fullgraph=True)
    compiled._compile_all_devices = True  # it would leave a CPU uncompiled
    static = dict(cache_implementation="static", compile_config=compiled)
    for name, settings in {"eager": {}, "compiled": static}.items():
        if name == "eager" or compile:
            yield System(f"transformers {name}", functools.partial(run_transformers, peer, prompts, case, **settings),
                         step_bytes(unquantized(model), case, False), short(model.dtype), None,
                         {"version": __version__})


# -- llama.cpp --------------------------------------------------------------------------------------------------------

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # its best setting on Linux, as it is ours
INT8_CACHES = ["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"]  # a scale for each 32 numbers
ON_CPU, ON_GPU = ("-ngl", "0"), ("-ngl", "99")


def with_attention(options: list[str], tokens: int, positions: int) -> list[str]:
    """Options with the faster of its attentions for so many tokens at once over so many positions: flash attention,
    its default, takes up to three times as long on a CPU for few tokens behind many."""
    plain = ON_CPU in itertools.pairwise(options) and "-fa" not in options and tokens < 64 and positions >= 128
    return [*options, "-fa", "off"] if plain else options


def ask_llama(command: list[str]) -> dict:
    """The line of JSON that one of its benchmarks says, among others."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | HUGE_PAGES)
    try:
        line, = (line for line in done.stdout.splitlines() if line.startswith('{"'))
        return json.loads(line)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Absent(f"{command[0]} failed with exit code {done.returncode}: {last}") from None


def run_llama(program: str, case: Case, options: list[str]) -> tuple[Run, dict]:
    """Its own benchmark, once for the prompt and once for the tokens after it, or for several rows the other one, which
    does both in one go; also what it says of itself."""
    steps = case.new_tokens - 1  # the first belongs to the prompt
    filled, threads = case.depth + case.prompt_length, str(torch.get_num_threads())
    if case.batch > 1:
        room = -(-(filled + steps) // 256) * 256  # of a row: it rounds less down
        found = ask_llama([program, *with_attention(options, case.batch, filled + steps), "-npp", str(filled), "-ntg",
                           str(steps), "-npl", str(case.batch), "-c", str(case.batch * room), "--output-format",
                           "jsonl", "-t", threads])
        return Run(None if case.depth else found["t_pp"], found["t_tg"]), found
    seconds = []
    for own, size in ((with_attention(options, case.prompt_length, filled),
                       ["-p", str(case.prompt_length), "-n", "0", "-d", str(case.depth)]),
                      (with_attention(options, 1, filled + steps), ["-p", "0", "-n", str(steps), "-d", str(filled)])):
        found = ask_llama([program, *own, *size, "-r", "1", "-o", "jsonl", "-t", threads])
        seconds.append(found["avg_ns"] / 1e9)
    return Run(*seconds), found


def start_llama(program: str, file: Path, case: Case) -> float:
    """Seconds from the start of its process to the first token behind a prompt, the file being in memory already."""
    start = time.perf_counter()
    done = subprocess.run([program, "-m", str(file), "-t", str(torch.get_num_threads()), "-p", str(case.prompt_length),
                           "-n", "0", "-d", "0", "-r", "1", "--no-warmup"], capture_output=True,
                          env=os.environ | HUGE_PAGES)
    if done.returncode:  # a failure is no fast start
        raise Absent(f"{program} failed with exit code {done.returncode} when it was started for one prompt")
    return time.perf_counter() - start


def llama_cpp(model: Transformer, exact: Callable[[], Transformer], case: Case, program: str,
              folder: str) -> Iterator[System]:
    """llama-bench on a GGUF of our numbers, which `exact` gives unpacked. `folder` keeps the file for more cases."""
    if shutil.which(program) is None:
        raise Absent(f"{program} is not on PATH; say where it is with --llama_bench FILE")
    rows = str(Path(shutil.which(program)).with_name("llama-batched-bench"))
    if case.batch > 1 and shutil.which(rows) is None:
        raise Absent(f"{rows}, which has batches, is not there; build it beside llama-bench")
    quantization, gpu = model.config.quantization, model.device.type != "cpu"
    file = Path(folder) / f"{quantization}.gguf"
    if not file.exists():
        export(exact(), None, file)
        os.sync()  # else it would start while its file is being written
    attended = case.depth + case.prompt_length + case.new_tokens / 2
    int8, size = model.kv_dtype == torch.int8, 2 / model.dtype.itemsize  # it has float16
    cache = model.cache_bytes_read(attended) if int8 else unrounded(model, attended) * size
    options = ["-m", str(file), *(ON_GPU if gpu else ON_CPU), *(INT8_CACHES if int8 else [])]
    _, found = run_llama(program, Case(1, 2), options)
    theirs = {"int8": "Q8_0", "int4": "Q4_0, head Q8_0", "int4-pure": "Q4_0"}
    timed = functools.partial(run_llama, program if case.batch == 1 else rows, case, options)
    yield System("llama.cpp", lambda: timed()[0], found["model_size"] + case.batch * cache, short(model.dtype),
                 theirs[quantization.mode] if quantization else None,
                 {"version": found["build_commit"], "start_warm_s": start_llama(program, file, case)})


# -- gpt-fast ---------------------------------------------------------------------------------------------------------

class GptFast:
    """gpt-fast in a process of its own, as its modules are called like ours: it answers each line with a run."""

    def __init__(self, arguments: dict) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, str(Path(__file__).with_name("gpt_fast_peer.py")), json.dumps(arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                                        text=True, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})

    def ask(self) -> dict:
        """The next line of what it says."""
        for line in self.process.stdout:
            if line.startswith('{"'):  # it may print more
                return json.loads(line)
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["it said nothing"])[-1]
        raise Absent(f"gpt-fast ended with exit code {self.process.wait()}: {last}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def run(self, case: Case) -> Run:
        with contextlib.suppress(BrokenPipeError):  # it has ended: `ask` says why
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        said = self.ask()
        return Run(None if case.depth else said["ttft_s"], said["decode_s"])


def gpt_fast(model: Transformer, case: Case, folder: str | None) -> Iterator[System]:
    """Random weights of this shape: it has no loader for our folders. Its int4 has a scale and a zero for 32."""
    if folder is None:
        raise Absent("say where it is with --gpt_fast DIR")
    c = model.config
    attention = c.mixers.get("full")
    if not llama_shaped(c) or attention.head_dim * attention.n_heads != c.dim or attention.rope.kind == "linear":
        raise Absent("it holds models of Llama's architecture only")
    if not (Path(folder) / "quantize.py").is_file():
        raise Absent(f"--gpt_fast {folder} does not hold its files")
    mode = c.quantization.mode.removesuffix("-pure") if c.quantization else None
    rope = None if attention.rope.kind == "default" else dict(
        factor=attention.rope.factor, low_freq_factor=attention.rope.low_freq_factor,
        high_freq_factor=attention.rope.high_freq_factor,
        original_max_position_embeddings=attention.rope.original_max_seq_len)
    shape = dict(block_size=c.max_seq_len, vocab_size=c.vocab_size, n_layer=len(c.layer_types), dim=c.dim,
                 n_head=attention.n_heads, n_local_heads=attention.n_kv_heads, intermediate_size=c.ffn_dim,
                 rope_base=attention.rope.theta, norm_eps=c.norm_eps, rope_scaling=rope)
    peer = GptFast(dict(folder=str(Path(folder).resolve()), shape=shape, mode=mode, device=str(model.device),
                        dtype=short(model.dtype), batch=case.batch, prompt=case.prompts(c.vocab_size)[0],
                        new_tokens=case.new_tokens))
    said = peer.ask()
    yield System("gpt-fast", lambda: peer.run(case), said["bytes"] + case.batch * unrounded(model, case.length),
                 short(model.dtype), mode, {"version": Path(folder).resolve().name}, peer.close)


def peers(wanted: Sequence[str], source: str | Path, model: Transformer, load: Callable[..., Transformer], case: Case,
          llama_bench: str, gpt_fast_folder: str | None, folder: str) -> Iterator[System]:
    """The systems of the peers asked for. `source`: a checkpoint's folder or a shape, of which the case's model is;
    `load(**settings)` makes it anew; `folder` takes files."""
    quantized = model.config.quantization is not None
    for name in wanted:
        try:
            if name.startswith("transformers"):
                yield from transformers(source, model, case, name == "transformers")
            elif name == "llama.cpp":
                settings = dict(dtype="fp32") if quantized else {}  # 16 bits would be packed
                plain = not quantized and model.device.type == "cpu"
                yield from llama_cpp(model, lambda: model if plain else load(device="cpu", **settings),  # noqa: B023
                                     case, llama_bench, folder)
            else:
                yield from gpt_fast(model, case, gpt_fast_folder)
        except (Absent, UserError) as e:  # the latter: no memory for its weights, no form for such a model
            print(f"{name} is skipped: {e}", file=sys.stderr)
