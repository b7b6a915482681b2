"""Figures of measured rows, as PNG files: those of scripts/benchmark.py, and of scripts/quantization_table.py.

    python -m scripts.plot benchmarks/cpu.jsonl
    python -m scripts.plot benchmarks/cpu.jsonl benchmarks/quality.jsonl --machine EPYC --output figures

STEM-speed.png    batch 1 and a short prompt: a bar for each system and weights, its spread, its roofline
STEM-context.png  rows that differ in depth only
STEM-batch.png    rows that differ in batch only
STEM-bits.png     speed, and perplexity, over the bits that a weight takes
STEM-ranks.png    rows that differ in ranks only (tensor parallelism), and what is in proportion to them

A figure is made if the files hold rows for it. Of rows that measure the same the last one counts, and all speeds are of
one machine: that of the last row of speed, unless --machine names another. Needs the extra matplotlib.
Glossary: the roofline is the speed that would use all of the read bandwidth measured in the same run: bandwidth over
bytes per token. Depth is tokens in the caches before the prompt. Tokens/s are of all rows of a batch together.
"""
import functools
import itertools
import json
import math
import os
import textwrap
from collections import namedtuple
from collections.abc import Callable, Iterable
from pathlib import Path

from errors import Parser, UserError, run_command

SHORT = 64  # tokens of a prompt that leaves decoding as it is
WIDTH, DPI = 10, 150  # inches, dots per inch
STYLE = {"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
         "grid.color": "#e3e3e3", "legend.frameon": False, "legend.fontsize": 9, "figure.constrained_layout.h_pad": 0.1}
# Okabe and Ito's colours (Color Universal Design, 2008), which the colour-blind tell apart too; yellow is too faint.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, BLACK = COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
SYSTEMS = {"ours compiled": BLUE, "ours eager": SKY, "transformers compiled": VERMILION, "transformers eager": ORANGE,
           "llama.cpp": GREEN, "gpt-fast": PURPLE}
MARKERS = "osD^vPX*<>"  # not as many as colours, so that more lines than colours differ too
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
ROOFLINE = "roofline: read bandwidth / bytes per token"


# -- rows -------------------------------------------------------------------------------------------------------------

Source = namedtuple("Source", "machine threads torch commit")  # where a row was measured
# What a row of speed measures; then its tokens/s (median, least and most) and whether its weights have plain 16 bits.
Case = namedtuple("Case", "model system weights prompt_tokens new_tokens depth batch ranks", defaults=(0, 1, 1))
Speed = namedtuple("Speed", "case tok_s least most bytes_per_token roofline plain source")
Quality = namedtuple("Quality", "case bits perplexity source")  # the case is (model, weights)
Row = Speed | Quality


def text(row: dict, name: str) -> str:
    if not isinstance(row.get(name), str) or not row[name]:
        raise UserError(f"{name} is {row.get(name)!r}; it must be a text")
    return row[name]


def number(row: dict, name: str) -> float:
    if type(row.get(name)) not in (int, float) or not 0 < row[name] < math.inf:
        raise UserError(f"{name} is {row.get(name)!r}; it must be a number above 0")
    return row[name]


def whole(row: dict, name: str, default: int | None = None) -> int:
    """With a default: a field that older rows lack."""
    value = default if row.get(name) is None else row[name]
    if type(value) is not int or value < (default or 0):
        raise UserError(f"{name} is {value!r}; it must be a whole number from {default or 0} up")
    return value


def model_of(row: dict) -> str:
    """Without the folders of a path; a shape's file by its stem."""
    return Path(text(row, "model")).name.removesuffix(".json") or row["model"]


def source_of(row: dict) -> Source:
    return Source(text(row, "machine"), row.get("threads"), row.get("torch"), text(row, "commit"))


def speed_of(row: dict) -> Speed:
    dtype, quantization = text(row, "dtype"), row.get("quantization")
    weights = DTYPES.get(dtype, dtype)
    if quantization:
        weights = text(row, "quantization") + ("" if dtype == "bfloat16" else f", {weights} activations")
    weights += ", int8 caches" if row.get("kv_dtype") else ""
    case = Case(model_of(row), text(row, "system"), weights, whole(row, "prompt_tokens"), whole(row, "new_tokens"),
                whole(row, "depth", 0), whole(row, "batch", 1), whole(row, "ranks", 1))
    tok_s = number(row, "decode_tok_s")
    if not isinstance(runs := row.get("decode_tok_s_all"), list):
        raise UserError(f"decode_tok_s_all is {runs!r}; it must be a list of numbers")
    speeds = [tok_s, *(number({"decode_tok_s_all": one}, "decode_tok_s_all") for one in runs)]
    size = number(row, "bytes_per_token") if "bytes_per_token" in row else number(row, "gb_s") * 1e9 / tok_s
    return Speed(case, tok_s, min(speeds), max(speeds), size, number(row, "bandwidth_gb_s") * 1e9 / size,
                 dtype in ("bfloat16", "float16") and not quantization, source_of(row))


def row_of(line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{line[:40]!r} is not a JSON object, which a line must be")
    if row.get("kind") is None:
        return speed_of(row)
    if row["kind"] != "quality":
        raise UserError(f"kind is {row['kind']!r}; rows of speed have none, and rows of perplexity 'quality'")
    costs = (number(row, name) for name in ("bits", "perplexity"))
    return Quality((model_of(row), text(row, "weights")), *costs, source_of(row))


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows, in the order of the files. UserError names the file and the line that cannot be used."""
    found = []
    for path in paths:
        try:
            written = path.read_text("utf-8").splitlines()
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read as text ({e}); give a file that scripts.benchmark wrote") from None
        for i, line in enumerate(written, 1):
            try:
                found += [row_of(line)] if line.strip() else []
            except UserError as e:
                raise UserError(f"{path}, line {i}: {e}") from None
    return found


# -- which rows -------------------------------------------------------------------------------------------------------

def chosen(rows: list[Row], commit: str | None = None, machine: str | None = None) -> tuple[list[Speed], list[Quality]]:
    """The rows whose commit and machine hold these texts, of each case the last; speeds of one machine, the last one's.
    Perplexity hardly depends on it: of the same one if that has any, or of another. UserError if no row holds them."""
    def holding(rows: list[Row], name: str, wanted: str | None) -> list[Row]:
        found = [row for row in rows if (wanted or "").lower() in getattr(row.source, name).lower()]
        if rows and not found:
            raise UserError(f"--{name} is {wanted!r}; allowed: {sorted({getattr(row.source, name) for row in rows})}")
        return found
    rows = holding(rows, "commit", commit)
    named = holding(rows, "machine", machine)
    speeds = of_last_machine([row for row in named if isinstance(row, Speed)])
    quality = [row for row in rows if isinstance(row, Quality)]
    same = [row for row in quality if row.source.machine in {other.source.machine for other in speeds or named}]
    return latest(speeds), latest(of_last_machine(same or quality))


def of_last_machine(rows: list) -> list:
    return [row for row in rows if row.source.machine == rows[-1].source.machine]


def latest(rows: Iterable[Row], key: Callable[[Row], object] = lambda row: row.case) -> list:
    """The last row of each key, where it stands among the rows."""
    found: dict[object, Row] = {}
    for row in rows:
        found.pop(key(row), None)
        found[key(row)] = row
    return list(found.values())


def by(items: Iterable, key: Callable) -> dict[object, list]:
    """Those of the same key together, in the order of the first of each."""
    found: dict[object, list] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def simple(speeds: Iterable[Speed]) -> dict[str, list[Speed]]:
    """For each model its rows of batch 1, depth 0, one rank and a short prompt: the shortest one, if none is short."""
    found = by((row for row in speeds if row.case[5:] == (0, 1, 1)), lambda row: row.case.model)
    limits = {model: max(SHORT, min(row.case.prompt_tokens for row in rows)) for model, rows in found.items()}
    return {model: [row for row in rows if row.case.prompt_tokens <= limits[model]] for model, rows in found.items()}


def bars(speeds: Iterable[Speed]) -> dict[str, list[Speed]]:
    """For each model the last simple row of each system and weights: the largest weights first, then the fastest."""
    found = {}
    for model, rows in simple(speeds).items():
        last = sorted(latest(rows, lambda row: (row.case.system, row.case.weights)), key=lambda row: -row.tok_s)
        alike = by(last, lambda row: row.case.weights).values()
        found[model] = list(itertools.chain(*sorted(alike, key=lambda rows: -max(row.bytes_per_token for row in rows))))
    return found


def lines(speeds: Iterable[Speed], axis: str) -> dict[str, list[list[Speed]]]:
    """For each model its lines: two rows or more whose cases differ in this field only, in its order."""
    alike = by(speeds, lambda row: row.case._replace(**{axis: 1}))
    found = [sorted(rows, key=lambda row: getattr(row.case, axis)) for rows in alike.values() if len(rows) > 1]
    return by(found, lambda rows: rows[0].case.model)


def over_bits(speeds: Iterable[Speed]) -> dict[str, list[tuple[float, Speed]]]:
    """For each model (bits of a weight, row) of ours, compiled if that was timed. Bits are 16 times the bytes per token
    over those of the row of 16-bit weights and the same tokens; rows without such a one, or alone, are left out."""
    found = {}
    for (model, system), rows in by(itertools.chain(*simple(speeds).values()), lambda row: row.case[:2]).items():
        groups = by(rows, lambda row: row.case._replace(weights="")).values()
        alike = [group for group in groups if len(group) > 1 and any(row.plain for row in group)]
        if alike and (system == "ours compiled" or (system == "ours eager" and model not in found)):
            group = max(reversed(alike), key=len)
            size = next(row.bytes_per_token for row in group if row.plain)
            found[model] = sorted(((16 * row.bytes_per_token / size, row) for row in group), key=lambda point: point[0])
    return found


# -- figures ----------------------------------------------------------------------------------------------------------

def library():
    """matplotlib, with the parts that are used here."""
    try:
        import matplotlib.figure
        import matplotlib.style
    except ImportError:
        raise UserError("the package matplotlib is not installed; pip install -r requirements-dev.txt") from None
    return matplotlib


def origin(rows: Iterable[Row]) -> str:
    """Machine, threads, torch and commits of these rows."""
    facts = (", ".join(dict.fromkeys(str(one) for one in column if one is not None))
             for column in zip(*(row.source for row in rows), strict=True))
    forms = "{}", "{} threads", "torch {}", "commit {}"
    return "; ".join(form.format(fact) for form, fact in zip(forms, facts, strict=True) if fact)


def sheet(title: str, note: str, footer: str, heights: list[float]):
    """A figure and its axes, one under the other, of so many inches with their labels."""
    figure = library().figure.Figure((WIDTH, sum(heights) + 1), dpi=DPI, layout="constrained")
    figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=14, fontweight="bold")
    figure.text(0.012, 1 - 0.42 / figure.get_figheight(), note, va="center", fontsize=9, color="#444444")
    figure.supxlabel("\n".join(part for line in footer.splitlines() for part in textwrap.wrap(line, 125)), x=0.012,
                     ha="left", fontsize=8, color="#555555")
    return figure, figure.subplots(len(heights), 1, squeeze=False, height_ratios=[h - 0.65 for h in heights])[:, 0]


def spread(rows: list[Speed]) -> list[list[float]]:
    return [[row.tok_s - row.least for row in rows], [row.most - row.tok_s for row in rows]]


def speed_figure(speeds: list[Speed], _: list[Quality]):
    """A panel of bars for each model."""
    found = bars(speeds)
    if not found:
        return None
    note = f"bar: median and spread of tokens/s.   ┃ {ROOFLINE}.   % of the roofline."
    figure, axes = sheet("Decoding at batch 1", note, origin(itertools.chain(*found.values())),
                         [0.75 + 0.29 * len(rows) for rows in found.values()])
    for ax, (model, rows) in zip(axes, found.items(), strict=True):
        draw_bars(ax, rows)
        spans = (sorted({getattr(row.case, name) for row in rows}) for name in ("prompt_tokens", "new_tokens"))
        ax.set_title(f"{model}, {' + '.join(' or '.join(map(str, span)) for span in spans)} tokens")
    axes[-1].set_xlabel("tokens/s")
    return figure


def draw_bars(ax, rows: list[Speed]) -> None:
    places, speeds = range(len(rows)), [row.tok_s for row in rows]
    ax.barh(places, speeds, height=0.66, color=[SYSTEMS.get(row.case.system, BLACK) for row in rows])
    ax.errorbar(speeds, places, xerr=spread(rows), fmt="none", ecolor="#444444", elinewidth=1, capsize=2.5)
    ax.plot([row.roofline for row in rows], places, "|", color=BLACK, markersize=15, markeredgewidth=2.2)
    for place, row in zip(places, rows, strict=True):  # beside the axes: there they are never under a mark
        speed = f"{row.tok_s:#.3g}" if row.tok_s < 99.95 else f"{row.tok_s:,.0f}"
        for x, said, weight in ((48, speed, "bold"), (86, f"{100 * row.tok_s / row.roofline:.0f} %", "normal")):
            ax.annotate(said, (1, place), (x, 0), ax.get_yaxis_transform(), "offset points", ha="right",
                        va="center_baseline", fontweight=weight)
    ax.set_yticks(places, [f"{row.case.system}, {row.case.weights}" for row in rows])
    ax.set(xlim=(0, 1.04 * max(max(row.roofline, row.most) for row in rows)), ylim=(len(rows) - 0.4, -0.6))
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


def label(case: Case, axis: str) -> str:
    """What a line is, but for the field it runs over."""
    more = [f"{name} {getattr(case, name)}" for name, usual in (("depth", 0), ("batch", 1), ("ranks", 1))
            if name != axis and getattr(case, name) != usual]
    return f"{case.system}, {case.weights}\n" + ", ".join([f"{case.prompt_tokens} + {case.new_tokens} tokens", *more])


def line_figure(axis: str, title: str, goal: str, name: str, speeds: list[Speed], _: list[Quality]):
    """A panel for each model, a line for each system and weights, and dashed in its colour what there is to reach."""
    found = lines(speeds, axis)
    if not found:
        return None
    flat = [row for group in found.values() for rows in group for row in rows]
    known = list(dict.fromkeys(label(row.case, axis) for row in flat))
    figure, axes = sheet(title, f"line: median and spread of tokens/s.   - - -  {goal}.", origin(flat),
                         [max(3.0, 0.8 + 0.4 * len(group)) for group in found.values()])
    for ax, (model, group) in zip(axes, found.items(), strict=True):
        for rows in group:
            x = [getattr(row.case, axis) + (row.case.prompt_tokens if axis == "depth" else 0) for row in rows]
            i = known.index(label(rows[0].case, axis))
            goals = [rows[0].tok_s * n / x[0] for n in x] if axis == "ranks" else [row.roofline for row in rows]
            draw_line(ax, x, rows, known[i], i)
            ax.plot(x, goals, "--", color=COLOURS[i % len(COLOURS)], linewidth=1.2)
        ax.set_xscale("log", base=2)
        if axis != "depth":  # those are many, or close to each other
            ax.set_xticks(sorted({getattr(row.case, axis) for rows in group for row in rows}))
        finish(ax, model, name)
    return figure


def draw_line(ax, x: list[float], rows: list[Speed], said: str, i: int) -> None:
    ax.errorbar(x, [row.tok_s for row in rows], yerr=spread(rows), color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], capsize=2.5, elinewidth=1, label=said)


def finish(ax, title: str, name: str, speeds: bool = True) -> None:
    """Labels, a legend beside the axes, and a scale of speeds where equal ratios look equal, over a factor of 5."""
    ax.set(title=title, xlabel=name)
    if speeds:
        ax.set(ylabel="tokens/s", yscale="log", ymargin=0.08)
        ax.set_ylim(min(ax.get_ylim()[0], ax.get_ylim()[1] / 5))
        ax.yaxis.set_major_locator(library().ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:,g}")
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.minorticks_off()
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def listed(head: str, items: list[str]) -> str:
    return "\n".join([f"{head}:", *textwrap.wrap("; ".join(items), 36)])


def bits_figure(speeds: list[Speed], quality: list[Quality]):
    """A panel of speeds, and below it one of perplexity by the way of rounding: what follows the comma in weights."""
    found = over_bits(speeds)
    shown, rounded = [row for points in found.values() for _, row in points], sorted(quality, key=lambda row: row.bits)
    ways = by(rounded, lambda row: (row.case[0], *row.case[1].split(", ", 1)[1:]))
    heights = [max(3.0, 0.8 + 0.55 * len(group)) for group in (found, ways) if group]
    if not heights:
        return None
    sources = [f"{what}: {origin(rows)}" for what, rows in (("speed", shown), ("perplexity", quality)) if rows]
    figure, axes = sheet("Bits of a weight", "line: median and spread of tokens/s at batch 1.   " * bool(found) +
                         "mark: perplexity, less is better." * bool(ways), "\n".join(sources), heights)
    for i, (model, points) in enumerate(found.items()):
        rows = [row for _, row in points]
        said = listed(f"{model}, {rows[0].case.system}", [row.case.weights for row in rows])
        draw_line(axes[0], [bits for bits, _ in points], rows, said, i)
    for i, (way, rows) in enumerate(ways.items()):
        axes[-1].plot([row.bits for row in rows], [row.perplexity for row in rows], MARKERS[i % len(MARKERS)], ms=8,
                      mfc="none", mew=1.6, color=COLOURS[i % len(COLOURS)],
                      label=listed(", ".join(way), [row.case[1].split(", ")[0] for row in rows]))
    every = [bits for points in found.values() for bits, _ in points] + [row.bits for row in quality]
    for ax, title in zip(axes, ["Speed"] * bool(found) + ["Perplexity"] * bool(ways), strict=True):
        ax.set(xscale="log", xticks=(2, 3, 4, 5, 6, 8, 10, 12, 16, 32))
        ax.set_xlim(min(every) / 1.1, max(every) * 1.1)
        finish(ax, title, "bits of a weight, scales included", title == "Speed")
    return figure


FIGURES: dict[str, Callable] = {
    "speed": speed_figure,
    "context": functools.partial(line_figure, "depth", "Decoding behind more context", ROOFLINE, "tokens of context"),
    "batch": functools.partial(line_figure, "batch", "Decoding several rows at once", ROOFLINE, "rows"),
    "bits": bits_figure,
    "ranks": functools.partial(line_figure, "ranks", "Decoding on several devices", "in proportion to ranks", "ranks")}


# -- command line -----------------------------------------------------------------------------------------------------

def save(figures: dict[Path, object]) -> None:
    """None is replaced before all are made, and each is there whole or not at all."""
    partial = {path: path.with_name(f"{os.getpid()}.{path.name}") for path in figures}
    try:
        for path, figure in figures.items():
            figure.savefig(partial[path], format="png")
        for path in figures:
            partial[path].replace(path)
    except OSError as e:
        raise UserError(f"the figures could not be written ({e}); give another --output") from None
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def main(argv: list[str]) -> None:
    p = Parser(prog="python -m scripts.plot", description=__doc__.splitlines()[0])
    p.add_argument("rows", type=Path, nargs="+", metavar="FILE", help="JSON lines; the first names the figures")
    p.add_argument("--output", type=Path, metavar="DIR", help="default: beside the first file")
    p.add_argument("--commit", help="only rows of this commit")
    p.add_argument("--machine", metavar="TEXT", help="speeds of the last machine with this in its name")
    args = p.parse_args(argv)
    style, folder = library().style, args.output or args.rows[0].parent
    if args.output and not folder.is_dir():
        raise UserError(f"--output {folder}: there is no such folder")
    speeds, quality = chosen(read(args.rows), args.commit, args.machine)
    with style.context(["default", STYLE]):  # whatever the user's own is
        made = {folder / f"{args.rows[0].stem}-{name}.png": make(speeds, quality) for name, make in FIGURES.items()}
        made = {path: figure for path, figure in made.items() if figure}
        if not made:
            raise UserError(f"{args.rows[0]}: no figure shows what is there; run scripts.benchmark with --output")
        save(made)
    print(*made, sep="\n")


if __name__ == "__main__":
    run_command(main)
