"""OpenAI's responses, whole or streamed: tokens to text, up to stop strings, in the documents that clients expect.

After OpenAI's API reference (completions, chat completions, streaming).
"""
import itertools
import json
import time
import uuid
from collections.abc import Iterator, Sequence

from sampling import Scored
from scripts.openai_requests import Asked, Served
from tokenizer import REPLACEMENT, Stops, Stream, Tokenizer


class Speller:
    """Tokens as text of their own, each behind a letter: decoders drop a space at the beginning."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.known = tokenizer, {}
        self.anchor = tokenizer.encode("a", begin=False)
        self.skip = len(tokenizer.decode(self.anchor))

    def __call__(self, token: int) -> tuple[str, list[int] | None]:
        """Its text, and its bytes where they are known: a part of a character alone is no text."""
        if token not in self.known:
            text, piece = self.tokenizer.decode([*self.anchor, token])[self.skip:], self.tokenizer.piece(token) or ""
            data = list(text.encode())
            if REPLACEMENT in text:
                data = [int(piece[3:5], 16)] if len(piece) == 6 and piece.startswith("<0x") else None
            self.known[token] = (text, data) if text else (piece, list(piece.encode()))
        return self.known[token]


class Choice:
    """A text that grows, and what of it has not been told yet: `text` and `scores`. `finish`: stop or length."""

    def __init__(self, index: int, prompt: Sequence[int], asked: Asked, tokenizer: Tokenizer) -> None:
        self.index, self.asked = index, asked
        self.stream, self.until = Stream(tokenizer, prompt), Stops(asked.stop)
        self.tokens, self.copied, self.finish = 0, 0, None  # copied: of the prompt, not read for it
        self.text = tokenizer.decode(prompt) if asked.echo else ""
        self.scores: list[tuple[int, Scored]] = []  # where the token's text begins, and it
        self.length, self.certain = 0, 0  # characters so far, and of those the ones that no stop string can take back
        self.offset = len(self.text)  # of the first of them in the whole

    def push(self, tokens: Sequence[int], stop: str | None) -> bool:
        """Take in some tokens; `stop` is the last one's. Whether the text has ended before its row knows it."""
        single = bool(self.asked.stop) or self.asked.sampling.logprobs is not None
        size = 1 if single else 4 if self.asked.stream else len(tokens)  # 4: `Stream` holds back up to 7 of a character
        for i in range(0, len(tokens), size):
            part = tokens[i:i + size]
            last = stop if i + size >= len(tokens) else None
            if self.asked.sampling.logprobs is not None and last != "stop_id":
                self.scores.append((self.length, part[0]))
            self.tokens += len(part)
            self.stream.ids += part[:-1]
            self._add(self.stream.push(part[-1]) if single or self.asked.stream else self._keep(part[-1]))
            if last and not self.until.met:
                self._add(self.stream.flush())
                self._certain(self.until.flush())
            if self.until.met or last:
                self.finish = "length" if last == "length" and not self.until.met else "stop"
                return self.until.met
        return False

    def _keep(self, token: int) -> str:
        self.stream.ids.append(token)
        return ""

    def _add(self, piece: str) -> None:
        self.length += len(piece)
        self._certain(self.until.push(piece))

    def _certain(self, piece: str) -> None:
        self.text += piece
        self.certain += len(piece)

    def take(self) -> tuple[str, list[tuple[int, Scored]]]:
        """What is certain and new: text, and tokens that begin within it, with their places."""
        whole = self.finish is not None and not self.until.met
        ready = [score for score in self.scores if whole or score[0] < self.certain]
        self.scores = self.scores[len(ready):]
        text, self.text = self.text, ""
        return text, ready


class Answer:
    """The documents of one response: whole, or in pieces."""

    def __init__(self, asked: Asked, served: Served, spell: Speller) -> None:
        self.asked, self.spell = asked, spell
        count = len(asked.prompts) * asked.n
        self.choices = [Choice(i, asked.prompts[i // asked.n], asked, served.tokenizer) for i in range(count)]
        kind = "chat.completion" if asked.chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}",
                     "object": f"{kind}.chunk" if asked.chat and asked.stream else kind, "created": int(time.time()),
                     "model": served.model}

    def usage(self) -> dict:
        """Tokens; a stop id counts as one that was generated. Of a prompt's choices the first tells what was cached."""
        given, new = sum(map(len, self.asked.prompts)), sum(choice.tokens for choice in self.choices)
        cached = sum(choice.copied for choice in self.choices[::self.asked.n])
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new,
                "prompt_tokens_details": {"cached_tokens": cached}}

    def whole(self) -> dict:
        return self.head | {"choices": [self.choice(choice, "message") for choice in self.choices],
                            "usage": self.usage()}

    def begin(self) -> Iterator[dict]:
        """What a stream starts with."""
        for choice in self.choices if self.asked.chat else ():
            yield self.piece([self.shaped(choice, "delta", {"role": "assistant", "content": ""}, None, None)])

    def news(self, choice: Choice) -> Iterator[dict]:
        """A piece with what is new, if anything is."""
        if choice.text or choice.finish:
            yield self.piece([self.choice(choice, "delta")])

    def end(self) -> Iterator[dict]:
        if self.asked.usage:
            yield self.piece([]) | {"usage": self.usage()}

    def piece(self, choices: list[dict]) -> dict:
        return self.head | {"choices": choices} | ({"usage": None} if self.asked.usage else {})

    def choice(self, choice: Choice, kind: str) -> dict:
        text, scores = choice.take()
        told = None
        if self.asked.sampling.logprobs is not None:
            told = self.chat_scores(scores) if self.asked.chat else self.scores(scores, choice.offset)
        content = text if not self.asked.chat else \
            {"role": "assistant", "content": text, "refusal": None} if kind == "message" else \
            {"content": text} if text else {}
        return self.shaped(choice, kind, content, told, choice.finish)

    def shaped(self, choice: Choice, kind: str, content: object, scores: dict | None, finish: str | None) -> dict:
        return {"index": choice.index, kind if self.asked.chat else "text": content, "logprobs": scores,
                "finish_reason": finish}

    def scores(self, scores: list[tuple[int, Scored]], offset: int) -> dict:
        n = self.asked.alternatives
        return {"tokens": [self.spell(token)[0] for _, token in scores],
                "token_logprobs": [token.logprob for _, token in scores],
                "top_logprobs": [{self.spell(i)[0]: p for i, p in reversed(token.top[:n])} for _, token in scores]
                if n else None,
                "text_offset": [offset + at for at, _ in scores]}

    def chat_scores(self, scores: list[tuple[int, Scored]]) -> dict:
        def entry(token: int, logprob: float) -> dict:
            text, data = self.spell(token)
            return {"token": text, "logprob": logprob, "bytes": data}
        return {"content": [entry(token, token.logprob) | {"top_logprobs": list(itertools.starmap(
            entry, token.top[:self.asked.alternatives]))} for _, token in scores], "refusal": None}


def event(document: dict | str) -> bytes:
    """A server-sent event."""
    return f"data: {document if isinstance(document, str) else json.dumps(document)}\n\n".encode()
