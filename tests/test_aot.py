"""What was compiled ahead of time is found again, never stale, and computes with the weights that are there now."""
import pytest
import torch
from torch import nn

import aot
from aot import AheadOfTime, Bound, package_of


class Counter(nn.Module):
    """As a model: weights, a cache that calls write into, a config."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.config = {"size": size}
        self.weight = nn.Parameter(torch.randn(size))  # so few numbers could be copied into the code
        self.scale = nn.Parameter(torch.randn(()))
        self.setup_caches()

    def setup_caches(self) -> None:
        self.register_buffer("seen", torch.zeros(self.config["size"]), persistent=False)
        self.cache_size = (1, self.config["size"], 0)

    def forward(self, x, y):
        self.seen.add_(x)
        return self.seen * self.weight * self.scale + y


def step(model, x, y, options):
    return model(x, y) * options["by"], x + options["times"]


def arguments(model: Counter) -> tuple:
    size = model.config["size"]
    return torch.randn(size), torch.randn(size), {"by": torch.randn(()), "times": 3}


def path_of(model: Counter, function=step, settings=None, **changes) -> tuple:
    x, y, options = arguments(model)
    options |= changes
    tensors = {name: t for name, t in options.items() if isinstance(t, torch.Tensor)}
    fixed = {name: value for name, value in options.items() if name not in tensors}
    return package_of(Bound(function, model, fixed), (x, y), tensors, settings or {})


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "readonce" / aot.FOLDER


def check(compiled: AheadOfTime, model: Counter) -> None:
    args = arguments(model)
    before = model.seen.clone()
    got, after = compiled(model, *args), model.seen.clone()
    model.seen.copy_(before)
    expected = step(model, *args)
    for a, b in zip((*got, after), (*expected, model.seen), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_one_package_serves_all_weights_caches_and_processes_of_a_shape(empty_cache, monkeypatch, capfd):
    compiled, model, other = AheadOfTime(step), Counter(), Counter()
    size = model.cache_size
    check(compiled, model)
    assert model.cache_size is size  # or all that was compiled so far would be loaded again
    kept = list(empty_cache.iterdir())
    assert len(kept) == 1 and kept[0].suffix == ".pt2" and "once" in capfd.readouterr().err
    monkeypatch.setattr(aot, "build", None)  # nothing more is to be made
    for again in (model, other, model):
        check(compiled, again)
    model.setup_caches()  # new buffers, which nothing else tells of
    check(compiled, model)
    check(compiled, model)
    model.weight.mul_(2)  # in place
    check(compiled, model)
    check(AheadOfTime(step), other)  # as another process would
    assert list(empty_cache.iterdir()) == kept and not capfd.readouterr().err


def test_whatever_decides_what_a_package_does_makes_another(empty_cache, monkeypatch):
    base = path_of(Counter())
    assert path_of(Counter()) == base and base[0]
    wide, doubled, config = Counter(5), Counter().double(), Counter()
    config.config = {"size": 4, "more": 1}
    found = [base, path_of(wide), path_of(doubled), path_of(config), path_of(Counter(), check),
             path_of(Counter(), times=4), path_of(Counter(), by=torch.randn(1)),
             path_of(Counter(), settings={"max_autotune": True})]
    torch.set_num_threads(torch.get_num_threads() + 1)
    found.append(path_of(Counter()))
    torch.set_num_threads(torch.get_num_threads() - 1)
    monkeypatch.setattr(torch, "__version__", "3.0")
    found.append(path_of(Counter()))
    assert len(set(found)) == len(found) and all(kept for kept, _ in found)


def test_an_edited_file_makes_another_package(empty_cache, tmp_path, monkeypatch):
    (tmp_path / "ops").mkdir()
    files = {"uses_two": "from two import used\nimport three\ndef step(model, x, y, options):\n    return used(x)",
             "two": "from four import more\ndef used(x):\n    return more(x)", "three": "",
             "four": "def more(x):\n    1", "unrelated": "", "ops/five": ""}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(aot, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    from uses_two import step as function
    model = Counter()
    base = path_of(model, function)
    found = {base}
    for name in files:
        (tmp_path / f"{name}.py").write_text("edited")
        changed = path_of(model, function)
        assert (changed in found) == (name == "unrelated")
        found.add(changed)
    exec(compile("def forward(self, x, y):\n    return x - y", str(tmp_path / "hack.py"), "exec"), hack := {})
    monkeypatch.setattr(Counter, "forward", hack["forward"])
    for text in ("3", "4"):
        (tmp_path / "hack.py").write_text(text)
        found.add(path_of(model, function))
    assert len(found) == len(files) + 2


@torch.no_grad()
def test_what_was_typed_at_a_prompt_is_compiled_and_not_kept(empty_cache, monkeypatch):
    typed = {}
    exec("def forward(self, x, y):\n    return self.seen.add_(x) * self.weight - self.scale * y", typed)
    model = Counter()
    monkeypatch.setattr(model, "forward", typed["forward"].__get__(model))
    check(AheadOfTime(step), model)
    assert not empty_cache.exists() or not list(empty_cache.iterdir())


@torch.no_grad()
def test_a_failed_compilation_leaves_nothing(empty_cache, monkeypatch):
    def unsupported(self, x, y):
        return x * float(y[0]) if y[0] > 0 else x
    monkeypatch.setattr(Counter, "forward", unsupported)
    with pytest.raises(Exception, match="data-dependent"):
        AheadOfTime(step)(Counter(), *arguments(Counter()))
    assert not list(empty_cache.iterdir())


@torch.no_grad()
def test_headers_are_precompiled_only_where_many_packages_are_made(empty_cache, monkeypatch):
    found = []

    def stop(program, package_path, inductor_configs):
        found.append(inductor_configs["aot_inductor.precompile_headers"])
        raise InterruptedError
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", stop)
    empty_cache.mkdir(parents=True)
    for i in range(5):
        with pytest.raises(InterruptedError):
            AheadOfTime(step)(Counter(), *arguments(Counter()))
        (empty_cache / f"{i}.pt2").touch()
    assert found == [False] * 4 + [True]
