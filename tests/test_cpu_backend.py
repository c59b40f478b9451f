"""The C++ kernels against the reference: bytes of append equal, attention within rounding."""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sawkv import CacheFormat, PagedKVCache, PageLayout, UnsupportedError, append, decode_attention, gather
from sawkv.kernels import cpu, reference, unsupported_reason
from sawkv.kernels.constants import HEADER_NAME, header
from sawkv.kernels.cpu import build
from sawkv.kernels.structs import read
from tests.conftest import Batch, make_batch, relative_error
from tests.kernel_checks import (
    check_append,
    check_feedback_ends_where_scales_saturate,
    check_gather_of_tails,
    check_wrong_feedback_is_noticed,
)

HEAD_DIMS = [16, 64, 80, 96, 128, 192, 256, 512]
FORMATS = ["int4", "int8", "int3", "int4v2", "bf16", "fp16-k16-v16", "fp32-k16-v0"]


def shapes(names: Sequence[str], float_dims: Sequence[int] = HEAD_DIMS) -> list[tuple[str, int]]:
    """Formats and the head_dims that they take; the float formats with some of them."""
    return [
        (name, head_dim)
        for name in names
        for head_dim in HEAD_DIMS
        if (head_dim % 32 == 0 or name != "int3") and (head_dim in float_dims or name.startswith("int"))
    ]


def test_the_backend_is_there() -> None:
    """All else here would be vacuous if `cpu` quietly became `reference`."""
    assert unsupported_reason("cpu", torch.device("cpu"), PageLayout(CacheFormat("int4"), 1, 128, 16)) is None


@pytest.mark.parametrize(("format_name", "head_dim"), shapes([*FORMATS, "int4-k0-v16", "int8-k16-v0"]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_append_writes_the_bytes_of_the_reference(head_dim: int, format_name: str, dtype: torch.dtype) -> None:
    is_centered, buckets = head_dim == 64, 3 if dtype == torch.bfloat16 else 1
    gained = head_dim in (64, 80, 256)
    check_append("cpu", "cpu", format_name, head_dim, dtype=dtype, centered=is_centered, gained=gained, buckets=buckets)


@pytest.mark.parametrize(
    ("format_name", "head_dim", "feedback"),
    [
        *((*shape, feedback) for shape in shapes(["int4"]) for feedback in ("k", "v", "kv")),
        *((*shape, "kv") for shape in shapes(["int3", "int4v2"])),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_append_with_feedback(format_name: str, head_dim: int, dtype: torch.dtype, feedback: str) -> None:
    check_append(
        "cpu",
        "cpu",
        format_name,
        head_dim,
        dtype=dtype,
        centered=dtype == torch.float16,
        gained=dtype != torch.float32,
        feedback=feedback,
        buckets=3 if feedback == "kv" else 1,
    )


def test_gather_of_wide_heads_with_a_center_per_bucket() -> None:
    check_gather_of_tails("cpu", "cpu", 512)


def test_wrong_feedback_is_noticed() -> None:
    check_wrong_feedback_is_noticed("cpu", "cpu")


def test_feedback_ends_where_scales_saturate() -> None:
    check_feedback_ends_where_scales_saturate("cpu", "cpu")


def attend(
    batch: Batch, q: torch.Tensor, starts: torch.Tensor, backend: str, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:2], math.nan)
    arguments = {
        "softmax_scale": q.shape[-1] ** -0.5,
        "max_query_len": int(starts.diff().max()),
        "out": out,
        "lse": lse,
    } | options
    # type: ignore[arg-type]
    decode_attention(q, batch.cache, batch.block_table, batch.seq_lens, starts, backend=backend, **arguments)
    return out, lse


@pytest.mark.parametrize(("format_name", "head_dim"), shapes(FORMATS, float_dims=(16, 128, 512)))
@pytest.mark.parametrize(
    ("query_lens", "group"),
    [([1] * 9, 1), ([1, 1, 3, 8, 2, 17, 60, 1, 1], 4), ([1, 1, 15, 4, 2, 1, 65, 200, 9], 3), ([1] * 9, 16)],
)
def test_attention_equals_the_reference(head_dim: int, format_name: str, query_lens: list[int], group: int) -> None:
    lengths = [1, 0, 15, 16, 17, 64, 65, 1030, 2100] if head_dim == 128 else [1, 0, 15, 16, 17, 64, 65, 200, 129]
    batch = make_batch(
        format_name,
        lengths,
        head_dim=head_dim,
        centered=group == 4,
        gained=group >= 4,
        page_size=32 if group == 3 else 16,
    )
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q = torch.randn(int(starts[-1]) + 2, 2 * group, head_dim)
    got, got_lse = attend(batch, q, starts, "cpu")
    want, want_lse = attend(batch, q, starts, "reference")
    used = int(starts[-1])
    assert relative_error(got[:used], want[:used]) < 1e-5
    torch.testing.assert_close(got_lse[:used], want_lse[:used], atol=1e-4, rtol=1e-5)
    assert got[used:].isnan().all(), "rows of no sequence are left as they are"


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 5},
        {"sliding_window": 70},
        {"logit_softcap": 2.0},
        {"sinks": True},
        {"logit_softcap": 2.0, "sinks": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_window_softcap_and_sinks(options: dict[str, object], dtype: torch.dtype) -> None:
    batch = make_batch("int4", [1, 0, 40, 1500], centered=True, gained=True)
    starts = torch.tensor([0, 1, 2, 33, 36], dtype=torch.int32)
    q = torch.randn(36, 2, 8, 128).to(dtype)[:, 1]  # a strided view
    if "sinks" in options:
        options = options | {"sinks": torch.randn(8).to(dtype)}
    got, got_lse = attend(batch, q, starts, "cpu", **options)
    want, want_lse = attend(batch, q, starts, "reference", **options)
    assert relative_error(got, want) < (1e-5 if dtype == torch.float32 else 5e-3)
    torch.testing.assert_close(got_lse, want_lse, atol=1e-4, rtol=1e-5)


def test_equal_values_give_equal_bits_whatever_they_are_stored_as() -> None:
    batch = make_batch("int4-k128-v128", [5, 300, 1100], num_kv_heads=2)
    layout = PageLayout(CacheFormat.parse("fp32-k128-v128"), 2, 128, 16)
    wide = PagedKVCache.allocate(layout, batch.cache.pages.shape[0])
    wide.pages.fill_(0xFF)
    for i, length in enumerate(batch.seq_lens.tolist()):
        k, v = reference.read_sequence(batch.cache, batch.block_table[i], length)
        position = torch.arange(length)
        page, offset = batch.block_table[i][position // 16].long(), position % 16
        k_plane, _, v_plane, _ = reference.planes(wide)
        k_plane[page, :, offset] = k.view(torch.uint8)
        v_plane[page, :, offset] = reference.swizzle_segments(v.view(torch.uint8), offset[:, None], layout)
    starts = torch.tensor([0, 1, 5, 30], dtype=torch.int32)
    q = torch.randn(30, 6, 128)
    narrow_out = attend(batch, q, starts, "cpu")
    wide_out = attend(Batch(wide, batch.k, batch.v, batch.block_table, batch.seq_lens), q, starts, "cpu")
    assert torch.equal(narrow_out[0], wide_out[0])
    assert torch.equal(narrow_out[1], wide_out[1])


def test_a_sequence_alone_equals_itself_in_a_batch() -> None:
    batch = make_batch("int4", [700, 3, 2500, 64])
    q = torch.randn(4, 8, 128)
    together, _ = attend(batch, q, torch.arange(5, dtype=torch.int32), "cpu")
    for i in range(4):
        one = Batch(batch.cache, batch.k, batch.v, batch.block_table[i : i + 1], batch.seq_lens[i : i + 1])
        alone, _ = attend(one, q[i : i + 1], torch.tensor([0, 1], dtype=torch.int32), "cpu")
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_stays_in_its_own_token_and_head(which: str) -> None:
    batch = make_batch("int4", [20, 20, 300])
    k, v = torch.randn(2, 1, 2, 128)
    (k if which == "k" else v)[0, 1, 3] = math.nan
    append(k, v, batch.cache, torch.tensor([int(batch.block_table[0, 0]) * 16 + 10]), backend="cpu")
    starts = torch.tensor([0, 20, 24, 25], dtype=torch.int32)
    out, _ = attend(batch, torch.randn(25, 4, 128), starts, "cpu")
    bad = out.isnan().any(-1)
    assert torch.equal(bad, out.isnan().all(-1))
    assert bad[10:20, 2:].all()
    bad[10:20, 2:] = False
    assert not bad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("rotated", [True, False])
def test_gather_equals_the_reference(format_name: str, rotated: bool, dtype: torch.dtype) -> None:
    head_dim = 96 if format_name == "int3" else 80
    batch = make_batch(
        format_name, [5, 0, 33, 16], head_dim=head_dim, centered=True, gained=rotated or dtype != torch.float16
    )
    starts = torch.tensor([0, 5, 9, 42, 60], dtype=torch.int32)
    results = []
    for backend in ("cpu", "reference"):
        k, v = torch.full((2, 60, 2, head_dim), -7.0, dtype=dtype)
        gather(batch.cache, batch.block_table, batch.seq_lens, starts, k, v, rotated=rotated, backend=backend)
        results.append(torch.stack([k, v]))
    assert torch.equal(*results)
    for backend in ("cpu", "reference"):  # the last tokens do not fit and are dropped; or none does
        for room in (50, 20, 0):
            k, v = torch.full((2, room, 2, head_dim), -7.0, dtype=dtype)
            gather(batch.cache, batch.block_table, batch.seq_lens, starts, k, v, rotated=rotated, backend=backend)
            assert torch.equal(torch.stack([k, v]), results[0][:, :room])


def test_cpp_and_python_lay_out_arguments_alike(tmp_path: Path) -> None:
    """By the compiler's own offsets. One byte off, the control, does not compile."""
    for name, text in (build.read_sources() | {HEADER_NAME: header(MAX_GROUP=build.MAX_GROUP)}).items():
        (tmp_path / name).write_text(text)
    structs = (cpu.Cache, cpu.AppendArguments, cpu.AttentionArguments, cpu.GatherArguments)
    offsets = {f"offsetof({s.__name__}, {name})": getattr(s, name).offset for s in structs for name, _ in s._fields_}
    offsets |= {f"sizeof({s.__name__})": ctypes.sizeof(s) for s in structs}
    for shift in (0, 1):
        checks = [f"static_assert({place} == {value + shift});" for place, value in offsets.items()]
        (tmp_path / "check.cpp").write_text("\n".join(["#include <cstddef>", '#include "kernels.cpp"', *checks]))
        command = ["g++", "-std=c++17", "-fsyntax-only", "-march=native", "-Wno-psabi", str(tmp_path / "check.cpp")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stderr.count("static assertion failed") == shift * len(checks), done.stderr[-2000:]
    with pytest.raises(AttributeError, match="num_slot"):
        cpu.AppendArguments().num_slot = 1


@pytest.mark.parametrize("line", ["long x;", "int x", "", "float* a, b;", "int x = 3;", "long x[2];"])
def test_a_struct_that_python_cannot_read_is_refused(line: str) -> None:
    source = f"struct Arguments {{\n  int ok[2], too;  // fine\n  {line}\n}};\n"
    with pytest.raises(ValueError, match="expected"):
        read(source, "Arguments")
    assert [name for name, _ in read(source.replace(f"  {line}\n", ""), "Arguments")._fields_] == ["ok", "too"]


def test_a_missing_or_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.raises(UnsupportedError, match="expected g\\+\\+ or clang\\+\\+"):
        build.load_library.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "read_sources", lambda: {"kernels.cpp": "int main( {"})
    with pytest.raises(UnsupportedError, match="could not compile"):
        build.load_library.__wrapped__()
    (tmp_path / "sawkv" / "cpu").chmod(0o777)
    with pytest.raises(UnsupportedError, match="no other can write to"):
        build.load_library.__wrapped__()
