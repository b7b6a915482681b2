"""How well a checkpoint predicts a text, and how far it is from another one.

    python -m scripts.eval --text FILE                                             # the demo
    python -m scripts.eval --text FILE --checkpoint_path INT4 --reference DIR      # beside what it was made from

Perplexity per token and bits per byte, over windows that overlap by half: each token is predicted once, from at least
half a window of text before it (but for the first). With --reference also the KL divergence of the predictions from
that checkpoint's, in nats per token, and how often both think the same token likeliest.
Glossary: S tokens of a window, V vocabulary.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from errors import Parser, UserError, run_command
from generate import DEMO, load_model
from model import Transformer


@dataclass
class Score:
    """Sums over the tokens predicted so far."""
    tokens: int = 0
    nats: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, log_p: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        """log-probabilities [n, V] of what comes next, what came [n], and the reference's log-probabilities."""
        self.tokens += len(targets)
        self.nats -= log_p.gather(-1, targets[:, None]).sum().item()
        if reference is not None:
            self.divergence += (reference.exp() * (reference - log_p)).sum().item()
            self.agreed += (reference.argmax(-1) == log_p.argmax(-1)).sum().item()

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    def bits_per_byte(self, text: str) -> float:
        return self.nats / math.log(2) / len(text.encode())


def windows(ids: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens [S], the last n of the tokens after them): windows of at most `size`, half a window apart."""
    done = 0
    for end in range(min(size, len(ids) - 1), len(ids) + size // 2 - 1, size // 2):
        end = min(end, len(ids) - 1)
        yield ids[max(0, end - size):end], ids[done + 1:end + 1]
        done = end


@torch.no_grad()
def log_probabilities(model: Transformer, tokens: Tensor, last: int) -> Tensor:
    """log p of what follows each of the last so many of tokens [S] -> float32 [last, V]."""
    model.setup_caches(1, len(tokens))
    hidden = model.hidden(tokens[None].to(model.device), torch.arange(len(tokens), device=model.device)[None])
    return model.logits(hidden[0, -last:]).float().log_softmax(-1)


def evaluate(models: list[Transformer], reference: Transformer | None, ids: Tensor, size: int) -> list[Score]:
    """The scores of several models on one text, beside one reference."""
    scores = [Score() for _ in models]
    for tokens, targets in tqdm(list(windows(ids, size)), desc="windows"):
        truth = None if reference is None else log_probabilities(reference, tokens, len(targets))
        for model, score in zip(models, scores, strict=True):
            score.add(log_probabilities(model, tokens, len(targets)), targets.to(model.device), truth)
    return scores


def main(argv: list[str]) -> None:
    p = Parser(prog="python -m scripts.eval", description=__doc__.splitlines()[0])
    p.add_argument("--text", type=Path, required=True, help="a text file")
    p.add_argument("--checkpoint_path", default=DEMO, help="default: the demo")
    p.add_argument("--quantize", help="round its weights while loading: int8, int4, int4-pure")
    p.add_argument("--reference", help="another checkpoint with the same tokenizer, to compare with")
    p.add_argument("--window", type=int, default=512, help="tokens (default %(default)s)")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--kv_dtype", default="auto", help="of its keys and values: auto (as activations) or int8")
    args = p.parse_args(argv)
    try:
        text = args.text.read_text("utf-8")
    except (OSError, ValueError) as e:
        raise UserError(f"--text {args.text} cannot be read as text ({e})") from None
    model, tokenizer = load_model(args.checkpoint_path, args.device, args.dtype, args.quantize, kv_dtype=args.kv_dtype)
    reference, other = load_model(args.reference, args.device, args.dtype) if args.reference else (None, tokenizer)
    ids = tokenizer.encode(text)
    if not 2 <= args.window <= model.config.max_seq_len:
        raise UserError(f"--window is {args.window}; it must be 2 to {model.config.max_seq_len}")
    if len(ids) < 2:
        raise UserError(f"--text {args.text} has {len(ids)} tokens; at least 2 are needed")
    if other.encode(text) != ids:
        raise UserError(f"--reference {args.reference} reads the text as other tokens; take one with this tokenizer")
    score, = evaluate([model], reference, torch.tensor(ids), args.window)
    print(f"{score.tokens} tokens: perplexity {score.perplexity:.4f}, {score.bits_per_byte(text):.4f} bits/byte")
    if reference:
        print(f"KL {score.divergence / score.tokens:.5f} nats/token, same likeliest token "
              f"{100 * score.agreed / score.tokens:.2f} %")


if __name__ == "__main__":
    run_command(main)
