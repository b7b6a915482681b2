"""Beginnings of texts, kept beside the rows of a batch for models whose layers do not all keep whole texts.

A recurrent state, or a window, is that of one position: what two texts have in common is of use only if somebody kept
the caches as they were there. So they are copied while a prompt is read: shortly before its end, as the next turn of a
chat begins like this one up to there (templates write an old reply otherwise than the beginning of a new one); and
where it ceases to be like a text that a row holds: what two have in common, a system prompt say, a third may have.
"""
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

import device as machine
from model import Transformer

TAIL = 8  # tokens at the end of a prompt that the next turn may have otherwise
STEP = 64  # marks are multiples of it, so that prompts are cut into few sizes


@dataclass(eq=False)
class Snapshot:
    """What the caches held behind these tokens. `shared`: two texts began with them."""
    tokens: Sequence[int]
    caches: list[nn.Module]
    shared: bool


class Snapshots:
    """At most `most` of them, each as large as a row of the batch, and fewer where memory ends sooner. A turn of a chat
    takes the place of the turn before, and else a new one that of the one used longest ago."""

    def __init__(self, model: Transformer, most: int) -> None:
        self.model, self.most = model, most
        self.kept: list[Snapshot] = []  # those used lately behind

    def longest(self, prompt: Sequence[int]) -> Snapshot | None:
        """That of most tokens which the prompt begins with; not of all of them, since its last one's logits are wanted.
        """
        fitting = [one for one in self.kept if list(prompt[:-1][:len(one.tokens)]) == list(one.tokens)]
        found = max(fitting, key=lambda one: len(one.tokens), default=None)
        if found:
            self.kept.remove(found)
            self.kept.append(found)
        return found

    def marks(self, prompt: Sequence[int], start: int, common: int) -> dict[int, bool]:
        """Behind how many tokens of a prompt, of which `start` are not read and `common` are like another's, the caches
        are to be kept; and whether as shared."""
        last, shared = (n // STEP * STEP for n in (len(prompt) - TAIL, min(common, len(prompt) - TAIL)))
        found = {last: False, shared: True} if self.most else {}
        return {mark: found[mark] for mark in sorted(found) if mark > start}

    def keep(self, tokens: Sequence[int], caches: list[nn.Module], shared: bool, before: Snapshot | None) -> None:
        """Copy caches of one row that have taken in these tokens, of which those of `before` need not be kept longer.
        """
        if before in self.kept and not before.shared:
            self.kept.remove(before)
            own = before.caches
        elif len(self.kept) < self.most and self._room():
            own = self.model.spare_caches()
        elif self.kept:
            own = self.kept.pop(0).caches
        else:
            return
        for copy, cache in zip(own, caches, strict=True):
            copy.adopt(0, cache, len(tokens))
        self.kept.append(Snapshot(tokens, own, shared))

    def _room(self) -> bool:
        """For one more; a row's is left for others."""
        free = machine.available_memory(self.model.device)
        return free is None or free > 2 * self.model.cache_bytes(self.model.cache_length)
