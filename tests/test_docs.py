"""Every command and snippet of the documentation runs as typed where that is cheap; of the rest, all names exist."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sawkv import cli, doctor
from sawkv.lab import evaluate
from tests.test_doctor import RIGHT
from tools import docs_pages

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "models/sawkv-6m/README.md")
]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), ROOT / "docs/lab/methods.md"]
MODEL = "models/sawkv-6m"
PLACEHOLDERS = {
    "DIR": MODEL,
    "MODEL": MODEL,
    '{"model": "DRAFT", "num_speculative_tokens": 2}': f'{{"model": "{MODEL}", "num_speculative_tokens": 2}}',
    "path/to/checkpoint": MODEL,
    "FILE": "some.txt",
    '"Qwen/Qwen3-8B"': f'"{MODEL}"',
    "Qwen/Qwen3-8B": MODEL,
    "Qwen/Qwen3-32B": MODEL,
    "Qwen/Qwen2.5-7B-Instruct": MODEL,
    'device_map="cuda"': 'device_map="cpu"',
}
"""What a reader puts in, by the words that stand for it."""
LESS = {
    "eval": shlex.split("--tokens 256 --window 64 --layer-tokens 64 --floor-tokens 0 --recall-count 0 --free-runs 0"),
    "analyze": shlex.split("--tokens 128 --window 64"),
    "prepare": shlex.split("--tokens 1024"),
}
"""Added to commands that measure, to measure less."""
RUN = ("doctor", "plan", "prepare", "eval", "analyze", "report", "formats")
"""Of the subcommands, those that need no server."""
OF_OTHERS = ("curl", "hf", "lm_eval", "rm", "npm", "docker", "podman", "grafana")
"""Programs that do not come with sawkv."""
OF_VLLM = {"--kernel-config", "--load-format", "--max-num-seqs"}
"""Options that `sawkv bench` passes on."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """Of a console block, in words, without comments, prompts and variables set before them."""
    lines = re.sub(r"\$\([^)]*\)", "OUTPUT", text.replace("\\\n", " ")).splitlines()
    found = []
    for line in lines:
        if line.startswith("$ "):
            lexer = shlex.shlex(line[2:], posix=True, punctuation_chars=";|&")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set(";|&"):
                    found += [words] if words else []
                    words = []
                elif words or not re.match(r"[A-Z_]+=", word):
                    words.append(word)
    return found


def console(page: Path) -> list[list[str]]:
    return [command for block in blocks(page, "console") for command in commands(block)]


def inline(page: Path) -> list[list[str]]:
    """Commands in the text and in tables; of an option that may be left out, too."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = []
    for code in re.findall(r"`([^`\n]+)`", text):
        if re.match(r"(sawkv|vllm serve|python|make|pytest|pip install) [\w.'\"-]", code) and not re.match(
            r"sawkv (entry|is|does)\b", code
        ):
            code = re.sub(r"[\[\]]|\.\.\.", "", code) if code.startswith("sawkv") else code.replace("...", "")
            found.append(shlex.split(code.replace("vLLM's options", "")))
    return found


def flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def faults(words: list[str]) -> list[str]:
    """What a command names and does not exist."""
    program, rest = words[0], words[1:]
    if program == "sawkv":
        parsers = cli.make_parser()[1]
        if not rest or rest[0] not in parsers:
            return [f"no command: {' '.join(words)}"]
        known = {option for action in parsers[rest[0]]._actions for option in action.option_strings}
        known |= OF_VLLM if rest[0] == "bench" else set()
        return [] if rest[0] == "serve" else [f"sawkv {rest[0]} has no {name}" for name in sorted(flags(rest) - known)]
    if program == "python" and rest[0] == "-m":
        spec = importlib.util.find_spec(rest[1])
        if spec is None or spec.origin is None:
            return [f"no module {rest[1]}"]
        strings = {
            node.value for node in ast.walk(ast.parse(Path(spec.origin).read_text())) if isinstance(node, ast.Constant)
        }
        shared = ROOT / "benchmarks" / "engines.py"
        strings |= {node.value for node in ast.walk(ast.parse(shared.read_text())) if isinstance(node, ast.Constant)}
        return [f"{rest[1]} has no {name}" for name in sorted(flags(rest[2:])) if name not in strings]
    if program == "python":
        return [f"no file {word}" for word in rest[:1] if not word.startswith("-") and not (ROOT / word).is_file()]
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
        return [f"no target {word}" for word in rest if word not in targets]
    if program == "pytest":
        return [f"no tests {word}" for word in rest if "/" in word and not (ROOT / word).exists()]
    if program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = re.findall(r"(?:sawkv|\.)\[([\w,-]+)\]", " ".join(rest))
        return [
            f"no extra {name}"
            for names in wanted
            for name in names.split(",")
            if name not in project["optional-dependencies"]
        ]
    return [] if program in OF_OTHERS or words[:2] == ["vllm", "serve"] else [f"unknown program {program}"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_names_what_exists(page: Path) -> None:
    found = [fault for words in [*console(page), *inline(page)] for fault in faults(words)]
    assert found == []


def test_a_wrong_name_is_found() -> None:
    """The control."""
    wrong = """
$ sawkv calibrate DIR
$ X=1 sawkv plan MODEL --gpu-memory 80GiB --no-such-flag 3   # a comment
$ sawkv eval a \\
    --formats int4 ; python -m benchmarks.serving --lods 1x1 | python -m benchmarks.none
$ make brew && pip install '.[tea]'; python examples/none.py; pytest tests/none.py; frobnicate
"""
    assert [fault for words in commands(wrong) for fault in faults(words)] == [
        "no command: sawkv calibrate DIR",
        "sawkv plan has no --no-such-flag",
        "benchmarks.serving has no --lods",
        "no module benchmarks.none",
        "no target brew",
        "no extra tea",
        "no file examples/none.py",
        "no tests tests/none.py",
        "unknown program frobnicate",
    ]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if console(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_run_as_typed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / MODEL, tmp_path / MODEL)
    (tmp_path / "some.txt").write_text((ROOT / "src/sawkv/prepare/corpus/prose.txt").read_text() * 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_probe", lambda: RIGHT)  # of this vLLM, which takes seconds: tests/test_doctor.py
    monkeypatch.setattr(evaluate, "NUM_WINDOWS", 1)  # what methods are fitted on
    for words in console(page):
        if words[0] != "sawkv" or words[1] not in RUN:
            continue
        argv = [PLACEHOLDERS.get(word, word) for word in words[1:]] + LESS.get(words[1], [])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = cli.main(argv)
        assert status == 0, f"{shlex.join(argv)}\n{printed.getvalue()}"
        long = [line for line in re.split(r"[\r\n]", printed.getvalue()) if len(line) > 80 and " tokens/s]" not in line]
        assert not long or "--json" in words or words[1] == "prepare", "a terminal has 80 columns"


PYTHON = [
    (page, index, text)
    for page in PAGES
    for index, text in enumerate(blocks(page, "python"))
    if "models" not in str(page)
]


@pytest.mark.parametrize(
    ("page", "index", "text"), PYTHON, ids=[f"{page.relative_to(ROOT)}-{index}" for page, index, _ in PYTHON]
)
def test_python_runs_as_typed(
    page: Path, index: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What needs vLLM is compiled, and its imports looked up."""
    for word, value in PLACEHOLDERS.items():
        text = text.replace(word, value) if len(word) > 5 else text
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tree = ast.parse(text)
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert [name for name in modules if name is None or importlib.util.find_spec(name) is None] == []
    if not any((name or "").startswith("vllm") for name in modules):
        space: dict[str, Any] = {}
        exec(compile(tree, f"{page.name}-{index}", "exec"), space)  # noqa: S102 - our own documentation
        assert "out" in space or "model" in space


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        r"`((?:src|tests|docs|benchmarks|tools|examples|training|models|kernels|integrations|prepare|lab)"
        r"/[\w/.-]+\.\w+)`",
        text,
    )
    assert [
        name
        for name in named
        if not any((ROOT / start / name).exists() for start in ("", "src/sawkv", "docs", page.parent))
    ] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_the_site_keeps_pictures(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = docs_pages.on_page_markdown(text, page=SimpleNamespace(file=SimpleNamespace(src_uri=page.name)))
    assert shown.count("![") == text.count("![") + text.count("<img ")
    assert "<img " not in shown
