"""Functions of a model compiled ahead of time: for each shape a library in the cache folder, loaded without a compiler.

torch.compile begins anew in every process: importing the compiler, tracing and searching its cache take 4 to 8 s, and
each call pays for guards and for Python between the kernels. An AOTInductor package is a C++ library that calls the
same kernels and reads weights and caches where they lie; loading it takes milliseconds.

Nothing kept is ever stale: a package is found by a hash of all that decides what is in it. Only a function patched in
from outside the project is not seen, unless it is a module's `forward`.
"""
import atexit
import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import compiler
import device as machine
from collectives import once_per_node

ROOT = Path(__file__).parent
FOLDER = "packages"
KEPT = 30 * 24 * 3600  # seconds after its last use that a package is kept


class Bound(nn.Module):
    """A function of a model and some tensors, with all other arguments fixed."""

    def __init__(self, function: Callable, model: nn.Module, options: dict) -> None:
        super().__init__()
        self.function, self.model, self.options = function, model, options

    def forward(self, first: Tensor, second: Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
        return self.function(self.model, first, second, {**self.options, **tensors})


class AheadOfTime:
    """function(model, tensor, tensor, options), of which it must be compilable, as packages: one for each model, shapes
    of the tensors and form of the options (tensors may change their values, anything else makes a package of its own).

    Returns a tuple of tensors. CPU only. `settings` are torch._inductor.config's, by name.
    """

    def __init__(self, function: Callable, **settings) -> None:
        assert function.__closure__ is None  # what it holds would decide what is compiled, and not be seen
        self.function, self.settings = function, settings
        self.loaded: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()
        self.last: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()

    def __call__(self, model: nn.Module, first: Tensor, second: Tensor, options: dict) -> tuple[Tensor, ...]:
        same, shapes, caches, run, more = self.last.get(model, (None,) * 5)
        if same is not options or caches is not model.cache_size or shapes != (first.shape, second.shape):
            run, more = self.find(model, first, second, options)
            self.last[model] = options, (first.shape, second.shape), model.cache_size, run, more
        return tuple(run([first, second, *more]))

    def find(self, model: nn.Module, first: Tensor, second: Tensor, options: dict) -> tuple[Callable, list[Tensor]]:
        """The package for such a call, and the tensors among the options."""
        tensors = {name: value for name, value in options.items() if isinstance(value, Tensor)}
        fixed = {name: value for name, value in options.items() if name not in tensors}
        form = first.shape, second.shape, *((name, t.shape) for name, t in tensors.items()), *fixed.items()
        caches, run = self.loaded.setdefault(model, {}).get(form, (None, None))
        if caches is not model.cache_size:  # other buffers than the package was given
            run = load(Bound(self.function, model, fixed), (first, second), tensors, self.settings)
            self.loaded[model][form] = model.cache_size, run
        return run, list(tensors.values())


def compiled(function: Callable, device: torch.device, **settings) -> Callable:
    """function(model, tensor, tensor, options) as one graph for each shape: on a CPU a package that is kept, made with
    such `settings` of torch._inductor.config; on a GPU a CUDA graph where there are such."""
    if device.type == "cpu":
        return AheadOfTime(function, **settings)
    compiler.configure(device)
    if device.type != "cuda":  # without graphs the mode for them only cuts the program in parts
        return torch.compile(function, fullgraph=True, dynamic=False)
    step = torch.compile(function, fullgraph=True, dynamic=False, mode="reduce-overhead")
    return lambda *inputs: tuple(t.clone() for t in step(*inputs))  # a graph overwrites what it gave before


# -- packages ---------------------------------------------------------------------------------------------------------

def load(bound: Bound, inputs: tuple[Tensor, ...], options: dict[str, Tensor],
         settings: dict) -> Callable[[list], list]:
    """The package for such a call, made if there is none; it reads and writes the model's own tensors."""
    kept, path = package_of(bound, inputs, options, settings)
    if kept:
        once_per_node(lambda: path.is_file() or build(bound, inputs, options, settings, path, kept))
    else:
        path = build(bound, inputs, options, settings, path, kept)
    with contextlib.suppress(OSError):
        os.utime(path)
    library = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    own = dict(bound.named_parameters(remove_duplicate=False)) | dict(bound.named_buffers(remove_duplicate=False))
    held = {name: own[name].detach() for name in library.get_constant_fqns()}
    library.load_constants(held, use_inactive=False, check_full_update=True, user_managed=True)

    def run(tensors: list[Tensor], held: dict = held) -> list[Tensor]:  # the library itself does not keep them alive
        return library.run(tensors)
    return run


def package_of(bound: Bound, inputs: tuple[Tensor, ...], options: dict[str, Tensor],
               settings: dict) -> tuple[bool, Path]:
    """Whether it may be kept for another process, and the file."""
    forwards = [getattr(module.forward, "__func__", module.forward) for module in (bound.model, *bound.model.modules())]
    files = {Path(code.__code__.co_filename) for code in (bound.function, *forwards) if hasattr(code, "__code__")}
    known = all(path.is_file() for path in files)  # what was typed at a prompt is in no file
    for code in (bound.function, *map(type, bound.model.modules())):
        files |= reached(sys.modules[code.__module__])
    tensors = [*bound.named_parameters(remove_duplicate=False), *bound.named_buffers(remove_duplicate=False),
               *options.items(), *enumerate(inputs)]
    facts = [torch.__version__, torch.__config__.show(), sys.version, machine.instruction_sets(),
             torch.get_num_threads(), bound.function.__qualname__, repr(bound.model), repr(bound.model.config),
             repr(bound.options), repr(settings), *((name, t.shape, t.stride(), t.dtype) for name, t in tensors),
             *sorted(kernels())]
    found = hashlib.sha256(repr(facts).encode())
    for path in sorted({*filter(Path.is_file, files), *(ROOT / "ops").glob("*.py")}):
        found.update(path.read_bytes())
    return known, machine.cache_dir() / FOLDER / f"{found.hexdigest()[:24]}.pt2"


def reached(module: ModuleType, files: set[Path] | None = None) -> set[Path]:
    """The files of this project that a module uses names of, its own among them."""
    files, path = set() if files is None else files, Path(getattr(module, "__file__", None) or "")
    if path in files or path.parent not in (ROOT, ROOT / "ops"):
        return files
    files.add(path)
    for value in vars(module).values():
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str) and name in sys.modules:
            reached(sys.modules[name], files)
    return files


def kernels() -> list[str]:
    """The operators of this project that a CPU has code of its own for."""
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("readonce::")
            and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]


def build(bound: Bound, inputs: tuple[Tensor, ...], options: dict[str, Tensor], settings: dict, path: Path,
          kept: bool) -> Path:
    """Trace, compile and write a package, whole or not at all; where it is."""
    # Two cores of a Xeon took 18 s for 6 layers, 27 for 16, 43 for 28, and 34 to 66 for 32 to 35 of several kinds.
    seconds = 10 + 6 * len(getattr(bound.model, "layers", ())) // 5
    print(f"note: compiling for this model and machine, once (~{seconds} s)", file=sys.stderr, flush=True)
    compiler.configure(torch.device("cpu"))
    from torch._inductor import aoti_compile_and_package
    folder = machine.kept_folder(FOLDER) if kept else None
    made, caches = Path(tempfile.mkdtemp(dir=folder), path.name), bound.model.cache_size
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.export.export(bound, inputs, options, strict=False)
            bound.model.cache_size = caches  # an equal tuple took its place, and would mean new buffers
            aoti_compile_and_package(program, package_path=str(made), inductor_configs=settings | {
                # Precompiled headers take 11 s and save 3 for each package that is still to come.
                "aot_inductor.precompile_headers": folder is not None and len([*folder.glob("*.pt2")]) > 3,
                "aot_inductor.package_constants_in_so": False,  # no weight is copied into the file
                "always_keep_tensor_constants": True})  # nor are the numbers of a small one into the code
        compiler.note_compilation()
        if folder is None:
            atexit.register(shutil.rmtree, made.parent, ignore_errors=True)
            return made
        made.replace(path)
        for old in folder.glob("*.pt2"):
            if old.stat().st_mtime < time.time() - KEPT:
                old.unlink(missing_ok=True)
    finally:
        if folder:
            shutil.rmtree(made.parent, ignore_errors=True)
    return path
