"""Figures show the rows they are given: the last of each case, of one machine, each with where it was measured."""
import json
import random
import struct
import sys
from pathlib import Path

import pytest

from errors import UserError
from scripts import plot


def row(**fields) -> dict:
    """A row as scripts/benchmark.py writes it, with random numbers that agree with each other."""
    size, speed, bandwidth = random.uniform(1e6, 1e9), random.uniform(5, 50), random.uniform(60, 90)
    row = {"system": "ours compiled", "model": "demo", "dtype": "bfloat16", "quantization": None, "prompt_tokens": 5,
           "new_tokens": 48, "depth": 0, "batch": 1, "decode_tok_s": speed, "bytes_per_token": size,
           "decode_tok_s_all": [speed * 0.9, speed, speed * 1.2], "bandwidth_gb_s": bandwidth, "machine": "EPYC",
           "threads": 2, "torch": "2.13", "commit": "abc1234"} | fields
    return {"gb_s": row["bytes_per_token"] * row["decode_tok_s"] / 1e9} | row


def quality(**fields) -> dict:
    return {"kind": "quality", "model": "demo", "weights": "int4 g32, GPTQ", "bits": 5.16, "kl": 0.005,
            "perplexity": random.uniform(15, 20), "agreement": 95.0, "commit": "abc1234", "machine": "EPYC"} | fields


def rows_of(*rows: dict) -> list[plot.Row]:
    return [plot.row_of(json.dumps(row)) for row in rows]


def speeds_of(*rows: dict) -> list[plot.Speed]:
    return plot.chosen(rows_of(*rows))[0]


def written(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def everything() -> list[dict]:
    """Rows of all five figures: speeds of two models of very different sizes, some with names that are long."""
    rows = [row(model=model, system=system, quantization=weights, bytes_per_token=size / s, decode_tok_s=v * s)
            for model, size, v in (("Llama-3.2-1B", 2e9, 9.0), ("benchmarks/qwen3-moe-8-layers.json", 1e7, 900.0))
            for system in plot.SYSTEMS
            for weights, s in ((None, 1), ("int8", 2), ("Q4_0, head Q8_0", 3.5))]
    for name, values in (("depth", (0, 1024, 16384)), ("batch", (1, 2, 8)), ("ranks", (1, 2, 4))):
        rows += [row(**{name: value, "new_tokens": 32, "system": system, "model": model, "bytes_per_token": size})
                 for model, size in (("demo", 1e7), ("Llama-3.2-1B", 2e9)) for value in values
                 for system in plot.SYSTEMS]
    ways = ("nearest", "nearest, zero points", "scales searched", "GPTQ")
    return rows + [quality(weights=f"int4 g{g}, {way}", bits=4 + 20 / g) for g in (32, 64, 128) for way in ways] + \
        [quality(weights="bf16", bits=16.0), quality(weights="int8 head, the rest bf16", bits=14.57)]


# -- which rows -------------------------------------------------------------------------------------------------------

def test_the_last_row_of_a_case_counts_and_older_rows_lack_fields():
    old, new = row(commit="old"), row(commit="new")
    for name in ("depth", "batch", "bytes_per_token", "quantization"):
        del old[name]
    others = [row(**{name: value}) for name, value in (("new_tokens", 9), ("system", "llama.cpp"), ("depth", 9),
                                                       ("batch", 2), ("ranks", 2), ("dtype", "float32"))]
    first, *_ = speeds_of(old)
    assert first.case == speeds_of(new)[0].case and first.case.ranks == first.case.batch == 1 and first.case.depth == 0
    found = speeds_of(old, *others, new)
    assert len(found) == 7 and found[-1].source.commit == "new" and found[-1].tok_s == new["decode_tok_s"]


def test_the_roofline_is_the_bandwidth_of_the_run_over_the_bytes_of_a_token():
    one = row(bytes_per_token=2e9, bandwidth_gb_s=30.0, decode_tok_s=10.0, decode_tok_s_all=[9.0, 10.0, 12.0])
    old = {name: value for name, value in one.items() if name != "bytes_per_token"}
    for found in speeds_of(one) + speeds_of(old):
        assert found.roofline == pytest.approx(15) and found.bytes_per_token == pytest.approx(2e9)
        assert (found.least, found.tok_s, found.most) == (9, 10, 12)


def test_machines_are_not_mixed():
    rows = rows_of(*(row(machine=name, depth=i) for i, name in enumerate(["EPYC", "H200", "EPYC 2", "H200", "EPYC"])))
    rows += rows_of(row(machine="EPYC 2"), row(machine="H200"))
    def machines(**options) -> list[str]:
        return [found.source.machine for found in plot.chosen(rows, **options)[0]]
    assert machines() == ["H200"] * 3 and machines(machine="epyc") == ["EPYC 2"] * 2
    with pytest.raises(UserError, match=r"--machine is 'M4'; allowed: \['EPYC', 'EPYC 2', 'H200'\]"):
        machines(machine="M4")


def test_a_commit_can_be_chosen():
    rows = rows_of(row(commit="aaa1"), row(commit="bbb2-dirty"), quality(commit="aaa1"))
    (speed,), (score,) = plot.chosen(rows, "aaa1")
    assert speed.source.commit == score.source.commit == "aaa1"
    assert [len(found) for found in plot.chosen(rows, "bbb2")] == [1, 0]
    with pytest.raises(UserError, match=r"--commit is 'ccc'; allowed: .*aaa1"):
        plot.chosen(rows, "ccc")


def test_perplexity_is_of_the_machine_of_the_speeds_if_it_has_any():
    here, there = quality(machine="EPYC"), quality(machine="M4")
    for rows, expected in (([here, row(), there], "EPYC"), ([row(machine="H200"), here, there], "M4"), ([there], "M4")):
        assert {found.source.machine for found in plot.chosen(rows_of(*rows))[1]} == {expected}
    _, (last,) = plot.chosen(rows_of(quality(perplexity=9.0), quality(perplexity=8.0)))
    assert last.perplexity == 8


def test_bars_are_of_one_row_and_a_short_prompt_the_largest_weights_first_and_then_the_fastest():
    long, deep, wide, two = row(prompt_tokens=512), row(depth=64), row(batch=4), row(ranks=2)
    slow, fast = (row(system=s, decode_tok_s=v, bytes_per_token=2e9) for s, v in (("slow", 5.0), ("fast", 6.0)))
    small, again = (row(quantization="int4 g32", bytes_per_token=5e8, new_tokens=n) for n in (48, 64))
    only_long = row(model="other", prompt_tokens=512)
    found = plot.bars(speeds_of(small, slow, long, deep, wide, two, fast, again, only_long))
    assert [(bar.case.system, bar.case.weights, bar.case.new_tokens) for bar in found["demo"]] == [
        ("fast", "bf16", 48), ("slow", "bf16", 48), ("ours compiled", "int4 g32", 64)]
    assert [bar.case.prompt_tokens for bar in found["other"]] == [512]


@pytest.mark.parametrize("axis", ["depth", "batch", "ranks"])
def test_a_line_is_of_rows_that_differ_in_one_field_only(axis):
    values = random.sample(range(2, 100), 3)
    line = [row(**{axis: value}) for value in values]
    other = [row(**{axis: value, "quantization": "int8"}) for value in values[:2]]
    alone = [row(**{axis: values[0], "new_tokens": 9}), row(**{axis: values[0], "system": "llama.cpp"}),
             row(**{axis: values[0], "model": "m"})]
    found = plot.lines(speeds_of(*line, *alone, *other), axis)
    assert [[getattr(point.case, axis) for point in points] for points in found["demo"]] == [
        sorted(values), sorted(values[:2])]
    assert list(found) == ["demo"] and not plot.lines(speeds_of(*alone), axis)


def test_bits_are_held_against_the_16_bit_row_of_the_same_tokens():
    full, half = row(bytes_per_token=2e9), row(bytes_per_token=1e9, quantization="int8")
    elsewhere = row(bytes_per_token=5e8, quantization="int4 g32", new_tokens=9)  # without a row of 16 bits
    eager = [one | {"system": "ours eager"} for one in (full, half)]
    peers = [one | {"system": "llama.cpp", "model": "m"} for one in (full, half)]
    for rows in ([*eager, full, half, elsewhere, *peers], [full, half, elsewhere, *eager]):
        found = plot.over_bits(speeds_of(*rows))
        assert [(bits, point.case.weights) for bits, point in found["demo"]] == [(8, "int8"), (16, "bf16")]
        assert found["demo"][0][1].case.system == "ours compiled" and list(found) == ["demo"]
    three, two, later = ([one | {"new_tokens": n} for one in (full, half, half | {"quantization": "int4 g32"})[:size]]
                         for n, size in ((3, 3), (4, 2), (5, 3)))
    for rows, tokens in ((three + two, 3), (three + two + later, 5)):  # the most rows; of as many, the last
        assert {point.case.new_tokens for _, point in plot.over_bits(speeds_of(*rows))["demo"]} == {tokens}
    assert plot.over_bits(speeds_of(*eager))["demo"][0][1].case.system == "ours eager"
    assert not plot.over_bits(speeds_of(full)) and not plot.over_bits(speeds_of(half, elsewhere))


@pytest.mark.parametrize("model, shown", [("demo", "demo"), ("Llama-3.2-1B", "Llama-3.2-1B"), ("a/b.json", "b"),
                                          ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B")])
def test_a_model_is_named_without_its_folders(model, shown):
    assert speeds_of(row(model=model))[0].case.model == shown


# -- figures ----------------------------------------------------------------------------------------------------------

def test_every_figure_is_written_and_no_other(command, tmp_path):
    file, folder = written(tmp_path / "cpu.jsonl", *everything()), tmp_path / "out"
    folder.mkdir()
    code, out, err = command(plot.main, file, "--output", str(folder))
    assert code == 0 and not err
    paths = [folder / f"cpu-{name}.png" for name in plot.FIGURES]
    assert out.split() == [str(path) for path in paths] and sorted(folder.iterdir()) == sorted(paths)
    for path in paths:
        head = path.read_bytes()[:24]
        width, height = struct.unpack(">II", head[16:])
        assert head.startswith(b"\x89PNG") and 1000 < width <= 1600 and height > 400
    code, out, _ = command(plot.main, written(tmp_path / "one.jsonl", row(), row(batch=2)))
    assert code == 0 and [Path(line).name for line in out.split()] == ["one-speed.png", "one-batch.png"]
    assert {path.name for path in tmp_path.glob("one*")} == {"one.jsonl", "one-speed.png", "one-batch.png"}


@pytest.fixture(scope="module")
def drawn() -> dict:
    """The figures of all rows, laid out."""
    speeds, scores = plot.chosen(rows_of(*everything()))
    with plot.library().style.context(["default", plot.STYLE]):
        figures = {name: make(speeds, scores) for name, make in plot.FIGURES.items()}
        for figure in figures.values():
            figure.draw_without_rendering()
    return figures


@pytest.mark.parametrize("name", plot.FIGURES)
def test_a_figure_says_where_its_rows_were_measured(drawn, name):
    said = drawn[name].get_supxlabel()
    assert all(fact in said for fact in ("EPYC", "2 threads", "torch 2.13", "commit abc1234"))


@pytest.mark.parametrize("name", plot.FIGURES)
def test_nothing_is_written_over_anything_else(drawn, name):
    figure = drawn[name]
    ticks = [label for ax in figure.axes for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim()))
             for tick, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
             if not min(limits) <= tick <= max(limits)]  # those are not drawn
    boxes = [("axes", ax.patch.get_window_extent()) for ax in figure.axes]
    for text in figure.findobj(plot.library().text.Text):
        if text.get_visible() and text.get_text().strip() and text not in ticks:
            box = text.get_window_extent().frozen()
            if text.get_text().endswith("\n"):  # the title leaves a line free, for the note
                box.y0 += box.height / 2
            boxes.append((text.get_text(), box))
    assert len(boxes) > 12
    for i, (one, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, one
        for other, there in boxes[:i]:
            across = min(box.x1, there.x1) - max(box.x0, there.x0)
            down = min(box.y1, there.y1) - max(box.y0, there.y0)
            assert across <= 1 or down <= 1, f"{one!r} and {other!r}"


def test_a_bar_has_its_speed_its_spread_and_its_roofline(drawn):
    ax = drawn["speed"].axes[0]
    bars = plot.bars(plot.chosen(rows_of(*everything()))[0])["Llama-3.2-1B"]
    assert len(ax.patches) == len(bars) == 18 and ax.get_title("left") == "Llama-3.2-1B, 5 + 32 or 48 tokens"
    assert [label.get_text() for label in ax.get_yticklabels()][-1].endswith("Q4_0, head Q8_0")
    one = row(decode_tok_s=10.0, decode_tok_s_all=[8.0, 10.0, 13.0], bytes_per_token=1e9, bandwidth_gb_s=40.0)
    ax, = plot.speed_figure(speeds_of(one), []).axes
    bar, = ax.patches
    (least, most), = ([x for x, _ in path] for path in ax.collections[0].get_segments())
    marks = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "|" and line.get_markersize() > 10]
    assert bar.get_width() == 10 and (least, most) == (8, 13) and marks == pytest.approx([40])
    assert [text.get_text() for text in ax.texts] == ["10.0", "25 %"]


@pytest.mark.parametrize("name, axis, at", [("context", "depth", [5, 1029]), ("batch", "batch", [2, 8]),
                                            ("ranks", "ranks", [2, 8])])
def test_a_line_has_its_goal_dashed_beside_it(name, axis, at):
    x = [0, 1024] if axis == "depth" else at
    found = speeds_of(*(row(**{axis: value}) for value in x))
    ax, = plot.FIGURES[name](found, []).axes
    line, = (line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2)
    goal, = (line for line in ax.lines if line.get_linestyle() == "--")
    assert list(line.get_xdata()) == list(goal.get_xdata()) == at
    assert list(line.get_ydata()) == [point.tok_s for point in found]
    expected = [found[0].tok_s, 4 * found[0].tok_s] if axis == "ranks" else [point.roofline for point in found]
    assert list(goal.get_ydata()) == pytest.approx(expected)


def test_perplexity_stands_at_its_bits_by_the_way_of_rounding(drawn):
    speed, perplexity = drawn["bits"].axes
    ways = [text.get_text().split(":")[0] for text in perplexity.get_legend().get_texts()]
    assert ways == ["demo, nearest", "demo, nearest, zero points", "demo, scales searched", "demo, GPTQ",
                    "demo, the rest bf16", "demo"]
    assert list(perplexity.lines[0].get_xdata()) == [4 + 20 / g for g in (128, 64, 32)]
    assert speed.get_xlim() == perplexity.get_xlim()
    assert "qwen3-moe-8-layers" in speed.get_legend().get_texts()[1].get_text()
    alone, = plot.bits_figure([], plot.chosen(rows_of(quality()))[1]).axes
    assert alone.get_title() == "Perplexity"


# -- bad input --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, said", [
    ("{", "line 2: '{' is not a JSON object"), ("[1]", "line 2: '[1]' is not a JSON object"),
    (row(decode_tok_s=0), "line 2: decode_tok_s is 0;"), (row(bandwidth_gb_s="fast"), "bandwidth_gb_s is 'fast'"),
    (row(decode_tok_s=float("nan")), "decode_tok_s is nan"), (row(decode_tok_s_all=[1.0, None]), "_all is None"),
    (row(decode_tok_s_all=3), "decode_tok_s_all is 3"), (row(batch=0), "batch is 0"), (row(depth=1.5), "depth is 1.5"),
    (row(prompt_tokens=None), "prompt_tokens is None"), (row(quantization=4), "quantization is 4"),
    (row(machine=None), "machine is None"), (quality(bits=None), "bits is None"), (quality(kind="x"), "kind is 'x'")])
def test_a_line_that_cannot_be_used_is_named_and_nothing_is_written(command, tmp_path, line, said):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in (row(), line)))
    code, out, err = command(plot.main, str(file))
    assert code == 2 and not out and said in err and "rows.jsonl" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("options, said", [
    (["nothing.jsonl"], "nothing.jsonl cannot be read"), (["."], "cannot be read"), ([], "required: FILE"),
    (["empty.jsonl"], "no figure shows what is there"), (["rows.jsonl", "--output", "nowhere"], "is no such folder"),
    (["rows.jsonl", "--machine", "M4"], "--machine is 'M4'"), (["rows.jsonl", "--commit", "fff"], "--commit is 'fff'")])
def test_what_cannot_be_drawn_is_one_line(command, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "rows.jsonl", row())
    written(tmp_path / "empty.jsonl")
    code, out, err = command(plot.main, *options)
    assert code == 2 and not out and said in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib_it_is_one_line(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = command(plot.main, written(tmp_path / "rows.jsonl", row()))
    assert code == 2 and "pip install -r requirements-dev.txt" in err and err.count("\n") == 1


def test_no_figure_is_replaced_before_all_are_made_and_nothing_half_written_is_left(command, tmp_path, monkeypatch):
    file, kept = written(tmp_path / "rows.jsonl", row(), row(batch=2)), tmp_path / "rows-speed.png"
    kept.write_text("what was there")
    figure, saved = plot.library().figure.Figure, []

    def full(self, path, **options):
        saved.append(path)
        path.write_text("half")
        if len(saved) == 2:
            raise OSError("no space left")
    monkeypatch.setattr(figure, "savefig", full)
    code, out, err = command(plot.main, file)
    assert code == 2 and not out and "no space left" in err and err.count("\n") == 1 and len(saved) == 2
    assert set(tmp_path.iterdir()) == {Path(file), kept} and kept.read_text() == "what was there"
