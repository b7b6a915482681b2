"""OpenAI's requests: which of their fields are understood, and what is refused by name.

A field that would change the result and is not known here is an error, as a key of a config.json is. After OpenAI's API
reference (completions, chat completions); `top_k`, `min_p` and `repetition_penalty` are ours besides.
"""
import json
from dataclasses import dataclass, replace

from batch import Request
from errors import UserError
from sampling import Sampling, Varied
from tokenizer import Tokenizer, is_unicode

MOST_CHOICES = 128  # `n`, as at OpenAI
MOST_STOPS, LONGEST_STOP = 4, 1000  # strings, and characters of one
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# name -> least, most; null and absence leave the default of `Sampling`, but temperature 1 and no top_k, as at OpenAI
NUMBERS = {"temperature": (0, 2), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 100),
           "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "prompt_cache_retention", "parallel_tool_calls"}  # they do not change the text
NEUTRAL = {  # not supported: the values that ask for nothing
    "tools": [[]], "tool_choice": ["none", "auto"], "functions": [[]], "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}], "logit_bias": [{}], "modalities": [["text"]], "suffix": [""], "audio": [],
    "prediction": [], "web_search_options": [], "reasoning_effort": [], "verbosity": ["medium"]}
COMMON = {"model", "n", "seed", "stop", "stream", "stream_options", "max_tokens", "logprobs", "top_k", *NUMBERS,
          *IGNORED}
FIELDS = {False: COMMON | {"prompt", "echo", "best_of"},
          True: COMMON | {"messages", "max_completion_tokens", "top_logprobs"}}


class ApiError(Exception):
    """What a client is told instead of a text."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": UserError(str(self)).line, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, value: object, allowed: str) -> ApiError:
    return ApiError(400, f"{param} is {brief(value)}; allowed: {allowed}", param, "invalid_value")


def brief(value: object) -> str:
    """A value that came, for a message. repr refuses integers of some thousand digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "out of all bounds"
    return text if len(text) <= 80 else f"{text[:77]}..."


# -- what is asked for ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Asked:
    """A request's body, read."""
    chat: bool
    prompts: list[list[int]]
    max_new_tokens: int | None  # None: to the end of the row
    sampling: Sampling
    seed: int | None
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False  # at the end of a stream; else it is always told
    alternatives: int = 0  # of those that `sampling.logprobs` brings; a batch may bring more
    echo: bool = False

    def requests(self, stop_ids: frozenset[int], length: int) -> list[Request]:
        """One for each choice, n for each prompt, in rows of `length`; choice i of a prompt has seed + i."""
        found = []
        for prompt in self.prompts:
            room = length - len(prompt)
            new = self.max_new_tokens or (room if self.chat else min(16, room))  # 16: OpenAI's own default
            if new > room or room < 1:
                raise ApiError(400, f"this server's texts have at most {length} tokens; {len(prompt)} in the prompt "
                                    f"and {max(new, 1)} to be generated are more", "messages" if self.chat else
                               "prompt", "context_length_exceeded")
            found += [Request(prompt, new, stop_ids, self.sampling, None if self.seed is None else self.seed + i)
                      for i in range(self.n)]
        return found


class Body:
    """The fields of a request; each is read with the check of its type."""

    def __init__(self, raw: bytes, chat: bool, model: str) -> None:
        try:
            self.fields = json.loads(raw, parse_constant=self.no_number)
        except (ValueError, RecursionError) as e:  # not UTF-8 is a ValueError too
            raise ApiError(400, f"the body is not JSON ({e})", code="invalid_json") from None
        if not isinstance(self.fields, dict):
            raise ApiError(400, "the body is not a JSON object", code="invalid_json")
        for name, value in self.fields.items():
            if name in NEUTRAL and name not in FIELDS[chat]:
                if value is not None and value not in NEUTRAL[name]:
                    raise ApiError(400, f"{name} is not supported here; leave it out", name, "unsupported_parameter")
            elif name not in FIELDS[chat]:
                raise ApiError(400, f"{brief(name)} is not a parameter here", name[:80], "unknown_parameter")
        if self.text("model", model) != model:
            raise ApiError(404, f"there is no model {brief(self.fields['model'])}; this server has {model}", "model",
                           "model_not_found")

    @staticmethod
    def no_number(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    def get(self, name: str, default: object) -> object:
        return default if self.fields.get(name) is None else self.fields[name]

    def text(self, name: str, default: str) -> str:
        return sound_text(name, self.get(name, default))

    def flag(self, name: str) -> bool:
        if not isinstance(value := self.get(name, False), bool):
            raise wrong(name, value, "true or false")
        return value

    def number(self, name: str, default: float | None, least: float, most: float) -> float | None:
        value = self.get(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int | float)
                                     or not least <= value <= most):
            raise wrong(name, value, f"{least} to {most}")
        return value if value is None else float(value)

    def whole(self, name: str, default: int | None, least: int, most: int) -> int | None:
        value = self.get(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int)
                                     or not least <= value <= most):
            raise wrong(name, value, f"a whole number, {least} to {most}")
        return value


def sound_text(name: str, value: object) -> str:
    """A string that can be written as UTF-8: JSON may hold halves of characters."""
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    if not is_unicode(value):
        raise wrong(name, value, "text without lone surrogates")
    return value


@dataclass(frozen=True)
class Served:
    """What a request is held against."""
    model: str
    tokenizer: Tokenizer
    length: int  # positions of a row
    vocab_size: int
    varied: Varied
    most_texts: int  # choices of one request
    longest_piece: int  # characters that a token can stand for

    def read(self, raw: bytes, chat: bool) -> Asked:
        """A body. Raises ApiError for all that is wrong with it."""
        body = Body(raw, chat, self.model)
        alternatives = self.alternatives(body, chat)
        asked = Asked(chat, [], self.max_new_tokens(body, chat), self.sampling(body, alternatives),
                      body.whole("seed", None, -2**63, 2**64 - 1), body.whole("n", 1, 1, MOST_CHOICES), stops(body),
                      body.flag("stream"), include_usage(body), alternatives or 0, not chat and body.flag("echo"))
        if asked.echo and alternatives is not None:
            raise ApiError(400, "echo and logprobs were both asked for: those of a prompt are not computed", "echo",
                           "unsupported_parameter")
        if not chat and body.whole("best_of", asked.n, 1, MOST_CHOICES) != asked.n:
            raise ApiError(400, "best_of is not supported here but with the value of n", "best_of",
                           "unsupported_parameter")
        texts = [messages(body)] if chat else prompts(body)
        if asked.n * len(texts) > self.most_texts:
            raise wrong("n" if chat else "prompt", asked.n * len(texts), f"at most {self.most_texts} texts in all")
        found = [self.chat_ids(texts[0])] if chat else [self.ids(text) for text in texts]
        return replace(asked, prompts=found)

    def max_new_tokens(self, body: Body, chat: bool) -> int | None:
        new = body.whole("max_tokens", None, 1, 2**53)
        return body.whole("max_completion_tokens", new, 1, 2**53) if chat else new

    def alternatives(self, body: Body, chat: bool) -> int | None:
        if not chat:
            return body.whole("logprobs", None, 0, self.varied.logprobs)
        most, wanted = body.whole("top_logprobs", None, 0, self.varied.logprobs), body.flag("logprobs")
        if most is not None and not wanted:
            raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
        return (most or 0) if wanted else None

    def sampling(self, body: Body, alternatives: int | None) -> Sampling:
        default = Sampling(temperature=1.0, top_k=None)
        numbers = {name: body.number(name, getattr(default, name), *bounds) for name, bounds in NUMBERS.items()}
        if numbers["top_p"] == 0:  # allowed there: the likeliest alone
            numbers["top_p"] = 1e-9
        most = self.varied.top_k or self.vocab_size
        top_k = body.whole("top_k", None, -1, most)
        return Sampling(**numbers, top_k=top_k if top_k and top_k > 0 else None, logprobs=alternatives)

    def ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self.require_room("prompt", prompt)
            prompt = self.tokenizer.encode(prompt)
        if not prompt:
            raise wrong("prompt", prompt, "some text")
        if not all(0 <= i < self.vocab_size for i in prompt):
            raise wrong("prompt", prompt, f"token ids from 0 to {self.vocab_size - 1}")
        return prompt

    def chat_ids(self, found: list[dict[str, str]]) -> list[int]:
        if self.tokenizer.template is None:
            raise ApiError(400, f"{self.model} has no chat template; use /v1/completions", "messages",
                           "no_chat_template")
        try:
            text = self.tokenizer.template.render(found)
        except UserError as e:
            raise ApiError(400, str(e), "messages", "chat_template") from None
        self.require_room("messages", text)
        return self.tokenizer.encode(text, begin=False)

    def require_room(self, where: str, text: str) -> None:
        """Refuse what cannot fit, before time goes into its tokens."""
        if len(text) > self.length * self.longest_piece:
            raise ApiError(400, f"this server's texts have at most {self.length} tokens; {len(text)} characters are "
                                f"more", where, "context_length_exceeded")


def longest_piece(tokenizer: Tokenizer, vocab_size: int) -> int:
    """Characters of the vocabulary's longest entry."""
    return max((len(piece) for i in range(vocab_size) if (piece := tokenizer.piece(i))), default=1)


def stops(body: Body) -> tuple[str, ...]:
    found = body.get("stop", [])
    found = found if isinstance(found, list) else [found]
    if len(found) > MOST_STOPS:
        raise wrong("stop", found, f"a string, or at most {MOST_STOPS}")
    for each in found:
        if not 0 < len(sound_text("stop", each)) <= LONGEST_STOP:
            raise wrong("stop", each, f"strings of 1 to {LONGEST_STOP} characters")
    return tuple(found)


def include_usage(body: Body) -> bool:
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(wanted := options.get("include_usage") or False, bool):
        raise wrong("stream_options", options, '{"include_usage": true or false}')
    return wanted


def prompts(body: Body) -> list[str | list[int]]:
    """A string, some, ids, or lists of them."""
    found = body.get("prompt", None)
    if isinstance(found, str) or (isinstance(found, list) and found and all(type(i) is int for i in found)):
        found = [found]
    if isinstance(found, list) and found:
        if all(isinstance(each, str) for each in found):
            return [sound_text("prompt", each) for each in found]
        if all(isinstance(each, list) and all(type(i) is int for i in each) for each in found):
            return found
    raise wrong("prompt", found, "a string, a list of strings, token ids, or a list of lists of token ids")


def messages(body: Body) -> list[dict[str, str]]:
    """Turns for a template: each with a role and its content as one string."""
    found = body.get("messages", None)
    if not isinstance(found, list) or not found:
        raise wrong("messages", found, 'a list of {"role": ..., "content": ...}, not empty')
    return [turn(f"messages[{i}]", each) for i, each in enumerate(found)]


def turn(where: str, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise wrong(where, message, '{"role": ..., "content": ...}')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{where}.role", role, ", ".join(ROLES))
    for key in message.keys() - {"role", "content", "name"}:
        if message[key] not in (None, []):
            raise ApiError(400, f"{where}: {brief(key)} is not supported here; leave it out", f"{where}.{key[:80]}",
                           "unsupported_parameter")
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or part.get("type") != "text":
            raise wrong(f"{where}.content", part, 'a string, or parts {"type": "text", "text": ...}')
    if isinstance(content, list):
        content = "".join(sound_text(f"{where}.content", part.get("text")) for part in content)
    return {"role": ROLES[role], "content": sound_text(f"{where}.content", content)}
