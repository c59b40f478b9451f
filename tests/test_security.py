"""What SECURITY.md promises of the code and of the compiled kernels on disk."""

from __future__ import annotations

import ast
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sawkv
from sawkv import CacheFormat, PagedKVCache, PageLayout, UnsupportedError
from sawkv.kernels.cpu import build
from sawkv.kernels.cuda import runtime
from sawkv.kernels.disk import private_folder

SOURCE = Path(sawkv.__file__).parent
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "yaml.load", "os.system", "os.popen"}
FORBIDDEN_KEYWORDS = {"trust_remote_code", "shell", "allow_pickle"}  # numpy.load refuses pickles unless told


def offences(tree: ast.AST) -> Iterator[str]:
    """What the sources must not hold, of one parsed file."""
    for node in ast.walk(tree):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (f"import of {name}" for name in imported if name.split(".")[0] in FORBIDDEN_IMPORTS)
        if isinstance(node, ast.Assert) and not narrows_a_type(node.test):  # asserts vanish under python -O
            yield f"assert {ast.unparse(node.test)}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield f"call of {name}"
            named = [keyword for keyword in node.keywords if keyword.arg in FORBIDDEN_KEYWORDS]
            yield from (f"keyword {keyword.arg}" for keyword in named if ast.unparse(keyword.value) != "False")


def narrows_a_type(test: ast.expr) -> bool:
    """`x is not None` or `isinstance(x, T)`: for the type checker, never for input."""
    if isinstance(test, ast.Call):
        return ast.unparse(test.func) == "isinstance"
    return isinstance(test, ast.Compare) and ast.unparse(test).endswith(" is not None")


def test_the_sources_hold_nothing_that_runs_what_it_reads() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 30
    found = [
        f"{file.relative_to(SOURCE)}: {offence}" for file in files for offence in offences(ast.parse(file.read_text()))
    ]
    assert not found
    control = (
        "import pickle\nassert x > 0\nos.system(x)\nf(trust_remote_code=True)\nnp.load(x,"
        " allow_pickle=True)\nyaml.load(x)"
    )
    control += "\nassert x is not None\nf(trust_remote_code=False)"
    assert len(list(offences(ast.parse(control)))) == 6


# ---- compiled kernels, which are code that is loaded


@pytest.fixture
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sawkv"


def test_only_this_user_can_write_where_kernels_are_kept(cache_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = private_folder("cpu")
    assert folder == cache_home / "cpu"
    assert folder.stat().st_mode & 0o077 == cache_home.stat().st_mode & 0o077 == 0
    for path in (folder, cache_home):
        for mode in (0o770, 0o707, 0o1777):
            path.chmod(mode)
            with pytest.raises(UnsupportedError, match="no other can write to"):
                private_folder("cpu")
            path.chmod(0o700)
    cache_home.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert runtime._cache_folder() is None, "the CUDA backend goes on without"
    assert "compiled kernels are not kept" in caplog.text


def test_a_damaged_library_is_built_anew_and_never_loaded(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS[:1], *build.FLAGS[2:]])  # without -O3, which takes longest
    build.load_library.__wrapped__()
    (library,) = (cache_home / "cpu").glob("*.so")
    whole = library.read_bytes()
    assert hashlib.sha256(whole[:-32]).digest() == whole[-32:]
    for damaged in (
        b"",
        b"not a library",
        whole[: len(whole) // 2],
        whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    ):
        library.unlink()  # this process has the file mapped
        library.write_bytes(damaged)
        assert not build._is_whole(library)
    build.load_library.__wrapped__()
    assert build._is_whole(library)


def test_a_damaged_cuda_image_is_not_loaded(cache_home: Path) -> None:
    folder = runtime._cache_folder()
    assert folder is not None
    path = folder / "x.cubin"
    runtime._write_cached(path, b"machine code")
    assert runtime._read_cached(path) == b"machine code"
    content = path.read_bytes()
    for damaged in (b"", content[:20], content[:-1], content + b"x", content[:40] + b"?" + content[41:]):
        path.write_bytes(damaged)
        assert runtime._read_cached(path) is None
    assert not [file for file in folder.iterdir() if file != path], "no temporary file stays"


# ---- what is passed between caches


def test_caches_of_equal_fingerprints_read_each_others_bytes_and_others_do_not() -> None:
    """What the fingerprint is for: everything that changes how bytes are read changes it. tests/test_format.py has the
    list.
    """
    k = torch.randn(16, 2, 128)
    caches = {}
    for name in ("int4-k128-v128", "int4-k64-v128", "int4-k128-v64", "int4"):
        layout = PageLayout(CacheFormat.parse(name), 2, 128, 16)
        caches[name] = PagedKVCache(torch.zeros(layout.pages_shape(1), dtype=torch.uint8), layout)
        sawkv.append(k, k, caches[name], torch.arange(16))
    first = caches["int4-k128-v128"]
    for other in caches.values():
        assert torch.equal(first.pages, other.pages) == (first.fingerprint() == other.fingerprint())
