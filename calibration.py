"""int4 by what a model does with a text: layer by layer, each matrix is rounded so that its outputs change least.

The text goes through one layer at a time in float32, those before it already rounded. On the way the inputs of each
matrix are summed up as x x^T, its Hessian, by which rounding.py then spreads the errors. Memory: one layer, its
Hessians (one for each expert), and the text's activations.

Glossary: W windows of text, S tokens in each, D dim, K columns of a matrix.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import ops
import rounding
from attention import Call
from checkpoint import Checkpoint
from errors import UserError
from layers import Matrix
from loader import load_module, require_finite
from model import Transformer
from ops import fused
from tokenizer import Tokenizer

WINDOWS, LENGTH = 64, 512  # how much of the text is read: more changes little


def windows(text: str, tokenizer: Tokenizer, longest: int) -> Tensor:
    """Up to WINDOWS pieces of LENGTH tokens, evenly from the whole text -> int64 [W, S]."""
    ids = torch.tensor(tokenizer.encode(text))
    size = min(LENGTH, longest, len(ids))
    if size < 32:
        raise UserError(f"the text to calibrate with has {len(ids)} tokens; give at least 32, better "
                        f"{WINDOWS * LENGTH}")
    count = min(WINDOWS, len(ids) // size)
    starts = torch.linspace(0, len(ids) - size, count).long()
    return ids[starts[:, None] + torch.arange(size)]


class Calibration:
    """Rounds the matrices of a model, in the order of its layers. `model` is on the meta device, in floats."""

    def __init__(self, model: Transformer, checkpoint: Checkpoint, found: dict[str, list[str]], groups: dict[str, int],
                 tokens: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.checkpoint, self.found, self.groups, self.device = model, checkpoint, found, groups, device
        self.positions = torch.arange(tokens.shape[1], device=device)[None]
        ends = ("tok_embeddings", "per_layer") if model.per_layer else ("tok_embeddings",)
        for name in ends:
            load_module(model, f"{name}.", checkpoint, found, device, dtype)
        model.settle(dtype)
        tokens = tokens.to(device)
        x = model.embed(tokens)
        self.per_layer = model.per_layer(tokens, x) if model.per_layer else None  # for each layer [W, S, P]
        self.x = x.float()  # [W, S, D]
        for name in ends:
            model.get_submodule(name).to("meta")
        model.settle(dtype)
        self.calls: dict[str, list[Call]] = {}  # of each type that is borrowed from, the last layer's with each window

    @torch.no_grad()
    def layer(self, i: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, weight, scale) of each matrix of the i-th layer; layers are to be asked for in order."""
        layer, prefix = self.model.layers[i], f"layers.{i}."
        load_module(self.model, prefix, self.checkpoint, self.found, self.device, torch.float32)
        if i < self.model.lenders:
            layer.attention.setup_cache(1, self.x.shape[1], 0, torch.float32, torch.float32, self.device)
        mine = {f"{prefix}{name}": module for name, module in layer.named_modules() if f"{prefix}{name}" in self.groups}
        with hessians(mine) as sums:
            self.run(i)
        for name, module in mine.items():
            require_finite(f"{name} of the model, or what the text gives it to multiply,", sums[name])
            weight, scale = rounded(module.weight, self.groups[name], sums.pop(name))
            require_finite(name, scale)
            module.weight.copy_(ops.dequantize(weight, scale))
            yield name, weight.cpu(), scale.cpu()
        self.x = self.run(i)
        layer.attention.cache = None
        layer.to("meta")

    def run(self, i: int) -> Tensor:
        """The output of the i-th layer for all windows, [W, S, D], one at a time."""
        config, layer = self.model.config, self.model.layers[i]
        kind, outputs, calls = config.layer_types[i], [], []
        borrows = getattr(config.mixers[kind], "borrows", "")
        for w, x in enumerate(self.x):
            call = self.calls[borrows][w] if borrows else layer.attention.prepare(self.positions)
            told = () if self.per_layer is None else (self.per_layer[i][w:w + 1].float(),)
            outputs.append(layer(x[None], call, *told))
            if getattr(layer.attention, "lends", False):  # the next window is written over this one
                cache, *seen = call.lent
                calls.append(call._replace(lent=[cache, *(part.clone() for part in seen)]))
        if calls:
            self.calls[kind] = calls
        return torch.cat(outputs)


def rounded(weight: Tensor, group: int, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix with its Hessian [K, K], or the matrices of experts with theirs [E, K, K]."""
    if weight.dim() == 2:
        return rounding.to_int4_calibrated(weight, group, hessian)
    both = [rounding.to_int4_calibrated(w, group, h) for w, h in zip(weight, hessian, strict=True)]
    return torch.stack([w for w, _ in both]), torch.stack([s for _, s in both])


@contextmanager
def hessians(matrices: dict[str, Matrix]) -> Iterator[dict[str, Tensor]]:
    """Name -> the sum of x x^T over all inputs x that the matrix gets meanwhile; with experts, one for each of them."""
    sums = {name: m.weight.new_zeros(*m.shape[:-2], m.shape[-1], m.shape[-1]) for name, m in matrices.items()}

    def adder(total: Tensor):
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            if len(inputs) == 1:
                total.addmm_(x.T, x)
            else:
                x = fused.for_each(x, inputs[1])
                for e in inputs[1].unique().tolist():
                    rows = x[inputs[1] == e]
                    total[e].addmm_(rows.T, rows)
        return add

    hooks = [matrix.register_forward_pre_hook(adder(sums[name])) for name, matrix in matrices.items()]
    yield sums
    for hook in hooks:
        hook.remove()
