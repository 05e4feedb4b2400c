"""The house holds together: imports run down its floors and in no circle, files are short, tests stand alone.

All of it is read from the sources; nothing of the package is imported.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "lite_attention"

# What each room of the package may import from: itself, and everything here. Beside one another is not below.
_KERNELS = {"ops"}
_MAPS = {"maps"} | _KERNELS
_ATTENTIONS = {"skipping", "families", "triton"} | _MAPS
_MODULES = {"parallel"} | _ATTENTIONS
BELOW = {
    "ops": set(),
    "maps": _KERNELS,
    "reference": {"maps"},  # the oracle shares no computation with what it judges, and nothing is built on it
    "skipping": _MAPS,
    "families": _MAPS,
    "triton": _MAPS,
    "parallel": _ATTENTIONS,
    "layers": _MODULES,
    "compat": _MODULES,
    "integrations": {"layers", "compat"} | _MODULES,
}
ON_TOP = {
    "__init__",
    "__main__",
    "info",
}  # of the package's own files; each other one is a foundation: it imports no room

MOST_LINES = 400
SOURCES = {".py", ".h", ".cpp", ".cuh", ".cu"}
FOLDERS = ("python", "cpp", "cmake", "tests", "benchmarks", "examples", "docs")
# Within the first lines of a longer file, in its docstring or a comment: `Over 400 lines: why it is one file`.
REASON = re.compile(rf"Over {MOST_LINES} lines: \w+ \w+ \w+")
REASON_WITHIN = 30


@dataclass(frozen=True)
class Import:
    """One module of the project names another, somewhere in its code."""

    source: str
    target: str
    where: str


def names_imported(path: Path, module: str) -> Iterator[tuple[str, str | None, int]]:
    """(module, name in it or None, line) of every import statement of a file, those inside functions too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                yield base, alias.name, node.lineno


def imports_within(folder: Path) -> list[Import]:
    """Every import of one module of a package by another."""
    paths = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = []
    for source, path in paths.items():
        for base, name, line in names_imported(path, source):
            target = f"{base}.{name}" if f"{base}.{name}" in paths else base
            while target and target not in paths:  # a class of a module, or what was compiled
                target = target.rpartition(".")[0]
            if target:
                found.append(Import(source, target, f"{path.relative_to(folder.parent)}:{line}"))
    return found


def room(module: str) -> str:
    """The folder of the package a module lies in, or its own name where it lies in none."""
    return (module.split(".") + ["__init__"])[1]


def imports_that_run_up(folder: Path) -> list[str]:
    """Imports of what does not lie below, and rooms that have no place in the order."""
    files = {path.stem for path in folder.glob("*.py")}
    folders = {path.name for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    foundations = files - ON_TOP - BELOW.keys()
    wrong = [f"{name}: a room that BELOW does not place" for name in sorted(folders - BELOW.keys())]
    for arrow in imports_within(folder):
        source, target = room(arrow.source), room(arrow.target)
        allowed = BELOW.get(source, set()) | foundations if source not in foundations else foundations
        if source not in ON_TOP and target != source and target not in allowed:
            wrong.append(f"{arrow.where}: {source} imports {arrow.target}")
    return list(dict.fromkeys(wrong))


def circles(folder: Path) -> list[list[str]]:
    """Sets of modules that import one another, each in alphabetical order."""
    targets: dict[str, set[str]] = {}
    for arrow in imports_within(folder):
        targets.setdefault(arrow.source, set()).add(arrow.target)

    def reached(start: str) -> set[str]:
        seen, stack = set(), [start]
        while stack:
            for target in targets.get(stack.pop(), set()) - seen:
                seen.add(target)
                stack.append(target)
        return seen

    reach = {module: reached(module) for module in targets}
    groups = {tuple(sorted(b for b in reach[a] & reach.keys() if a in reach[b])) for a in reach if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def long_files(root: Path) -> list[str]:
    """Sources of too many lines that do not tell why. A test module may be long: a list of claims has no second job."""
    wrong = []
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SOURCES):
        lines = path.read_text().splitlines()
        told = REASON.search("\n".join(lines[:REASON_WITHIN]))
        if len(lines) > MOST_LINES and not told and not path.name.startswith("test_"):
            wrong.append(f"{path.relative_to(root)}: {len(lines)} lines")
    return wrong


def imports_by_tests(root: Path) -> list[str]:
    """Imports that tests must not have: of benchmarks in tests/, and of a test module in any file."""
    files = sorted([*(root / "tests").rglob("*.py"), *(root / "benchmarks").rglob("*.py")])
    benchmarks = {"benchmarks", *(path.stem for path in (root / "benchmarks").iterdir())}
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    wrong = []
    for path in files:
        refused = tests | benchmarks if path.is_relative_to(root / "tests") else tests
        for base, name, line in names_imported(path, path.stem):
            if base.split(".")[0] in refused or {*base.split("."), name} & tests:
                wrong.append(f"{path.relative_to(root)}:{line}: imports {base}")
    return list(dict.fromkeys(wrong))


def test_imports_run_down() -> None:
    wrong = imports_that_run_up(PACKAGE)
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_one_another() -> None:
    assert circles(PACKAGE) == []


def test_a_long_file_tells_why() -> None:
    wrong = long_files(ROOT)
    assert not wrong, "\n".join(wrong)


def test_tests_import_neither_benchmarks_nor_tests() -> None:
    wrong = imports_by_tests(ROOT)
    assert not wrong, "\n".join(wrong)


def grow(root: Path, files: dict[str, str]) -> Path:
    """A made-up tree."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("ops/a.py", "from house.maps import keep_map", "ops imports house.maps.keep_map"),
        ("ops/a.py", "def f():\n    import house.maps.keep_map as m", "ops imports house.maps.keep_map"),
        ("ops/a.py", "from ..maps.keep_map import pack", "ops imports house.maps.keep_map"),
        ("ops/a.py", "from ..maps import keep_map", "ops imports house.maps.keep_map"),
        ("ops/__init__.py", "from ..maps import keep_map", "ops imports house.maps.keep_map"),
        ("ops/a.py", "if TYPE_CHECKING:\n    from house.maps.keep_map import Map", "ops imports house.maps.keep_map"),
        ("maps/a.py", "from house import attention", "maps imports house"),
        ("maps/a.py", "import house", "maps imports house"),
        ("maps/a.py", "import house.info", "maps imports house.info"),
        ("skipping/a.py", "from house.families.duo import x", "skipping imports house.families"),
        ("layers/a.py", "from house.compat import x", "layers imports house.compat"),
        ("parallel/a.py", "from house.layers.deep.b import x", "parallel imports house.layers.deep.b"),
        ("families/a.py", "from house.reference import attention", "families imports house.reference"),
        ("reference.py", "from house.ops import a", "reference imports house.ops"),
        ("shared.py", "from house.ops import a", "shared imports house.ops"),
        ("attic/a.py", "", "attic: a room that BELOW does not place"),
    ],
)
def test_an_import_that_runs_up_is_noticed(tmp_path: Path, name: str, text: str, wrong: str) -> None:
    rooms = ("ops", "maps", "families", "skipping", "layers", "layers/deep", "compat")
    house = {f"{room}/__init__.py": "" for room in rooms} | {"maps/keep_map.py": "", "layers/deep/b.py": ""}
    house |= {"__init__.py": "from house.ops import attention", "info.py": "", "reference.py": "", "shared.py": ""}
    house |= {"integrations/a.py": "from house import shared\nimport torch, house.layers.deep.b"}
    assert imports_that_run_up(grow(tmp_path / "house", house)) == []
    line = text.count("\n") + 1
    expected = wrong if wrong.startswith("attic") else f"house/{name}:{line}: {wrong}"
    assert imports_that_run_up(grow(tmp_path / "house", {name: text})) == [expected]


@pytest.mark.parametrize(
    "c", ["from house.ops.a import x", "from . import a", "from .a import x", "def f():\n    from house.ops import a"]
)
def test_a_circle_is_noticed(tmp_path: Path, c: str) -> None:
    line = {"a.py": "from house.ops.b import x", "b.py": "from house.ops import c", "c.py": "import torch"}
    house = grow(tmp_path / "house", {f"ops/{name}": text for name, text in line.items()} | {"ops/__init__.py": ""})
    assert circles(house) == []
    assert circles(grow(house, {"ops/c.py": c})) == [["house.ops.a", "house.ops.b", "house.ops.c"]]


def test_a_circle_through_a_folder_s_own_names_is_noticed(tmp_path: Path) -> None:
    files = {"maps/__init__.py": "from house.maps.tiles import shape", "maps/tiles.py": "from house.maps import shape"}
    assert circles(grow(tmp_path / "house", files)) == [["house.maps", "house.maps.tiles"]]


@pytest.mark.parametrize("name", ["python/house/a.py", "cpp/kernels/a.cuh", "tests/support/a.py", "benchmarks/a.py"])
def test_a_long_file_is_noticed(tmp_path: Path, name: str) -> None:
    comment = "//" if name.endswith(".cuh") else "#"
    assert long_files(grow(tmp_path, {name: "x\n" * 400, "tests/test_a.py": "x\n" * 401})) == []
    reason = f"{comment} Over 400 lines: one walk read from top to bottom.\n"
    assert long_files(grow(tmp_path, {name: reason + "x\n" * 400})) == []
    assert long_files(grow(tmp_path, {name: f"{comment} Over 400 lines: it is.\n" + "x\n" * 400})) == [
        f"{name}: 401 lines"
    ]
    assert long_files(grow(tmp_path, {name: "x\n" * 30 + reason + "x\n" * 400})) == [f"{name}: 431 lines"]


@pytest.mark.parametrize(
    ("name", "text", "noticed"),
    [
        ("tests/ops/test_a.py", "from benchmarks.peers import peer", "imports benchmarks.peers"),
        ("tests/support/a.py", "def f():\n    import peers", "imports peers"),
        ("tests/gpu/test_a.py", "from test_b import stack", "imports test_b"),
        ("benchmarks/tests/test_a.py", "import test_b", "imports test_b"),
        ("tests/support/a.py", "from ops import test_b", "imports ops"),
        ("benchmarks/tests/test_a.py", "from peers import peer\nfrom torch.library import test_schema", None),
    ],
)
def test_a_test_that_leans_on_others_is_noticed(tmp_path: Path, name: str, text: str, noticed: str | None) -> None:
    grow(tmp_path, {"benchmarks/peers.py": "", "tests/support/inputs.py": "", "tests/ops/test_b.py": "import torch"})
    grow(tmp_path, {"tests/support/c.py": "from support import inputs", name: text})
    line = text.count("\n") + 1
    assert imports_by_tests(tmp_path) == ([] if noticed is None else [f"{name}:{line}: {noticed}"])
