"""A chat at the terminal: turns become one growing text, of which only what is new is read by the model.

Replies stay in the text as the tokens that were generated. Where the next prompt begins like the last one and its
reply, their keys, values and states are in the caches already; a template that rewrites earlier turns (and drops what
the model thought, say) shortens that beginning. Without a template each input continues a plain text on a new line.
"""
import importlib
import importlib.util
import sys
from collections.abc import Callable

import device as machine
from metrics import Sample
from model import Transformer
from tokenizer import Tokenizer, is_unicode

CACHE_LENGTH = 8192  # positions to start with; doubled when a chat outgrows them
REWIND = 8  # positions that may be given up: a token being read when Ctrl-C came, those a GPU is ahead of us

Reply = Callable[[int, list[int], int, int], Sample]  # turn, prompt ids, max_new_tokens, how many of the ids are cached


class Conversation:
    """The turns so far, the text they make, and its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.text, self.ids = "", []

    def prompt(self, message: str) -> tuple[str, list[int]]:
        """The whole text up to where the reply to `message` begins, and its token ids."""
        if self.tokenizer.template is None:
            text = f"{self.text}\n{message}" if self.text else message
            return text, self.tokenizer.encode(text)
        text = self.tokenizer.template.render([*self.messages, {"role": "user", "content": message}])
        if self.ids and text.startswith(self.text):
            return text, self.ids + self.tokenizer.encode(text[len(self.text):], begin=False)
        return text, self.tokenizer.encode(text, begin=False)

    def add(self, message: str, text: str, ids: list[int], reply: Sample) -> None:
        """A turn and its reply; a stop id belongs to the template, which writes it itself."""
        self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": reply.text}]
        tokens = reply.tokens[:-1] if reply.stop == "stop_id" else reply.tokens
        self.text, self.ids = text + reply.text, ids + tokens
        if reply.stop == "stop_string":  # its tokens say more than its text: it is encoded anew
            self.text, self.ids = text, ids

    def drop_oldest(self) -> None:
        """Forget the oldest turn and its reply (without a template, the first half of the text)."""
        self.messages = self.messages[2:]
        self.text, self.ids = (self.text[len(self.text) // 2:] if self.messages else "", [])


def setup(model: Transformer, spare: int = 0) -> None:
    """Caches for a chat, and line editing where the terminal can have it.

    `spare`: positions behind a text that speculation writes too, and that are given up afterwards.
    """
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # `input` makes use of it once it is there
    length = min(CACHE_LENGTH, model.config.max_seq_len)
    machine.require_memory(model.cache_bytes(length), model.device)
    model.setup_caches(1, length + spare, max(REWIND, spare))


def common(a: list[int], b: list[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def interact(model: Transformer, conversation: Conversation, reply: Reply, max_new_tokens: int,
             ask: Callable[[str], str] = input, say: Callable[[str], None] = tell, spare: int = 0) -> None:
    """Read turns until the input ends. `reply` writes the answer; `say` is for messages that are not part of it;
    `spare` as in `setup`."""
    held: list[int] = []  # ids at the positions that the caches hold
    turn = 0
    while (message := read(ask, say)) is not None:
        if message.strip() == "/reset":
            conversation.reset()
            say("forgotten")
        if message.strip() in ("", "/reset"):
            continue
        text, ids = fit(conversation, message, min(max_new_tokens, model.config.max_seq_len // 4),
                        model.config.max_seq_len, ask, say)
        if not ids:
            continue
        room = min(max_new_tokens, model.config.max_seq_len - len(ids))
        if grow(model, len(ids) + room, say, spare):
            held = []
        cached = min(common(held, ids), len(ids) - 1)
        # what the device may have read beyond the ids we saw has to be given up as well
        if not model.rewind(len(held) - cached + spare + machine.read_ahead(model.device) * (1 + spare)):
            cached = 0
        sample = reply(turn, ids, room, cached)
        # the last token has not been read; without one the prompt may be in only some of the layers' caches
        held = ids + sample.tokens[:-1] if sample.tokens else []
        conversation.add(message, text, ids, sample)
        turn += 1
        if sample.stop == "length" and room < max_new_tokens:
            say(f"the context of {model.config.max_seq_len} tokens is full")


def read(ask: Callable[[str], str], say: Callable[[str], None]) -> str | None:
    """A line of input; None at its end. Ctrl-C only clears the line."""
    while True:
        try:
            if is_unicode(text := ask("> " if sys.stdin.isatty() else "")):
                return text
            say("that was not UTF-8")
        except EOFError:
            return None
        except KeyboardInterrupt:
            say("\nCtrl-D ends the chat")


def fit(conversation: Conversation, message: str, wanted: int, limit: int, ask: Callable[[str], str],
        say: Callable[[str], None]) -> tuple[str, list[int]]:
    """The prompt, with oldest turns dropped if need be and allowed; no ids if it cannot be sent."""
    text, ids = conversation.prompt(message)
    while len(ids) + wanted > limit:
        full = f"the context of {limit} tokens is full ({len(ids)} are taken, a reply may take {wanted})"
        if not conversation.messages:
            if len(ids) < limit:  # a long message, a short reply
                return text, ids
            say(f"{full}; this message alone does not fit: shorten it")
            return "", []
        say(f"{full}. Drop the oldest turn? [Y/n]")
        answer = read(ask, say)
        if answer is None or answer.strip().lower() not in ("", "y", "yes"):
            if len(ids) < limit:
                return text, ids
            say("not sent; /reset forgets everything")
            return "", []
        conversation.drop_oldest()
        text, ids = conversation.prompt(message)
    return text, ids


def grow(model: Transformer, length: int, say: Callable[[str], None], spare: int = 0) -> bool:
    """Longer caches, empty, if a text of `length` needs them."""
    if length <= model.cache_length - spare:
        return False
    longer = model.cache_length - spare
    while longer < length:
        longer *= 2
    longer = min(longer, model.config.max_seq_len)
    say(f"making room for {longer} tokens: the chat is read again, a compiled step compiled again")
    machine.require_memory(model.cache_bytes(longer), model.device)
    model.setup_caches(1, longer + spare, max(REWIND, spare))
    return True
