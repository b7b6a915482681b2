"""Broken files and options by the thousand: each must either work or give one clear line.

    python -m scripts.fuzz --count 20000 --seed 1                   # all targets in turn
    python -m scripts.fuzz --targets weights --seed 1 --from 812 --count 1      # one case again, with its traceback

A case is made from the seed and its number alone, so what was found can be found again. Cases run in a process of their
own, which may crash, hang or ask for too much memory; each of that is a finding, as is any exception but `UserError`.
"""
import argparse
import contextlib
import io
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import generate
from checkpoint import Checkpoint
from config import read_json
from errors import Parser, UserError, run_command
from families import config_from_dict, shapes
from loader import load_weights
from model import Transformer
from scripts import benchmark, roofline
from tokenizer import ChatTemplate, Stream, load_tokenizer

BASE = generate.DEMO.with_name("demo-draft")
PATIENCE, IMPORTING = 20, 60  # seconds for a case, and more for the first of a process
MEMORY = 6 << 30  # bytes of addresses that a process may have
SECRET = "what no template may read"
ODD = [None, True, False, -1, 0, 1, 2, 3, 7, 2 ** 31, 2 ** 63, -2 ** 63, 10 ** 30, 0.5, -0.0, 1e308, float("nan"),
       float("inf"), "", "x", "0", "\0", "é" * 9, "A" * 5000, [], [[]], [None], [1, 2], ["x"], {}, {"x": 1}, {"": None}]

Random = random.Random


# -- breaking things --------------------------------------------------------------------------------------------------

def break_json(document: Any, rng: Random) -> Any:
    """A copy with a few values, at any depth, changed, left out, or put elsewhere."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = list(places(document))
        if not spots:
            return rng.choice(ODD)
        holder, key = rng.choice(spots)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other, at = rng.choice(spots)
            with contextlib.suppress(LookupError):
                holder[key] = json.loads(json.dumps(other[at]))
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "rope_scaling", "quantization_config", "text_config"))] = rng.choice(ODD)
        elif kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * rng.choice((-1, 0, 2, 3, 0.5, 10 ** 6)) + rng.choice((-1, 0, 1))
        else:
            holder[key] = rng.choice(ODD)
    return rng.choice(ODD) if rng.random() < 0.01 else document


def places(document: Any) -> "list[tuple[Any, Any]]":
    """Every (object or list, key) in a document, of long lists the first few."""
    if isinstance(document, dict):
        inner = list(document.items())[:2000]
    elif isinstance(document, list):
        inner = list(enumerate(document))[:5]
    else:
        return []
    return [spot for key, value in inner for spot in ((document, key), *places(value)[:200])]


def break_bytes(data: bytes, rng: Random) -> bytes:
    """A few bytes changed, cut out, put in or repeated; or the end missing."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, n = rng.randrange(len(changed) + 1), rng.choice((1, 2, 8, 100, 5000))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at:at + n] = rng.randbytes(len(changed[at:at + n]))
        elif kind == 1:
            del changed[at:at + n]
        elif kind == 2:
            changed[at:at] = rng.randbytes(n)
        elif kind == 3:
            changed[at:at] = changed[max(0, at - n):at]
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def write_json(path: Path, document: Any, rng: Random) -> None:
    data = json.dumps(document).encode()
    path.write_bytes(break_bytes(data, rng) if rng.random() < 0.3 else data)


# -- targets ----------------------------------------------------------------------------------------------------------

def fuzz_config(rng: Random, folder: Path) -> None:
    known = shapes()
    document = known[rng.choice(list(known))]
    write_json(folder / "config.json", break_json(document, rng), rng)
    config = config_from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):
        Transformer(config)


def link(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).symlink_to(BASE / name)


def load(folder: Path) -> None:
    config = config_from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config).eval()
    Checkpoint(folder)
    load_weights(model, folder, torch.device("cpu"), torch.float32)


def fuzz_weights(rng: Random, folder: Path) -> None:
    """The header of a safetensors file, or the file."""
    data = (BASE / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header, rest = data[8:end], data[end:]
    kind = rng.randrange(3)
    if kind == 0:
        header = json.dumps(break_json(json.loads(header), rng)).encode()
        data = len(header).to_bytes(8, "little") + header + rest
    elif kind == 1:
        data = data[:8] + break_bytes(header, rng) + rest
    else:
        data = break_bytes(data[:end + 64], rng) + data[end + 64:]
    (folder / "model.safetensors").write_bytes(data)
    link(folder, "config.json")
    load(folder)


def fuzz_index(rng: Random, folder: Path) -> None:
    """Two shards, and the file that says which tensor is where."""
    tensors = load_file(BASE / "model.safetensors")
    names = sorted(tensors)
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    broken = break_json(index, rng)
    if rng.random() < 0.3 and isinstance(broken, dict) and isinstance(broken.get("weight_map"), dict):
        broken["weight_map"][rng.choice(names)] = rng.choice(
            ("../../etc/passwd", "/dev/zero", "", ".", "x.safetensors", "config.json", "a/b", "\0", "é"))
    write_json(folder / "model.safetensors.index.json", broken, rng)
    link(folder, "config.json")
    load(folder)


def fuzz_tokenizer(rng: Random, folder: Path) -> None:
    broken = rng.choice(("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        if name != broken and not (broken == "tokenizer.model" and name == "tokenizer.json"):
            link(folder, name)
    if broken == "tokenizer.model":
        (folder / broken).write_bytes(break_bytes((BASE / broken).read_bytes(), rng))
    else:
        write_json(folder / broken, break_json(read_json(BASE / broken), rng), rng)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("def f(x):\n    return 'é'")
    tokenizer.decode([i for i in ids if i >= 0])
    stream = Stream(tokenizer, ids)
    for i in rng.choices(range(max(tokenizer.vocab_size, 1)), k=4):
        stream.push(i)
    stream.flush()


WORDS = ["messages", "m", "m.content", "m['role']", "tools", "loop", "loop.index", "bos_token", "eos_token", "x", "''",
         "1", "-1", "0.5", "[1, 2]", "{'a': 1}", "none", "range(5)", "namespace(a=1)", "strftime_now('%Y')", "dict()",
         "raise_exception", "self", "cycler", "lipsum", "messages[0]", "messages|length", "add_generation_prompt"]
ESCAPES = ["''.__class__.__mro__[1].__subclasses__()", "self.__init__.__globals__", "lipsum.__globals__['os'].environ",
           "cycler.__init__.__globals__.os.popen('env').read()", "range.__self__", "messages.append(1)",
           "raise_exception.__globals__", "raise_exception.__func__.__globals__['os'].environ",
           "strftime_now.__globals__", "''|attr('__class__')", "'{0.__class__}'.format(1)", "x.__dict__",
           "'%(x)s'|format(x=messages.__class__)", "messages.__reduce__()", "(1).__class__.__base__",
           "namespace.__init__.__globals__.__builtins__.open('/proc/self/environ').read()", "tojson.__globals__",
           "messages|map(attribute='__class__')|list", "[]|groupby('__class__')", "''.join.__self__.__class__"]
FILTERS = ["upper", "tojson", "length", "list", "join(',')", "trim", "first", "last", "map(attribute='content')", "int",
           "sort", "items", "default('x')", "replace('a', 'b')", "batch(2)", "nothing", "e", "tojson(indent=2)"]
SHAPES = ["{{{{ {0} }}}}", "{{{{ {0}|{2} }}}}", "{{% for m in {0} %}}{{{{ {1} }}}}{{% endfor %}}",
          "{{% if {0} == {1} %}}a{{% else %}}b{{% endif %}}", "{{{{ {0} + {1} }}}}", "{{{{ {0}[{1}] }}}}",
          "{{% generation %}}{{{{ {0} }}}}{{% endgeneration %}}", "{{{{ raise_exception({0}) }}}}", "{{# {0} #}}",
          "{{% macro f(x) %}}{{{{ {0} }}}}{{% endmacro %}}{{{{ f({1}) }}}}", "{{{{ {0} is {1} }}}}", "{{% break %}}",
          "{{{{ ({0}).{1} }}}}", "{{% import {0} as x %}}", "{{% include {0} %}}", "{{% {0} %}}", "{{{{ {0}({1}) }}}}",
          "{{% set x.a = {0} %}}", "{{{{ {0} ** {1} }}}}", "{{{{ {0} % {1} }}}}", "{{{{ {0} ~ {1} }}}}", "{{-",
          "{{% raw", "{{% set x = {0} %}}"]


def fuzz_template(rng: Random, folder: Path) -> None:
    def word() -> str:
        return rng.choice(ESCAPES if rng.random() < 0.2 else WORDS)
    source = "".join(rng.choice(SHAPES).format(word(), word(), rng.choice(FILTERS)) for _ in range(rng.randint(1, 4)))
    source = break_bytes(source.encode(), rng).decode(errors="replace") if rng.random() < 0.2 else source
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = ChatTemplate(source, {"bos_token": "<s>"}).render(messages)
    assert isinstance(text, str) and SECRET not in text and "__globals__" not in text.replace(source, ""), text[:200]
    assert messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], messages


VALUES = ["", "0", "1", "-1", "2", "1e9", "nan", "inf", "x", "None", "true", "9" * 30, "0.5", "a,b", "1,2", "auto",
          "cpu", "mps", "cuda", "cuda:7", "cuda:x", "int4", "int8", "bf16", "fp64", "lookup", "self", "mtp", "--json",
          "é", "/", "\0", ".", "..", "/dev/null", "/no/such", "Llama-3.2-1B", "H200", "here", "none", "demo"]


class Reached(Exception):
    """All options were taken: what comes next is the model."""


def stop_here(*_, **__) -> None:
    raise Reached


def fuzz_arguments(rng: Random, folder: Path) -> None:
    main, parser = rng.choice(((generate.main, generate.parser), (roofline.main, roofline.parser),
                               (benchmark.parse, benchmark.parser)))
    argv: list[str] = []
    for action in rng.sample(parser()._actions, rng.choice((0, 1, 2, 3, 5))):
        argv += [rng.choice(action.option_strings)] if action.option_strings else []
        argv += [rng.choice(VALUES)] if action.nargs != 0 or rng.random() < 0.05 else []
    known = {name: getattr(generate, name) for name in ("load_model", "load_random")}
    for name in known:
        setattr(generate, name, stop_here)
    try:
        with contextlib.suppress(Reached):
            main(argv)
    except SystemExit as e:
        assert e.code in (0, None), f"{argv}: exit code {e.code}"  # --help
    finally:
        for name, function in known.items():
            setattr(generate, name, function)


TARGETS: dict[str, Callable[[Random, Path], None]] = {
    "config": fuzz_config, "weights": fuzz_weights, "index": fuzz_index, "tokenizer": fuzz_tokenizer,
    "template": fuzz_template, "arguments": fuzz_arguments}


# -- a process of cases -----------------------------------------------------------------------------------------------

def outcome(target: str, seed: int, number: int, whole: bool = False) -> str:
    """`works`, `refused`, or what was found, with where it came from, or the whole traceback."""
    folder = Path(tempfile.mkdtemp())
    try:
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.redirect_stderr(io.StringIO()):
            TARGETS[target](Random(f"{target} {seed} {number}"), folder)
        return "works"
    except UserError as e:
        return "refused" if len(e.line) > 20 and e.line.isprintable() else f"no line for people: {e.line!r}"
    except BaseException as e:  # PyO3's panics are no Exceptions
        if whole:
            return traceback.format_exc()
        where = traceback.extract_tb(e.__traceback__)[-1]
        return f"{type(e).__name__}: {str(e)[:300]} ({Path(where.filename).name}:{where.lineno})"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def work(target: str, seed: int, numbers: range) -> None:
    """Say the outcome of each case, a JSON line each, in a process of limited memory."""
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    os.environ["READONCE_SECRET"] = SECRET
    say = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for number in numbers:
        said = outcome(target, seed, number, len(numbers) == 1)
        print(json.dumps([number, said]), file=say, flush=True)


def outcomes(target: str, seed: int, numbers: range):
    """(number, outcome) of each case; a process that dies or hangs is replaced, and that is the case's outcome."""
    at = numbers.start
    while at < numbers.stop:
        command = [sys.executable, "-m", "scripts.fuzz", "--targets", target, "--seed", str(seed), "--from", str(at),
                   "--count", str(numbers.stop - at), "--worker"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   cwd=generate.DEMO.parent.parent)
        lines: queue.Queue = queue.Queue()
        reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stdout] + [lines.put(None)])  # noqa: B023
        reader.start()
        patience = PATIENCE + IMPORTING
        while True:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                process.kill()
                yield at, f"hangs for more than {patience} s"
                at += 1
                break
            if line is None:
                if process.wait():
                    yield at, f"ended the process with code {process.returncode}: {process.stderr.read()[-200:]!r}"
                    at += 1
                break
            number, said = json.loads(line)
            yield number, said
            at, patience = number + 1, PATIENCE
        process.kill()
        reader.join()
        process.communicate()


# -- command line -----------------------------------------------------------------------------------------------------

def parser() -> Parser:
    p = Parser(prog="python -m scripts.fuzz", description=__doc__.splitlines()[0])
    p.add_argument("--targets", default=",".join(TARGETS), help="commas (default: all: %(default)s)")
    p.add_argument("--count", type=int, default=20000, help="cases in all, shared among targets (default %(default)s)")
    p.add_argument("--seed", type=int, default=1, help="default %(default)s")
    p.add_argument("--from", type=int, default=0, dest="first", help="number of the first case (default %(default)s)")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    targets = args.targets.split(",")
    if unknown := [name for name in targets if name not in TARGETS]:
        raise UserError(f"--targets {unknown[0]!r}; allowed: {', '.join(TARGETS)}")
    if args.count < 1 or args.first < 0:
        raise UserError(f"--count is {args.count} and --from {args.first}; at least 1 and 0 are expected")
    numbers = range(args.first, args.first + -(-args.count // len(targets)))
    if args.worker:
        work(targets[0], args.seed, numbers)
        return 0
    found, start = 0, time.perf_counter()
    for target in targets:
        kinds: Counter = Counter()
        for number, said in tqdm(outcomes(target, args.seed, numbers), target, len(numbers), leave=False, disable=None):
            kinds[said if said in ("works", "refused") else "found"] += 1
            if said not in ("works", "refused"):
                print(f"{target} {number}: {said}", flush=True)
        found += kinds["found"]
        print(f"{target}: {len(numbers)} cases from {args.first}, seed {args.seed}: {kinds['works']} work, "
              f"{kinds['refused']} are refused in a line, {kinds['found']} found", flush=True)
    print(f"{len(numbers) * len(targets)} cases in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    run_command(main)
