"""What each way to round the demo's weights costs in quality: a table of docs/measured.md.

    python -m scripts.quantization_table --output benchmarks/quality.jsonl

Every row is the demo with its numbers replaced by what the rounded ones mean, in float32, on held-out files of the
Python standard library; calibration text is from the files it was trained on. Needs requirements-dev.txt.
"""
from collections.abc import Callable

import torch
from torch import Tensor

import ops
import rounding
from calibration import Calibration, windows
from checkpoint import Checkpoint
from config import Quantization, read_json
from errors import Parser, run_command
from families import config_from_dict
from generate import DEMO, load_model
from loader import plan
from model import Transformer
from quantize import groups
from scripts.eval import evaluate
from scripts.rows import add_output, check, origin, write
from scripts.tables import quality_table
from scripts.train_demo import corpus

TEXT = 200_000  # characters that are scored
Rounded = tuple[Tensor, float]  # what the numbers mean, and the bits each takes, scales included


def to_int8(w: Tensor) -> Rounded:
    return ops.dequantize(*rounding.to_int8(w)), 8 + 32 / w.shape[-1]


def to_int4(w: Tensor, group: int, search: bool) -> Rounded:
    return ops.dequantize(*rounding.to_int4(w, group, search)), 4 + 16 / group


def to_int4_with_zero(w: Tensor, group: int) -> Rounded:
    """Between the least and the largest of a group, with a zero point of 4 bits."""
    x = w.unflatten(-1, (-1, group))
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 15).half().float()
    zero = rounding.round_to(-low, scale, 0, 15)
    return ((rounding.round_to(x, scale, -15, 15) + zero).clamp(0, 15) - zero).mul(scale).flatten(-2), 4 + 20 / group


def calibrated(group: int, text: str) -> Callable[[str, Tensor], Rounded]:
    """By GPTQ: the whole model is done at once, and its matrices are handed out by name."""
    config, checkpoint = config_from_dict(read_json(DEMO / "config.json")), Checkpoint(DEMO)
    with torch.device("meta"):
        model = Transformer(config).eval()
    sizes = {name: size for name, size in groups(model, Quantization("int4", group)).items() if size}
    _, tokenizer = load_model(DEMO, "cpu")
    run = Calibration(model, checkpoint, plan(model, checkpoint), sizes, windows(text, tokenizer, config.max_seq_len),
                      torch.device("cpu"), torch.float32)
    done = {name: (w, s) for i in range(len(config.layer_types)) for name, w, s in run.layer(i)}
    return lambda name, w: (ops.dequantize(*done[name]), 4 + 16 / group)


def model_of(body: Callable[[str, Tensor], Rounded], ends: Callable[[Tensor], Rounded]) -> tuple[Transformer, float]:
    """The demo with its layers and its embedding (which is its head) replaced; bits for each of all their numbers."""
    model, _ = load_model(DEMO, "cpu", "fp32")
    bits = total = 0.0
    for name in groups(model, Quantization("int8")):
        matrix = model.get_submodule(name)
        values, each = ends(matrix.weight) if name == "tok_embeddings" else body(name, matrix.weight)
        matrix.weight.data = values
        bits, total = bits + each * values.numel(), total + values.numel()
    model.settle(torch.float32)
    return model, bits / total


def with_int8_caches(made: tuple[Transformer, float]) -> tuple[Transformer, float]:
    made[0].kv_dtype = torch.int8
    return made


def with_large_keys(made: tuple[Transformer, float]) -> tuple[Transformer, float]:
    """Two numbers of each key 30 times as large, as in models that have such, and those of queries as much smaller: the
    same products. They are a pair of the rotary embedding, so that it keeps them alone."""
    for mixer in made[0].mixers:
        c = mixer.config
        heads = mixer.wqkv.weight.data.view(-1, c.head_dim, made[0].config.dim)
        pair = [5, 5 + c.head_dim // 2]
        heads[:c.n_heads, pair] /= 30
        heads[c.n_heads:c.n_heads + c.n_kv_heads, pair] *= 30
    return made


def without_turning(made: tuple[Transformer, float]) -> tuple[Transformer, float]:
    """Caches that round keys as they are."""
    model, setup = made[0], made[0].setup_caches

    def plain(*sizes) -> None:
        setup(*sizes)
        for mixer in model.mixers:
            mixer.cache.turn, mixer.cache.gain = torch.eye(mixer.config.head_dim), 1.0

    model.setup_caches = plain
    return made


def rows(text: str) -> dict[str, tuple[Transformer, float]]:
    def same(w: Tensor) -> Rounded:
        return w, 16.0

    found = {"bf16": model_of(lambda _, w: same(w), same),
             "int8": model_of(lambda _, w: to_int8(w), to_int8),
             "int8 head, the rest bf16": model_of(lambda _, w: same(w), to_int8),
             "int4 g32 head, the rest bf16": model_of(lambda _, w: same(w), lambda w: to_int4(w, 32, True))}
    for g in Quantization.GROUPS:
        best = calibrated(g, text)
        found |= {f"int4 g{g}, nearest": model_of(lambda _, w, g=g: to_int4(w, g, False), to_int8),
                  f"int4 g{g}, nearest, zero points": model_of(lambda _, w, g=g: to_int4_with_zero(w, g), to_int8),
                  f"int4 g{g}, scales searched": model_of(lambda _, w, g=g: to_int4(w, g, True), to_int8),
                  f"int4 g{g}, GPTQ": model_of(best, to_int8)}
        if g == 32:
            found |= {"int4-pure g32, scales searched": model_of(lambda _, w: to_int4(w, 32, True),
                                                                 lambda w: to_int4(w, 32, True)),
                      "int4-pure g32, GPTQ": model_of(best, lambda w: to_int4(w, 32, True)),
                      "int4 g32, GPTQ; keys and values int8": with_int8_caches(model_of(best, to_int8))}
    def plain() -> tuple[Transformer, float]:
        return with_int8_caches(model_of(lambda _, w: same(w), same))
    return found | {"bf16; keys and values int8": plain(),
                    "the same; two of 64 numbers of a key 30 times as large": with_large_keys(plain()),
                    "the same, keys not turned": without_turning(with_large_keys(plain()))}


def main(argv: list[str]) -> None:
    p = Parser(prog="python -m scripts.quantization_table", description=__doc__.splitlines()[0])
    add_output(p, whole=True)
    args = p.parse_args(argv)
    check(args)
    train, held_out = ("\n".join(texts) for texts in corpus())
    held_out = held_out[:TEXT]
    _, tokenizer = load_model(DEMO, "cpu")
    with torch.no_grad():
        models = rows(train)
    reference, *others = (model for model, _ in models.values())
    scores = evaluate([reference, *others], reference, torch.tensor(tokenizer.encode(held_out)), 512)
    about = {"model": "demo", **origin("quantization_table", argv, torch.device("cpu"))}
    found = [{"kind": "quality", "weights": name, "bits": bits, "perplexity": score.perplexity,
              "kl": score.divergence / score.tokens, "agreement": 100 * score.agreed / score.tokens, **about}
             for (name, (_, bits)), score in zip(models.items(), scores, strict=True)]
    print(quality_table(found))
    write(args.output, found)


if __name__ == "__main__":
    run_command(main)
