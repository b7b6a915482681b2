"""Drafts in a batch whose rows are taken by one text after another: each text is what its prompt gives alone, and what
is drafted in it is what would be drafted in it alone, whatever joins, leaves or is shared."""
import json
import random
from dataclasses import replace

import pytest
import tiny_models
import torch
from conftest import DEMO
from test_bad_input import refused
from test_batch import GREEDY, LENGTHS, NEW, VARIED, texts
from test_drafts import DRAFT, drafts, with_head

import batch
import decoding
import device
import generate as g
from batch import Batch, Request, generate_batch
from decoding import generate
from drafts import LookupDraft, ModelDraft, MultiTokenDraft
from errors import UserError
from model import Transformer
from sampling import RowOptions, Varied, sample_places
from speculative import Draft, Speculation, few_enough

K = 3


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (decoding, batch):
        monkeypatch.setattr(module, "PREFILL_CHUNK", 64)


class Watched(Speculation):
    """Drafts K tokens or none, as chance has it, and notes what was proposed behind each text."""

    due = 0

    def __init__(self, draft: Draft, plain: float = 0.3) -> None:
        super().__init__(draft, "watched", K)
        self.share, self.together = plain, None
        self.seen: dict[tuple[int, int], list[int]] = {}  # request and position -> tokens
        self.drafts, draft.propose = draft.propose, self.propose

    def choose(self, strength: int) -> int:
        return 0 if strength < 0 or random.random() < self.share else K

    def propose(self, k, token, position, *rest):
        found = self.drafts(k, token, position, *rest)
        rows = [-1 if text is None else text.number for text in self.together.rows] if self.together else [0]
        for number, at, tokens in zip(rows, position[:, 0].tolist(), found.tokens.tolist(), strict=bool(self.together)):
            if number >= 0:
                self.seen.setdefault((number, at), tokens)
        return found


def agreed(model: Transformer, kinds: dict[str, Draft], requests: list[Request], rows: int, monkeypatch) -> None:
    """Texts and proposals in a batch are those alone. What is proposed behind a text's end counts for nothing."""
    plain = [list(generate(model, r.prompt, r.max_new_tokens, GREEDY)) for r in requests]
    for kind, draft in kinds.items():
        alone = {}
        for number, request in enumerate(requests):
            watched = Watched(draft, 0.1)
            assert list(generate(model, request.prompt, request.max_new_tokens, GREEDY, speculation=watched)) == \
                plain[number], kind
            alone |= {(number, at): tokens for (_, at), tokens in watched.seen.items()}
            draft.propose = watched.drafts
        monkeypatch.setattr(device, "read_ahead", lambda _, late=random.choice((0, 2)): late)
        watched = Watched(draft)
        watched.together = Batch(model, rows, 200, GREEDY, snapshots=3, speculation=watched)
        for request in requests:
            watched.together.add(request)
        assert texts(watched.together.events()) == plain, kind
        both = [(number, at) for number, at in alone.keys() & watched.seen.keys()
                if at < len(requests[number].prompt) + requests[number].max_new_tokens - 1]
        assert both or kind in ("lookup", "same"), kind  # these two may find nothing, or accept nearly all
        assert [watched.seen[which] for which in both] == [alone[which] for which in both], kind
        draft.propose = watched.drafts


@pytest.mark.parametrize("family, smaller", [("Llama 3.2", "Qwen3.5"), ("Gemma 3", "Llama 3.2"), ("Qwen3.5", "Qwen3.5"),
                                             ("Qwen3-MoE", "Gemma 3")])
def test_texts_and_what_is_drafted_in_them_are_as_alone(family, smaller, tmp_path, monkeypatch):
    """Through fewer rows than prompts; some begin like others, in rows that run and rows that are free."""
    for folder, name in (("a", family), ("b", smaller)):
        tiny_models.reference_model(name).save_pretrained(tmp_path / folder)
    model, other = tiny_models.load(tmp_path / "a"), tiny_models.load(tmp_path / "b")
    requests = [Request(torch.randint(128, (n,)).tolist(), new) for n, new in zip(LENGTHS, NEW, strict=True)]
    for like in (1, 4, 4):
        begun = requests[like].prompt[:random.randint(66, len(requests[like].prompt))]
        requests.append(Request([*begun, *torch.randint(128, (random.randint(1, 9),)).tolist()], 15))
    agreed(model, drafts(model, other), requests, 3, monkeypatch)


def test_a_head_drafts_for_rows_as_for_one(tmp_path, monkeypatch):
    model = with_head(tmp_path)
    requests = [Request(torch.randint(128, (n,)).tolist(), new) for n, new in zip(LENGTHS, NEW, strict=True)]
    agreed(model, {"mtp": MultiTokenDraft()}, requests, 3, monkeypatch)


@torch.no_grad()
def test_a_head_begins_a_text_beside_a_round_of_others(tmp_path):
    """Whose hidden states come several at a time; and with a seed it draws for the place where its token will stand."""
    model = with_head(tmp_path)
    model.setup_caches(2, 200, 4)
    options = RowOptions(Varied(), 2, 128, model.device)
    for row in range(2):
        options.set(row, g.Sampling(3.0), 7, 0)
    hidden, tokens, places = torch.randn(2, 9, 64), torch.randint(128, (2, 9)), torch.arange(9).expand(2, -1)
    draft, found = MultiTokenDraft(), []
    for round_of_others in (False, True):
        draft.setup(model, 4)
        draft.open()
        if round_of_others:
            draft.hear(torch.randn(2, 4, 64), 20 + torch.arange(4).expand(2, -1), torch.randint(128, (2, 4)),
                       torch.tensor([[2], [3]]))
        with model.using(spare := model.spare_caches(), None):
            draft.read(9, hidden[:1], places[:1], tokens[:1], g.Steps())
        draft.take(1, torch.tensor([[24], [0]]), {}, g.Steps())
        for mixer, cache in zip(model.mixers, spare, strict=True):
            mixer.cache.adopt(1, cache, 9)
        proposal = draft.propose(3, tokens[:, :1], torch.tensor([[24], [9]]), None, options.plain, g.Steps())
        found.append(proposal.tokens[1])
    assert torch.equal(*found)
    logits = model.head(model.draft_hidden(model.norm(hidden), tokens, places))[:, -1:]
    logits[1] = logits[0]
    assert sample_places(logits, torch.tensor([[10], [10]]), options.plain)[0] == found[0][0]


@pytest.mark.parametrize("plain", [0.2, 0.93, 0.93, 0.98])
def test_a_draft_reads_of_the_next_turn_only_what_is_new(plain, tmp_path, monkeypatch):
    """Its caches, too, keep what a row held; but not if it was left out for so long that reading on spoils that. Those
    of a model's twin are the model's, whenever it proposes something."""
    monkeypatch.setattr(device, "read_ahead", lambda _, late=random.choice((0, 2)): late)
    tiny_models.reference_model("Llama 3.2").save_pretrained(tmp_path)
    model, twin = tiny_models.load(tmp_path), tiny_models.load(tmp_path)
    read, draft, compared = [], ModelDraft(twin), 0

    def prefill(which, ids, positions, options):
        read.extend(positions[0].tolist() if which is twin else [])
        return decoding.prefill(which, ids, positions, options)

    def latest(token, position, *rest, own=draft.latest):
        nonlocal compared
        found = own(token, position, *rest)
        assert not any(together.rows[row] for row in draft.left)
        for row, at in enumerate(position[:, 0].tolist()):
            for a, b in zip(model.mixers, twin.mixers, strict=True) if at < together.limits[row] else ():
                torch.testing.assert_close(a.cache.k[row, :, :at - 1], b.cache.k[row, :, :at - 1], rtol=0, atol=1e-4)
                compared += 1
        return found

    draft.latest = latest
    together = Batch(model, 3, 500, GREEDY, g.Steps(prefill), speculation=Watched(draft, plain))
    prompt = torch.randint(128, (90,)).tolist()
    for turn in range(6):
        read.clear()
        number = together.add(Request(prompt, 30))
        for n in (5,) if plain == 0.2 else random.choices((1, 5, 70), k=random.choice((1, 3))):
            beside = torch.randint(128, (n,)).tolist() if n < 70 else [*prompt[:n], 7]
            together.add(Request(beside, random.choice((3, 60))))
        tokens = []
        for event in together.events():
            tokens += [event.token] if event.number == number else []
            if plain > 0.2 and random.random() < 0.05:  # as far as it has come
                together.add(Request([*prompt, *tokens, 7], 9))
        if turn and plain == 0.2:  # 6 new tokens, some before them, the beginning of a row, and the 5
            assert len(read) < 6 + 16 + 18 + 5, turn
        prompt += tokens + torch.randint(128, (6,)).tolist()  # the request has a copy
    assert compared


def noisy_twin(folder) -> Transformer:
    """A draft of which some tokens stand and some do not."""
    noisy, _ = g.load_model(folder.path, "cpu", "fp32")
    for p in noisy.parameters():
        p.add_(torch.randn_like(p) * 0.003)
    return noisy


@pytest.mark.parametrize("late", [0, 2])
def test_with_a_seed_a_text_is_the_same_with_and_without_a_draft(late, folder, monkeypatch):
    """At any temperature; texts that want penalties or logarithms go on beside, and are told theirs."""
    monkeypatch.setattr(device, "read_ahead", lambda _: late)
    model, _ = g.load_model(folder.write(), "cpu")
    requests = [Request(torch.randint(4096, (n,)).tolist() * 2, new, frozenset(), way, seed)
                for n, new, way, seed in zip((9, 35, 3, 66, 20, 1, 5), (30, 9, 25, 12, 20, 9, 40), VARIED,
                                             (1, 2, 2**64 - 1, 3, -4, 5, 6), strict=True)]
    plain = texts(generate_batch(model, requests, 3, Varied()))
    twin, _ = g.load_model(folder.path, "cpu")
    for draft, least in ((LookupDraft(), 0), (ModelDraft(noisy_twin(folder)), 0.01), (ModelDraft(twin), 0.9)):
        watched = Watched(draft, 0.2)
        found = texts(generate_batch(model, requests, 3, Varied(), speculation=watched))
        assert found == plain
        assert (watched.statistics.summary()["acceptance"] or 0) >= least  # the twin draws by the same numbers
        assert [token.top for tokens in found for token in tokens if hasattr(token, "top")]


WAYS = [g.Sampling(0)] * 4 + [g.Sampling(1.0, None), g.Sampling(0.7, 20, 0.9), g.Sampling(0, repetition_penalty=1.4),
                              g.Sampling(0, logprobs=2), g.Sampling(2.0, 7)]


@pytest.mark.parametrize("family, smaller", [("Qwen3", "Llama 3.2"), ("Gemma 3", "Gemma 3"), ("Qwen3.5", "Gemma 3")])
def test_texts_that_come_and_go_as_they_like_are_what_they_are_alone(family, smaller, tmp_path, monkeypatch):
    """All at once: requests join while others run, are given up, share beginnings, end at stop ids, and are heard of
    late; each with its way to choose."""
    monkeypatch.setattr(device, "read_ahead", lambda _, late=random.randint(0, 2): late)
    for folder, name in (("a", family), ("b", smaller)):
        tiny_models.reference_model(name).save_pretrained(tmp_path / folder)
    model, other = tiny_models.load(tmp_path / "a"), tiny_models.load(tmp_path / "b")
    pool = [torch.randint(128, (n,)).tolist() for n in (5, 40, 90)]
    prompts = [begun[:random.randint(1, len(begun))] + torch.randint(128, (random.choice((0, 3, 30)),)).tolist()
               for begun in random.choices(pool, k=12)]
    requests = [Request(prompt, random.choice((1, 2, 9, 40)), frozenset(random.sample(range(128), 2)),
                        random.choice(WAYS), seed) for seed, prompt in enumerate(prompts)]
    requests = [replace(r, seed=None) if r.sampling.temperature == 0 and i % 3 else r for i, r in enumerate(requests)]
    alone = [texts(generate_batch(model, [request], 1, Varied()))[0] for request in requests]
    kinds = drafts(model, other)
    for kind in random.sample(list(kinds), 2):
        watched = Watched(kinds[kind], random.choice((0, 0.3, 0.95)))
        together = Batch(model, random.randint(1, 4), 300, Varied(), snapshots=random.choice((0, 3)),
                         speculation=watched)
        waiting, found, numbers, ended, given_up = [*enumerate(requests)], {}, {}, set(), set()
        while waiting or together.unended:
            for which, request in (waiting.pop(0) for _ in range(min(len(waiting), 3))):
                numbers[together.add(request)] = which
            for turn in together.turns():
                for number, token, stop in turn:
                    assert number not in ended | given_up
                    found.setdefault(number, []).append(token)
                    ended |= {number} if stop else set()
                if random.random() < 0.02:
                    number = random.choice(list(numbers))
                    given_up |= {number} - ended
                    together.end(number)
                if waiting and random.random() < 0.2:
                    which, request = waiting.pop(0)
                    numbers[together.add(request)] = which
        assert ended | given_up == set(numbers) and len(numbers) == len(requests)
        for number, which in numbers.items():
            tokens = found.get(number, [])
            assert tokens == (alone[which] if number in ended else alone[which][:len(tokens)]), (kind, number)


def test_each_text_ends_on_its_own_within_a_round(folder):
    """At a stop id or its length, and what was accepted behind that is not told."""
    model, _ = g.load_model(folder.write(), "cpu")
    requests = [Request(torch.randint(4096, (n,)).tolist(), 24) for n in (5, 40, 3, 9)]
    free = texts(generate_batch(model, requests, 2, GREEDY))
    stops = frozenset(random.choice(tokens[:16]) for tokens in free)
    ends = [next((i for i, token in enumerate(tokens, 1) if token in stops), 24) for tokens in free]
    requests = [Request(r.prompt, 24, stops) for r in requests]
    speculation = Watched(ModelDraft(g.load_model(folder.path, "cpu")[0]), 0)  # whose proposals all stand
    events = list(generate_batch(model, requests, 2, GREEDY, speculation=speculation))
    assert texts(events) == [tokens[:end] for tokens, end in zip(free, ends, strict=True)]
    assert speculation.statistics.summary()["acceptance"] > 0.8


def test_a_compiled_round_of_rows_with_seeds_is_the_eager_one(folder):
    """One graph, whatever is accepted and however the rows choose."""
    model, _ = g.load_model(folder.write(), "cpu", "fp32")
    ways = [way for way in VARIED if way.logprobs is None and not way.remembers]
    requests = [Request(torch.randint(4096, (n,)).tolist() * 4, 30, frozenset(), way, 5)
                for n, way in zip((20, 3, 9, 8), ways, strict=True)]
    compiled, noisy = g.compiled_steps(model.device), noisy_twin(folder)
    found = [texts(generate_batch(model, requests, 3, Varied()))]
    for steps in (g.Steps(), g.Steps(verify=compiled.verify)):
        watched = Watched(ModelDraft(noisy))
        found.append(texts(generate_batch(model, requests, 3, Varied(), steps=steps, speculation=watched)))
        assert 0 < sum(watched.statistics.stood) < sum(watched.statistics.proposed)
    assert found[0] == found[1] == found[2] and len(compiled.verify.loaded[model]) == 1


def test_rows_share_the_tokens_that_kernels_for_few_take():
    assert [few_enough((3, 7, 15), rows) for rows in (1, 2, 3, 4, 5, 8, 100)] == \
        [(3, 7, 15), (3, 7), (3,), (3,), (1,), (1,), (1,)]
    assert few_enough((1, 3, 5), 4) == (1, 3) and few_enough((1, 2, 4), 5) == (1, 2)


# -- the command line -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("draft", ["lookup", str(DRAFT)])
def test_a_command_line_of_several_prompts_drafts(draft, command, tmp_path):
    (tmp_path / "in.txt").write_text("import os\nclass Row:\ndef main\nimport os\n")
    arguments = ("--prompts_file", str(tmp_path / "in.txt"), "--batch_size", "2", "--temperature", "0", "--dtype",
                 "fp32", "--max_new_tokens", "30", "--json")
    plain, (code, out, err) = command(g.main, *arguments), command(g.main, *arguments, "--draft", draft,
                                                                   "--speculate_k", "2")
    assert code == 0 and "tokens a round of 2.0 drafted" in err
    told, before = (json.loads(x.splitlines()[-1]) for x in (out, plain[1]))
    assert [s["tokens"] for s in told["samples"]] == [s["tokens"] for s in before["samples"]]
    assert told["batch"]["speculation"]["rounds"] > 0 and before["batch"]["speculation"] is None
    assert out.splitlines()[:-1] == plain[1].splitlines()[:-1]


def test_what_drafts_cannot_tell_is_one_line(command):
    refused(command(g.main, "--prompt", "a", "--prompt", "b", "--draft", "lookup", "--logprobs", "2", "--json"),
            "logprobs are not told while speculating")
    refused(command(g.main, "--prompt", "a", "--prompt", "b", "--speculate_k", "3"), "--speculate_k is for --draft")
    model, _ = g.load_model(DEMO, "cpu", "fp32")
    with pytest.raises(UserError, match="a row of this batch has"):
        together = Batch(model, 2, 300, GREEDY, speculation=Speculation(LookupDraft(), "lookup", 5))
        together.add(Request([1] * (together.length - 3), 4))
