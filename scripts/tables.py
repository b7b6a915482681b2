"""The tables of README and of docs/ from the rows in benchmarks/, so that no number is copied by hand.

    python -m scripts.tables

What stands between `<!-- speed -->` and `<!-- end -->`, and likewise for the other tables, is written anew. Of rows
that measure the same on the same machine the last one counts.
"""
import functools
import itertools
import json
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from errors import Parser, UserError, run_command

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("measured", "why-cpu", "tensor-parallel")))
PEERS = {"transformers eager": "transformers", "transformers compiled": "its compiled", "llama.cpp": "llama.cpp",
         "gpt-fast": "gpt-fast"}
Case = list[dict]  # the rows of one case, ours first


def read_rows(folder: Path = ROOT / "benchmarks") -> list[dict]:
    """All rows, file by file."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def cases(rows: Iterable[dict]) -> list[Case]:
    """Rows of speed by what was timed, the last of each; those of a machine together, in the order of the rows."""
    found: dict[tuple, Case] = {}
    for row in rows:
        if "decode_tok_s" not in row:
            continue
        if row["system"].startswith("ours") and row["ours_over_this"] == 1:  # the first of its case
            key = tuple(row.get(name) for name in ("machine", "model", "dtype", "quantization", "prompt_tokens",
                                                   "new_tokens", "kv_dtype", "depth", "batch"))
            key = (*key[:7], key[7] or 0, key[8] or 1)
            found.pop(key, None)  # the last one stands where it was measured
            found[key] = case = []
        case.append(row)
    machines = list(dict.fromkeys(case[0]["machine"] for case in reversed(found.values())))  # the newest first
    return sorted(found.values(), key=lambda case: machines.index(case[0]["machine"]))


def table(head: str, lines: Iterable[str]) -> str:
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "|---" * columns + "|", *(f"| {line} |" for line in lines)])


def by_machine(rows: list[dict]) -> list[tuple[str, list[Case]]]:
    """Machines and what was timed on them, that which was measured last first."""
    return [(machine, list(group)) for machine, group in
            itertools.groupby(cases(rows), lambda case: case[0]["machine"])]


def speed_table(rows: list[dict], which: slice = slice(1)) -> str:
    """For each of these machines a table, and the commands that its rows name by number."""
    parts = []
    for machine, found in by_machine(rows)[which]:
        commands = list(dict.fromkeys(command_of(case[0]) for case in found))
        peers = [name for name in PEERS if any(row["system"] == name for case in found for row in case)]
        head = " | ".join(["model", "weights", "tokens", "MB/token", "tok/s", "GB/s", "of bandwidth", "first token",
                           *(f"times {PEERS[name]}" for name in peers), "commit", "run"])
        bandwidths = [case[0]["bandwidth_gb_s"] for case in found]
        threads = " or ".join(map(str, sorted({case[0]["threads"] for case in found})))
        parts.append(f"**{machine}**, {threads} threads, torch {found[-1][0]['torch']}, read bandwidth "
                     f"{min(bandwidths):.0f} to {max(bandwidths):.0f} GB/s in these runs:\n")
        parts.append(table(head, (speed_line(case, peers, commands) for case in found)))
        listed = "\n".join(f"{command}  # {i}" for i, command in enumerate(commands, 1))
        parts.append(f"\n```sh\n{listed}\n```\n")
    return "\n".join(parts).rstrip()


def speed_line(case: Case, peers: list[str], commands: list[str]) -> str:
    ours = case[0]
    tokens = f"{ours['prompt_tokens']} + {ours['new_tokens']}" + \
        (f" behind {ours['depth']}" if ours.get("depth") else "") + \
        (f", {ours['batch']} rows" if ours.get("batch", 1) > 1 else "")
    first = ours["ttft_s"]
    by_name = {row["system"]: row for row in case}
    bytes_per_token = ours.get("bytes_per_token") or 1e9 * ours["gb_s"] / ours["decode_tok_s"]
    return " | ".join([
        Path(ours["model"]).stem if ours["model"].endswith(".json") else ours["model"],
        (ours.get("quantization") or ours["dtype"]) + (", int8 caches" if "kv_dtype" in ours else ""), tokens,
        f"{bytes_per_token / 1e6:.0f}", number(ours["decode_tok_s"]), f"{ours['gb_s']:.1f}",
        f"{ours['bandwidth_pct']:.0f} %",
        "" if first is None else f"{first:.2f} s" if first >= 0.1 else f"{first * 1e3:.1f} ms",
        *(ratio(by_name.get(name)) for name in peers), ours["commit"],
        str(commands.index(command_of(ours)) + 1)])


def command_of(row: dict) -> str:
    """What makes the row again, wherever it is kept."""
    return re.sub(r" --output \S+", "", row["command"])


def number(speed: float) -> str:
    return f"{speed:.1f}" if speed < 100 else f"{speed:.0f}"


def ratio(row: dict | None) -> str:
    """Ours over a peer: decoding, and the prompt where it is long enough to be one."""
    if row is None:
        return ""
    prompt = row.get("ours_over_this_prefill") if row["prompt_tokens"] >= 64 else None
    return f"{row['ours_over_this']:.2f}" + (f", prompt {prompt:.2f}" if prompt else "")


def starts_table(rows: list[dict]) -> str:
    """Seconds from a process's start to its first token, with empty caches and with filled ones; and parts of that. On
    the machine that was measured last."""
    lines: dict[tuple, str] = {}
    for case in itertools.chain(*(found for _, found in by_machine(rows)[:1])):
        ours = case[0]
        if "start_cold_s" in ours:
            weights = ours.get("quantization") or ours["dtype"]
            pairs = (f"{ours[f'{what}_cold_s']:.1f} / {ours[f'{what}_warm_s']:.1f} s"
                     for what in ("start", "load", "compile"))
            peer = next((f"{row['start_warm_s']:.2f} s" for row in case if row["system"] == "llama.cpp"
                         and "start_warm_s" in row), "")
            lines[ours["model"], weights] = " | ".join(
                [ours["model"], weights, *pairs, peer, ours["machine"], ours["commit"]])
    return table("model | weights | first token, cold / warm | loading | compiling | llama.cpp's | machine | commit",
                 lines.values())


USUAL = ("bf16", "int8", "int4 g32, nearest", "int4 g32, GPTQ", "int4 g128, GPTQ", "int4-pure g32, GPTQ",
         "bf16; keys and values int8")  # ways to round that README shows


def quality_table(rows: list[dict], shown: Container[str] | None = None) -> str:
    """What each way to round costs, or those in `shown`."""
    found = {row["weights"]: row for row in rows if row.get("kind") == "quality"}
    lines = (f"{r['weights']} | {r['bits']:.2f} | {r['perplexity']:.3f} | {r['kl']:.5f} | {r['agreement']:.2f} %"
             for r in found.values() if shown is None or r["weights"] in shown)
    last = list(found.values())[-1]
    return table("weights | bits each | perplexity | KL to bf16, nats/token | same likeliest token", lines) + \
        f"\n\n`{command_of(last)}`, commit {last['commit']}, {last['machine']}."


ROUNDED = {"exact": "float32 activations", "ours, float32": "8 bits, else float32", "ours": "ours as it runs",
           "llama.cpp": "llama.cpp, the same numbers", "llama.cpp's rounding": "llama.cpp, its own rounding"}


def activations_table(rows: list[dict]) -> str:
    """A line for each kind of weights, with the divergence and the perplexity of each system."""
    found = {(row["weights"], row["system"]): row for row in rows if row.get("kind") == "activations"}
    if not found:
        return ""
    lines = []
    for weights in dict.fromkeys(weights for weights, _ in found):
        of_each = [found.get((weights, system)) for system in ROUNDED]
        lines.append(" | ".join([weights, *("" if r is None else f"{r['kl']:.5f}, {r['perplexity']:.3f}"
                                            for r in of_each)]))
    last = list(found.values())[-1]
    return table(" | ".join(["weights", *ROUNDED.values()]), lines) + \
        f"\n\n`{command_of(last)}`, commit {last['commit']}, {last['machine']}."


def speculation_table(rows: list[dict]) -> str:
    """A line for each text and way to decode it, the last of each model."""
    found: dict[tuple, dict] = {}
    for r in rows:
        if r.get("kind") == "speculation":
            found[r["machine"], r["model"], r["quantization"], r["text"], r["way"], r.get("synthetic_acceptance")] = r
    if not found:
        return ""

    def cell(row: dict, name: str, form: str, scale: float = 1) -> str:
        return "" if row.get(name) is None else format(row[name] * scale, form)
    lines = []
    for r in found.values():
        chance = r.get("synthetic_acceptance")
        lines.append(" | ".join([
            f"{r['model']}, {r['quantization']}" if r["quantization"] else r["model"],
            r["text"] if chance is None else f"{r['text']}, {100 * chance:.0f} % taken by chance", r["way"],
            number(r["tok_s"]), f"{r['over_plain']:.2f}", cell(r, "tokens_per_round", ".2f"),
            cell(r, "acceptance", ".0f", 100), cell(r, "draft_ms", ".2f"), cell(r, "verify_ms", ".2f"),
            cell(r, "plain_ms", ".2f"), cell(r, "break_even_acceptance", ".0f", 100)]))
    head = ("model | text | draft, k | tok/s | over plain | tokens a round | stood, % | ms to draft | to verify | "
            "plain | pays from, %")
    sources = dict.fromkeys(f"`{command_of(r)}`, commit {r['commit']}, {r['machine']}" for r in found.values())
    return table(head, lines) + "\n\n" + "; ".join(sources) + "."


def ranks_table(rows: list[dict]) -> str:
    """A line for each model and way to share it, the last of each."""
    found: dict[tuple, dict] = {}
    for r in rows:
        if r.get("kind") == "ranks":
            found[r["machine"], r["model"], r["quantization"], r["way"]] = r
    lines = [" | ".join([
        f"{r['model']}, {r['quantization'] or r['dtype']}", r["way"], number(r["tok_s"]),
        "" if r["over_one"] is None else f"{r['over_one']:.2f}", f"{r['bytes_per_token'] / 1e6:.0f}",
        "" if r["sums_pct"] is None else f"{r['sums_pct']:.0f}"]) for r in found.values()]
    sources = dict.fromkeys(f"`{command_of(r)}`, commit {r['commit']}, {r['machine']}" for r in found.values())
    return table("model | shared by | tok/s | over one rank, all cores | MB a rank and token | % in sums", lines) + \
        "\n\n" + "; ".join(sources) + "." if found else ""


BESIDE = {"our server": "times our server", "transformers": "times transformers",
          "llama.cpp's server": "times llama.cpp's server"}


def throughput_table(rows: list[dict]) -> str:
    """A line for each model and number of rows, with the last of each system."""
    found: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        if r.get("kind") == "throughput":
            key = r["machine"], r["model"], r["quantization"], r["dtype"], r["rows"]
            found.setdefault(key, {})[r["system"]] = r
    if not found:
        return ""
    lines = [" | ".join([model, quantization or dtype, str(size), number(of["ours"]["tok_s"]),
                         *(f"{of[name]['ours_over_this']:.2f}" if name in of else "" for name in BESIDE)])
             for (_, model, quantization, dtype, size), of in found.items()]
    sources = dict.fromkeys(f"`{command_of(r)}`, commit {r['commit']}, {r['machine']}"
                            for of in found.values() for r in of.values())
    return table(" | ".join(["model", "weights", "rows", "tok/s", *BESIDE.values()]), lines) + \
        "\n\n" + "; ".join(sources) + "."


# -- docs/why-cpu.md --------------------------------------------------------------------------------------------------

POINTS = ("quantization", "kernels", "dispatch", "memory", "start", "threads", "fusion", "step")  # why_cpu.py's
THINGS = {"token": ("ms/token", "tok/s", "GB/s", "faster by"), "prompt": ("prompt, tok/s", "faster by"),
          "start": ("seconds", "faster by"), "part": ("ms", "of the step")}  # any other is a matrix


def why_rows(rows: list[dict], point: str | None = None) -> list[dict]:
    """Those of the last run, or of the last that had this point."""
    found = [row for row in rows if row.get("kind") == "why" and row["point"] == (point or row["point"])]
    return [row for row in found if all(row[key] == found[-1][key] for key in ("machine", "commit", "command"))]


def why_table(point: str, rows: list[dict]) -> str:
    """What each way took and is worth; where matrices were timed one by one, a table of their GB/s below."""
    found = why_rows(rows, point)
    ways = {way: {row["thing"]: row for row in found if row["what"] == way}
            for way in dict.fromkeys(row["what"] for row in found)}
    things = list(dict.fromkeys(row["thing"] for row in found))
    parts = []
    for shown in ([t for t in things if t in THINGS], [t for t in things if t not in THINGS]):
        if shown:
            head = " | ".join(["", *(name for thing in shown for name in THINGS.get(thing, (f"{thing}, GB/s",)))])
            lines = ([way, *itertools.chain(*(why_cells(of[thing], found) for thing in shown))]
                     for way, of in ways.items() if shown[0] in of)
            parts.append(table(head, map(" | ".join, lines)))
    return "\n\n".join(parts)


def why_cells(row: dict, rows: list[dict]) -> list[str]:
    """What stands under a thing's columns. A base that is compared with another itself is named."""
    if "base" in row:
        named = any(other["what"] == row["base"] and "base" in other for other in rows)
        worth = f"{row['worth_pct']:+.0f} %" + (f" on {row['base']}" if named else "")
    else:
        worth = "base"
    cells = {"token": lambda: [f"{row['ms']:.3g}", number(row["tok_s"]), f"{row['gb_s']:.1f}" if "gb_s" in row else "",
                               worth],
             "prompt": lambda: [number(row["tok_s"]), worth], "start": lambda: [f"{row['ms'] / 1e3:.2f}", worth],
             "part": lambda: [f"{row['ms']:.2f}", f"{row['share_pct']:.0f} %"]}
    return cells.get(row["thing"], lambda: [f"{row['gb_s']:.1f}"])()


def why_source(rows: list[dict]) -> str:
    """Where the figures come from."""
    found = why_rows(rows)
    if not found:
        return ""
    bandwidths = [row["bandwidth_gb_s"] for row in found]
    last = found[-1]
    return (f"{last['model']} on {last['machine']}, {last['threads']} threads, torch {last['torch']}, read bandwidth "
            f"{min(bandwidths):.0f} to {max(bandwidths):.0f} GB/s; commit {last['commit']}, `{command_of(last)}`.")


# -- pages ------------------------------------------------------------------------------------------------------------

TABLES = {"speed": speed_table, "speed-others": functools.partial(speed_table, which=slice(1, None)),
          "starts": starts_table, "quality": functools.partial(quality_table, shown=USUAL),
          "quality-all": quality_table, "activations": activations_table,
          "speculation": speculation_table, "ranks": ranks_table, "throughput": throughput_table, "why": why_source,
          **{f"why-{point}": functools.partial(why_table, point) for point in POINTS}}


def pieces(text: str) -> Iterator[tuple[str | None, str]]:
    """(None, prose) and (name of a table, what stands there) in turns. UserError if a mark lacks its end."""
    while text:
        marks = {text.index(f"<!-- {name} -->"): name for name in TABLES if f"<!-- {name} -->" in text}
        if not marks:
            yield None, text
            return
        name = marks[min(marks)]
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        inside, end, text = rest.partition("<!-- end -->")
        if not mark or not end:
            raise UserError(f"a page has <!-- {name} --> without a line <!-- end --> behind it; put one there")
        yield None, before + mark
        yield name, inside
        text = end + text


def written(text: str, rows: list[dict]) -> str:
    """A page with its tables made of these rows."""
    return "".join(old if name is None else f"{TABLES[name](rows)}\n" for name, old in pieces(text))


def main(argv: list[str]) -> None:
    Parser(prog="python -m scripts.tables", description=__doc__.splitlines()[0]).parse_args(argv)
    for page in PAGES:
        page.write_text(written(page.read_text("utf-8"), read_rows()), "utf-8")


if __name__ == "__main__":
    run_command(main)
