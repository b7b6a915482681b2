"""What guesses the next tokens for speculative.py: the model's own text, another model, its own weights in int4, or its
head for multi-token prediction.

Glossary: B batch, k drafted tokens, S tokens in one call.
"""
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import device as machine
import ops
from config import Quantization
from decoding import Steps, chunks
from errors import UserError
from layers import Matrix
from loader import fill_rounded, materialize
from model import Transformer
from quantize import quantize_
from sampling import Sampling
from speculative import LONGEST, Draft, Proposal, given_or
from tokenizer import Tokenizer
from tp import build, whole_config

FEW = 16  # tokens that a draft reads in pairs
ROWS = 4096  # of a matrix, rounded at a time


class LookupDraft(Draft):
    """What followed the last few tokens when the text had them before; see `speculative.lookup`."""

    choices = 3, 7, LONGEST

    def setup(self, model: Transformer, longest: int) -> None:
        self.model, self.longest = model, longest

    def look(self, token: Tensor, position: Tensor, steps: Steps) -> int:
        self.tokens, found = steps.look_up(self.model, token, position, {"k": self.longest})
        if found.device.type != "cpu":
            return 0  # it would be waited for
        return -(-int(found.sum()) // len(found)) or -1

    def propose(self, k: int, token: Tensor, position: Tensor, given: Tensor | None, options: dict,
                steps: Steps) -> Proposal:
        return Proposal(self.tokens[:, :k].contiguous())


class SteppingDraft(Draft):
    """A model that makes one token after another."""

    choices = 1, 3, 5

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def latest(self, token: Tensor, position: Tensor, steps: Steps, options: dict) -> tuple[Tensor, Tensor]:
        """Tokens to begin with and their positions, both [B, 1 or 2]."""
        return token, position

    def propose(self, k: int, token: Tensor, position: Tensor, given: Tensor | None, options: dict,
                steps: Steps) -> Proposal:
        options = options | {"vocab_size": self.target.config.vocab_size}
        tokens, positions = self.latest(token, position, steps, options)
        drafted = []
        for i in range(k):
            token, *chances = steps.propose(self.model, tokens, positions, options)
            if given is not None:
                token = given_or(given[:, i:i + 1], token)
            drafted.append((token, *chances))
            tokens, positions = token, positions[:, -1:] + 1
        return proposal(drafted)


class SelfDraft(SteppingDraft):
    """The model itself in int4, over the model's own caches: what it writes there the model overwrites when it checks,
    so that it always reads exact keys, values and states, and has no prompt to read."""

    def setup(self, model: Transformer, longest: int) -> None:
        self.target = model
        if self.model.cache_size is not model.cache_size:
            for own, layer in zip(self.model.layers[:model.lenders], model.layers, strict=False):
                own.attention.cache = layer.attention.cache
            self.model.cache_size = model.cache_size


class ModelDraft(SteppingDraft):
    """A smaller model with the same vocabulary."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        self.known = self.end = 0  # positions that its caches hold of this text, and up to which it has read anything
        self.missing = 0  # tokens that it has not read, but for the last two
        self.left: dict[int, int] = {}  # free row -> how much its caches hold of its last text, but for the beginning

    def setup(self, model: Transformer, longest: int) -> None:
        self.target, before = model, self.model.cache_size
        batch, length, _ = model.cache_size
        if self.model.cache_size[0] != batch or self.model.cache_length < length:
            machine.require_memory(batch * self.model.cache_bytes(length), self.model.device)
        self.model.setup_caches(batch, length, longest)
        if self.model.cache_size is not before:
            self.known = self.end = 0

    def begin(self, cached: int, position: Tensor, start: int, options: dict, steps: Steps) -> None:
        self.known = min(self.known, cached)
        if not self.model.rewind(self.end - self.known):
            self.known = 0
        self.missing = start - 1 - self.known
        self.catch_up(position, steps, options)

    def catch_up(self, position: Tensor, steps: Steps, options: dict) -> None:
        """Read what is missing before the last two tokens, the latter of which stands at `position` [B, 1]: a few in
        pairs, for which there is a compiled step; of an odd number the last one brings its successor along."""
        options, few = options | {"vocab_size": self.target.config.vocab_size}, self.missing <= FEW
        pieces = [slice(i, i + 2) for i in range(0, self.missing, 2)] if few else \
            chunks(0, self.missing, self.model.block)
        if not few:
            self.left = dict.fromkeys(self.left, 0)  # overwritten
        first = (position - 1 - self.missing).clamp_min(0)  # 0 for free rows
        for piece in pieces:
            at = first + torch.arange(piece.start, piece.stop, device=position.device)
            (steps.propose if few else steps.prefill)(self.model, self.target.text.gather(1, at), at, options)
        self.missing = 0

    def latest(self, token: Tensor, position: Tensor, steps: Steps, options: dict) -> tuple[Tensor, Tensor]:
        """If all of the last proposal stood, its last token was never read: so the last two."""
        self.catch_up(position, steps, options)
        before = (position - 1).clamp_min(0)
        return torch.cat([self.target.text.gather(1, before), token], 1), torch.cat([before, before + 1], 1)

    def skip(self) -> None:
        self.missing += 1

    def record(self, start: int) -> None:
        self.known = max(start - 1 - self.missing, 0)
        self.end = start + 3 * (LONGEST + 1)  # with what a device may have been given since

    def open(self) -> None:
        self.known = self.end = self.missing = 0
        self.entrance = self.model.spare_caches()
        self.left.clear()
        self.whole = all(mixer.cache.whole for mixer in self.model.mixers)

    def admit(self, prompt: Sequence[int], row: int | None, shared: int) -> None:
        """What a free row may have been overwritten with is read again; see `catch_up` and `latest`."""
        spoiled = max(FEW, LONGEST) + 2 if row in self.left else 0
        known = min(shared, self.left.get(row, shared - 1 - self.missing))
        if row is None or not self.whole or known <= spoiled:
            known = spoiled = 0
        for cache, mixer in zip(self.entrance, self.model.mixers, strict=True) if known else ():
            cache.adopt(0, mixer.cache, known, row)
        self.prompt = prompt
        self.pieces = itertools.chain(chunks(0, spoiled, 0), chunks(known, len(prompt) - 1, self.model.block))

    def read(self, stop: int, hidden: Tensor | None, positions: Tensor, tokens: Tensor, steps: Steps) -> None:
        for piece in self.pieces:
            ids = torch.tensor([self.prompt[piece]], device=positions.device)
            at = torch.arange(piece.start, piece.stop, device=positions.device)[None]
            with self.model.using(self.entrance, None):
                steps.prefill(self.model, ids, at, Sampling(0).arguments(self.model.config.vocab_size, ids.device))
            if piece.stop >= stop:
                break

    def take(self, row: int, position: Tensor, options: dict, steps: Steps) -> None:
        """All rows have as much missing, so that these are not to have anything."""
        self.catch_up(position, steps, options)
        for mixer, cache in zip(self.model.mixers, self.entrance, strict=True):
            mixer.cache.adopt(row, cache, len(self.prompt) - 1)
        self.left.pop(row, None)

    def leave(self, row: int, length: int) -> None:
        self.left[row] = max(length - 2 - self.missing, 0)


class MultiTokenDraft(Draft):
    """The head for multi-token prediction that comes with a checkpoint, over the model's own hidden states.

    What it is told waits until something is to be proposed: the head need not run for plain steps.
    """

    choices, hears = (1, 2, 4), True
    WAITING = 64  # plain steps whose hidden states are kept

    def setup(self, model: Transformer, longest: int) -> None:
        self.model = model
        self.waiting: list[tuple[Tensor, ...]] = []

    def read(self, stop: int, hidden: Tensor, positions: Tensor, tokens: Tensor, steps: Steps) -> None:
        self.run(hidden, positions, tokens)
        self.last = [x[:, -1:].clone() for x in (hidden, positions, tokens)]

    def begin(self, cached: int, position: Tensor, start: int, options: dict, steps: Steps) -> None:
        """The last token of a prompt is read once more when something is proposed, for its output."""
        self.waiting = [(*self.last, torch.ones_like(position))]

    def open(self) -> None:
        rows, device = self.model.cache_size[0], self.model.device
        hidden = torch.zeros(rows, 1, self.model.config.dim, dtype=self.model.dtype, device=device)
        places, tokens, count = torch.zeros(3, rows, 1, dtype=torch.int64, device=device)
        self.waiting = [(hidden, places, tokens, count + 1)]

    def take(self, row: int, position: Tensor, options: dict, steps: Steps) -> None:
        self.catch_up()
        hidden, positions, tokens, count = (x.clone() for x in self.waiting[0])
        for mine, its in zip((hidden, positions, tokens), self.last, strict=True):
            mine[row] = its[0]  # in all places, of which the first counts
        positions[row] += torch.arange(positions.shape[1], device=positions.device)
        count[row] = 1
        self.waiting = [(hidden, positions, tokens, count)]

    def hear(self, hidden: Tensor, positions: Tensor, tokens: Tensor, count: Tensor) -> None:
        self.waiting.append((hidden, positions, tokens, count))
        if len(self.waiting) > self.WAITING:
            self.catch_up()

    def run(self, hidden: Tensor, positions: Tensor, tokens: Tensor) -> None:
        self.model.draft_hidden(self.model.norm(hidden), tokens.clamp_min(0), positions)

    def catch_up(self) -> None:
        """Read all that waits but the last. Plain steps stand one behind the other, and are read together."""
        *earlier, last = self.waiting
        for plain, calls in itertools.groupby(earlier, lambda call: call[1].shape[1] == 1):
            hidden, positions, tokens, _ = zip(*calls, strict=True)
            if plain:
                self.run(*(torch.cat(x, 1) for x in (hidden, positions, tokens)))
            else:
                for call in zip(hidden, positions, tokens, strict=True):
                    self.run(*call)
        self.waiting = [last]

    def propose(self, k: int, token: Tensor, position: Tensor, given: Tensor | None, options: dict,
                steps: Steps) -> Proposal:
        self.catch_up()
        (hidden, positions, tokens, count), = self.waiting
        more = {"vocab_size": self.model.config.vocab_size, "normed": False, "tokens": tokens, "last": count - 1}
        drafted = []
        for i in range(k):
            hidden, token, *chances = steps.foretell(self.model, hidden, positions, options | more)
            if given is not None:
                token = given_or(given[:, i:i + 1], token)
            drafted.append((token, *chances))
            positions = position + i
            more |= {"normed": True, "tokens": token, "last": torch.zeros_like(token)}
        return proposal(drafted)


def proposal(drafted: list[tuple[Tensor, ...]]) -> Proposal:
    """Of steps that gave a token each, and perhaps its chances."""
    tokens, *chances = zip(*drafted, strict=True)
    return Proposal(torch.cat(tokens, 1), *(torch.stack(x, 1) for x in chances))


# -- making them ------------------------------------------------------------------------------------------------------

def require_same_vocabulary(model: Tokenizer, draft: Tokenizer) -> None:
    """UserError if two tokenizers do not give the same tokens the same ids."""
    shared = min(model.vocab_size, draft.vocab_size)
    differing = next((i for i in range(shared) if model.piece(i) != draft.piece(i)), None)
    if differing is not None:
        raise UserError(f"the draft has another vocabulary: token {differing} is {draft.piece(differing)!r} there and "
                        f"{model.piece(differing)!r} in the model; take a draft of the same family")


def int4_copy(model: Transformer, pack: bool) -> Transformer:
    """A model's weights once more, in int4; what is not rounded is shared. UserError if it is int4 already."""
    if model.config.quantization and model.config.quantization.mode != "int8":
        raise UserError(f"--draft self is the model's own int4, and the model is {model.config.quantization} already; "
                        f"take another draft, or a less rounded model")
    quantization = Quantization("int4")
    with torch.device("meta"):
        copy = build(dataclasses.replace(whole_config(model), quantization=quantization, mtp=False)).eval()
    quantize_(copy, quantization)
    for name, module, tensors in materialize(copy, model.device, model.dtype, pack):
        source = model.get_submodule(name)
        for leaf, tensor in tensors.items():
            if leaf == "weight" and "scale" in tensors:
                fill_rounded(f"{name}.weight", module, tensors, rows(source), model.device)
            elif leaf != "scale":
                tensor.copy_(getattr(source, leaf))
    for name, module in copy.named_modules():
        source = model.get_submodule(name)
        for leaf in [leaf for leaf, _ in module.named_parameters(recurse=False)]:
            if leaf not in ("weight", "scale") or not isinstance(module, Matrix):
                setattr(module, leaf, getattr(source, leaf))
        if isinstance(module, Matrix) and kind(module) == kind(source):
            module.share(source)
    copy.settle(model.dtype)
    return copy


def kind(matrix: Matrix) -> tuple:
    """What must be alike of matrices with the same numbers."""
    return matrix.weight.dtype, matrix.group, matrix.packed


def rows(matrix: Matrix) -> Iterator[Tensor]:
    """A matrix, or several on top of each other, in blocks of rows [r, inputs], whatever it is kept as."""
    *_, outputs, inputs = matrix.shape
    if matrix.packed:
        for weight in matrix.weight if len(matrix.shape) == 3 else [matrix.weight]:
            for block in torch.arange(outputs).split(ROWS):
                yield torch.ops.readonce.unpack_rows(weight, block, inputs, matrix.group)
        return
    weight = matrix.weight.flatten(0, -2)
    scales = [None] * len(weight) if matrix.scale is None else matrix.scale.reshape(len(weight), -1).split(ROWS)
    for block, scale in zip(weight.split(ROWS), scales, strict=False):
        yield block if scale is None else ops.dequantize(block, scale if matrix.group else scale[:, 0])
