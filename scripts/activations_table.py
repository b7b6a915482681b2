"""What rounding activations to 8 bits costs, ours beside llama.cpp's: a table of docs/measured.md.

    python -m scripts.activations_table --output benchmarks/activations.jsonl

Everything is held against the same predictions, those of the demo's weights with float32 activations, by the protocol
of llama-perplexity: chunks of 512 tokens, each with the text's first token (the sign of a beginning) in place of its
own, of which the last 255 are predicted. The predictions are in the form of its base file, so that its divergences and
ours are of the very same numbers. Needs llama-perplexity and llama-quantize, a C++ compiler and requirements-dev.txt.
Glossary: n chunks, S tokens of a chunk, T predicted ones, V vocabulary.
"""
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import ops
from config import Quantization
from errors import Parser, UserError, run_command
from generate import DEMO, load_model
from layers import Matrix
from model import Transformer
from scripts.eval import Score, log_probabilities
from scripts.export_gguf import export, library
from scripts.quantization_table import TEXT
from scripts.rows import add_output, check, origin, write
from scripts.tables import activations_table
from scripts.train_demo import corpus

CHUNK = 512
PREDICTED = CHUNK - 1 - CHUNK // 2
LEAST = -16.0  # log-probabilities from here down are left out of divergences
STEPS = 65535  # to which a base's log-probabilities are rounded, from the least to the greatest of a token
# llama-quantize's options and type for the same mix of widths as ours
THEIRS = {"int8": ([], "Q8_0"), "int4": (["--pure", "--token-embedding-type", "q8_0"], "Q4_0"),
          "int4-pure": (["--pure"], "Q4_0")}
PRINTED = {"perplexity": r"Mean PPL\(Q\)", "kl": r"Mean +KLD", "agreement": "Same top p"}  # by llama-perplexity


# -- the base ---------------------------------------------------------------------------------------------------------

def encoded(log_p: Tensor) -> Tensor:
    """float32 [T, V] -> uint16 [T, 4 + V]: step and least as float32, then steps above the least, which is no more than
    16 below the greatest."""
    greatest = log_p.amax(-1, keepdim=True)
    least = torch.maximum(log_p.amin(-1, keepdim=True), greatest + LEAST)
    step = (greatest - least) / STEPS
    q = ((log_p - least) / step).round_().clamp_(0, STEPS)
    return torch.cat([step.view(torch.uint16), least.view(torch.uint16), q.int().to(torch.uint16)], -1)


def decoded(codes: Tensor) -> Tensor:
    """What such numbers mean, float32 [T, V]; those that are left out are so low that their probability is 0."""
    step, least = codes[:, :4].contiguous().view(torch.float32).split(1, -1)
    log_p = codes[:, 4:].float() * step + least
    return log_p.where(log_p > LEAST, -1e4)


@dataclass
class Base:
    """The predictions that all others are held against."""
    chunks: Tensor  # int64 [n, S]
    predictions: list[Tensor]  # of each chunk, uint16 [T, 4 + V]

    @classmethod
    def of(cls, model: Transformer, ids: Tensor) -> "Base":
        chunks = ids[:len(ids) // CHUNK * CHUNK].view(-1, CHUNK).clone()
        chunks[:, 0] = ids[0]
        return cls(chunks, [encoded(log_probabilities(model, chunk[:-1], PREDICTED)) for chunk in progress(chunks)])

    def write(self, path: Path) -> None:
        """As llama-perplexity --kl-divergence-base does."""
        sizes = struct.pack("=8siii", b"_logits_", CHUNK, self.predictions[0].shape[-1] - 4, len(self.chunks))
        with path.open("wb") as file:
            file.write(sizes + self.chunks.int().numpy().tobytes())
            for codes in self.predictions:
                file.write(codes.numpy().tobytes())

    def score(self, model: Transformer) -> dict:
        score = Score()
        for chunk, codes in zip(progress(self.chunks), self.predictions, strict=True):
            log_p = log_probabilities(model, chunk[:-1], PREDICTED)
            score.add(log_p, chunk[-PREDICTED:], decoded(codes))
        return {"perplexity": score.perplexity, "kl": score.divergence / score.tokens,
                "agreement": 100 * score.agreed / score.tokens}


def progress(chunks: Tensor) -> Iterable[Tensor]:
    return tqdm(chunks, desc="chunks", leave=False, disable=None)


# -- llama.cpp --------------------------------------------------------------------------------------------------------

def output_of(*command: object) -> str:
    """All that a program says. UserError with its last line if it fails."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    except OSError as e:
        raise UserError(f"{command[0]} cannot be run ({e})") from None
    said = done.stdout + done.stderr
    if done.returncode:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{command[0]} failed with exit code {done.returncode}: {last}")
    return said


@dataclass
class LlamaCpp:
    """Its programs, and the base in their form."""
    perplexity: str
    quantize: str
    base: Path

    def score(self, file: Path) -> dict:
        said = output_of(self.perplexity, "-m", file, "--kl-divergence", "--kl-divergence-base", self.base, "-c", CHUNK,
                         "-t", torch.get_num_threads(), "-ngl", 0)
        found = {name: re.search(rf"^{words} *: +(\S+)", said, re.M) for name, words in PRINTED.items()}
        if None in found.values():
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"{self.perplexity} gave no divergence of {file.name}: {last}")
        return {name: float(match[1]) for name, match in found.items()} | {"version": self.version()}

    def version(self) -> str:
        found = re.search(r"version: *(.+)", output_of(self.perplexity, "--version"))
        return found[1] if found else "unknown"

    def rounded(self, file: Path, mode: str) -> Path:
        """Its own rounding of a bfloat16 file."""
        options, kind = THEIRS[mode]
        made = file.with_name(f"{mode}-{kind}.gguf")
        output_of(self.quantize, *options, file, made, kind)
        return made


def program(name: str, folder: Path | None) -> str:
    found = shutil.which(name, path=folder)
    if found is None:
        raise UserError(f"{name} is not {f'in {folder}' if folder else 'on PATH'}; say where llama.cpp's programs are "
                        f"with --llama_cpp DIR")
    return found


# -- the table --------------------------------------------------------------------------------------------------------

def packed(model: Transformer) -> Transformer:
    """The same model with the layout of its device, which loading makes of 16-bit ones only."""
    for module in model.modules():
        if isinstance(module, Matrix):
            module.pack()
    model.settle(model.dtype)
    return model


def plain_scores(base: Base, llama: LlamaCpp, file: Path) -> Iterator[tuple[str, dict]]:
    """(system, its score) for the weights as they are, of which `file` is made."""
    yield "exact", base.score(load_model(DEMO, "cpu", "fp32")[0])
    model, tokenizer = load_model(DEMO, "cpu", "bf16")
    yield "ours", base.score(model)
    export(model, tokenizer, file)
    yield "llama.cpp", llama.score(file)


def quantized_scores(base: Base, llama: LlamaCpp, file: Path, mode: str) -> Iterator[tuple[str, dict]]:
    """(system, its score) for quantized weights; `file` holds them as they were."""
    model, tokenizer = load_model(DEMO, "cpu", "fp32", mode)
    yield "exact", base.score(model)
    ours = file.with_name(f"{mode}.gguf")
    export(model, tokenizer, ours)
    yield "ours, float32", base.score(packed(model))
    yield "ours", base.score(load_model(DEMO, "cpu", "bf16", mode)[0])
    yield "llama.cpp", llama.score(ours)
    yield "llama.cpp's rounding", llama.score(llama.rounded(file, mode))


def rows(ids: Tensor, programs: tuple[str, str], about: dict) -> Iterator[dict]:
    base = Base.of(load_model(DEMO, "cpu", "fp32")[0], ids)
    with tempfile.TemporaryDirectory() as folder:
        llama, file = LlamaCpp(*programs, Path(folder, "base")), Path(folder, "bf16.gguf")
        base.write(llama.base)
        found = {"bf16": plain_scores(base, llama, file)}
        found |= {str(Quantization(mode)): quantized_scores(base, llama, file, mode) for mode in THEIRS}
        for weights, scores in found.items():
            for system, score in scores:
                yield {"kind": "activations", "weights": weights, "system": system, **score, **about}


def main(argv: list[str]) -> None:
    p = Parser(prog="python -m scripts.activations_table", description=__doc__.splitlines()[0])
    p.add_argument("--llama_cpp", type=Path, metavar="DIR", help="where llama.cpp's programs are (default: on PATH)")
    add_output(p, whole=True)
    args = p.parse_args(argv)
    check(args)
    programs = program("llama-perplexity", args.llama_cpp), program("llama-quantize", args.llama_cpp)
    library()
    if not ops.packs("cpu"):
        raise UserError("activations are rounded by the CPU kernels only, which need a C++ compiler; install one")
    _, tokenizer = load_model(DEMO, "cpu")
    ids = torch.tensor(tokenizer.encode("\n".join(corpus()[1])[:TEXT]))
    about = {"model": "demo", **origin("activations_table", argv, torch.device("cpu"))}
    found = list(rows(ids, programs, about))
    print(activations_table(found))
    write(args.output, found)


if __name__ == "__main__":
    run_command(main)
