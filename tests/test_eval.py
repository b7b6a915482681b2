"""Scores are those of the text, token by token, and of nothing else."""
import itertools
import math
import random

import pytest
import torch
from conftest import DEMO, ROOT

from generate import load_model
from scripts import eval as score

TEXT = (ROOT / "errors.py").read_text()


@pytest.mark.parametrize("length", [2, 3, 40, 511, 512, 513, 1000])
def test_every_token_but_the_first_is_predicted_once_from_half_a_window_or_all_before_it(length):
    size = random.choice([2, 7, 64, 512])
    ids, predicted = torch.arange(length), []
    for tokens, targets in score.windows(ids, size):
        assert len(tokens) <= size and torch.equal(tokens[-len(targets):] + 1, targets)
        seen = len(tokens) - len(targets) + 1  # tokens before the first of them
        assert seen >= size // 2 or tokens[0] == 0
        predicted += targets.tolist()
    assert predicted == list(range(1, length))


@torch.no_grad()
def test_the_score_is_the_likelihood_of_the_text_token_by_token():
    model, tokenizer = load_model(DEMO, "cpu", "fp32")
    ids = tokenizer.encode(TEXT)[:48]
    model.setup_caches(1, 64)
    nats = 0.0
    for i, (token, following) in enumerate(itertools.pairwise(ids)):
        logits = model(torch.tensor([[token]]), torch.tensor([[i]]))
        nats -= logits[0].log_softmax(-1)[following].item()
    result, = score.evaluate([model], model, torch.tensor(ids), 64)
    assert result.tokens == 47 and abs(result.nats - nats) < 1e-3 and result.divergence == 0 and result.agreed == 47
    assert math.isclose(result.perplexity, math.exp(nats / 47), rel_tol=1e-4)


def test_the_command_prints_scores_beside_a_reference(command, tmp_path):
    (tmp_path / "text").write_text(TEXT[:600])
    code, out, _ = command(score.main, "--text", str(tmp_path / "text"), "--quantize", "int8", "--reference", str(DEMO),
                           "--dtype", "fp32", "--window", "64")
    assert code == 0 and "bits/byte" in out
    kl, agreed = (float(out.split(word)[1].split()[0]) for word in ("KL", "token "))
    assert 0 < kl < 0.005 and agreed > 90


@pytest.mark.parametrize("options, said", [
    (["--text", "nothing"], "cannot be read as text"),
    (["--text", str(ROOT / "errors.py"), "--window", "1"], "must be 2 to 1024"),
    (["--text", str(ROOT / "scripts" / "__init__.py")], "at least 2"),
])
def test_what_cannot_be_scored_is_one_line(command, options, said):
    code, out, err = command(score.main, *options)
    assert code == 2 and not out and said in err and err.count("\n") == 1
