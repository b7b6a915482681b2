"""A checkpoint as a GGUF file, for llama.cpp: the same numbers, so that the two can be compared.

    python -m scripts.export_gguf --output demo.gguf                                               # the demo, bf16
    python -m scripts.export_gguf --checkpoint_path DIR --quantize int4 --output model.gguf
    python -m scripts.export_gguf --random_weights Llama-3.2-1B --quantize int4-pure --output 1b.gguf

Llama, Mistral without a window, Qwen2.5 and Qwen3, all dense. What is not quantized keeps its dtype (BF16, F16, F32);
norms and biases are F32. int4 becomes Q4_0, bit for bit: a group of 64 or 128 repeats its scale in each block of 32.
int8 becomes Q8_0, whose scales are float16: that rounds ours, which are float32 and one for a row. Chat templates are
left out. Needs the extra gguf (requirements-dev.txt).
Glossary: M rows of a matrix, K columns, n blocks of 32 columns, H heads, E head_dim, V vocabulary.
"""
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import resolve_checkpoint
from config import AttentionConfig, DeltaNetConfig, ModelConfig, Quantization, Rope, read_json
from errors import Parser, UserError, run_command
from families import config_from_dict, config_of_shape
from generate import DEMO, load_model, load_random
from layers import Matrix, rope_frequencies
from model import Transformer
from scripts.rows import check
from tokenizer import JsonTokenizer, Tokenizer

BLOCK = 32  # numbers that share a scale in Q4_0 and Q8_0
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "Q8_0": 34 / BLOCK, "Q4_0": 18 / BLOCK}  # of a number, with its share of scales
PLAIN = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def library():
    """The gguf package of llama.cpp."""
    try:
        import gguf
    except ImportError:
        raise UserError("the package gguf is not installed; pip install -r requirements-dev.txt") from None
    return gguf


# -- which models -----------------------------------------------------------------------------------------------------

KNOWN = {ModelConfig: {"vocab_size", "dim", "ffn_dim", "max_seq_len", "layer_types", "mixers", "norm_eps",
                       "tie_embeddings", "quantization", "dtype"},
         AttentionConfig: {"n_heads", "n_kv_heads", "head_dim", "rope", "qk_norm", "qkv_bias"}}


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name for such a model: llama, qwen2 or qwen3. UserError naming what none of them has."""
    mixers = [config.mixers[kind] for kind in dict.fromkeys(config.layer_types)]
    odd = ["layers of several kinds"] if len(mixers) > 1 else []
    for part in (config, *mixers):
        odd += unlike_llama(part)
    if odd:
        raise UserError(f"a GGUF is written of Llama, Mistral without window, Qwen2.5 and Qwen3 (dense) only; "
                        f"this model has {', '.join(dict.fromkeys(odd))}")
    return name_of(mixers[0])


def unlike_llama(part: ModelConfig | AttentionConfig | DeltaNetConfig) -> list[str]:
    """Whatever is set and not known here, so that nothing new slips through."""
    if isinstance(part, DeltaNetConfig):
        return ["linear attention"]
    odd = [f.name if f.name == "experts" else f"{f.name}={getattr(part, f.name)}" for f in fields(part)
           if f.name not in KNOWN[type(part)] and getattr(part, f.name) != f.default]
    if isinstance(part, AttentionConfig):
        odd += odd_rope(part) + (["qk_norm beside qkv_bias"] if part.qk_norm and part.qkv_bias else [])
        odd += ["a norm over all heads together"] if part.qk_norm == "all" else []
    return odd


def name_of(mixer: AttentionConfig) -> str:
    return "qwen3" if mixer.qk_norm else "qwen2" if mixer.qkv_bias else "llama"


def odd_rope(mixer: AttentionConfig) -> list[str]:
    """What llama.cpp cannot rotate. It reads factors for each pair in its llama only."""
    if mixer.rope is None:
        return ["layers without rotary embedding"]
    kinds = {"default", "linear"} | ({"llama3", "yarn"} if name_of(mixer) == "llama" else set())
    odd = [f"rope type {mixer.rope.kind}"] if mixer.rope.kind not in kinds else []
    if mixer.rope.dim != mixer.head_dim:
        odd.append(f"heads of which {mixer.rope.dim} of {mixer.head_dim} rotate")
    return odd


# -- numbers ----------------------------------------------------------------------------------------------------------

def q4_0(weight: Tensor, scale: Tensor) -> Tensor:
    """Two numbers to a byte [M, K / 2] and float16 [M, groups] -> Q4_0, bytes [M, n * 18].

    A block is its scale, then 16 bytes, of which byte j holds number j in its low half and number j + 16 in its high
    one; ours hold numbers 2j and 2j + 1. Both mean (half - 8) * scale.
    """
    pairs = weight.unflatten(-1, (-1, BLOCK // 2))  # [M, n, 16]
    halves = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)  # [M, n, 32]
    scale = scale.repeat_interleave(pairs.shape[1] // scale.shape[1], 1)  # [M, n]
    return joined(scale, halves[..., :16] | halves[..., 16:] << 4)


def q8_0(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 [M, K] and float32 [M] -> Q8_0, bytes [M, n * 34]: of each block its scale, then its numbers."""
    blocks = weight.view(torch.uint8).unflatten(-1, (-1, BLOCK))  # [M, n, 32]
    half = scale.half()
    if not half.isfinite().all():
        raise UserError(f"a scale of {scale.max():.3g} does not fit the float16 of Q8_0; export without quantization")
    return joined(half[:, None].expand(blocks.shape[:2]), blocks)


def joined(scale: Tensor, blocks: Tensor) -> Tensor:
    """float16 [M, n] before bytes [M, n, b] -> [M, n * (2 + b)]."""
    return torch.cat([scale.contiguous().view(torch.uint8).view(*scale.shape, 2), blocks], -1).flatten(1)


@dataclass
class Entry:
    """A tensor of the file, made when it is written."""
    name: str
    shape: tuple[int, ...]
    kind: str  # one of BYTES
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return round(torch.Size(self.shape).numel() * BYTES[self.kind])


def matrix(name: str, source: Matrix, rows: Tensor | slice = slice(None)) -> Entry:
    """Some rows of a matrix, in an order of their own."""
    assert not source.packed, f"{name} has a device's layout; quantized models are exported from dtype fp32"
    count = len(range(source.shape[0])[rows]) if isinstance(rows, slice) else len(rows)
    if source.scale is None:
        return Entry(name, (count, source.shape[1]), PLAIN[source.weight.dtype], lambda: source.weight[rows])
    if source.shift is not None:
        raise UserError(f"{name} has zero points other than 8, which Q4_0 does not know; export the checkpoint before "
                        f"quantization")
    if source.shape[1] % BLOCK:
        raise UserError(f"{name} has {source.shape[1]} columns, which blocks of {BLOCK} do not divide; export it "
                        f"without --quantize")
    kind, pack = ("Q4_0", q4_0) if source.group else ("Q8_0", q8_0)
    return Entry(name, (count, source.shape[1]), kind,
                 lambda: pack(source.weight[rows].cpu(), source.scale[rows].cpu()))


def vector(name: str, source: Tensor) -> Entry:
    return Entry(name, tuple(source.shape), "F32", source.float)


def turned(n_heads: int, head_dim: int) -> Tensor:
    """Rows of a projection in the order of llama.cpp's llama, [H * E]: pairs that rotate together stand side by side,
    where ours, as in Hugging Face files, are half a head apart."""
    return torch.arange(n_heads * head_dim).view(n_heads, 2, head_dim // 2).transpose(1, 2).flatten()


def entries(model: Transformer) -> Iterator[Entry]:
    """All tensors, under llama.cpp's names. A tied head is left out: llama.cpp then takes the embedding."""
    mixer = model.layers[0].attention.config
    yield matrix("token_embd.weight", model.tok_embeddings)
    yield vector("output_norm.weight", model.norm.weight)
    if not model.config.tie_embeddings:
        yield matrix("output.weight", model.output)
    if mixer.rope.kind in ("llama3", "yarn"):
        yield vector("rope_freqs.weight", rope_factors(mixer.rope))
    for i, layer in enumerate(model.layers):
        yield from layer_entries(f"blk.{i}.", layer, mixer)


def layer_entries(prefix: str, layer: torch.nn.Module, mixer: AttentionConfig) -> Iterator[Entry]:
    attention, ffn = layer.attention, layer.feed_forward
    q, kv = mixer.n_heads * mixer.head_dim, mixer.n_kv_heads * mixer.head_dim
    order = turned if name_of(mixer) == "llama" else lambda n_heads, head_dim: torch.arange(n_heads * head_dim)
    rows = {"q": order(mixer.n_heads, mixer.head_dim), "k": q + order(mixer.n_kv_heads, mixer.head_dim),
            "v": slice(q + kv, q + 2 * kv)}
    yield vector(f"{prefix}attn_norm.weight", layer.attention_norm.weight)
    for letter, part in rows.items():
        yield matrix(f"{prefix}attn_{letter}.weight", attention.wqkv, part)
        if mixer.qkv_bias:
            yield vector(f"{prefix}attn_{letter}.bias", attention.wqkv.bias[part])
    if mixer.qk_norm:
        yield vector(f"{prefix}attn_q_norm.weight", attention.q_norm.weight)
        yield vector(f"{prefix}attn_k_norm.weight", attention.k_norm.weight)
    yield matrix(f"{prefix}attn_output.weight", attention.wo)
    yield vector(f"{prefix}ffn_norm.weight", layer.ffn_norm.weight)
    half = ffn.w13.shape[0] // 2
    yield matrix(f"{prefix}ffn_gate.weight", ffn.w13, slice(half))
    yield matrix(f"{prefix}ffn_up.weight", ffn.w13, slice(half, 2 * half))
    yield matrix(f"{prefix}ffn_down.weight", ffn.w2)


def rope_factors(rope: Rope) -> Tensor:
    """What llama.cpp divides the angle of each pair by, float32 [E / 2]."""
    return rope_frequencies(replace(rope, kind="default")) / rope_frequencies(rope)


# -- vocabulary -------------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens in the format


@dataclass
class Vocabulary:
    """What llama.cpp has instead of a tokenizer's file; `model` llama is sentencepiece's, gpt2 byte-level BPE."""
    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)  # llama: the merge into the token of the highest comes first
    merges: list[str] = field(default_factory=list)  # gpt2: in their order
    pre: str = "default"  # the rule by which a text is split into words, by name


def of_sentencepiece(processor) -> Vocabulary:
    ids = range(processor.vocab_size())
    types = [UNKNOWN if processor.is_unknown(i) else CONTROL if processor.is_control(i) else
             UNUSED if processor.is_unused(i) else BYTE if processor.is_byte(i) else NORMAL for i in ids]
    return Vocabulary("llama", [processor.id_to_piece(i) for i in ids], types, [processor.get_score(i) for i in ids])


def of_json(document: dict) -> Vocabulary:
    """From a tokenizer.json of BPE, byte-level or as sentencepiece has it (its merges give scores back)."""
    model, added = document["model"], {token["id"]: token for token in document["added_tokens"]}
    if model["type"] != "BPE":
        raise UserError(f"tokenizer.json is of type {model['type']}; a GGUF is written of BPE only")
    texts = {i: text for text, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    byte_level = "ByteLevel" in json.dumps(document["pre_tokenizer"])
    if not byte_level and not model.get("byte_fallback"):
        raise UserError("tokenizer.json is neither byte-level nor with byte fallback; a GGUF is written of these only")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    tokens, types = [texts.get(i, unused(i)) for i in range(max(texts) + 1)], []
    for i, text in enumerate(tokens):
        is_byte = not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", text)
        types.append(UNKNOWN if text == model.get("unk_token") else UNUSED if i not in texts else BYTE if is_byte else
                     NORMAL if i not in added else CONTROL if added[i]["special"] else USER_DEFINED)
    if byte_level:
        return Vocabulary("gpt2", tokens, types, merges=[" ".join(pair) for pair in merges],
                          pre=word_rule(document["pre_tokenizer"]))
    return Vocabulary("llama", tokens, types, [-float(ranks.get(text, len(merges))) for text in tokens])


def unused(i: int) -> str:
    return f"[unused {i}]"


WORD_RULES = {  # of Llama 3, Qwen, Mistral Nemo
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken"}


def word_rule(pre_tokenizer: dict) -> str:
    """llama.cpp's name of the rule in a tokenizer.json, where it is one of a few; else "default", and a note."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds, first, last = [step["type"] for step in steps], steps[0], steps[-1]
    name = None
    if kinds == ["Split", "ByteLevel"]:
        name = WORD_RULES.get(first["pattern"].get("Regex"))
    elif last.get("use_regex", True):
        name = "gpt-2" if kinds == ["ByteLevel"] else \
               "smollm" if kinds == ["Digits", "ByteLevel"] and first["individual_digits"] else None
    if name and not last["add_prefix_space"]:
        return name
    print("note: how this tokenizer splits words has no name here that llama.cpp knows; the file says \"default\", and "
          "llama.cpp may read a text as other tokens", file=sys.stderr)
    return "default"


def write_vocabulary(writer, tokenizer: Tokenizer | None, size: int) -> None:
    """`size`: rows of the embedding; tokens beyond the tokenizer's are called unused. Without a tokenizer, none."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")  # llama.cpp then makes up as many tokens as the model has
        return
    is_json = isinstance(tokenizer, JsonTokenizer)
    v = of_json(json.loads(tokenizer.library.to_str())) if is_json else of_sentencepiece(tokenizer.library)
    more = range(len(v.tokens), size)
    writer.add_tokenizer_model(v.model)
    writer.add_tokenizer_pre(v.pre)
    writer.add_token_list((v.tokens + [unused(i) for i in more])[:size])
    writer.add_token_types((v.types + [UNUSED for _ in more])[:size])
    if v.model == "llama":
        writer.add_token_scores((v.scores + [0.0 for _ in more])[:size])
    else:
        writer.add_token_merges(v.merges)
    whole, inner = tokenizer.encode("a"), tokenizer.encode("a", begin=False)
    first = tokenizer.library.id_to_token(inner[0]) if is_json else tokenizer.library.id_to_piece(inner[0])
    writer.add_add_space_prefix(first.startswith("\u2581"))  # sentencepiece's sign for a space
    writer.add_add_bos_token(whole[0] != inner[0])
    writer.add_add_eos_token(whole[-1] != inner[-1])
    if whole[0] != inner[0]:
        writer.add_bos_token_id(whole[0])
    for add, i in zip((writer.add_eos_token_id, writer.add_eot_token_id), sorted(tokenizer.stop_ids), strict=False):
        add(i)


# -- the file ---------------------------------------------------------------------------------------------------------

def write_settings(writer, config: ModelConfig, kinds: set[str]) -> None:
    gguf, mixer = library(), config.mixers[config.layer_types[0]]
    most = next(kind for kind in ("Q4_0", "Q8_0", "BF16", "F16", "F32") if kind in kinds)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(len(config.layer_types))
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(mixer.n_heads)
    writer.add_head_count_kv(mixer.n_kv_heads)
    writer.add_key_length(mixer.head_dim)
    writer.add_value_length(mixer.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(mixer.rope.dim)
    writer.add_rope_freq_base(mixer.rope.theta)
    writer.add_rope_scaling_type(gguf.RopeScalingType("linear" if mixer.rope.kind == "linear" else "none"))
    if mixer.rope.kind == "linear":
        writer.add_rope_scaling_factor(mixer.rope.factor)
    if mixer.rope.scale != 1:
        writer.add_rope_scaling_attn_factors(mixer.rope.scale)


def export(model: Transformer, tokenizer: Tokenizer | None, path: Path) -> None:
    """Write a model that is not packed (a quantized one must have been loaded with dtype fp32) as a GGUF file.

    Without a tokenizer the file has a vocabulary without texts. Memory: the model and one of its matrices more.
    Raises UserError for a model that llama.cpp has in another form or not at all, and when the file cannot be written.
    """
    gguf = library()
    writer = gguf.GGUFWriter(None, architecture(model.config))
    found = list(entries(model))
    writer.add_name(path.stem)
    write_settings(writer, model.config, {entry.kind for entry in found if len(entry.shape) == 2})
    write_vocabulary(writer, tokenizer, model.config.vocab_size)
    for entry in found:
        writer.add_tensor_info(entry.name, entry.shape, None, entry.nbytes, gguf.GGMLQuantizationType[entry.kind])
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in tqdm(found, desc="export", unit=" tensors", leave=False, disable=None):
            writer.write_tensor_data(entry.make().detach().cpu().contiguous().view(torch.uint8).numpy())
        writer.close()
        partial.replace(path)
    except OSError as e:
        raise UserError(f"{path} could not be written ({e}); nothing was left there") from None
    finally:
        with contextlib.suppress(OSError):  # a full disk says so again while closing
            writer.close()
        partial.unlink(missing_ok=True)


# -- command line -----------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    p = Parser(prog="python -m scripts.export_gguf", description=__doc__.splitlines()[0])
    p.add_argument("--checkpoint_path", help="Hugging Face folder, or ORG/NAME on the hub (default: the demo)")
    p.add_argument("--random_weights", metavar="SHAPE", help="a named shape or a config.json instead")
    p.add_argument("--quantize", help=f"round the weights while loading: {', '.join(Quantization.MODES)}")
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .gguf file to be written")
    args = p.parse_args(argv)
    check(args)
    library()
    source = args.random_weights or resolve_checkpoint(str(args.checkpoint_path or DEMO))
    config = config_of_shape(source) if args.random_weights else config_from_dict(read_json(source / "config.json"))
    architecture(config)
    dtype = "fp32" if args.quantize or config.quantization else "auto"  # 16-bit ones would be packed
    model, tokenizer = ((load_random(source, "cpu", dtype, quantize=args.quantize), None) if args.random_weights
                        else load_model(source, "cpu", dtype, args.quantize))
    export(model, tokenizer, args.output)
    print(f"{args.output}: {architecture(config)}, {model.config.quantization or config.dtype}, "
          f"{args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
