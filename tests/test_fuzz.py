"""Broken files and options work or are refused in one line. A few cases of each kind run here, thousands by
`python -m scripts.fuzz`; what that found is kept below."""
import json
import random

import pytest
from conftest import DEMO
from safetensors.torch import save_file

from checkpoint import Checkpoint
from config import read_json
from errors import UserError
from families import config_from_dict
from scripts import fuzz
from tokenizer import ChatTemplate, load_tokenizer


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_few_fresh_cases_work_or_are_refused_in_a_line(target):
    seed = random.randrange(10 ** 9)
    said = [fuzz.outcome(target, seed, number) for number in range(12)]
    assert set(said) <= {"works", "refused"}, (seed, said)


def test_a_crash_a_hang_and_an_exception_are_findings_and_the_next_case_runs(monkeypatch, tmp_path):
    """The process of cases is replaced when it ends: here by one that does what a broken library would."""
    script = tmp_path / "worker"
    script.write_text("""#!/usr/bin/env python
import json, os, signal, sys, time
first = int(sys.argv[sys.argv.index("--from") + 1])
for number in range(first, 4):
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 2:
        time.sleep(60)
    print(json.dumps([number, "works"]), flush=True)
""")
    script.chmod(0o755)
    monkeypatch.setattr(fuzz.sys, "executable", str(script))
    monkeypatch.setattr(fuzz, "PATIENCE", 1)
    monkeypatch.setattr(fuzz, "IMPORTING", 1)
    found = dict(fuzz.outcomes("config", 1, range(4)))
    assert found[0] == found[3] == "works" and "code -11" in found[1] and "hangs" in found[2]


def test_a_case_is_the_same_again(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError):
            fuzz.fuzz_weights(random.Random("weights 1 0"), tmp_path / name)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


# -- found, and mended ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shard", ["A" * 5000, "a\0b", "..", "../x.safetensors"])
def test_an_index_may_not_name_just_any_file(tmp_path, shard):
    save_file({}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match="same folder"):
        Checkpoint(tmp_path)


def test_a_tokenizer_over_which_its_library_panics_is_refused(tmp_path):
    document = read_json(DEMO / "tokenizer.json")
    document["post_processor"]["single"][0]["SpecialToken"]["id"] = "<no such token>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no sound tokenizer"):
        tokenizer.encode("x")


@pytest.mark.parametrize("source", ["{% break %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "(" * 99])
def test_a_template_that_python_cannot_run_is_refused_or_text(source):
    try:
        ChatTemplate(source, {}).render([])
    except UserError as e:
        assert "chat template" in str(e)
    else:
        assert source == "(" * 99


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "head_dim",
                                 "num_attention_heads", "num_key_value_heads", "max_position_embeddings"])
def test_a_size_that_no_model_has_is_refused_before_anything_is_built(key):
    document = read_json(DEMO / "config.json")
    with pytest.raises(UserError, match="at most"):
        config_from_dict(document | {key: 6 * 10 ** 18})


def test_a_layer_type_that_is_no_name_is_refused():
    document = read_json(DEMO / "config.json")
    with pytest.raises(UserError, match="layer_types"):
        config_from_dict(document | {"layer_types": [["full_attention"]] * document["num_hidden_layers"]})


@pytest.mark.parametrize("fast", [float("inf"), 1e308, 10 ** 400])
def test_a_number_that_no_rotation_has_is_refused(fast):
    yarn = {"rope_type": "yarn", "factor": 8.0, "beta_fast": fast}
    with pytest.raises(UserError, match="beta_fast"):
        config_from_dict(read_json(DEMO / "config.json") | {"rope_parameters": yarn})
    if isinstance(fast, int):
        llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}
        with pytest.raises(UserError, match="original_max"):
            config_from_dict(read_json(DEMO / "config.json") | {
                "rope_parameters": llama3 | {"original_max_position_embeddings": fast}})


def test_what_came_is_shown_in_part_if_it_is_long_and_what_to_do_stays():
    line = UserError(f"config.json gives x={'A' * 5000}; a number is expected").line
    assert UserError("it holds \x1b[2J and \0").line == r"it holds \x1b[2J and \x00"
    assert len(line) < 700 and line.startswith("config.json gives x=AAA") and line.endswith("a number is expected")
