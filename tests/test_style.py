"""The house's rules that a machine can check: names, imports between rooms, formatting, what lies where."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import HERE

ROOT = HERE.parent
PACKAGE = ROOT / "comfy_mminterleaved"
ROOMS = ("comfy_mminterleaved", "nodes", "starter_training", "benchmarks", "workflows", "web", "tests")
SOURCES = [ROOT / "__init__.py", ROOT / "dev.py", *sorted(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))]

# Words that say nothing of what a thing is, and names that gave way to the field's.
VAGUE = {"found", "said", "shown", "told", "taken", "wanted", "aside", "theirs", "ours"}
RETIRED = re.compile(
    r"LearnTo\w*|HEARSAY|SLIPS|FIRM|sync_(every|levels|base|heads|points|width)|slots|look_back|GraphModel|StoryLLM"
    r"|sites_attached"
)


def names(tree: ast.AST):
    """Every identifier of a module with its line; strings and comments are prose."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield node.arg, node.lineno
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.rpartition(".")[2], 0


def imports(path: Path):
    """Modules that a file imports, absolute: `.` is resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [(name, line) for name, line in names(tree) if RETIRED.fullmatch(name)] == []
    if path.is_relative_to(PACKAGE) or path.is_relative_to(ROOT / "nodes"):
        assert [(name, line) for name, line in names(tree) if name in VAGUE] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    library = path.is_relative_to(PACKAGE)
    for module in imports(path):
        if library or path.is_relative_to(ROOT / "starter_training"):
            assert module.split(".")[0] not in ("comfy", "comfy_api", "comfy_execution", "folder_paths"), module
        if library or path.is_relative_to(ROOT / "nodes"):
            assert "starter_training" not in module.split("."), module
        if library:
            assert module.split(".")[0] not in ("nodes", "tests", "benchmarks"), module


# Each room may use those below it (docs/design.md, "Layout").
LAYERS = (
    ("errors", "files", "config", "presets", "tokenizer"),
    ("stories",),
    ("models", "books"),
    ("checkpoints", "generation", "writers"),
    ("loading",),
    ("pipeline", "author", "drawing", "storyteller", "finetune"),
    ("jobs",),
    ("cli", "__main__"),
)


def test_the_package_has_no_cycles():
    """Imports at the top of a module; what a function imports when it runs may come from anywhere."""
    level = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        base = path.relative_to(ROOT).parts[:-1]
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.level:
                inner = [*base[: len(base) - node.level + 1], *(node.module or "").split(".")][1:]
                used = inner[0] or node.names[0].name
                if used in level:
                    assert level[used] <= level[room], f"{path.relative_to(ROOT)} imports {used}"


def test_code_is_formatted():
    assert not [path for path in SOURCES if path != Path(__file__) and "fmt: skip" in path.read_text(encoding="utf-8")]
    done = subprocess.run([sys.executable, "-m", "ruff", "format", "--check", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_files_are_written_through_one_door():
    """Temporary names belong to files.py."""
    for path in SOURCES:
        if path.is_relative_to(PACKAGE) or path.is_relative_to(ROOT / "starter_training"):
            text = path.read_text(encoding="utf-8")
            assert path.name == "files.py" or not re.search(r'\.part[".]', text), path


def test_configurations_import_no_torch():
    """So that the command line says what is wrong within a fraction of a second."""
    code = (
        "import sys, comfy_mminterleaved.cli, comfy_mminterleaved.generation.config, comfy_mminterleaved.presets\n"
        "import comfy_mminterleaved.errors, comfy_mminterleaved.files\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
