"""Imports run one way (kernels <- parallel <- lctrain <- tools, slurm) and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LINKED = ("kernels", "parallel", "configs", "slurm")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "kernels": ("lctrain.kernels",),
    "parallel": ("lctrain.kernels", "lctrain.parallel"),
    "configs": (),
}


def sources() -> dict[str, str]:
    """Module name -> source text of everything of ours but the tests; tools keep the name of their folder."""
    found = {}
    for folder in ("lctrain", "tools", *LINKED):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[0] == "lctrain" and parts[1] in LINKED:
                continue  # the same files, seen through the link
            parts = ("lctrain", *parts) if parts[0] in LINKED else parts
            found[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def imports(text: str, modules: Mapping[str, str], everywhere: bool) -> Iterator[str]:
    """Full names of what a source imports: everywhere, or only what runs when the module is imported."""
    todo: list[ast.AST] = [ast.parse(text)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names)
        elif not everywhere and _runs_later(node):
            continue
        todo += ast.iter_child_nodes(node)


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith("TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def wrong_arrows(modules: Mapping[str, str]) -> list[str]:
    """Every import that runs against the order of the folders, as `importer -> imported`."""
    wrong = []
    for module, text in modules.items():
        top, _, below = module.partition(".")
        area = below.partition(".")[0] if top == "lctrain" else top
        for target in imports(text, modules, everywhere=True):
            ours = target.partition(".")[0] in {"lctrain", "tools", "tests", *LINKED} or target.startswith(".")
            if not ours:
                continue
            if area in MAY_IMPORT:
                allowed = target.startswith(MAY_IMPORT[area])
            else:
                outside = ("slurm", "tools")
                allowed = target.startswith("lctrain") and (area in outside or not target.startswith("lctrain.slurm"))
            if not allowed:
                wrong.append(f"{module} -> {target}")
    return wrong


def circle(modules: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle at import time, or nothing."""
    graph = {module: set(imports(text, modules, everywhere=False)) & set(modules) for module, text in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_run_one_way():
    assert wrong_arrows(sources()) == []


def test_no_circles():
    assert circle(sources()) == []


def test_every_area_is_seen():
    names = set(sources())
    assert {"lctrain.config.load", "lctrain.parallel.layout", "lctrain.kernels.attention.reference"} <= names


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("lctrain.kernels.a", "from lctrain.parallel import layout"),
        ("lctrain.kernels.a", "def f():\n    import lctrain.errors"),
        ("lctrain.parallel.a", "from lctrain.errors import UserError"),
        ("lctrain.models.a", "import tools.plot"),
        ("lctrain.models.a", "from parallel.layout import SequenceLayout"),
        ("lctrain.models.a", "from . import b"),
        ("lctrain.models.a", "from lctrain.slurm import preflight"),
    ],
)
def test_a_wrong_arrow_is_found(module, text):
    assert len(wrong_arrows({module: text})) == 1


def test_a_circle_is_found_and_a_late_import_is_none():
    forward = {"lctrain.a": "from lctrain import b"}
    assert circle({**forward, "lctrain.b": "import lctrain.a"})
    assert not circle({**forward, "lctrain.b": "def f():\n    import lctrain.a"})


def test_kernels_is_no_package():
    """`import transformers` looks for a package named kernels, and would run an __init__.py of ours."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


LLAMA = """
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
import sys
assert not any(getattr(m, "__file__", None) and "/kernels/" in m.__file__ and m.__file__.startswith(sys.argv[1] + "/kernels")
               for m in list(sys.modules.values())), "transformers imported our kernels"
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1))
print(tuple(model(torch.zeros(1, 3, dtype=torch.long)).logits.shape))
"""


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_works_from_the_repository_root():
    done = subprocess.run(
        [sys.executable, "-c", LLAMA, str(ROOT)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3, 8)"
