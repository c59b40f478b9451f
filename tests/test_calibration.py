# Over 400 lines: tables of bad files, each refused by its own message.
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

from sawkv import CacheFormat, PagedKVCache, PageLayout, SawkvError
from sawkv.errors import CalibrationError
from sawkv.format.feedback import Feedback, takes_from
from sawkv.prepare import calibration
from sawkv.prepare.calibration import Calibration, LayerCalibration, model_id

FORMAT = CacheFormat.parse("int4-k128-v128")


def make(num_layers: int = 3, num_kv_heads: int = 2, head_dim: int = 128) -> Calibration:
    k_center, v_center = torch.randn(2, num_layers, num_kv_heads, head_dim)
    return Calibration(FORMAT, "a model", k_center, v_center)


def make_fed(num_layers: int = 3, num_kv_heads: int = 2, head_dim: int = 128) -> Calibration:
    """With gains, and feedback of random weights, other ones in every layer and head."""
    shape = (num_layers, num_kv_heads)
    weights = torch.randint(-127, 128, (2, *shape, head_dim, head_dim), dtype=torch.int8) * takes_from(head_dim).to(
        torch.int8
    )
    step = torch.rand(2, *shape) / 1e4
    made = make_gained(num_layers, num_kv_heads, head_dim)
    fed = replace(made, k_feedback=weights[0], k_feedback_step=step[0], v_feedback=weights[1], v_feedback_step=step[1])
    return replace(fed, k_energy=torch.rand(shape) + 0.1, v_energy=torch.rand(shape) + 0.1)


def make_gained(num_layers: int = 3, num_kv_heads: int = 2, head_dim: int = 128) -> Calibration:
    made = make(num_layers, num_kv_heads, head_dim)
    k_gain, v_gain = torch.exp2(4 * torch.rand(2, *made.v_center.shape) - 2)
    return replace(made, k_gain=k_gain, v_gain=v_gain)


def make_buckets() -> Calibration:
    """With three centers of K per layer."""
    return replace(make_fed(), k_center=torch.randn(3, 3, 2, 128))


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("calibration") / "good.safetensors"
    Calibration(FORMAT, "a model", *torch.ones(2, 2, 1, 128)).save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def fed_content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Small, so that damage often hits the header; all weights that may be are 1."""
    path = tmp_path_factory.mktemp("calibration") / "fed.safetensors"
    weights, step = takes_from(16).to(torch.int8).expand(2, 1, 16, 16), torch.full((2, 1), 1e-4)
    fed = {"k_feedback": weights, "k_feedback_step": step, "v_feedback": weights, "v_feedback_step": step}
    gains = {"k_gain": torch.full((2, 1, 16), 2.0), "v_gain": torch.full((2, 1, 16), 0.5)}
    Calibration(CacheFormat.parse("int4-k16-v16"), "a model", *torch.ones(2, 2, 1, 16), **gains, **fed).save(path)
    return path.read_bytes()


def load_bytes(path: Path, content: bytes) -> Calibration:
    path.write_bytes(content)
    return Calibration.load(path)


TENSORS = (
    "k_center",
    "v_center",
    "k_gain",
    "v_gain",
    "k_feedback",
    "k_feedback_step",
    "v_feedback",
    "v_feedback_step",
    "k_energy",
    "v_energy",
)


@pytest.mark.parametrize(
    "made",
    [
        *(make(), make_gained(), make_fed(), make_buckets()),
        replace(make_fed(), k_gain=None, k_feedback=None, k_feedback_step=None),
    ],
)
def test_what_is_saved_is_loaded(made: Calibration, tmp_path: Path) -> None:
    made.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert (loaded.format, loaded.model, loaded.fingerprint()) == (FORMAT, "a model", made.fingerprint())
    for name in TENSORS:
        got, want = getattr(loaded, name), getattr(made, name)
        assert (got is None) == (want is None), name
        assert want is None or torch.equal(got, want), name


def test_loading_does_not_follow_the_default_device(tmp_path: Path) -> None:
    made = make_fed()
    made.save(tmp_path / "c.safetensors")
    with torch.device("meta"):  # vLLM makes its layers under that of the GPU
        loaded = Calibration.load(tmp_path / "c.safetensors")
        layer = loaded.layer(1)
    assert loaded.fingerprint() == made.fingerprint()
    assert layer.k_feedback is not None
    assert layer.k_feedback.weights.device.type == "cpu"
    assert torch.equal(layer.k_feedback.weights, made.layer(1).k_feedback.weights)  # type: ignore[union-attr]


def test_a_fingerprint_stays_what_it_is() -> None:
    made = Calibration(FORMAT, "a model", *torch.ones(2, 2, 1, 128))
    assert made.fingerprint() == "1d0120c0af1650ee"
    several = replace(made, k_center=made.k_center.repeat(1, 2, 1, 1))
    assert several.fingerprint() == "0795751495313048"


def test_buckets_of_layers() -> None:
    """A rank takes its heads of the buckets that it serves. What is filled in place takes as many as it has room for;
    the last one holds all later positions.
    """
    made = make_buckets()
    layer = made.layer(0, slice(1, 2), 2)
    assert layer.k_center is not None
    assert torch.equal(layer.k_center, made.k_center[0, :2, 1:2])
    again = Calibration.from_layers(FORMAT, "a model", 3, {i: made.layer(i) for i in range(3)})
    assert again.fingerprint() == made.fingerprint()
    with pytest.raises(CalibrationError, match=r"expected one number of buckets in all of them, got \[2, 3\]"):
        Calibration.from_layers(FORMAT, "a model", 3, {0: made.layer(0), 1: made.layer(1, num_buckets=2)})
    for num_buckets, taken in ((1, [0]), (3, [0, 1, 2]), (5, [0, 1, 2, 2, 2])):
        blank = LayerCalibration.blank(PageLayout(FORMAT, 2, 128, 16), "cpu", num_buckets)
        blank.fill(made.layer(0))
        assert blank.k_center is not None
        assert torch.equal(blank.k_center, made.k_center[0, taken])


def test_what_a_rank_gets_and_none_where_there_is_nothing_to_do() -> None:
    made = make_fed(num_kv_heads=4)
    assert made.k_feedback is not None
    assert made.k_feedback_step is not None
    assert made.v_feedback is not None
    made.v_center[1] = 0
    made.v_feedback[1] = 0
    assert made.k_gain is not None
    assert made.v_gain is not None
    made.k_gain[1] = 1
    layer = made.layer(1, slice(2, 4))
    assert layer.k_center is not None
    assert torch.equal(layer.k_center, made.k_center[1, :, 2:4])
    assert layer.v_center is None
    assert layer.k_gain is None
    assert layer.v_gain is not None
    assert torch.equal(layer.v_gain, made.v_gain[1, 2:4])
    assert layer.k_feedback is not None
    assert torch.equal(layer.k_feedback.weights, made.k_feedback[1, 2:4])
    assert torch.equal(layer.k_feedback.step, made.k_feedback_step[1, 2:4])
    assert layer.v_feedback is None
    assert made.layer(0).v_feedback is not None
    cache = PagedKVCache.allocate(PageLayout(FORMAT, 2, 128, 16), 1, "cpu", **layer.to("cpu").constants())
    assert (
        len({each.fingerprint() for each in (cache, replace(cache, k_feedback=None), replace(cache, v_gain=None))}) == 3
    )
    for index, heads in ((3, slice(0, 1)), (-1, slice(0, 1)), (0, slice(3, 5))):
        with pytest.raises(CalibrationError, match="expected"):
            made.layer(index, heads)


def test_layers_make_a_whole_and_a_whole_its_layers() -> None:
    made = make_fed(num_layers=4)
    rebuilt = Calibration.from_layers(FORMAT, "a model", 4, {index: made.layer(index) for index in range(4)})
    assert rebuilt.fingerprint() == made.fingerprint()
    # Others do not attend.
    parts = {
        2: made.layer(2),
        0: replace(made.layer(0), k_gain=None, v_feedback=None, k_center=None),
    }
    sparse = Calibration.from_layers(FORMAT, "a model", 4, parts)
    assert sparse.num_layers == 4
    for index in range(4):
        layer, wanted = sparse.layer(index), vars(parts.get(index, LayerCalibration()))
        for name, part in vars(layer).items():
            want = wanted[name]
            assert (part is None) == (want is None), (index, name)
            for got, expected in zip(tensors_of(part), tensors_of(want), strict=True):
                assert torch.equal(got, expected), (index, name)
    alone = Calibration.from_layers(FORMAT, "a model", 2, {1: LayerCalibration(v_center=made.v_center[0])})
    assert (alone.k_gain, alone.v_gain, alone.k_feedback, alone.v_feedback_step) == (None,) * 4
    assert not alone.k_center.any()


def tensors_of(part: torch.Tensor | Feedback | None) -> list[torch.Tensor]:
    if part is None:
        return []
    return [part.weights, part.step] if isinstance(part, Feedback) else [part]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "expected a center, gain or feedback"),
        ({0: LayerCalibration()}, "expected a center, gain or feedback"),
        ({3: LayerCalibration(k_center=torch.zeros(2, 128))}, r"expected indices from 0 to 2, got \[3\]"),
        ({-1: LayerCalibration(k_center=torch.zeros(2, 128))}, "expected indices from 0 to 2"),
        ({0: LayerCalibration(k_gain=torch.ones(2, 128), v_gain=torch.ones(2, 64))}, r"got \[\[2, 128\], \[2, 64\]\]"),
        (
            {0: LayerCalibration(k_gain=torch.ones(2, 128)), 1: LayerCalibration(k_gain=torch.ones(1, 128))},
            r"got \[\[2, 128\], \[1, 128\]\]",
        ),
        ({0: LayerCalibration(k_gain=torch.zeros(2, 128))}, "from 1/1024 to 1024"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers: dict[int, LayerCalibration], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Calibration.from_layers(FORMAT, "a model", 3, layers)


def test_the_fingerprint_covers_all_that_changes_the_bytes() -> None:
    made = make()
    moved = made.k_center.clone()
    moved[2, 0, 1, 127] += 1e-3
    others = [
        replace(made, format=CacheFormat.parse("int4-k128-v0")),
        replace(made, model="another"),
        replace(made, k_center=moved),
        replace(made, k_center=made.v_center, v_center=made.k_center[:, 0]),
        replace(made, k_center=made.k_center.repeat(1, 2, 1, 1)),
        replace(made, k_center=made.k_center.view(2, 3, 128), v_center=made.v_center.view(2, 3, 128)),
    ]
    fed = make_fed()
    assert fed.k_feedback is not None
    assert fed.v_feedback_step is not None
    turned = fed.k_feedback.clone()
    turned[2, 1, 127, 0] ^= 1
    fed_others = [
        replace(fed, k_feedback=turned),
        replace(fed, v_feedback_step=fed.v_feedback_step * 2),
        replace(fed, v_feedback=None, v_feedback_step=None),
        replace(fed, k_feedback=fed.v_feedback, v_feedback=fed.k_feedback),
        replace(fed, k_gain=None),
        replace(fed, k_gain=fed.v_gain, v_gain=fed.k_gain),
    ]
    all_of_them = [made, *others, fed, *fed_others]
    assert len({each.fingerprint() for each in all_of_them}) == len(all_of_them)


def test_a_misfit_names_all_that_differs() -> None:
    fits: dict[str, Any] = {
        "cache_format": CacheFormat("int4").resolve(128),
        "model": "a model",
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_dim": 128,
    }
    make().check(**fits)
    with pytest.raises(CalibrationError, match=r"layers: expected 4, got 3; model: expected b, got a model"):
        make().check(**fits | {"num_layers": 4, "model": "b"})
    with pytest.raises(CalibrationError, match="format: expected int8-k128-v128, got int4-k128-v128"):
        make().check(**fits | {"cache_format": CacheFormat("int8").resolve(128)})
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
        (
            {"v_center": torch.zeros(3, 1, 128)},
            r"v_center: expected the shape of k_center, \[3, 2, 128\], got \[3, 1, 128\]",
        ),
        ({"k_gain": torch.ones(3, 2, 64)}, "k_gain: expected the shape of k_center"),
        ({"v_gain": torch.ones(3, 2, 128).double()}, "v_gain: expected float32"),
        (
            {"k_gain": torch.full((3, 2, 128), torch.nan)},
            "k_gain: expected values from 1/1024 to 1024, got NaN or others",
        ),
        ({"k_gain": torch.full((3, 2, 128), 0.0)}, "k_gain: expected values from 1/1024"),
        ({"v_gain": torch.full((3, 2, 128), -1.0)}, "v_gain: expected values from 1/1024"),
        ({"v_gain": torch.full((3, 2, 128), 1025.0)}, "v_gain: expected values from 1/1024"),
        ({"k_energy": torch.ones(3, 1)}, r"k_energy: expected float32 \[3, 2\] on the CPU, got torch.float32 \[3, 1\]"),
        ({"v_energy": torch.ones(3, 2).double()}, r"v_energy: expected float32 \[3, 2\]"),
        ({"v_energy": torch.full((3, 2), torch.nan)}, "v_energy: expected finite values from 0"),
        ({"k_energy": torch.full((3, 2), -1.0)}, "k_energy: expected finite values from 0"),
        ({"format": CacheFormat("int4")}, "int4-k128-v128, got int4"),
        ({"format": CacheFormat("int4", 256, 0)}, "divisor"),
    ],
)
def test_bad_centers_and_gains_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        replace(make(), **change)


WEIGHTS, STEP = torch.zeros(3, 2, 128, 128, dtype=torch.int8), torch.zeros(3, 2)
UPPER = torch.ones(128, 128, dtype=torch.int8).triu(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_feedback": None}, "k_feedback: expected weights and steps, got steps alone"),
        ({"v_feedback_step": None}, "v_feedback: expected weights and steps, got weights alone"),
        ({"k_feedback": WEIGHTS.float()}, r"k_feedback: expected torch.int8 \[3, 2, 128, 128\]"),
        ({"k_feedback": WEIGHTS[:, :1]}, r"got torch.int8 \[3, 1, 128, 128\]"),
        ({"v_feedback_step": STEP.double()}, r"v_feedback_step: expected torch.float32 \[3, 2\]"),
        ({"v_feedback_step": STEP.T}, r"v_feedback_step: expected torch.float32 \[3, 2\]"),
        ({"k_feedback_step": STEP + torch.nan}, "from 0 to 1, got NaN"),
        ({"k_feedback_step": STEP - 1}, "from 0 to 1"),
        ({"v_feedback_step": STEP + 1.5}, "from 0 to 1"),
        ({"v_feedback": UPPER.expand(3, 2, -1, -1)}, "v_feedback: expected weights of 0"),
        ({"v_feedback": torch.eye(128, dtype=torch.int8).expand(3, 2, -1, -1)}, "v_feedback: expected weights of 0"),
        (
            {"format": CacheFormat.parse("int8-k128-v128")},
            "k_feedback: expected a format below 8 bits, got int8-k128-v128",
        ),
    ],
)
def test_bad_feedback_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        replace(make_fed(), **change)


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
        ({"version": "3"}, "expected the keys"),
        ({"version": "3", "num_buckets": "2"}, r"k_center: expected F32 \[2, 2, 1, 128\], got F32 \[2, 1, 128\]"),
        ({"num_buckets": "1"}, "expected the keys"),
        ({"version": "1"}, "expected a calibration of version 2 or 3, got '1'. `sawkv prepare` makes it again"),
        ({"version": None}, "got 'no version'"),
        ({"model": None}, "expected the keys"),
        ({"colour": "red"}, "colour"),
        ({"model": "another"}, "fingerprint: expected"),
        ({"fingerprint": "0" * 16}, f"got {'0' * 16}"),
        ({"format": "int4-k64-v64"}, "fingerprint: expected"),
        ({"format": "int5"}, "unknown codec"),
        ({"format": "int4"}, "expected rotation orders"),
        ({"format": "int4-k128-v128-r64"}, "expected that of the pages, int4-k128-v128, got int4-k128-v128-r64"),
        ({"num_layers": "3"}, r"k_center: expected F32 \[3, 1, 128\], got F32 \[2, 1, 128\]"),
        ({"num_layers": "-2"}, "expected a positive integer, got '-2'"),
        ({"num_layers": "٢"}, "expected a positive integer"),
        ({"head_dim": "9" * 4000}, "expected a positive integer"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    content: bytes, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_bytes(tmp_path / "c.safetensors", rewritten(content, **metadata(content, **change)))


def test_headers_that_lie_are_refused(content: bytes, fed_content: bytes, tmp_path: Path) -> None:
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
    for lie in (
        {"k_feedback": None},
        {"k_feedback_step": None},
        {"k_gain": {"dtype": "F32", "shape": [1, 2, 16], "data_offsets": [136, 264]}},
        {"k_gain": {"dtype": "F16", "shape": [2, 1, 32], "data_offsets": [136, 264]}},
        {"w_feedback": {"dtype": "I8", "shape": [2, 1, 16, 16], "data_offsets": [0, 512]}},
        {"k_feedback": {"dtype": "U8", "shape": [2, 1, 16, 16], "data_offsets": [528, 1040]}},
        {"k_feedback": {"dtype": "I8", "shape": [2, 1, 32, 8], "data_offsets": [528, 1040]}},
        {"k_feedback": {"dtype": "I8", "shape": [1 << 40, 1, 16, 16], "data_offsets": [528, 1040]}},
    ):
        with pytest.raises(CalibrationError):
            load_bytes(tmp_path / "c.safetensors", rewritten(fed_content, **lie))
    assert load_bytes(tmp_path / "c.safetensors", rewritten(fed_content)).k_feedback is not None, "the control"
    for header in (b"[" * 100_000, b"{" * 100_000, b'{"a":' * 100_000, b"\xff" * 100, b""):
        with pytest.raises(CalibrationError, match="cannot be parsed"):
            load_bytes(tmp_path / "c.safetensors", struct.pack("<Q", len(header)) + header)


def test_what_is_no_calibration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        Calibration.load(tmp_path / "none")
    with pytest.raises(CalibrationError, match="no file"):
        Calibration.load(tmp_path)
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrationError, match="expected a calibration of version 2 or 3, got 'no version'"):
        Calibration.load(tmp_path / "model.safetensors")
    make().save(tmp_path / "c.safetensors")
    monkeypatch.setattr(calibration, "MAX_FILE_BYTES", 1000)
    with pytest.raises(CalibrationError, match="at most 1000 bytes"):
        Calibration.load(tmp_path / "c.safetensors")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_of_ours_and_never_another_center(
    content: bytes, fed_content: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    """Bytes changed, cut off or added anywhere: either a CalibrationError, or the same content (where JSON's spelling
    alone changed).
    """
    whole = data.draw(st.sampled_from([content, fed_content]))
    damaged = bytearray(whole)
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
    assert loaded.fingerprint() == load_bytes(tmp_path / "whole.safetensors", whole).fingerprint()
    assert torch.equal(loaded.k_center, torch.ones_like(loaded.k_center))
    assert torch.equal(loaded.v_center, torch.ones_like(loaded.v_center))
    for gain, want in ((loaded.k_gain, 2.0), (loaded.v_gain, 0.5)):
        assert (gain is None) == (whole is content)
        assert gain is None or torch.equal(gain, torch.full((2, 1, 16), want))
    for weights in (loaded.k_feedback, loaded.v_feedback):
        assert (weights is None) == (whole is content)
        assert weights is None or torch.equal(weights, takes_from(16).to(torch.int8).expand(2, 1, 16, 16))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=300), honest_length=st.booleans())
def test_arbitrary_bytes_are_an_error_of_ours(tmp_path: Path, body: bytes, honest_length: bool) -> None:
    with pytest.raises(SawkvError):
        load_bytes(tmp_path / "noise.safetensors", (struct.pack("<Q", len(body)) if honest_length else b"") + body)


def test_the_models_identity_is_its_shape() -> None:
    shape = {
        "model_type": "qwen3",
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = SimpleNamespace(**shape, num_key_value_heads=2, intermediate_size=128)
    same = SimpleNamespace(**vars(config), dtype="bfloat16", quantization_config={"bits": 8}, transformers_version="9")
    assert model_id(config) == model_id(same)
    for change in ({"hidden_size": 65}, {"num_key_value_heads": 1}):
        assert model_id(config) != model_id(SimpleNamespace(**vars(config) | change))
