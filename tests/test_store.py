"""Calibrations on disk between starts: whole, found by the weights' contents, and refused when they are damaged."""

from __future__ import annotations

import errno
import logging
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sawkv import CacheFormat, UnsupportedError
from sawkv.errors import SawkvError
from sawkv.prepare import store
from sawkv.prepare.calibration import Calibration
from sawkv.prepare.store import CalibrationStore, contents_digest, load_shipped, make_key, shipped_paths

FORMAT = CacheFormat.parse("int4-k32-v32")
EXPECTED = {"cache_format": FORMAT, "model": "m", "num_layers": 3, "num_kv_heads": 2, "head_dim": 32}
KEY = make_key({"weights": "w"})


def calibration(model: str = "m") -> Calibration:
    return Calibration(FORMAT, model, torch.randn(3, 2, 32), torch.randn(3, 2, 32))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    kept, saved = CalibrationStore(tmp_path / "made" / "for it"), calibration()
    assert kept.load(KEY, **EXPECTED) is None
    assert kept.save(KEY, saved) == kept.path(KEY)
    loaded = kept.load(KEY, **EXPECTED)
    assert loaded is not None
    assert loaded.fingerprint() == saved.fingerprint()
    assert Calibration.load(kept.path(KEY)).fingerprint() == saved.fingerprint(), "a calibration file, to use elsewhere"
    assert kept.load(make_key({"weights": "x"}), **EXPECTED) is None


def test_a_full_disk_leaves_nothing_and_is_said_of_the_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(SawkvError, match=rf"^cannot write {tmp_path}/{KEY}\.safetensors: No space left"):
        CalibrationStore(tmp_path).save(KEY, calibration())
    assert not list(tmp_path.iterdir())


def refuse_to_remove(self: Path, missing_ok: bool = False) -> None:
    raise PermissionError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "of another model", "where nothing can be removed"])
def test_a_damaged_entry_is_refused_and_removed(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = CalibrationStore(tmp_path)
    path = kept.save(KEY, calibration("another" if damage == "of another model" else "m"))
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    fixed = damage == "where nothing can be removed"
    if fixed:
        monkeypatch.setattr(Path, "unlink", refuse_to_remove)
    if fixed or damage == "flipped":
        path.write_bytes(content)
    elif damage != "of another model":
        path.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    with caplog.at_level(logging.WARNING):
        assert kept.load(KEY, **EXPECTED) is None
    assert str(path) in caplog.text or damage == "of another model"
    assert "made again" in caplog.text
    assert path.exists() == fixed


@pytest.mark.parametrize(
    "fault", [None, "other weights", "no weights named", "another model", "another format", "damaged"]
)
def test_what_comes_with_a_checkpoint_is_used_for_its_very_weights(
    fault: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"w": torch.randn(3)}, tmp_path / "model.safetensors")
    digest = contents_digest(tmp_path)
    assert digest is not None
    weights = {"other weights": "f" * 64, "no weights named": ""}.get(fault or "", digest)
    saved = replace(calibration("another" if fault == "another model" else "m"), weights=weights)
    cache_format = CacheFormat.parse("int4-k32-v0") if fault == "another format" else FORMAT
    (path,) = shipped_paths(tmp_path, [{"cache_format": cache_format}])
    saved.save(path)
    assert contents_digest(tmp_path) == digest, "it is no part of the checkpoint's weights"
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:-7])
    content = path.read_bytes()
    loaded = load_shipped(tmp_path, digest, [EXPECTED])
    assert path.read_bytes() == content, "what came with a model is not ours to remove"
    if fault is None:
        assert [(part.fingerprint(), part.weights) for part in loaded] == [(saved.fingerprint(), digest)]
        assert not caplog.text
    else:
        assert loaded == []
        assert fault == "another format" or (str(path) in caplog.text and "prepared anew" in caplog.text)


def test_of_unlike_layers_all_files_are_used_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = [EXPECTED, EXPECTED | {"num_kv_heads": 1}]
    paths = shipped_paths(tmp_path, expected)
    assert [path.name for path in paths] == ["int4-k32-v32-2x32.safetensors", "int4-k32-v32-1x32.safetensors"]
    assert load_shipped(tmp_path, "w", expected) == []
    assert not caplog.text
    for path, heads in zip(paths, (2, 1), strict=True):
        Calibration(FORMAT, "m", torch.randn(3, heads, 32), torch.randn(3, heads, 32), weights="w").save(path)
    assert [part.num_kv_heads for part in load_shipped(tmp_path, "w", expected)] == [2, 1]
    paths[1].unlink()
    assert load_shipped(tmp_path, "w", expected) == []
    assert f"{paths[1]}, which came with the model, cannot be used" in caplog.text


def test_a_folder_that_others_can_write_to_is_refused_for_the_users_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    CalibrationStore()
    os.chmod(tmp_path / "sawkv" / "prepared", 0o777)
    with pytest.raises(UnsupportedError, match="no other can write"):
        CalibrationStore()
    os.chmod(tmp_path, 0o777)
    CalibrationStore(tmp_path)  # named by the user


def test_starts_at_the_same_time_leave_one_whole_entry(tmp_path: Path) -> None:
    kept, saved = CalibrationStore(tmp_path), calibration()
    seen: list[str] = []

    def start() -> None:
        for _ in range(20):
            kept.save(KEY, saved)
            loaded = kept.load(KEY, **EXPECTED)
            seen.append("none" if loaded is None else loaded.fingerprint())

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {saved.fingerprint()}
    assert len(seen) == 80
    assert os.listdir(tmp_path) == [kept.path(KEY).name]


def test_weights_that_differ_in_one_element_differ_in_their_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the piece of the file is that holds it."""
    monkeypatch.setattr(store, "PIECE", 4096)
    weights = torch.randn(5000)
    digests = set()
    for changed in (None, 0, 2500, 4999):
        copy = weights.clone()
        if changed is not None:
            copy[changed] += 1e-6 * copy[changed].abs()
            assert not torch.equal(copy, weights)
        save_file({"w": copy}, tmp_path / "model.safetensors")
        digests.add(contents_digest(tmp_path))
    assert len(digests) == 4
    save_file({"w": weights}, tmp_path / "model.safetensors")
    assert contents_digest(tmp_path) in digests


def test_what_else_is_in_a_checkpoints_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert contents_digest(tmp_path) is None, "no weights"
    (tmp_path / "model.py").write_text("a = 1")
    assert contents_digest(tmp_path) is None, "code alone"
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    seen = {contents_digest(tmp_path)}
    (tmp_path / "README.md").write_text("changes nothing")
    assert contents_digest(tmp_path) in seen
    (tmp_path / "model.py").write_text("a = 2")
    seen.add(contents_digest(tmp_path))
    (tmp_path / "b.safetensors").write_bytes(b"")
    seen.add(contents_digest(tmp_path))
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    seen.add(contents_digest(tmp_path))
    assert len(seen) == 4
    file = tmp_path / "x.gguf"
    file.write_bytes(b"weights")
    assert contents_digest(file) not in {None, *seen}


def test_files_of_the_hubs_cache_are_not_read_whole_but_noticed_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's copy, which was downloaded at another time, is the same."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in ("0" * 64, "1" * 64):
        (blobs / name).write_bytes(b"weights")
        os.utime(blobs / name, ns=(0, 0))
    link = snapshot / "model.safetensors"
    link.symlink_to(blobs / ("0" * 64))
    seen = {contents_digest(snapshot)}
    os.utime(blobs / ("0" * 64), ns=(0, 1))
    assert contents_digest(snapshot) in seen
    (blobs / ("0" * 64)).write_bytes(b"weightZ")  # in place
    seen.add(contents_digest(snapshot))
    link.unlink()
    link.symlink_to(blobs / ("1" * 64))
    monkeypatch.setattr(store, "_sha256", None)  # nothing is read
    seen.add(contents_digest(snapshot))
    assert len(seen) == 3


def test_keys_tell_all_parts_apart() -> None:
    parts = {"weights": "w", "config": {"rope_theta": 1.0}, "dtype": "bf16"}
    changed = [{"weights": "v"}, {"config": {"rope_theta": 2.0}}, {"dtype": "fp16"}, {"more": 1}]
    assert len({make_key(parts), *(make_key(parts | change) for change in changed)}) == 5
    assert make_key(dict(reversed(parts.items()))) == make_key(parts)
