"""One rank of test_tp.py: does what a JSON file on the command line says, and writes what came of it beside it."""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import generate as generate_module
from checkpoint import Checkpoint
from collectives import joined, world
from decoding import Steps, compiled_steps, generate_rows
from generate import load_model, load_speculation
from sampling import Sampling
from tp import candidates

TOKENS = 6


def text(model, prompts, steps=Steps(), **options) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in generate_rows(model, prompts, TOKENS, steps=steps, **options):
        for row, token in zip(rows, tokens, strict=True):
            row += [] if token is None else [token]
    return rows


@torch.no_grad()
def logits(model, prompt: list[int]) -> torch.Tensor:
    model.setup_caches(1, 256)
    found = model(torch.tensor([prompt]), torch.arange(len(prompt))[None])
    return candidates(model, found, None)[0]


def work(task: dict) -> dict:
    """For one folder: logits, texts in many ways, and the bytes that were read."""
    read, file_of = [0], Checkpoint.file_of

    def counted(self, stored, size):
        read[0] += size
        return file_of(self, stored, size)
    Checkpoint.file_of = counted
    model, tokenizer = load_model(task["folder"], "cpu", task["dtype"], task.get("quantize"),
                                  mtp="mtp" in task["drafts"])
    Checkpoint.file_of = file_of
    prompts, greedy = task["prompts"], Sampling(0)
    found = {"read": read[0], "logits": logits(model, prompts[0]).tolist(),
             "greedy": text(model, prompts[:1], sampling=greedy), "rows": text(model, prompts, sampling=greedy),
             "drawn": text(model, prompts[:1], sampling=Sampling(1.0, 20), seed=3)}
    if task["drafts"]:
        found["nucleus"] = text(model, prompts, sampling=Sampling(0.9, None, 0.8, 0.05), seed=4)
        asked = Sampling(0, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.2, logprobs=2)
        found["penalized"] = text(model, prompts, sampling=asked)
    if task["compile"] and world.size == 2:
        steps = compiled_steps(model.device)
        found["compiled"] = text(model, prompts[:1], steps, sampling=Sampling(1.0, 20), seed=3)
    if task["drafts"]:
        auto = load_speculation("lookup", model, tokenizer)  # by each rank's clock, if they did not agree
        auto.pace.KEPT = auto.pace.MEASURED = 1
        found["auto"] = [text(model, prompts[:1], sampling=greedy, speculation=auto) for _ in range(3)]
    for draft in task["drafts"]:
        speculation = load_speculation(draft, model, tokenizer, 3)
        speculation.pace.KEPT = 0  # no plain steps first
        for name, some in (("one", prompts[:1]), ("rows", prompts)):
            found[f"{draft}, {name}"] = text(model, some, sampling=greedy, speculation=speculation)
        found[f"{draft}, drawn"] = text(model, prompts, sampling=Sampling(1.0, 20), seed=5, speculation=speculation)
        assert speculation.statistics.rounds
    return found


if __name__ == "__main__":
    plan = Path(sys.argv[1])
    if len(sys.argv) > 2:  # as where there is no compiler, or the ranks are on several machines
        generate_module.share_memory = lambda: None
    with joined("cpu"):
        found = [work(task) for task in json.loads(plan.read_text())]
        plan.with_name(f"{world.size}-{world.rank}.json").write_text(json.dumps(found))
