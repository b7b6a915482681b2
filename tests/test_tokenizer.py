"""Text survives the way through tokens, whole and in pieces."""
import json
import shutil

import pytest
from conftest import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from tokenizer import JsonTokenizer, SentencePieceTokenizer, Stops, Stream, load_tokenizer

BOTH = [JsonTokenizer(DEMO / "tokenizer.json"), SentencePieceTokenizer(DEMO / "tokenizer.model")]
# U+2581 is sentencepiece's sign for a space: it comes back as one, as in every tokenizer of this kind.
# The names of special tokens are those tokens in a tokenizer.json, wherever they stand.
TEXT = st.text(st.characters(exclude_characters="\u2581\0", exclude_categories=["Cs"])).filter(
    lambda text: not any(name in text for name in ("<unk>", "<s>", "</s>")))
SAMPLES = ["def f(x):\n    return x  # caf\u00e9\n", "  two  spaces", "\U0001f469\u200d\U0001f680 emoji", "\t\n",
           "\u6f22\u5b57", "<s> is text here? </s>"]


@pytest.mark.parametrize("tokenizer", BOTH, ids=["json", "sentencepiece"])
@given(text=TEXT)
@settings(max_examples=150, deadline=None)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=TEXT)
@settings(max_examples=150, deadline=None)
def test_both_files_of_the_demo_are_the_same_tokenizer(text):
    assert BOTH[0].encode(text) == BOTH[1].encode(text)


@pytest.mark.parametrize("tokenizer", BOTH, ids=["json", "sentencepiece"])
@given(text=TEXT | st.sampled_from(SAMPLES[:-1]), prompt=TEXT)
@settings(max_examples=150, deadline=None)
def test_streamed_pieces_join_to_the_text_and_none_is_a_broken_character(tokenizer, text, prompt):
    stream = Stream(tokenizer, tokenizer.encode(prompt))
    pieces = [stream.push(i) for i in tokenizer.encode(text)[1:]]
    assert "".join(pieces) + stream.flush() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("tokenizer", BOTH, ids=["json", "sentencepiece"])
def test_a_character_cut_off_at_the_end_is_shown_as_such(tokenizer):
    stream = Stream(tokenizer)
    ids = tokenizer.encode("\U0001f680")[1:-1]  # byte tokens, the last one missing
    assert "".join(stream.push(i) for i in ids) == ""
    assert "\ufffd" in stream.flush()


def test_broken_bytes_do_not_hold_the_text_for_ever():
    tokenizer = BOTH[0]
    stream = Stream(tokenizer)
    lone = tokenizer.encode("\U0001f680")[1]
    assert "".join(stream.push(lone) for _ in range(50)).count("\ufffd") > 30


def test_a_text_starts_with_the_begin_token():
    assert all(t.encode("x")[0] == t.token_id("<s>") for t in BOTH)


def test_stop_ids_are_the_union_of_all_places(tmp_path):
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    for name, content in {"config.json": {"eos_token_id": 7, "text_config": {"eos_token_id": [8, 9]}},
                          "generation_config.json": {"eos_token_id": [10]},
                          "tokenizer_config.json": {"eos_token": {"content": "</s>"}}}.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).stop_ids == {2, 7, 8, 9, 10}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff garbage", b'{"model": 3}'])
def test_a_damaged_tokenizer_is_one_clear_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="download it again"):
        load_tokenizer(tmp_path)


@given(st.lists(st.text("ab\n", max_size=4), max_size=12),
       st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_however_it_is_cut(pieces, strings):
    stops, text = Stops(strings), "".join(pieces)
    given = [stops.push(piece) for piece in pieces] + [stops.flush()]
    ends = [(at + len(string), at) for string in strings if (at := text.find(string)) >= 0]
    first = min(ends)[1] if ends else len(text)  # the one that is complete first, however it began
    assert "".join(given) == text[:first] and stops.met == any(string in text for string in strings)


def test_of_two_stops_the_one_that_is_complete_first_counts():
    """However tokens cut the text: nobody waits for the rest of a longer one that began before."""
    for pieces in (["b", "\n\n", "a"], ["b\n\na"]):
        stops = Stops(["\n", "b\n\na"])
        assert "".join(map(stops.push, pieces)) == "b" and stops.met


def test_text_that_begins_no_stop_is_given_at_once():
    stops = Stops(["\n\n", "END"])
    assert [stops.push(piece) for piece in ("one ", "E", "x", "\n", "two")] == ["one ", "", "Ex", "", "\ntwo"]
