"""Text to token ids and back: `tokenizer.json` (the tokenizers library) or `tokenizer.model` (sentencepiece).

`Stream` turns ids into text as they come, without broken characters or lost spaces. A tokenizer's `stop_ids` are the
union of every place where a checkpoint names the tokens that end a text.
"""
from collections.abc import Sequence
from pathlib import Path

from config import read_json
from errors import UserError

REPLACEMENT = "\ufffd"  # what a decoder shows for an incomplete UTF-8 sequence


class JsonTokenizer:
    """`tokenizer.json`: every current family."""
    stop_ids: frozenset[int] = frozenset()

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library  # here, so that a run without text does not import it
        try:
            self.library = Library.from_file(str(path))
        except Exception as e:  # the library raises nothing narrower
            raise UserError(f"{path} is not a tokenizer ({str(e).splitlines()[0]}); download it again") from None

    def encode(self, text: str) -> list[int]:
        return self.library.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.library.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self.library.token_to_id(token)


class SentencePieceTokenizer:
    """`tokenizer.model`: Llama 2, Mistral 7B, and the demo."""
    stop_ids: frozenset[int] = frozenset()

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor
        try:
            self.library = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as e:
            reason = str(e).splitlines()[0]
            raise UserError(f"{path} is not a sentencepiece model ({reason}); download it again") from None
        self.vocab_size = self.library.vocab_size()

    def encode(self, text: str) -> list[int]:
        return [self.library.bos_id(), *self.library.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.library.decode([i for i in ids if i < self.vocab_size])

    def token_id(self, token: str) -> int | None:
        i = self.library.piece_to_id(token)
        return None if i == self.library.unk_id() else i


Tokenizer = JsonTokenizer | SentencePieceTokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, with its `stop_ids`; `encode` adds the begin token if there is one."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = JsonTokenizer(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    else:
        raise UserError(f"{folder} has no tokenizer; expected tokenizer.json or tokenizer.model")
    tokenizer.stop_ids = find_stop_ids(folder, tokenizer)
    return tokenizer


def find_stop_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a text: eos of generation_config.json, config.json (and its text_config), tokenizer_config.json."""
    documents = {name: read_json(folder / name) for name in
                 ("generation_config.json", "config.json", "tokenizer_config.json") if (folder / name).is_file()}
    documents = {name: d for name, d in documents.items() if isinstance(d, dict)}
    nested = documents.get("config.json", {}).get("text_config")
    nested = nested if isinstance(nested, dict) else {}
    found: set[int] = set()
    for document in (documents.get("generation_config.json", {}), documents.get("config.json", {}), nested):
        eos = document.get("eos_token_id")
        found.update(i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int))
    token = documents.get("tokenizer_config.json", {}).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and (i := tokenizer.token_id(token)) is not None:
        found.add(i)
    return frozenset(found)


class Stream:
    """Text of a growing list of ids. `push` gives what became readable, `flush` the rest at the end.

    Decoders drop a leading space and join byte tokens, so each piece is decoded behind its predecessors: the text of
    [context + new] minus the text of [context]. Text that ends inside a character waits for the next token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt)  # all of it: a cut could fall inside a character and spoil the decoder's byte run
        self.context, self.read = 0, len(self.ids)  # ids[context:read] is shown already, ids[read:] is not

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self.emit(hold=len(self.ids) - self.read < 8)  # characters have 4 bytes at most

    def flush(self) -> str:
        return self.emit(hold=False)

    def emit(self, hold: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.context:self.read])
        text = self.tokenizer.decode(self.ids[self.context:])
        if hold and text.endswith(REPLACEMENT):
            return ""
        if len(text) > len(before):
            self.context, self.read = self.read, len(self.ids)
        return text[len(before):]
