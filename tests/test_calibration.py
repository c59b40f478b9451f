"""The calibration file: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sawkv import CacheFormat, SawkvError, calibration
from sawkv.calibration import Calibration, model_id
from sawkv.errors import CalibrationError

FORMAT = CacheFormat.parse("int4-k128-v128")


def make(num_layers: int = 3, num_kv_heads: int = 2, head_dim: int = 128) -> Calibration:
    k_center, v_center = torch.randn(2, num_layers, num_kv_heads, head_dim)
    return Calibration(FORMAT, "a model", k_center, v_center)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("calibration") / "good.safetensors"
    Calibration(FORMAT, "a model", *torch.ones(2, 2, 1, 128)).save(path)
    return path.read_bytes()


def load_bytes(path: Path, content: bytes) -> Calibration:
    path.write_bytes(content)
    return Calibration.load(path)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    made = make()
    made.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert (loaded.format, loaded.model, loaded.fingerprint()) == (FORMAT, "a model", made.fingerprint())
    assert torch.equal(loaded.k_center, made.k_center)
    assert torch.equal(loaded.v_center, made.v_center)


def test_centers_of_a_rank_and_none_where_there_is_nothing_to_subtract() -> None:
    made = make(num_kv_heads=4)
    made.v_center[1] = 0
    k, v = made.centers(1, slice(2, 4))
    assert k is not None
    assert torch.equal(k, made.k_center[1, 2:4])
    assert v is None
    for layer, heads in ((3, slice(0, 1)), (-1, slice(0, 1)), (0, slice(3, 5))):
        with pytest.raises(CalibrationError, match="expected"):
            made.centers(layer, heads)


def test_the_fingerprint_covers_all_that_changes_the_bytes() -> None:
    made = make()
    moved = made.k_center.clone()
    moved[2, 1, 127] += 1e-3
    others = [
        replace(made, format=CacheFormat.parse("int4-k128-v0")),
        replace(made, model="another"),
        replace(made, k_center=moved),
        replace(made, k_center=made.v_center, v_center=made.k_center),
        replace(made, k_center=made.k_center.view(2, 3, 128), v_center=made.v_center.view(2, 3, 128)),
    ]
    assert len({made.fingerprint(), *(other.fingerprint() for other in others)}) == len(others) + 1


def test_a_misfit_names_all_that_differs() -> None:
    fits: dict[str, Any] = {"cache_format": CacheFormat("int4"), "model": "a model", "num_layers": 3, "num_kv_heads": 2, "head_dim": 128}
    make().check(**fits)
    with pytest.raises(CalibrationError, match=r"layers: expected 4, got 3; model: expected b, got a model"):
        make().check(**fits | {"num_layers": 4, "model": "b"})
    with pytest.raises(CalibrationError, match="format: expected int8-k128-v128, got int4-k128-v128"):
        make().check(**fits | {"cache_format": CacheFormat("int8")})
    with pytest.raises(CalibrationError, match="KV heads: expected 8, got 2; head_dim: expected 64, got 128"):
        make().check(**fits | {"num_kv_heads": 8, "head_dim": 64})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_center": torch.full((3, 2, 128), torch.nan)}, "finite"),
        ({"v_center": torch.full((3, 2, 128), torch.inf)}, "finite"),
        ({"v_center": torch.full((3, 2, 128), 1e6)}, "65504"),
        ({"v_center": torch.zeros(3, 2, 128, dtype=torch.float64)}, "float32"),
        ({"v_center": torch.zeros(3, 256)}, "num_layers, num_kv_heads, head_dim"),
        ({"v_center": torch.zeros(0, 2, 128)}, "num_layers, num_kv_heads, head_dim"),
        ({"v_center": torch.zeros(3, 1, 128)}, "equal shapes"),
        ({"format": CacheFormat("int4")}, "int4-k128-v128, got int4"),
        ({"format": CacheFormat("int4", 256, 0)}, "divisor"),
    ],
)
def test_bad_centers_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        replace(make(), **change)


def rewritten(content: bytes, **changes: Any) -> bytes:
    """The file with its header's entries changed, its data as they are."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header = {name: value for name, value in (header | changes).items() if value is not None}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def metadata(content: bytes, **changes: Any) -> dict[str, Any]:
    size = struct.unpack("<Q", content[:8])[0]
    known = json.loads(content[8 : 8 + size])["__metadata__"]
    return {"__metadata__": {name: value for name, value in (known | changes).items() if value is not None}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "expected a calibration of version 1, got '2'"),
        ({"version": None}, "got 'no version'"),
        ({"model": None}, "expected the keys"),
        ({"colour": "red"}, "colour"),
        ({"model": "another"}, "fingerprint: expected"),
        ({"fingerprint": "0" * 16}, f"got {'0' * 16}"),
        ({"format": "int4-k64-v64"}, "fingerprint: expected"),
        ({"format": "int5"}, "unknown codec"),
        ({"format": "int4"}, "expected rotation orders"),
        ({"num_layers": "3"}, r"k_center: expected F32 \[3, 1, 128\], got F32 \[2, 1, 128\]"),
        ({"num_layers": "-2"}, "expected a positive integer, got '-2'"),
        ({"num_layers": "٢"}, "expected a positive integer"),
        ({"head_dim": "9" * 4000}, "expected a positive integer"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(content: bytes, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_bytes(tmp_path / "c.safetensors", rewritten(content, **metadata(content, **change)))


def test_headers_that_lie_are_refused(content: bytes, tmp_path: Path) -> None:
    size = 2 * 128 * 4
    lies = [
        {"k_center": None},
        {"k_centre": {"dtype": "F32", "shape": [2, 1, 128], "data_offsets": [0, size]}},
        {"k_center": {"dtype": "F32", "shape": [2, 1, 128], "data_offsets": [0, 1 << 62]}},
        {"k_center": {"dtype": "F32", "shape": [1 << 40, 1 << 40, 1 << 40], "data_offsets": [0, size]}},
        {"k_center": {"dtype": "I32", "shape": [2, 1, 128], "data_offsets": [0, size]}},
        {"k_center": {"dtype": "F32", "shape": [1, 2, 128], "data_offsets": [0, size]}},
        {"k_center": {"dtype": "F32", "shape": [2, 1, 128], "data_offsets": [size, 2 * size]}},
        {"k_center": [[[[]]]]},
        {"__metadata__": {"version": 1}},
        {"__metadata__": None},
    ]
    for lie in lies:
        with pytest.raises(CalibrationError):
            load_bytes(tmp_path / "c.safetensors", rewritten(content, **lie))
    for header in (b"[" * 100_000, b"{" * 100_000, b'{"a":' * 100_000, b"\xff" * 100, b""):
        with pytest.raises(CalibrationError, match="cannot be parsed"):
            load_bytes(tmp_path / "c.safetensors", struct.pack("<Q", len(header)) + header)


def test_what_is_no_calibration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        Calibration.load(tmp_path / "none")
    with pytest.raises(CalibrationError, match="no file"):
        Calibration.load(tmp_path)
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrationError, match="expected a calibration of version 1, got 'no version'"):
        Calibration.load(tmp_path / "model.safetensors")
    make().save(tmp_path / "c.safetensors")
    monkeypatch.setattr(calibration, "MAX_FILE_BYTES", 1000)
    with pytest.raises(CalibrationError, match="at most 1000 bytes"):
        Calibration.load(tmp_path / "c.safetensors")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_of_ours_and_never_another_center(content: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed, cut off or added anywhere: either a CalibrationError, or the same centers (where JSON's spelling alone changed)."""
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "change":
            damaged[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del damaged[at : at + data.draw(st.integers(1, 2000))]
            damaged = damaged or bytearray(1)
        else:
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=40))
    try:
        loaded = load_bytes(tmp_path / "damaged.safetensors", bytes(damaged))
    except CalibrationError:
        return
    assert torch.equal(loaded.k_center, torch.ones(2, 1, 128))
    assert torch.equal(loaded.v_center, torch.ones(2, 1, 128))
    assert (loaded.format, loaded.model) == (FORMAT, "a model")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=300), honest_length=st.booleans())
def test_arbitrary_bytes_are_an_error_of_ours(tmp_path: Path, body: bytes, honest_length: bool) -> None:
    with pytest.raises(SawkvError):
        load_bytes(tmp_path / "noise.safetensors", (struct.pack("<Q", len(body)) if honest_length else b"") + body)


def test_the_models_identity_is_its_shape() -> None:
    shape = {"model_type": "qwen3", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SimpleNamespace(**shape, num_key_value_heads=2, intermediate_size=128)
    same = SimpleNamespace(**vars(config), dtype="bfloat16", quantization_config={"bits": 8}, transformers_version="9")
    assert model_id(config) == model_id(same)
    for change in ({"hidden_size": 65}, {"sawkv_balanced": "0123456789abcdef"}):
        assert model_id(config) != model_id(SimpleNamespace(**vars(config) | change))
