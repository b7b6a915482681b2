"""Time decoding, beside a peer if asked: interleaved in one run, medians, the ratio of each pair.

    python -m scripts.benchmark --random_weights Llama-3.2-1B --peers transformers --output benchmarks/cpu.jsonl
    python -m scripts.benchmark                                     # the demo, ours alone

Every system gets the same weights, the same prompt and greedy decoding of exactly --new_tokens tokens. One uncounted
run each comes first. Peers are extras (requirements-dev.txt); one that is absent is skipped with a line.
"""
import functools
import importlib.util
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import device as machine
from config import ModelConfig
from errors import Parser, UserError, run_command
from generate import DEMO, Steps, compiled_steps, generate, load_model, load_random
from metrics import measure
from model import Transformer
from sampling import Sampling

Times = tuple[float, list[float]]  # when the call began, and when each token was known on the host
GREEDY = Sampling(temperature=0)


def ours(model: Transformer, prompt: list[int], new_tokens: int, steps: Steps) -> Times:
    machine.synchronize(model.device)
    start = time.perf_counter()
    return start, [time.perf_counter() for _ in generate(model, prompt, new_tokens, GREEDY, steps=steps)]


def as_transformers(model: Transformer):
    """A transformers model that holds our weights (the tensors themselves, split but not copied): Llama's kind only."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c, attention = model.config, model.config.mixers.get("full")
    simple = ModelConfig(c.vocab_size, c.dim, c.ffn_dim, c.max_seq_len, c.layer_types, c.mixers, norm_eps=c.norm_eps,
                         tie_embeddings=c.tie_embeddings, dtype=c.dtype)
    keys = {"default": 2, "linear": 3, "llama3": 6}  # how many of the rope's, below
    if c != simple or set(c.layer_types) != {"full"} or attention.qk_norm or attention.qkv_bias \
            or attention.rope.kind not in keys:
        raise UserError("transformers is compared on unquantized folders of Llama's architecture only; take one "
                        "or leave --peers out")
    rope = dict(rope_type=attention.rope.kind, rope_theta=attention.rope.theta, factor=attention.rope.factor,
                low_freq_factor=attention.rope.low_freq_factor, high_freq_factor=attention.rope.high_freq_factor,
                original_max_position_embeddings=attention.rope.original_max_seq_len)
    config = LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=len(c.layer_types),
                         head_dim=attention.head_dim, num_attention_heads=attention.n_heads,
                         num_key_value_heads=attention.n_kv_heads, intermediate_size=c.ffn_dim,
                         max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps,
                         rope_parameters=dict(list(rope.items())[:keys[attention.rope.kind]]),
                         tie_word_embeddings=c.tie_embeddings, eos_token_id=None, bos_token_id=None)
    with torch.device("meta"):
        peer = LlamaForCausalLM(config).eval()
    q, kv = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
    state = {"model.embed_tokens.weight": model.tok_embeddings.weight, "lm_head.weight": model.output.weight,
             "model.norm.weight": model.norm.weight}
    for i, layer in enumerate(model.layers):
        wq, wk, wv = layer.attention.wqkv.weight.split([q, kv, kv])
        gate, up = layer.feed_forward.w13.weight.chunk(2)
        state |= {f"model.layers.{i}.{name}.weight": w for name, w in {
            "input_layernorm": layer.attention_norm.weight, "post_attention_layernorm": layer.ffn_norm.weight,
            "self_attn.q_proj": wq, "self_attn.k_proj": wk, "self_attn.v_proj": wv,
            "mlp.gate_proj": gate, "mlp.up_proj": up,
            "self_attn.o_proj": layer.attention.wo.weight, "mlp.down_proj": layer.feed_forward.w2.weight}.items()}
    dtype = model.output.weight.dtype  # theirs has norms in the dtype of the rest
    peer.load_state_dict({name: w.to(dtype) for name, w in state.items()}, assign=True)
    peer.tie_weights()
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config).to(model.device)  # its table was on meta
    return peer


def transformers(peer, prompt: list[int], new_tokens: int) -> Times:
    """Eager transformers as a user calls it: generate() with its default cache."""
    class Clock:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: torch.Tensor) -> None:  # called with the prompt, then with each token on the host
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    ids = torch.tensor([prompt], device=peer.device)
    machine.synchronize(peer.device)
    start = time.perf_counter()
    peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                  do_sample=False, streamer=clock, pad_token_id=0)
    return start, clock.times[1:]


def commit() -> str:
    """The commit that is measured, marked if the code differs from it (benchmarks/ holds results, not code)."""
    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=DEMO.parent.parent)
        return run.stdout.strip()
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def load(args, quantize: str | None = None) -> Transformer:
    if args.random_weights:
        return load_random(args.random_weights, args.device, args.dtype, quantize=quantize)
    return load_model(args.checkpoint_path or DEMO, args.device, args.dtype, quantize)[0]


def systems(args, model: Transformer, prompt: list[int]) -> dict[str, tuple[Transformer, Callable[[], Times]]]:
    """Name -> whose weights it reads, and one timed run. Ours compiled comes first: ratios are of it over each."""
    compiled = compiled_steps(model.device)
    found = {"ours compiled": (model, lambda: ours(model, prompt, args.new_tokens, compiled)),
             "ours eager": (model, lambda: ours(model, prompt, args.new_tokens, Steps()))}
    for peer in args.peers.split(",") if args.peers else []:
        if peer != "transformers":
            raise UserError(f"unknown peer {peer!r}; allowed: transformers")
        if importlib.util.find_spec("transformers") is None:
            print("transformers is not installed: skipped (pip install -r requirements-dev.txt)", file=sys.stderr)
            continue
        floats = load(args) if args.quantize else model
        run_once = functools.partial(transformers, as_transformers(floats), prompt, args.new_tokens)
        found["transformers eager"] = floats, run_once
    return found


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m scripts.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", help="default: the demo")
    parser.add_argument("--random_weights", metavar="SHAPE", help="a named shape or a config.json instead")
    parser.add_argument("--prompt_length", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", help="transformers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", help="int8, int4 or int4-pure, rounded while loading; peers get the floats")
    parser.add_argument("--output", type=Path, help="append the rows to this file, a JSON document a line")
    args = parser.parse_args(argv)
    for name in ("prompt_length", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.new_tokens < 2:
        raise UserError(f"--new_tokens is {args.new_tokens}; it must be at least 2, as the first belongs to the prompt")
    rows = run(args, load(args, args.quantize))
    for row in rows:
        row["command"] = shlex.join(["python", "-m", "scripts.benchmark", *argv])
    if args.output:
        with args.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def run(args, model: Transformer) -> list[dict]:
    """All rounds, the table on screen, and a row per system."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (args.prompt_length,), generator=generator).tolist()
    timed = systems(args, model, prompt)
    samples: dict[str, list] = {name: [] for name in timed}
    bandwidth = machine.measure_bandwidth(model.device)  # in this run, at both ends of it: not the one remembered
    for i in tqdm(range(args.repeats + 1), desc="rounds"):
        for name, (weights, call) in timed.items():
            start, times = call()
            if i:  # the first round compiles and warms up
                samples[name].append(measure(weights, prompt, [0] * len(times), "", "length", start, times))
    bandwidth = max(bandwidth, machine.measure_bandwidth(model.device))
    first = next(iter(samples))
    rows = []
    for name, runs in samples.items():
        weights, _ = timed[name]
        speeds = [s.decode_tok_s for s in runs]
        ratios = [a.decode_tok_s / b for a, b in zip(samples[first], speeds, strict=True)]
        moved = statistics.median(s.gb_s for s in runs)
        rows.append({
            "system": name, "model": args.random_weights or args.checkpoint_path or "demo",
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": str(weights.config.quantization) if weights.config.quantization else None,
            "prompt_tokens": args.prompt_length,
            "new_tokens": args.new_tokens, "decode_tok_s": statistics.median(speeds), "decode_tok_s_all": speeds,
            "ttft_s": statistics.median(s.ttft_s for s in runs), "gb_s": moved, "bandwidth_gb_s": bandwidth / 1e9,
            "bandwidth_pct": 100e9 * moved / bandwidth, "ours_over_this": statistics.median(ratios),
            "machine": machine.device_name(model.device), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "commit": commit()})
        print(f"{name:20} {rows[-1]['decode_tok_s']:8.1f} tok/s ({min(speeds):.1f}-{max(speeds):.1f})  "
              f"{moved:5.1f} GB/s = {rows[-1]['bandwidth_pct']:3.0f} %  "
              f"first token {rows[-1]['ttft_s'] * 1e3:7.1f} ms  "
              f"{first} is {rows[-1]['ours_over_this']:.2f}x this")
    return rows


if __name__ == "__main__":
    run_command(main)
