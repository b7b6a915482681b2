"""Weights from a Hugging Face folder: found, checked, then read by mmap straight into the fused layout of model.py.

Nothing is converted or written: names are translated, q/k/v and gate/up are joined, dtypes are widened or narrowed on
the way in. Every name, shape and dtype is checked against the headers before the first byte of a weight is read.
"""
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import device as machine
from config import read_json
from errors import UserError

# Our parameter -> the tensors of the file that make it up, stacked along dim 0.
NAMES = {
    r"tok_embeddings\.weight": ["model.embed_tokens.weight"],
    r"output\.weight": ["lm_head.weight"],
    r"norm\.weight": ["model.norm.weight"],
    r"layers\.(\d+)\.attention_norm\.weight": ["model.layers.{}.input_layernorm.weight"],
    r"layers\.(\d+)\.ffn_norm\.weight": ["model.layers.{}.post_attention_layernorm.weight"],
    r"layers\.(\d+)\.attention\.wqkv\.weight": [f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"],
    r"layers\.(\d+)\.attention\.wo\.weight": ["model.layers.{}.self_attn.o_proj.weight"],
    r"layers\.(\d+)\.feed_forward\.w13\.weight": [f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up")],
    r"layers\.(\d+)\.feed_forward\.w2\.weight": ["model.layers.{}.mlp.down_proj.weight"],
}
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # recomputed from the config; old exports carry it
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# What a run reads of a hub repository; everything else stays there.
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


# -- finding the folder -----------------------------------------------------------------------------------------------

def resolve_checkpoint(path: str) -> Path:
    """A folder as it is; else ORG/NAME from the local hub cache, or downloaded into it with a progress bar."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path} is a file; give the checkpoint's folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or folder.parent.is_dir():
        raise UserError(f"there is no folder {path}; give a checkpoint folder or a hub repository as ORG/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    try:
        return Path(snapshot_download(path, allow_patterns=HUB_FILES, local_files_only=True))
    except LocalEntryNotFoundError:  # absent, or a download that was cut short
        return download(path)


def download(repo: str, folder: Path | None = None) -> Path:
    """The config, tokenizer and safetensors of a hub repository, into `folder` or the hub's cache; resumes."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(repo, allow_patterns=HUB_FILES, local_dir=folder))
    except hub.GatedRepoError:
        raise UserError(f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then run "
                        f"`hf auth login` (or set HF_TOKEN) and try again") from None
    except hub.RepositoryNotFoundError:
        raise UserError(f"the hub has no repository {repo}, or it is private; check the name, and `hf auth login` "
                        f"if it is yours") from None
    except hub.HFValidationError as e:
        raise UserError(f"{repo!r} is not a repository name ({e}); expected ORG/NAME") from None
    except (hub.LocalEntryNotFoundError, hub.HTTPError, OSError) as e:
        reason = str(e).strip().splitlines()
        raise UserError(f"{repo} could not be downloaded ({reason[0] if reason else type(e).__name__}); "
                        f"run again to resume, or give a local folder") from None


# -- the files --------------------------------------------------------------------------------------------------------

class Checkpoint:
    """The tensors of a folder: which file holds each, its shape and dtype. Opens files only while reading them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, tuple[Path, tuple[int, ...], torch.dtype]] = {}
        listed = self.shards()
        for path, names in listed.items():
            with self.open(path) as file:
                present = set(file.keys())
                for name in names if names is not None else sorted(present):
                    if name not in present:
                        raise UserError(f"{folder / 'model.safetensors.index.json'} says {path.name} holds {name}, "
                                        f"which it does not; download the folder again")
                    part = file.get_slice(name)
                    if part.get_dtype() not in STORED and not IGNORED.fullmatch(name):
                        raise UserError(f"{path.name}: {name} has dtype {part.get_dtype()}; "
                                        f"supported: {', '.join(STORED)}")
                    self.tensors[name] = (path, tuple(part.get_shape()), STORED.get(part.get_dtype(), torch.float32))

    def shards(self) -> dict[Path, list[str] | None]:
        """File -> the tensors the index expects in it (None: whatever it holds)."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            document = read_json(index)
            table = document.get("weight_map") if isinstance(document, dict) else None
            if not isinstance(table, dict) or not table:
                raise UserError(f"{index} has no weight_map; download it again")
            by_file: dict[Path, list[str] | None] = {}
            for name, shard in table.items():
                if not isinstance(shard, str) or shard in ("", ".", "..") or re.search(r"[/\\]", shard):
                    raise UserError(f"{index} places {name} in {shard!r}; only files of the same folder are allowed")
                if not (self.folder / shard).is_file():
                    raise UserError(f"{index} names {shard}, which is not in {self.folder}; download it again")
                by_file.setdefault(self.folder / shard, []).append(name)
            return by_file
        if (self.folder / "model.safetensors").is_file():
            return {self.folder / "model.safetensors": None}
        pickles = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in self.folder.glob(pattern))
        if pickles:
            raise UserError(f"{self.folder} holds {pickles[0]}: a pickle, which can run code when opened, is refused; "
                            f"use the safetensors version of this checkpoint")
        raise UserError(f"{self.folder} has no weights; expected model.safetensors or model.safetensors.index.json")

    def open(self, path: Path) -> safe_open:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path} is damaged or no safetensors file ({e}); download it again") from None

    def copy(self, name: str, target: torch.Tensor) -> None:
        """Read one tensor into `target`. The map is closed again, or every page read so far would stay resident."""
        path, _, _ = self.tensors[name]
        with self.open(path) as file:
            target.copy_(file.get_tensor(name))


def sources(parameter: str) -> list[str]:
    """The file's names for one of our parameters."""
    for pattern, names in NAMES.items():
        if match := re.fullmatch(pattern, parameter):
            return [name.format(*match.groups()) for name in names]
    raise AssertionError(f"no name table entry for {parameter}")


def check(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Missing, extra or wrongly shaped tensors are errors that name them."""
    expected = {name for parameter, _ in model.named_parameters() for name in sources(parameter)}
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()  # some exports repeat the embedding
    extra = sorted(n for n in checkpoint.tensors if n not in expected | tied and not IGNORED.fullmatch(n))
    missing = sorted(expected - checkpoint.tensors.keys())
    for problem, names in (("lacks", missing), ("has unknown", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{checkpoint.folder} {problem} tensors {', '.join(names[:3])}{more}; "
                            f"the weights do not belong to this config.json")
    for parameter, p in model.named_parameters():
        shapes = [checkpoint.tensors[name][1] for name in sources(parameter)]
        if any(s[1:] != p.shape[1:] or not s for s in shapes) or sum(s[0] for s in shapes) != p.shape[0]:
            raise UserError(f"{checkpoint.folder}: {' + '.join(sources(parameter))} has shape "
                            f"{' + '.join(map(str, map(list, shapes)))}; config.json wants {list(p.shape)} in all")


# -- into the model ---------------------------------------------------------------------------------------------------

def materialize(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Replace each meta parameter by memory on `device`, one at a time, and hand it out to be filled."""
    for name, p in list(model.named_parameters()):
        tensor = machine.empty(tuple(p.shape), dtype, device)
        yield name, tensor
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    model.tie()
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))


def load_weights(model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Fill a model built on the meta device. Peak memory: the weights plus one tensor of the file."""
    checkpoint = Checkpoint(folder)
    check(model, checkpoint)
    machine.require_memory(sum(p.numel() for p in model.parameters()) * dtype.itemsize, device)
    for parameter, tensor in materialize(model, device, dtype):
        row = 0
        for name in sources(parameter):
            rows = checkpoint.tensors[name][1][0]
            checkpoint.copy(name, tensor[row:row + rows])
            row += rows


def random_weights(model: nn.Module, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
    """Fill a model built on the meta device with reproducible weights that keep activations near unit size.

    Values repeat from one pool: drawing billions of normal numbers takes minutes, copying them seconds, and speed
    depends on neither (all-zero or denormal weights it would depend on).
    """
    machine.require_memory(sum(p.numel() for p in model.parameters()) * dtype.itemsize, device)
    pool = torch.randn((1 << 22) + 7, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    offset = 0
    for _, tensor in materialize(model, device, dtype):
        if tensor.dim() == 1:
            tensor.fill_(1.0)
            continue
        flat = tensor.view(-1)
        for start in range(0, len(flat), len(pool)):
            part = flat[start:start + len(pool)]
            split = min(len(part), len(pool) - offset)
            part[:split] = pool[offset:offset + split]
            part[split:] = pool[:len(part) - split]
            offset = (offset + len(part) + 12345) % len(pool)
        flat.mul_(tensor.shape[1] ** -0.5)
