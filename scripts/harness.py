"""Tasks of EleutherAI's lm-evaluation-harness, answered by a model of ours.

    python -m scripts.harness --tasks hellaswag,arc_easy                                  # the demo
    python -m scripts.harness --tasks arc_easy --checkpoint_path ORG/NAME --quantize int4 --output results.json
    python -m scripts.harness --tasks my_task --include_path DIR --limit 100              # tasks of your own

Needs the package lm_eval (requirements-dev.txt), which fetches the tasks' data, counts and prints; what is asked of the
model is answered here as lm_eval's own backend for transformers does: the same tokens, the same cuts of texts that are
too long, the same ends of generated texts. Probabilities are float32 whatever the model's dtype (that backend takes
them in the model's).

A `Scorer` needs no lm_eval: it scores and continues token lists in batches. `Requests` reads lm_eval's requests.
Glossary: B rows of a batch, S tokens of the longest, D dim, V vocabulary; a pair is a context and its continuation.
"""
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import compiler
import device as machine
from checkpoint import resolve_checkpoint
from decoding import Steps, blame, chunks, compiled_steps, generate_rows
from errors import Parser, UserError, run_command
from generate import DEMO, load_model
from model import Transformer
from sampling import Sampling
from scripts.rows import check, replace
from tokenizer import JsonTokenizer, Stream, Tokenizer, optional_json, special_tokens

BUCKET = 64  # padded lengths are multiples of it: few sizes for the allocator
LOGITS = 1 << 25  # held at once, at most: 128 MB of float32
GREEDY = Sampling(temperature=0)
NEUTRAL = dict(num_beams=1, repetition_penalty=1.0, use_cache=True)  # options that change nothing at these values


# -- token lists ------------------------------------------------------------------------------------------------------

class Reply:
    """One generated text: it ends before a stop string, at a stop id, or when its row does."""

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str]) -> None:
        self.tokenizer, self.until = tokenizer, [stop for stop in until if stop]
        self.stream, self.seen, self.ids, self.done = Stream(tokenizer), "", [], False

    def push(self, token: int | None) -> None:
        """The row's next id, or None if it has none in this step."""
        if token is None or self.done:
            return
        if token not in self.tokenizer.stop_ids:
            self.ids.append(token)
            piece = self.stream.push(token)
            self.seen += piece
        self.done = token in self.tokenizer.stop_ids or any(
            stop in self.seen[-len(piece) - len(stop):] for stop in self.until)

    def text(self) -> str:
        """Decoded as a text of its own, up to the first stop string in it."""
        text = self.tokenizer.decode(self.ids)
        return text[:min((at for stop in self.until if (at := text.find(stop)) >= 0), default=None)]


class Scorer:
    """Scores and continues token lists, `batch_size` at a time; only texts up to `max_length` tokens are read."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int = 8, max_length: int | None = None,
                 steps: Steps = Steps()) -> None:
        self.model, self.tokenizer, self.batch_size, self.steps = model, tokenizer, batch_size, steps
        self.max_length = max_length or model.config.max_seq_len
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        if not 1 <= self.max_length <= model.config.max_seq_len:
            raise UserError(f"max_length is {max_length}; it must be 1 to {model.config.max_seq_len} for this model")

    def continuation_scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation) the log-probability of the continuation, in nats, and whether each of its
        tokens is the likeliest. Contexts hold a token at least and lose their beginning when a text is too long.

        Pairs that differ in their last token only are read once. An empty continuation is certain: 0 and True.
        Raises UserError for a continuation over max_length, and for logits that are not finite.
        """
        reads: dict[tuple[int, ...], list[int]] = {}  # what the model reads -> the pairs it is read for
        for i, (context, continuation) in enumerate(pairs):
            assert context, i
            if len(continuation) > self.max_length:
                raise UserError(f"a continuation of {len(continuation)} tokens cannot be scored; at most "
                                f"{self.max_length} fit the model's context or --max_length")
            if continuation:
                reads.setdefault((*context, *continuation)[-self.max_length - 1:-1], []).append(i)
        scores = [(0.0, True)] * len(pairs)
        order = sorted(reads, key=len)  # attention looks at all of a cache, so caches grow with the texts
        size = min(self.batch_size, len(order))
        if order and (self.model.cache_size[0] != size or self.model.cache_size[1] < len(order[-1])):
            machine.require_memory(size * self.model.cache_bytes(len(order[-1])), self.model.device)
        with tqdm(total=len(order), desc="texts read") as bar:
            for rows in cut(order, size):
                questions = [(row, i, pairs[i][1]) for row, read in enumerate(rows) for i in reads[read]]
                for (_, i, _), score in zip(questions, self.score(rows, questions, size), strict=True):
                    scores[i] = score
                bar.update(len(rows))
        return scores

    @torch.no_grad()
    def score(self, rows: Sequence[Sequence[int]], questions: list[tuple[int, int, Sequence[int]]],
              size: int) -> list[tuple[float, bool]]:
        """The scores of one batch; a question is (row, anything, what follows the last so many tokens of the row)."""
        wanted = [0] * len(rows)
        for row, _, targets in questions:
            wanted[row] = max(wanted[row], len(targets))
        parts, ends = self.read(rows, wanted, size), torch.tensor(wanted).cumsum(0).tolist()
        at = torch.cat([torch.arange(ends[row] - len(targets), ends[row]) for row, _, targets in questions])
        targets = torch.tensor([token for *_, targets in questions for token in targets])
        log_p, likeliest = self.look_up(torch.cat(parts), at, targets)
        counts = [len(targets) for *_, targets in questions]
        return [(p.sum().item(), bool(best.all()))
                for p, best in zip(log_p.split(counts), likeliest.split(counts), strict=True)]

    def read(self, rows: Sequence[Sequence[int]], wanted: Sequence[int], size: int) -> list[Tensor]:
        """What the model makes of the last so many tokens of each row, [n, D] each.

        Rows are padded on the right, where no token before can see it, and to `size` rows, so that the caches stay.
        """
        longest, device = max(map(len, rows)), self.model.device
        width = max(longest, min(-(-longest // BUCKET) * BUCKET, self.model.config.max_seq_len))
        tokens = torch.zeros(size, width, dtype=torch.int64)
        for row, ids in zip(tokens, rows, strict=False):
            row[:len(ids)] = torch.tensor(ids)
        tokens, positions = tokens.to(device), torch.arange(width, device=device).expand(size, -1)
        self.model.setup_caches(size, min(1 << (width - 1).bit_length(), self.model.config.max_seq_len))
        parts: list[list[Tensor]] = [[] for _ in rows]
        for chunk in chunks(0, width, self.model.block):
            x = self.model.hidden(tokens[:, chunk], positions[:, chunk])  # [B, S of the chunk, D]
            for row, (part, ids, n) in enumerate(zip(parts, rows, wanted, strict=True)):
                first, end = (min(max(edge - chunk.start, 0), x.shape[1]) for edge in (len(ids) - n, len(ids)))
                part.append(x[row, first:end].clone())  # a view would keep all of x
        return [torch.cat(part) for part in parts]

    def look_up(self, hidden: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [N, D]; places in it and what comes after them, both [n] -> log-probabilities float64 [n] and whether
        nothing is likelier, bool [n], on the CPU. Logits are never held for all N at once."""
        log_p, likeliest = torch.zeros(len(at), dtype=torch.float64), torch.zeros(len(at), dtype=torch.bool)
        piece = max(1, LOGITS // self.model.config.vocab_size)
        for start in range(0, len(hidden), piece):
            logits = self.model.logits(hidden[start:start + piece]).float()  # [N', V]
            here = (at >= start) & (at < start + piece)
            place, target = (at[here] - start).to(logits.device), targets[here].to(logits.device)
            log_p[here] = logits.log_softmax(-1)[place, target].cpu().double()
            likeliest[here] = (logits.argmax(-1)[place] == target).cpu()
        if not log_p.isfinite().all():
            raise UserError(f"the logits are not finite: {blame(self.model)}")
        return log_p, likeliest

    def generate(self, prompts: Sequence[Sequence[int]], until: Sequence[str], max_new_tokens: int,
                 sampling: Sampling = GREEDY) -> list[str]:
        """The texts that continue the prompts, each up to the first of the strings `until`, a stop id, or so many
        tokens. Draws come from torch's default generator. Raises UserError as `decoding.generate_rows` does."""
        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # like lengths together; room is made once
        size = min(self.batch_size, len(order))
        with tqdm(total=len(order), desc="texts continued") as bar:
            for batch in cut(order, size):
                replies = [Reply(self.tokenizer, until) for _ in batch]
                rows = [prompts[i] for i in (*batch, *batch[-1:] * (size - len(batch)))]
                with contextlib.closing(generate_rows(self.model, rows, max_new_tokens, sampling,
                                                      self.tokenizer.stop_ids, steps=self.steps)) as steps:
                    for tokens in steps:
                        for reply, token in zip(replies, tokens, strict=False):  # rows that only fill up have none
                            reply.push(token)
                        if all(reply.done for reply in replies):
                            break
                for i, reply in zip(batch, replies, strict=True):
                    texts[i] = reply.text()
                bar.update(len(batch))
        return texts


def cut(order: list, size: int) -> Iterator[list]:
    """`order` in pieces of `size` and a rest."""
    for start in range(0, len(order), max(size, 1)):
        yield order[start:start + size]


# -- lm_eval's requests -----------------------------------------------------------------------------------------------

def special_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, int]:
    """What stands before a text without context (the begin token, or else the end token), and the end token.

    As in transformers, tokenizer_config.json decides; config.json is asked only where that names no end token.
    """
    names = special_tokens(folder)
    bos, eos = (tokenizer.token_id(names[key]) if key in names else None for key in ("bos_token", "eos_token"))
    if eos is None:
        config = optional_json(folder / "config.json")
        eos = config.get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        bos = config.get("bos_token_id") if bos is None else bos
    if not isinstance(eos, int):
        raise UserError(f"{folder} names no end token; put eos_token into its tokenizer_config.json")
    return bos if isinstance(bos, int) else eos, eos


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """How a special token is written; `decode` leaves it out."""
    library = tokenizer.library
    return (library.id_to_token(token) if isinstance(tokenizer, JsonTokenizer) else library.id_to_piece(token)) or ""


class Requests:
    """Answers to the three kinds of requests: what lm_eval's TemplateLM leaves to a backend."""
    eot_token_id = prefix_token_id = 0  # properties there, which could not be set

    def __init__(self, scorer: Scorer, prefix_id: int, end_id: int, about: dict | None = None) -> None:
        """`about`: what the results are to say of the model."""
        super().__init__()
        self.scorer, self.max_length, self.about = scorer, scorer.max_length, about or {}
        self.prefix_token_id, self.eot_token_id = prefix_id, end_id
        self.prefix_text, self.end_text = (token_text(scorer.tokenizer, i) for i in (prefix_id, end_id))

    def get_model_info(self) -> dict:
        return self.about

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """With the begin token, if the tokenizer sets one and the text has none yet."""
        begun = bool(self.prefix_text) and string.startswith(self.prefix_text)
        return self.scorer.tokenizer.encode(string, not begun if add_special_tokens is None else add_special_tokens)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Of ((context, continuation), their ids, their ids): TemplateLM.loglikelihood has encoded them."""
        return self.scorer.continuation_scores([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, the first token included, in windows of max_length that do not overlap but for the last."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [[make_disjoint_window(window) for window in
                    get_rolling_token_windows(text, self.prefix_token_id, self.max_length, 1)] for text in texts]
        scores = iter(self.scorer.continuation_scores([pair for pairs in windows for pair in pairs]))
        return [sum((next(scores)[0] for _ in pairs), 0.0) for pairs in windows]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations; requests with the same options share batches. All options are read before any text is."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        options = [self.options(requests[members[0]].args[1]) for members in groups.values()]
        texts = [""] * len(requests)
        for members, (until, max_new_tokens, sampling) in zip(groups.values(), options, strict=True):
            room = self.max_length - max_new_tokens
            prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in members]
            found = self.scorer.generate(prompts, until, max_new_tokens, sampling)
            for i, text in zip(members, found, strict=True):
                texts[i] = text
        return texts

    def options(self, given: dict) -> tuple[list[str], int, Sampling]:
        """Stop strings (the end token as text among them), new tokens (256 if none are named) and sampling of a
        request; greedy unless a temperature is set."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
        options = dict(normalize_gen_kwargs(given, 256))
        until = handle_stop_sequences(options.pop("until"), self.end_text)
        count, sampled = options.pop("max_gen_toks"), options.pop("do_sample", False)
        temperature, top_k, top_p = (options.pop(key, None) for key in ("temperature", "top_k", "top_p"))
        unknown = {key: value for key, value in options.items() if value is not None and NEUTRAL.get(key) != value}
        if unknown:
            raise UserError(f"a task asks for generation with {unknown}; known here: until, max_gen_toks, do_sample, "
                            f"temperature, top_k and top_p; leave the task out")
        if sampled and not temperature:
            raise UserError("a task asks for do_sample without a temperature above 0; set one in the task, or leave "
                            "do_sample out")
        if not 1 <= count < self.max_length:
            raise UserError(f"a task asks for {count} new tokens; with a context of {self.max_length} it can be 1 to "
                            f"{self.max_length - 1}: leave the task out")
        if not sampled:
            return until, count, GREEDY
        return until, count, Sampling(float(temperature), top_k if top_k and top_k > 0 else None, top_p)


def require_harness() -> None:
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError as e:
        raise UserError(f"lm_eval is needed and cannot be imported ({e}); "
                        f"pip install -r requirements-dev.txt") from None


def language_model(scorer: Scorer, prefix_id: int, end_id: int, about: dict | None = None):
    """The same as an lm_eval.api.model.LM, for lm_eval.simple_evaluate(model=...)."""
    from lm_eval.api.model import TemplateLM
    return type("readonce", (Requests, TemplateLM), {})(scorer, prefix_id, end_id, about)


# -- command line -----------------------------------------------------------------------------------------------------

def find_tasks(names: list[str], include_path: str | None):
    """lm_eval's index of tasks, and which of them the names and patterns (mmlu_*) mean."""
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            raise UserError(f"lm_eval has no task {name!r}; `lm_eval ls tasks` lists them, and --include_path adds a "
                            f"folder of them")
    return manager, manager.match_tasks(names)


def load_tasks(manager, names: list[str]) -> list:
    """lm_eval's tasks and groups of these names, with their data."""
    loaded: list = []
    try:
        for name in names:
            found = manager.load([name])
            loaded += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
        tasks = manager.load(loaded)["tasks"]  # refuses a task that comes with two of the names
    except Exception as e:  # from a missing network to a missing package: nothing narrower is raised
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise UserError(f"task {name} cannot be loaded ({reason})") from None
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name} runs code that the model writes, or needs more than text; neither is done "
                            f"here: leave it out")
    return loaded


def parser() -> Parser:
    p = Parser(prog="python -m scripts.harness", description=__doc__.splitlines()[0])
    p.add_argument("--tasks", required=True, help="names of tasks, groups or tags, or patterns, with commas between")
    p.add_argument("--checkpoint_path", default=DEMO, help="default: the demo")
    p.add_argument("--quantize", help="round its weights while loading: int8, int4, int4-pure")
    p.add_argument("--batch_size", type=int, default=8, help="texts at a time (default %(default)s)")
    p.add_argument("--limit", type=float, help="only the first so many documents of each task; below 1, a share")
    p.add_argument("--num_fewshot", type=int, help="examples before each question (default: the task's)")
    p.add_argument("--max_length", type=int, help="tokens that are read at most (default: the model's context)")
    p.add_argument("--include_path", help="a folder with tasks of your own (YAML files)")
    p.add_argument("--output", type=Path, metavar="FILE.json", help="write the results there")
    p.add_argument("--compile", action="store_true", help="compile the decode step (generating tasks gain by it)")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    return p


def check_options(args) -> None:
    if args.limit is not None and not (0 < args.limit < 1 or (args.limit >= 1 and args.limit.is_integer())):
        raise UserError(f"--limit is {args.limit:g}; it must be a whole number from 1 up, or a share below 1")
    check(args, batch_size=1, num_fewshot=0, max_length=1)
    if args.include_path and not Path(args.include_path).is_dir():
        raise UserError(f"--include_path {args.include_path} is not a folder; give one with YAML files of tasks")


def write(results: dict, path: Path) -> None:
    from lm_eval.utils import handle_non_serializable
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"
    replace(path, text)


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    check_options(args)
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table
    manager, names = find_tasks([name.strip() for name in args.tasks.split(",")], args.include_path)
    folder = resolve_checkpoint(str(args.checkpoint_path))
    model, tokenizer = load_model(folder, args.device, args.dtype, args.quantize)
    missing = args.compile and compiler.missing(model.device)
    if missing:
        print(f"note: --compile needs {missing}, not found here; running uncompiled, slower", file=sys.stderr)
    steps = compiled_steps(model.device) if args.compile and not missing else Steps()
    scorer = Scorer(model, tokenizer, args.batch_size, args.max_length, steps)
    about = dict(checkpoint_path=str(args.checkpoint_path), model_dtype=str(model.dtype).removeprefix("torch."),
                 quantization=str(model.config.quantization) if model.config.quantization else None,
                 max_length=scorer.max_length)
    answering = language_model(scorer, *special_ids(folder, tokenizer), about)
    limit = int(args.limit) if args.limit and args.limit >= 1 else args.limit
    results = simple_evaluate(answering, tasks=load_tasks(manager, names), num_fewshot=args.num_fewshot, limit=limit,
                              batch_size=args.batch_size, device=str(model.device), task_manager=manager,
                              log_samples=False)
    if args.output:
        write(results, args.output)
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))


if __name__ == "__main__":
    run_command(main)
