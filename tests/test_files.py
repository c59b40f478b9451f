"""What commands write: asked for before the work, whole or not there, and readable by others."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from sawkv import CacheFormat, SawkvError, cli
from sawkv.files import check_writable, writing
from sawkv.prepare import model
from sawkv.prepare.calibration import Calibration
from tests.conftest import MODEL

WRITERS = {
    "eval": [str(MODEL)],
    "analyze": [str(MODEL)],
    "prepare": [str(MODEL)],
    "report": ["record.json"],
    "bench": [str(MODEL)],
}


def test_what_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("old")
    with contextlib.suppress(KeyError), writing(file) as part:
        part.write_text("half of the n")
        raise KeyError
    assert file.read_text() == "old"
    with writing(file) as part:
        part.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with writing(tmp_path / "link") as part:
        part.write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "x"


def test_devices_are_written_to_and_not_replaced(capfd: pytest.CaptureFixture[str]) -> None:
    check_writable(Path("/dev/stdout"))
    for device, text in (("/dev/null", "x"), ("/dev/fd/1", "shown")):
        if not Path(device).is_file():  # pytest's capture is a file
            with writing(Path(device)) as part:
                part.write_text(text)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_calibration_file_has_the_permissions_of_any_file(umask: int, tmp_path: Path) -> None:
    """A server often runs as another user."""
    centers = torch.zeros(1, 1, 16)
    before = os.umask(umask)
    try:
        Calibration(CacheFormat.parse("int4-k16-v16"), "0", centers, centers).save(tmp_path / "new" / "c.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "c.safetensors").stat().st_mode) == 0o666 & ~umask
    assert os.listdir(tmp_path / "new") == ["c.safetensors"]


def test_a_calibration_goes_through_a_pipe_which_stays_one(tmp_path: Path) -> None:
    """And through /dev/null: root may replace a device, and with it break the machine."""
    pipe, centers = tmp_path / "pipe", torch.zeros(1, 1, 16)
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    saved = Calibration(CacheFormat.parse("int4-k16-v16"), "0", centers, centers)
    saved.save(pipe)
    assert pipe.is_fifo()
    (tmp_path / "read").write_bytes(os.read(reading, 1 << 16))
    os.close(reading)
    assert Calibration.load(tmp_path / "read").fingerprint() == saved.fingerprint()


def write_half(file: Path) -> None:
    with writing(file) as part:
        part.write_text("half")
        Path("/dev/full").write_text("x")


def test_a_full_disk_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(SawkvError, match=r"cannot write .*x\.json: No space left on device"):
        write_half(tmp_path / "x.json")
    assert not os.listdir(tmp_path)
    with pytest.raises(SawkvError, match="No space left"), writing(Path("/dev/full")) as part:
        part.write_text("x")


@pytest.mark.parametrize("command", WRITERS)
def test_every_command_asks_for_its_output_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(model.EvalModel, "load", work)
    (tmp_path / "file").write_text("x")
    for out, words in (
        ("file/x", "Not a directory"),
        (".", "it is a folder"),
        ("a\0b", "null"),
        ("n" * 300, "File name too long"),
    ):
        assert cli.main([command, *WRITERS[command], "--out", str(tmp_path / out)]) == 2
        shown = capsys.readouterr().err
        assert "sawkv: --out: expected a file" in shown
        assert words in shown
        assert shown.count("\n") == 1


def test_every_command_that_writes_is_among_these() -> None:
    parsers = {name: cli.make_parser()[1][name].format_help() for name in cli.COMMANDS}
    assert {name for name, text in parsers.items() if "--out FILE" in text} == set(WRITERS)
