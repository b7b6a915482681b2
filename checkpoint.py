"""The files of a Hugging Face folder: where it is, which tensors it holds, and reading them through mmap.

`NAMES` is the table from our parameters to the names in the files. Opening a folder reads and checks the headers only.
"""
import bisect
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

import foreign
from config import read_json
from errors import UserError

# Our parameter -> the tensors of the file that make it up, stacked along their leading dimensions. Files differ: the
# first line whose tensors are all there counts. {e} runs over the experts.
NAMES: dict[str, list[list[str]]] = {
    r"tok_embeddings.weight": [["model.embed_tokens.weight"]],
    r"output.weight": [["lm_head.weight"]],
    r"norm.weight": [["model.norm.weight"]],
    "per_layer.table.weight": [["model.embed_tokens_per_layer.weight"]],  # Gemma 4 E2B, E4B
    "per_layer.projection.weight": [["model.per_layer_model_projection.weight"]],
    "per_layer.norm.weight": [["model.per_layer_projection_norm.weight"]],
    "mtp.fc.weight": [["mtp.fc.weight"]],
    "mtp.norm_e.weight": [["mtp.pre_fc_norm_embedding.weight"]],
    "mtp.norm_h.weight": [["mtp.pre_fc_norm_hidden.weight"]],
    "mtp.norm.weight": [["mtp.norm.weight"]],
}
BLOCK_NAMES: dict[str, list[list[str]]] = {  # behind layers.N. on both sides, or mtp.block. on ours
    "attention_norm.weight": [["input_layernorm.weight"]],
    "scalar": [["layer_scalar"]],
    "attention_post_norm.weight": [["post_attention_layernorm.weight"]],
    "ffn_norm.weight": [["pre_feedforward_layernorm.weight"], ["post_attention_layernorm.weight"]],
    "ffn_post_norm.weight": [["post_feedforward_layernorm.weight"]],
    "attention.wqkv.weight": [*([f"self_attn.{x}_proj.weight" for x in part] for part in ("qkv", "qk")),
                              ["self_attn.qkv_proj.weight"]],
    "attention.wq.weight": [["self_attn.q_proj.weight"]],
    "attention.wqkv.bias": [[f"self_attn.{x}_proj.bias" for x in "qkv"]],
    "attention.q_norm.weight": [["self_attn.q_norm.weight"]],
    "attention.k_norm.weight": [["self_attn.k_norm.weight"]],
    "attention.sinks": [["self_attn.sinks"]],
    "attention.wo.bias": [["self_attn.o_proj.bias"]],
    "attention.wo.weight": [["self_attn.o_proj.weight"], ["linear_attn.out_proj.weight"]],
    "attention.w_qkvz.weight": [["linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight"],
                                ["linear_attn.in_proj_qkvz.weight"]],
    "attention.w_ba.weight": [["linear_attn.in_proj_b.weight", "linear_attn.in_proj_a.weight"],
                              ["linear_attn.in_proj_ba.weight"]],
    "attention.conv": [["linear_attn.conv1d.weight"]],
    "attention.A_log": [["linear_attn.A_log"]],
    "attention.dt_bias": [["linear_attn.dt_bias"]],
    "attention.norm.weight": [["linear_attn.norm.weight"]],
    "feed_forward.w13.weight": [
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"], ["mlp.gate_up_proj.weight"], ["mlp.experts.gate_up_proj"],
        ["mlp.experts.gate_up_proj_blocks", "mlp.experts.gate_up_proj_scales"],
        ["mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"],
        ["block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"]],
    "feed_forward.w2.weight": [
        ["mlp.down_proj.weight"], ["mlp.experts.down_proj"], ["mlp.experts.{e}.down_proj.weight"],
        ["mlp.experts.down_proj_blocks", "mlp.experts.down_proj_scales"], ["block_sparse_moe.experts.{e}.w2.weight"]],
    "feed_forward.router.weight": [["mlp.gate.weight"], ["block_sparse_moe.gate.weight"], ["mlp.router.weight"]],
    "feed_forward.shared.w13.weight": [["mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"]],
    "feed_forward.shared.w2.weight": [["mlp.shared_expert.down_proj.weight"]],
    "feed_forward.shared_gate.weight": [["mlp.shared_expert_gate.weight"]],
    "feed_forward.router.bias": [["mlp.router.bias"]],  # gpt-oss
    "feed_forward.w13.bias": [["mlp.experts.gate_up_proj_bias"]],
    "feed_forward.w2.bias": [["mlp.experts.down_proj_bias"]],
    "feed_forward.dense_norm.weight": [["pre_feedforward_layernorm.weight"]],  # Gemma 4
    "feed_forward.dense_post_norm.weight": [["post_feedforward_layernorm_1.weight"]],
    "feed_forward.dense.w13.weight": [["mlp.gate_proj.weight", "mlp.up_proj.weight"]],
    "feed_forward.dense.w2.weight": [["mlp.down_proj.weight"]],
    "feed_forward.experts_norm.weight": [["pre_feedforward_layernorm_2.weight"]],
    "feed_forward.experts_post_norm.weight": [["post_feedforward_layernorm_2.weight"]],
    "feed_forward.router_norm.weight": [["router.scale"]],
    "feed_forward.expert_scale": [["router.per_expert_scale"]],
    "per_layer.gate.weight": [["per_layer_input_gate.weight"]],
    "per_layer.out.weight": [["per_layer_projection.weight"]],
    "per_layer.norm.weight": [["post_per_layer_input_norm.weight"]],
    "feed_forward.experts.router.weight": [["router.proj.weight"]],
    "feed_forward.experts.w13.weight": [["experts.gate_up_proj"]],
    "feed_forward.experts.w2.weight": [["experts.down_proj"]],
}
# The text half of a model that also sees or hears stands under one of these; its other halves and tables that are
# recomputed from the config are not read, and the head that drafts further tokens only if it is asked for.
PREFIX = re.compile(r"(model\.language_model\.|language_model\.model\.|language_model\.(?=lm_head\.))")
SKIPPED = re.compile(r"(model\.)?(visual|vision_tower|vision_model|vision_embedder|audio_tower|audio_model|"
                     r"embed_vision|embed_audio|multi_modal_projector)\..*|.*\.rotary_emb\.inv_freq")
MTP = re.compile(r"^(model\.)?(?=mtp\.)")
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
QUANTIZED = {"I8": torch.int8, "U8": torch.uint8}  # by quantize.py; scales are of the dtypes above
BLOCK = 1 << 22  # numbers of a matrix that are rounded at a time
RESIDENT = 16 << 20  # bytes of a file that may stay mapped while reading

# What a run reads of a hub repository; everything else stays there.
HUB = dict(allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "*.jinja"],
           ignore_patterns=["*/*", "consolidated*"])  # the same weights again, in their makers' own layout


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
        return Path(snapshot_download(path, local_files_only=True, **HUB))
    except LocalEntryNotFoundError:  # absent, or a download that was cut short
        return download(path)


def download(repo: str, folder: Path | None = None) -> Path:
    """The config, tokenizer and safetensors of a hub repository, into `folder` or the hub's cache; resumes."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(repo, local_dir=folder, **HUB))
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

class Stored(NamedTuple):
    """A tensor of a file; one of another tool with the shape and dtype that it has as ours."""
    path: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str
    layout: str = ""  # of another tool's (foreign.py)
    scale: "Stored | None" = None  # what floats of 8 bits, or numbers between zero points, are to be multiplied by
    expert: int | None = None  # which of the leading dimension of the file's tensor


class Part(NamedTuple):
    """What is wanted of a parameter: some rows of a matrix [..., out, in] or vector, in this order, some of its
    columns, or nothing, and zeros instead."""
    rows: list[slice] | None = None  # None: all
    columns: tuple[int, int] | None = None  # the i-th of n equal parts; None: all
    absent: bool = False

    def columns_of(self, width: int) -> slice:
        i, n = self.columns or (0, 1)
        return slice(width * i // n, width * (i + 1) // n)


def matrix(shape: tuple[int, ...], column: bool = False) -> tuple[int, int]:
    """A shape as that of a matrix: leading dimensions as rows, a vector (and whatever is a `column`) as a column."""
    width = shape[-1] if len(shape) > 1 and not column else 1
    return math.prod(shape) // max(width, 1), width


def is_column(parameter: str, p: torch.Tensor) -> bool:
    """The scales of int8 are one to a row, however many dimensions the rows have."""
    return parameter.endswith(".scale") and p.dtype == torch.float32


class Checkpoint:
    """The text model's tensors of a folder, without prefix, with or without those of the multi-token-prediction head.
    `tool`: who quantized them. Opens files only while reading them.
    """

    def __init__(self, folder: Path, mtp: bool = False, tool: str = "") -> None:
        self.folder, self.tool = folder, tool
        self.tensors: dict[str, Stored] = {}
        self.aside: dict[str, Stored] = {}  # what another tool says of them
        self.held: tuple[Path, safe_open] | None = None  # the file being read
        self.scale: tuple[Stored | None, torch.Tensor] = (None, torch.empty(0))  # the last that was needed
        self.resident = 0  # bytes read since it was opened
        listed = self.shards()
        for path, names in listed.items():
            with self.open(path) as file:
                present = set(file.keys())
                for name in names if names is not None else sorted(present):
                    if name not in present:
                        raise UserError(f"{folder / 'model.safetensors.index.json'} says {path.name} holds {name}, "
                                        f"which it does not; download the folder again")
                    if not SKIPPED.fullmatch(name) and (mtp or not MTP.match(name)):
                        self.add(path, name, file.get_slice(name))
        if floats := {name: stored for name, stored in self.tensors.items() if stored.dtype == foreign.FLOAT8}:
            self.join_scales(floats)

    def add(self, path: Path, name: str, part) -> None:
        dtype = part.get_dtype()
        plain = PREFIX.sub("", name)
        if plain != name and not plain.startswith("lm_head."):
            plain = f"model.{plain}"
        plain = MTP.sub("", plain)
        for own, shape, expert in foreign.apart(plain, tuple(part.get_shape()), self.tool):
            if own.endswith(foreign.ASIDE):
                self.aside[own] = Stored(path, name, shape, dtype, expert=expert)
                continue
            own, shape, kind, layout = foreign.renamed(own, shape, dtype, self.tool)
            if kind not in STORED and kind not in QUANTIZED and kind != foreign.FLOAT8:
                raise UserError(f"{path.name}: {name} has dtype {kind}; supported: {', '.join(STORED)}, "
                                f"{foreign.FLOAT8}")
            self.tensors[own] = Stored(path, name, shape, kind, layout, expert=expert)

    def join_scales(self, floats: dict[str, Stored]) -> None:
        """Floats of 8 bits and their scales are one from here on; of what is said of activations nothing is wanted."""
        for name, stored in floats.items():
            scale = next((self.tensors.pop(f"{name}{end}") for end in foreign.FLOAT8_SCALES
                          if f"{name}{end}" in self.tensors), None)
            if scale is None:
                raise UserError(f"{stored.path}: {stored.name} has dtype {stored.dtype} and no scale beside it "
                                f"({' or '.join(foreign.FLOAT8_SCALES)}); get the checkpoint again")
            if scale.dtype not in STORED or len(stored.shape) < 2 or not foreign.blocks(scale.shape, stored.shape):
                raise UserError(f"{scale.path}: {scale.name} has dtype {scale.dtype} and shape {list(scale.shape)}, no "
                                f"scale of {list(stored.shape)}; one number is expected, or one for each row or for "
                                f"each block of 128 x 128")
            self.tensors[name] = stored._replace(scale=scale)
        for name in [name for name in self.tensors if name.endswith(foreign.FLOAT8_ASIDE)]:
            del self.tensors[name]

    def shift(self, name: str, zeros: Stored) -> None:
        """Make a tensor of zero points or biases, and the scales beside it, the shifts that they come to."""
        owner = name.rpartition(".")[0]
        shape, scale = foreign.shape_of_zeros(zeros.shape, self.tool), self.tensors.get(f"{owner}.weight_scale")
        right = zeros.dtype in STORED if self.tool == "mlx" else zeros.dtype == "I32"
        if scale is not None and (not right or shape != scale.shape):
            raise UserError(f"{zeros.path}: {zeros.name} has dtype {zeros.dtype} and shape {list(zeros.shape)}, no "
                            f"zero points as {self.tool} packs them for {list(scale.shape)} groups; {foreign.INSTEAD}")
        self.tensors[f"{owner}.weight_shift"] = zeros._replace(shape=shape, dtype="F32", layout="zeros", scale=scale)

    def widen(self, name: str, inputs: int) -> None:
        """Read a matrix of int4 or int8 with scales and shifts as what its numbers mean."""
        stored, shift = self.tensors[name], self.tensors.pop(f"{name}_shift", None)
        rows, groups = shift.shape if shift is not None and len(shift.shape) == 2 else (0, 0)
        if not self.tensors.pop(f"{name}_scale", None) or rows != stored.shape[0] or groups == 0 or inputs % groups or \
                stored.shape[1] * 8 not in (4 * inputs, 8 * inputs):
            raise UserError(f"{stored.path}: {stored.name} has shape {list(stored.shape)}, no int4 or int8 of {inputs} "
                            f"columns with scales and biases; get the checkpoint again")
        self.tensors[name] = stored._replace(shape=(stored.shape[0], inputs), dtype="F32", layout="wide", scale=shift)

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
                if not isinstance(shard, str) or not re.fullmatch(r"(?!\.{0,2}$)[^/\\\0]{1,120}", shard):
                    raise UserError(f"{index} places {name[:99]} in {str(shard)[:99]!r}; only files of the same folder "
                                    f"are allowed")
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

    def file_of(self, stored: Stored, size: int) -> safe_open:
        """The tensor's file, to read `size` bytes of it. Every page read stays resident until the map is closed, and
        opening means parsing a header of thousands of names: so it is opened anew now and then."""
        if self.held is None or self.held[0] != stored.path or self.resident + size > RESIDENT:
            self.held = None  # closed before the next is opened
            self.held, self.resident = (stored.path, self.open(stored.path)), 0
        self.resident += size
        return self.held[1]

    def read(self, stored: Stored, size: int, *where: int | slice) -> torch.Tensor:
        """What of a tensor is wanted, about `size` bytes; all if nothing is said."""
        if stored.scale and self.scale[0] != stored.scale:
            self.scale = stored.scale, self.read(stored.scale, 4 * math.prod(stored.scale.shape)).clone()
        file = self.file_of(stored, size)
        if not where and not stored.layout and stored.expert is None:
            found = file.get_tensor(stored.name)  # which may have no dimension to be cut along
        else:
            part = file.get_slice(stored.name)
            part = part if stored.expert is None else foreign.Slice(part, stored.expert)
            if stored.layout == "zeros":
                return foreign.shifts(part[:, :], self.scale[1], self.tool)[where]
            if stored.layout == "wide":
                words, shift = part[:, :], self.scale[1]
                return foreign.wide(words, self.read(stored.scale.scale, size), shift, stored.shape[1])[where]
            found = foreign.read(part, stored.layout, *where) if stored.layout else part[where]
        return foreign.widen(found, self.scale[1], stored.shape, where) if stored.scale else found

    def copy(self, name: str, target: torch.Tensor) -> None:
        """Read one tensor into `target`, of as many numbers in the same order."""
        target.copy_(self.read(self.tensors[name], target.nbytes).view_as(target))

    def part(self, name: str, i: int, *inner: slice) -> torch.Tensor:
        """The i-th of the tensor's leading dimension, or what is wanted of that."""
        stored = self.tensors[name]
        return self.read(stored, 4 * math.prod(stored.shape[1:]), i, *inner)

    def whole(self, name: str) -> torch.Tensor:
        """One tensor as it is in the file, but for floats of 8 bits, which are made wide."""
        stored = self.tensors.get(name) or self.aside[name]
        return self.read(stored, 4 * math.prod(stored.shape)).clone()  # of the file's pages, which are given back

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor as the rows of a matrix, in blocks [r, width]."""
        stored = self.tensors[name]
        height, width = matrix(stored.shape[-2:])
        step = max(1, BLOCK // width)
        for e in range(math.prod(stored.shape[:-2])):
            for start in range(0, height, step):
                rows = slice(start, min(start + step, height))
                yield self.read(stored, 4 * step * width, *((e, rows) if len(stored.shape) == 3 else (rows,)))

    def parts(self, names: list[str], matrices: int, part: Part, column: bool = False) -> Iterator[torch.Tensor]:
        """The wanted rows, in blocks [r, width], of so many matrices on top of each other that tensors make up."""
        shapes = [matrix(self.tensors[name].shape, column) for name in names]
        starts = [0, *itertools.accumulate(rows for rows, _ in shapes)]
        height = starts[-1] // matrices
        for e in range(matrices):
            for wanted in part.rows or [slice(0, height)]:
                first, last = e * height + wanted.start, e * height + wanted.stop
                for i in range(bisect.bisect_right(starts, first) - 1, len(names)):
                    if first >= last:
                        break
                    end = min(last, starts[i + 1])
                    yield from self.piece(names[i], first - starts[i], end - starts[i], part, column)
                    first = end

    def piece(self, name: str, first: int, last: int, part: Part, column: bool) -> Iterator[torch.Tensor]:
        """Rows first to last of a tensor as a matrix, which do not cross the end of an expert, in blocks."""
        stored = self.tensors[name]
        _, width = matrix(stored.shape, column)
        leading = stored.shape if width == 1 else stored.shape[:-1]
        inner = math.prod(leading[1:]) if len(leading) > 1 else 0  # rows of an expert
        columns = part.columns_of(width) if width > 1 else slice(0, 1)
        itemsize = STORED.get(stored.dtype, QUANTIZED.get(stored.dtype, torch.int8)).itemsize
        for start in range(first, last, step := max(1, BLOCK // width)):
            end = min(start + step, last)
            size = (end - start) * (columns.stop - columns.start) * itemsize
            e, row = divmod(start, inner) if inner > 1 else (start, 0)
            where = (e, slice(row, row + end - start)) if inner > 1 else (slice(start, end), *[0] * (len(leading) - 1))
            found = self.read(stored, size, *where, *([columns] if width > 1 else []))
            yield found.reshape(end - start, -1)

    def sources(self, parameter: str, experts: int) -> list[str]:
        """The tensors that make up one of our parameters; those of the table's first line if none are there."""
        owner, _, leaf = parameter.rpartition(".")
        if leaf in ("scale", "shift"):
            return [f"{name}_{leaf}" for name in self.sources(f"{owner}.weight", experts)]
        layer = re.match(r"(layers\.\d+|mtp\.block)\.", parameter)
        prefix = layer[0] if layer else ""
        theirs = "mtp.layers.0." if prefix == "mtp.block." else f"model.{prefix}" if layer else ""
        lines = (BLOCK_NAMES if layer else NAMES)[parameter.removeprefix(prefix)]
        lines = [[f"{theirs}{name}" for name in line] for line in lines]
        lines = [[name.format(e=e) for e in range(experts) for name in line] if "{e}" in line[0] else line
                 for line in lines if experts or "{e}" not in line[0]]
        for enough in (all, any):  # a line that is there in part is what an incomplete file was meant to have
            for line in lines:
                if enough(name in self.tensors for name in line):
                    return line
        return lines[0]
