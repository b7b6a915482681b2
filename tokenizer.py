"""Text to token ids and back: `tokenizer.json` (the tokenizers library) or `tokenizer.model` (sentencepiece).

`Stream` turns ids into text as they come, without broken characters or lost spaces. A tokenizer's `stop_ids` are the
union of every place where a checkpoint names the tokens that end a text; its `template` makes a text of a chat.
"""
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from config import read_json
from errors import UserError

REPLACEMENT = "\ufffd"  # what a decoder shows for an incomplete UTF-8 sequence


def is_unicode(text: str) -> bool:
    """False where it holds halves of characters: what was not UTF-8 on a command line, or JSON that names them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def sound(path: Path) -> Iterator[None]:
    """The tokenizers library panics over files that it took and cannot work with; its panics are no Exceptions."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{path} is no sound tokenizer ({str(e).splitlines()[0]}); download it again") from None


class JsonTokenizer:
    """`tokenizer.json`: every current family."""
    stop_ids: frozenset[int] = frozenset()
    template: "ChatTemplate | None" = None

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library  # here, so that a run without text does not import it
        try:
            with sound(path):
                self.library = Library.from_file(str(path))
        except UserError:
            raise
        except Exception as e:  # the library raises nothing narrower
            raise UserError(f"{path} is not a tokenizer ({str(e).splitlines()[0]}); download it again") from None
        self.path, self.vocab_size = path, self.library.get_vocab_size()

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Special tokens in the text count as such; `begin`: with what the tokenizer sets before and behind a text."""
        with sound(self.path):
            return self.library.encode(text, add_special_tokens=begin).ids

    def decode(self, ids: Sequence[int]) -> str:
        with sound(self.path):
            return self.library.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self.library.token_to_id(token)

    def piece(self, token: int) -> str | None:
        """A token as the vocabulary has it; None if it has no such."""
        return self.library.id_to_token(token)


class SentencePieceTokenizer:
    """`tokenizer.model`: Llama 2, Mistral 7B, and the demo."""
    stop_ids: frozenset[int] = frozenset()
    template: "ChatTemplate | None" = None

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor
        try:
            self.library = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as e:
            reason = str(e).splitlines()[0]
            raise UserError(f"{path} is not a sentencepiece model ({reason}); download it again") from None
        self.vocab_size = self.library.vocab_size()
        controls = [self.library.id_to_piece(i) for i in range(self.vocab_size) if self.library.is_control(i)]
        self.controls = re.compile("(" + "|".join(map(re.escape, controls)) + ")")

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """The begin token and the text, in which nothing is special; without `begin` (a rendered chat) the text alone,
        in which the names of control tokens are those tokens."""
        if begin:
            return [self.library.bos_id(), *self.library.encode(text)]
        parts = self.controls.split(text)  # texts and control tokens take turns
        return [i for n, part in enumerate(parts) if part
                for i in ([self.library.piece_to_id(part)] if n % 2 else self.library.encode(part))]

    def decode(self, ids: Sequence[int]) -> str:
        return self.library.decode([i for i in ids if i < self.vocab_size])

    def token_id(self, token: str) -> int | None:
        i = self.library.piece_to_id(token)
        return None if i == self.library.unk_id() else i

    def piece(self, token: int) -> str | None:
        return self.library.id_to_piece(token) if token < self.vocab_size else None


Tokenizer = JsonTokenizer | SentencePieceTokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, with its `stop_ids` and `template`."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = JsonTokenizer(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    elif (folder / "tekken.json").is_file():
        raise UserError(f"{folder} has tekken.json alone, which is not read; take a version with tokenizer.json")
    else:
        raise UserError(f"{folder} has no tokenizer; expected tokenizer.json or tokenizer.model")
    tokenizer.stop_ids = find_stop_ids(folder, tokenizer)
    tokenizer.template = find_template(folder)
    return tokenizer


def optional_json(path: Path) -> dict:
    """The object in `path`; empty if there is none."""
    document = read_json(path) if path.is_file() else {}
    return document if isinstance(document, dict) else {}


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and so on of tokenizer_config.json, each a string there or an object with `content`."""
    found = {key: value.get("content") if isinstance(value, dict) else value
             for key, value in optional_json(folder / "tokenizer_config.json").items() if key.endswith("_token")}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def find_stop_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a text: eos of generation_config.json, config.json (and its text_config), tokenizer_config.json."""
    config, found = optional_json(folder / "config.json"), set()
    nested = config.get("text_config")
    nested = nested if isinstance(nested, dict) else {}
    for document in (optional_json(folder / "generation_config.json"), config, nested):
        eos = document.get("eos_token_id")
        found.update(i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int))
    token = special_tokens(folder).get("eos_token")
    if token is not None and (i := tokenizer.token_id(token)) is not None:
        found.add(i)
    return frozenset(found)


# -- chat -------------------------------------------------------------------------------------------------------------

class ChatTemplate:
    """A checkpoint's chat template: a jinja2 program, and as it comes from a stranger, in a sandbox.

    The names it may use are those that transformers gives it (its documentation of chat templates).
    """

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        from jinja2 import TemplateSyntaxError, nodes  # here, so that a run without chat does not import it
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %} marks what the model said, for training; it changes nothing."""
            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser):
                line = next(parser.stream).lineno
                return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[Generation, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda x, ensure_ascii=False, **options: json.dumps(
            x, ensure_ascii=ensure_ascii, **options)
        environment.globals.update(raise_exception=self.refuse, strftime_now=lambda form: datetime.now().strftime(form))
        self.tokens = tokens
        try:
            self.program = environment.from_string(source)
        except (TemplateSyntaxError, SyntaxError, RecursionError) as e:  # jinja2 makes Python of it, and compiles that
            raise UserError(f"the checkpoint's chat template is not valid ({e}); download it again") from None

    @staticmethod
    def refuse(message: str) -> None:
        raise UserError(f"the checkpoint's chat template refuses this chat: {message}")

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text of a chat up to where the model's next turn begins; messages have `role` and `content`."""
        from jinja2 import TemplateError
        try:
            return self.program.render(messages=messages, tools=None, documents=None, add_generation_prompt=True,
                                       **self.tokens)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
                RecursionError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(f"the checkpoint's chat template fails ({e}); download it again") from None


def find_template(folder: Path) -> ChatTemplate | None:
    """From chat_template.jinja, tokenizer_config.json or chat_template.json; None if the checkpoint has none."""
    try:
        source = (folder / "chat_template.jinja").read_text("utf-8")
    except FileNotFoundError:
        source = optional_json(folder / "tokenizer_config.json").get("chat_template") \
            or optional_json(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return ChatTemplate(source, special_tokens(folder)) if isinstance(source, str) else None


# -- streaming --------------------------------------------------------------------------------------------------------


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


class Stops:
    """Text up to the one of some strings that is complete first; what may be the beginning of one waits for more."""

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self.strings, self.held, self.met = [string for string in strings if string], "", False

    def push(self, piece: str) -> str:
        """What of the text so far, and not given yet, belongs to it for certain. `met`: nothing more will."""
        text = self.held + piece
        if self.met or (ends := [(at + len(string), at) for string in self.strings if (at := text.find(string)) >= 0]):
            text, self.held, self.met = "" if self.met else text[:min(ends)[1]], "", True
            return text
        most = max(map(len, self.strings), default=1) - 1
        start = next((i for i in range(max(len(text) - most, 0), len(text))
                      if any(string.startswith(text[i:]) for string in self.strings)), len(text))
        self.held = text[start:]
        return text[:start]

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text
