"""Train the demo: a SentencePiece tokenizer, a target and a small draft model, on the Python standard library.

    python -m scripts.train_demo                     # everything, about an hour on two CPU cores
    python -m scripts.train_demo --only draft        # one part again; parts: tokenizer, target, draft, report

Every machine with Python has the text (`sysconfig` names the folder), so the demo can be made again anywhere.
Files whose path has crc32 % 16 == 0 are held out and never trained on. Both models are Llama-shaped, written in
the Hugging Face layout, and are meant to show the machinery, not to be good at anything.
Needs requirements-dev.txt (transformers holds the training-time model). Interrupted runs resume from --work_dir.
"""
import argparse
import json
import lzma
import math
import platform
import shutil
import sysconfig
import zlib
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

VOCAB, CONTEXT = 4096, 1024
EXCLUDED = {"test", "tests", "site-packages", "dist-packages", "pydoc_data", "encodings"}  # tests and tables
SHAPES = {  # head_dim 64 and every dim a multiple of 64, as the kernels of real models want them
    "target": dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
                   intermediate_size=768),
    "draft": dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                  intermediate_size=384),
}
FOLDERS = {"target": "demo", "draft": "demo-draft"}
# Most steps on short windows, where a step costs least; the last ones teach the full context.
PHASES = ((0.85, 512), (1.0, CONTEXT))
TOKENS_PER_STEP, PEAK_LR, WARMUP = 4096, 3e-3, 100


# -- data -------------------------------------------------------------------------------------------------------------

def corpus() -> tuple[list[str], list[str]]:
    """(training texts, held-out texts) of the running Python's standard library, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED.intersection(relative.parts):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            (train if zlib.crc32(relative.as_posix().encode()) % 16 else held_out).append(text)
    return train, held_out


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Byte-fallback BPE whose pieces may span spaces and line ends, so that indentation costs one token."""
    blocks = [text[i:i + 2000] for text in texts for i in range(0, len(text), 2000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(blocks), model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB, model_type="bpe",
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, byte_fallback=True, split_digits=True, character_coverage=1.0,
        max_sentence_length=20000, num_threads=1, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()
    write_tokenizer_json(folder)


def write_tokenizer_json(folder: Path) -> None:
    """The same tokenizer as `tokenizer.model`, in the format of the `tokenizers` library."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = []
    for piece, i in vocab.items():
        if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i)):
            halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            merges += [(-sp.get_score(i), vocab[a], vocab[b], a, b) for a, b in halves if a in vocab and b in vocab]
    merges = [(a, b) for *_, a, b in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", sp.bos_id())])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>", "clean_up_tokenization_spaces": False, "model_max_length": CONTEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(texts: list[str], sp: sentencepiece.SentencePieceProcessor) -> list[list[int]]:
    return [[sp.bos_id(), *ids, sp.eos_id()] for ids in sp.encode(texts)]


# -- model ------------------------------------------------------------------------------------------------------------

def new_model(part: str) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=CONTEXT, head_dim=64, tie_word_embeddings=True,
                         bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5, use_cache=False, **SHAPES[part])
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():  # smaller residual branches keep the start of training calm
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    return model


def train(part: str, stream: torch.Tensor, steps: int, seed: int, work: Path, device: str) -> LlamaForCausalLM:
    """AdamW, linear warm-up, then linear decay to zero; state is saved every 200 steps and picked up again."""
    torch.manual_seed(seed)
    model = new_model(part).to(device)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    saved, start = work / f"{part}.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        if state["steps"] != steps or state["seed"] != seed:
            raise SystemExit(f"{saved} belongs to a run with steps={state['steps']} seed={state['seed']}; "
                             f"pass the same values or delete it")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    @torch.compile
    def loss_of(window: torch.Tensor) -> torch.Tensor:  # [B, S + 1] -> nats per token
        logits = model(window[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())

    bar = tqdm(range(start, steps), initial=start, total=steps, desc=part, mininterval=1)
    mean = None
    for step in bar:
        length = next(length for share, length in PHASES if step < share * steps)
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)  # any step can be repeated on its own
        at = torch.randint(len(stream) - length - 1, (TOKENS_PER_STEP // length,), generator=rng)
        window = torch.stack([stream[i:i + length + 1] for i in at.tolist()]).to(device)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
        loss = loss_of(window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}")
        if (step + 1) % 200 == 0 or step + 1 == steps:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1, steps=steps,
                         seed=seed)
            torch.save(state, work / "saving.pt")
            (work / "saving.pt").replace(saved)
    return model


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    model = model.to(torch.bfloat16)
    model.config.use_cache = True
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)


# -- report -----------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def bits_per_byte(folder: Path, texts: list[str], sp: sentencepiece.SentencePieceProcessor) -> float:
    """Held-out bits per UTF-8 byte: every file on its own, windows of the full context, moved by half of it."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats = 0.0
    for ids in tqdm(encode(texts, sp), desc=f"held-out, {folder.name}"):
        ids = torch.tensor(ids)
        done = 1  # tokens already scored; the first, <s>, is given
        while done < len(ids):
            begin = max(0, done - CONTEXT // 2)
            window = ids[begin:begin + CONTEXT + 1]
            logits = model(window[None, :-1]).logits[0]
            losses = F.cross_entropy(logits, window[1:], reduction="none")
            nats += losses[done - begin - 1:].sum().item()
            done = begin + len(window)
    return nats / math.log(2) / sum(len(t.encode()) for t in texts)


README = """# {name}
{what}.
Trained by `python -m scripts.train_demo` so that a fresh machine has something real to run. It shows the machinery; it
is not good at anything else.

- **Data**: the source of Python {python}'s standard library without tests and tables ({train_mb:.1f} MB); files whose
  path has crc32 % 16 == 0 ({held_kb:.0f} KB) were held out.
- **Licence**: the text is under the PSF licence (https://docs.python.org/3/license.html); these weights are published
  under this repository's BSD-3-Clause.
- **Size**: {parameters:,} parameters in bfloat16, {size_mb:.1f} MB; vocabulary {vocab}, context {context}.
- **Training**: {steps} steps of {tokens_per_step} tokens, seed {seed}.
- **Held-out bits per byte**: **{bpb:.3f}**. For scale: demo {target:.3f}, demo-draft {draft:.3f}, and `xz -9e` over the
  same files in one piece {xz:.3f}.
"""


def report(root: Path, train_texts: list[str], held_out: list[str], steps: dict[str, int], seed: int) -> None:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(root / "demo" / "tokenizer.model"))
    joined = "".join(held_out).encode()
    xz = 8 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / len(joined)
    bpb = {part: bits_per_byte(root / folder, held_out, sp) for part, folder in FOLDERS.items()}
    for part, folder in FOLDERS.items():
        shape = SHAPES[part]
        what = f"A {shape['num_hidden_layers']}-layer, {shape['hidden_size']}-wide Llama-shaped model of Python source"
        weights = root / folder / "model.safetensors"
        parameters = LlamaForCausalLM.from_pretrained(root / folder).num_parameters()
        text = README.format(
            name=folder, what=what, python=platform.python_version(), vocab=VOCAB, context=CONTEXT, xz=xz, seed=seed,
            train_mb=sum(len(t.encode()) for t in train_texts) / 1e6, held_kb=len(joined) / 1e3,
            parameters=parameters, size_mb=weights.stat().st_size / 1e6, steps=steps[part],
            tokens_per_step=TOKENS_PER_STEP, bpb=bpb[part], **bpb)
        (root / folder / "README.md").write_text(text)
    print(f"held-out bits per byte: target {bpb['target']:.3f}, draft {bpb['draft']:.3f}, xz -9e {xz:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("checkpoints"), help="folder that gets demo and demo-draft")
    parser.add_argument("--work_dir", type=Path, default=Path("checkpoints/training"), help="state of unfinished runs")
    parser.add_argument("--only", choices=["tokenizer", "target", "draft", "report"], help="do one part only")
    parser.add_argument("--target_steps", type=int, default=2800)
    parser.add_argument("--draft_steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    demo = args.output / FOLDERS["target"]
    demo.mkdir(parents=True, exist_ok=True)
    steps = {"target": args.target_steps, "draft": args.draft_steps}
    train_texts, held_out = corpus()
    if args.only in (None, "tokenizer"):
        train_tokenizer(train_texts, demo)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(demo / "tokenizer.model"))
    if args.only in (None, "target", "draft"):
        stream = torch.tensor([i for ids in encode(train_texts, sp) for i in ids])
        print(f"{len(train_texts)} files, {len(stream):,} tokens to train on; {len(held_out)} files held out")
    for part, folder in FOLDERS.items():
        if args.only in (None, part):
            model = train(part, stream, steps[part], args.seed, args.work_dir, args.device)
            write_model(model, args.output / folder)
            for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
                if part != "target":
                    shutil.copy(demo / name, args.output / folder / name)
    if args.only in (None, "report"):
        report(args.output, train_texts, held_out, steps, args.seed)


if __name__ == "__main__":
    main()
