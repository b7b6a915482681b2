"""The house keeps its shape: a file imports only what ranks below it, at its top, and stays small."""
import ast
from pathlib import Path

import pytest
from conftest import ROOT

RANKS = [["errors"], ["collectives", "config", "device", "pace"], ["ops", "foreign"], ["compiler"], ["aot"],
         ["sampling"], ["speculative"], ["families", "tokenizer", "rounding", "checkpoint"],
         ["loader", "layers", "packed"], ["linear_attention", "kv_cache"], ["attention"], ["model"], ["tp"],
         ["metrics", "calibration", "decoding", "snapshots"], ["chat", "quantize", "batch"], ["drafts", "prompts"],
         ["generate"], ["scripts"]]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
FILES = sorted(p for p in (*ROOT.glob("*.py"), *ROOT.glob("ops/*.py"), *ROOT.glob("scripts/*.py")))


def module_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def project_imports(node: ast.AST) -> list[str]:
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
        [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return [top for name in names if (top := name.partition(".")[0]) in RANK]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_lower_ranks_and_only_at_its_top(path):
    tree = ast.parse(path.read_text())
    me = module_of(path)
    for node in ast.walk(tree):
        for name in project_imports(node):
            inside = me == name and me in ("ops", "scripts")  # files of one folder may share what it holds
            assert inside or RANK[name] < RANK[me], f"{path.name} (rank {RANK[me]}) imports {name} (rank {RANK[name]})"
            assert node in tree.body, f"{path.name} imports {name} inside a function or a try"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} has over 60 lines"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path.name} has a bare except"
        assert not isinstance(node, ast.Global), f"{path.name} has a global"
    assert ast.get_docstring(ast.parse(text)) or not text, f"{path.name} does not say what it does"
