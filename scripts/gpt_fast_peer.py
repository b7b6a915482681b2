"""Runs gpt-fast in its own process for scripts/peers.py, with random weights of a given shape.

Its one argument is a JSON document; it prints a line of JSON once it is ready, and one for each line it reads. Nothing
of ours is imported: gpt-fast's modules have the same names. int4 weights are filled in their packed layout, as its
quantizer does not run on today's PyTorch.
"""
import importlib
import importlib.util
import inspect
import json
import os
import sys
import time
from unittest.mock import MagicMock


def build(torch, arguments: dict):
    """Its model, compiled decoding, and the bytes of its weights that a token reads."""
    if importlib.util.find_spec("tiktoken") is None:  # of a tokenizer, which is not needed here
        sys.modules.update({name: MagicMock() for name in ("tiktoken", "tiktoken.load")})
    generate, model, quantize = map(importlib.import_module, ("generate", "model", "quantize"))
    with torch.device("meta"):
        built = model.Transformer(model.ModelArgs(**arguments["shape"]))
        if arguments["mode"] == "int8":
            built = quantize.WeightOnlyInt8QuantHandler(built).convert_for_runtime()
        elif arguments["mode"] == "int4":
            built = quantize.WeightOnlyInt4QuantHandler(built, 32).convert_for_runtime()
    built = built.to_empty(device=arguments["device"])
    torch.manual_seed(0)
    for name, tensor in (*built.named_parameters(), *built.named_buffers()):
        if not tensor.is_floating_point():
            info = torch.iinfo(tensor.dtype)
            tensor.random_(info.min, info.max)
        elif "scales" in name:
            tensor.fill_(1e-3)
        else:
            tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02)
    built = built.to(getattr(torch, arguments["dtype"])).eval()
    generate.decode_one_token = torch.compile(generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
    read = sum(t.numel() * t.itemsize for name, t in (*built.named_parameters(), *built.named_buffers())
               if "tok_embeddings" not in name)
    return generate, built, read


def main() -> None:
    arguments = json.loads(sys.argv[1])
    sys.path[0] = arguments["folder"]  # not ours
    os.chdir(arguments["folder"])
    import torch
    torch.set_grad_enabled(False)
    generate, model, read = build(torch, arguments)
    sync = torch.cuda.synchronize if arguments["device"].startswith("cuda") else lambda: None
    plain, marks = generate.prefill, []

    def prefill(*rest, **settings):
        token = plain(*rest, **settings)
        sync()
        marks.append(time.perf_counter())
        return token

    generate.prefill = prefill
    prompt = torch.tensor(arguments["prompt"], device=arguments["device"], dtype=torch.int)

    def once() -> dict:
        sync()
        start = time.perf_counter()
        with torch.device(arguments["device"]):
            rows = (arguments["batch"],) if "batch_size" in inspect.signature(generate.generate).parameters else ()
            generate.generate(model, prompt, arguments["new_tokens"], *rows, interactive=False, draft_model=None,
                              temperature=0.8, top_k=200)
        sync()
        return {"ttft_s": marks[-1] - start, "decode_s": time.perf_counter() - marks[-1]}

    once()  # compiles
    print(json.dumps({"bytes": read}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


if __name__ == "__main__":
    main()
