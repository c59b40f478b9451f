"""Counts that show how easy the code and the documentation are to read, at any commits, as a table.

    python tools/counts.py d2f4cb7 HEAD

"Code" is what Git tracks in src, tests, benchmarks, tools and training with the suffixes .py, .h, .cpp, .cu and .cuh.
"Docs" are README.md and the pages in docs, without docs/lab (or log.md before it), docs/decisions and docs/results.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Final

FOLDERS: Final = ("src/", "tests/", "benchmarks/", "tools/", "training/")
SUFFIXES: Final = (".py", ".h", ".cpp", ".cu", ".cuh")
RUN: Final = 6
"""Lines of a run that counts as repeated."""
TABLE: Final = re.compile(r"^<!-- (?:table: )?([\w. ]+?) -->\n.*?^<!-- end.*?-->", re.DOTALL | re.MULTILINE)
"""A table that benchmarks make from docs/results."""

Tree = Mapping[str, str]
"""Texts by path."""


def main() -> None:
    commits = sys.argv[1:] or ["HEAD"]
    trees = [read_tree(commit) for commit in commits]
    print(f"| | {' | '.join(commits)} |\n|{'-|' * (1 + len(commits))}")
    for name, count in COUNTS.items():
        print(f"| {name} | {' | '.join(f'{count(tree):,}' for tree in trees)} |")


def read_tree(commit: str) -> Tree:
    """Texts that Git tracks at a commit."""
    archive = subprocess.run(["git", "archive", commit], check=True, capture_output=True).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None and member.name.endswith((*SUFFIXES, ".md")):
                found[member.name] = file.read().decode()
    return found


def code(tree: Tree, folders: tuple[str, ...] = FOLDERS) -> dict[str, str]:
    return {path: text for path, text in tree.items() if path.startswith(folders) and path.endswith(SUFFIXES)}


def docs(tree: Tree) -> str:
    left_out = ("docs/lab/", "docs/log.md", "docs/decisions/", "docs/results/")
    pages = [path for path in sorted(tree) if path == "README.md" or path.startswith("docs/")]
    return "\n".join(tree[path] for path in pages if path.endswith(".md") and not path.startswith(left_out))


def lines(tree: Tree, folder: str) -> int:
    return sum(len(text.splitlines()) for text in code(tree, (folder,)).values())


def long_files(tree: Tree, *, unexplained: bool = False) -> int:
    long = [text for text in code(tree).values() if len(text.splitlines()) > 400]
    return sum(not unexplained or "Over 400 lines: " not in text[:3000] for text in long)


def wide_lines(tree: Tree) -> int:
    return sum(len(line) > 120 for text in code(tree).values() for line in text.splitlines())


def functions(tree: Tree, folder: str) -> Iterator[int]:
    """Numbers of arguments of public functions and methods, without `self` and `cls`."""
    for path, text in code(tree, (folder,)).items():
        if not path.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(text)):
            public = isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__call__")
            if isinstance(node, ast.FunctionDef) and public and not _is_device_code(node):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                yield sum(argument.arg not in ("self", "cls") for argument in given)


def _is_device_code(node: ast.FunctionDef) -> bool:
    return any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)


def repeated_runs(tree: Tree) -> int:
    """Pairs of places with the same run of six lines or more, blank lines and imports left out."""
    places = defaultdict(list)
    for path, text in code(tree, ("src/", "benchmarks/")).items():
        kept = [line.strip() for line in text.splitlines() if line.strip()]
        kept = [line for line in kept if not line.startswith(("import ", "from ", "#include"))]
        for start in range(len(kept) - RUN + 1):
            places[tuple(kept[start : start + RUN])].append((path, start))
    pairs = {(a, b) for found in places.values() for i, a in enumerate(found) for b in found[i + 1 :]}
    shifted = {((a, i + 1), (b, j + 1)) for (a, i), (b, j) in pairs}
    return len(pairs - shifted)  # of a longer run, its first six lines alone


def package_imports(tree: Tree) -> int:
    """Pairs of packages (or modules) right below sawkv of which one imports the other."""
    found = set()
    for path, text in code(tree, ("src/sawkv/",)).items():
        here = path.removeprefix("src/sawkv/").split("/")[0].removesuffix(".py")
        if path.endswith(".py") and here != "__init__":
            for line in re.findall(r"^\s*(?:from|import) sawkv\.(\w+)", text, re.MULTILINE):
                found.add((here, line))
    return sum(a != b for a, b in found)


def words(text: str) -> int:
    """Words with a letter or digit, so that the bars of tables do not count."""
    return sum(any(character.isalnum() for character in word) for word in text.split())


COUNTS: Final[Mapping[str, Callable[[Tree], float]]] = {
    "lines of code in src": lambda tree: lines(tree, "src/"),
    "lines of code in tests": lambda tree: lines(tree, "tests/"),
    "lines of code in benchmarks": lambda tree: lines(tree, "benchmarks/"),
    "median lines of a file in src": lambda tree: statistics.median(
        len(text.splitlines()) for text in code(tree, ("src/",)).values()
    ),
    "files over 400 lines": long_files,
    "files over 400 lines that do not say why": lambda tree: long_files(tree, unexplained=True),
    "lines over 120 columns": wide_lines,
    "arguments of the widest function of a backend": lambda tree: max(functions(tree, "src/sawkv/kernels/")),
    "arguments of the widest public function": lambda tree: max(functions(tree, "src/sawkv/")),
    "repeated runs of six lines or more, in src and benchmarks": repeated_runs,
    "pairs of packages of which one imports the other": package_imports,
    "words of docs": lambda tree: words(docs(tree)),
    "words of docs outside of generated tables": lambda tree: words(TABLE.sub("", docs(tree))),
    "lines of README.md": lambda tree: len(tree["README.md"].splitlines()),
}


if __name__ == "__main__":
    main()
