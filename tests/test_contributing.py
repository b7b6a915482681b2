"""What CONTRIBUTING.md says to do works as it stands."""
import re
import shlex

import pytest
import tiny_models
import torch
import transformers as hf
from conftest import DEMO, ROOT

import families
import generate as g
from speculative import Speculation

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_the_family_of_the_example_is_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    exec(next(block for block in BLOCKS if "FAMILIES[" in block), {})
    monkeypatch.setitem(tiny_models.FAMILIES, "Seed-OSS", (hf.SeedOssConfig, dict(head_dim=16)))
    theirs = tiny_models.reference_model("Seed-OSS")
    theirs.save_pretrained(tmp_path)
    model, ids = tiny_models.load(tmp_path), torch.randint(128, (1, 40))
    with torch.no_grad():
        truth = theirs(ids).logits[:, -1]
    torch.testing.assert_close(tiny_models.run(model, ids, 30, *range(31, 40)), truth, rtol=0, atol=1e-4)


def test_the_draft_of_the_example_changes_no_token():
    names: dict = {}
    exec(next(block for block in BLOCKS if "class Again" in block), names)
    model, tokenizer = g.load_model(DEMO, "cpu", "fp32")
    prompt = tokenizer.encode("x = [0, 0, 0,")
    plain = list(g.generate(model, prompt, 40, g.Sampling(temperature=0)))
    speculation = Speculation(names["Again"](), "again", 2)
    assert list(g.generate(model, prompt, 40, g.Sampling(temperature=0), speculation=speculation)) == plain
    assert speculation.statistics.summary()["rounds"] > 0


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+\.(?:py|cpp|metal|json|md))`", TEXT))))
def test_the_files_it_names_are_there(name):
    assert (ROOT / name).is_file() or list(ROOT.glob(f"ops/{name}"))


def test_the_names_it_follows_a_token_by_are_there():
    for file, names in {"generate.py": ("main", "run_sample"), "decoding.py": ("generate", "_step", "compiled_steps"),
                        "model.py": ("Transformer", "Block"), "attention.py": ("Attention",),
                        "kv_cache.py": ("KVCache",), "layers.py": ("Matrix",)}.items():
        text = (ROOT / file).read_text()
        assert all(f"`{name}" in TEXT and re.search(rf"^(def|class) {name}\b", text, re.M) for name in names)


def test_its_commands_are_those_of_the_project():
    commands = [shlex.split(line, comments=True) for line in re.search(r"```sh\n(.*?)```", TEXT, re.S)[1].splitlines()]
    assert commands[0] == shlex.split(re.search(r"## Tests\n\n```sh\n(.*)\n", (ROOT / "README.md").read_text())[1])
    assert all(command[:3] == ["python", "-m", "pytest"] or command[0] == "ruff" for command in commands[1:])
