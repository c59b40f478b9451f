"""Bytes of weights: from files, from the hub, and counted from the shape."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.shapes import SHAPES
from sawkv.capacity.model import read_shape
from sawkv.capacity.weights import Weights, weights_of
from sawkv.checkpoint import Checkpoint, read_checkpoint
from sawkv.errors import SawkvError, UnsupportedError
from tests.capacity.configs import AWQ, CONFIGS, FP8, write_config
from tests.conftest import MODEL

GB = 10**9


def weights(folder: Path, language_model_only: bool = False) -> Weights:
    checkpoint = read_checkpoint(str(folder))
    return weights_of(checkpoint, read_shape(checkpoint.config, language_model_only), language_model_only)


def count(config: Mapping[str, Any], language_model_only: bool = False) -> Weights:
    config = dict(config)
    return weights_of(
        Checkpoint("here", config, Path("nowhere")), read_shape(config, language_model_only), language_model_only
    )


def header(told: Any) -> bytes:
    text = json.dumps(told).encode()
    return struct.pack("<Q", len(text)) + text


def write_safetensors(file: Path, tensors: Mapping[str, tuple[str, list[int]]]) -> None:
    """A file with the header alone, of which plan reads no more."""
    told = {"__metadata__": {}} | {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()}
    file.write_bytes(header(told))


def test_bytes_of_files_are_counted_as_vllm_holds_them(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3-8b", quantization_config=AWQ)
    write_safetensors(
        tmp_path / "model.safetensors",
        {"a": ("F32", [3, 5]), "b": ("BF16", [7]), "c": ("F8_E4M3", [11]), "d": ("I32", [2]), "e": ("U8", [13])},
    )
    # The same weights again, for another loader.
    write_safetensors(tmp_path / "consolidated.safetensors", {"a": ("BF16", [1000])})
    assert weights(tmp_path) == Weights(2 * 15 + 2 * 7 + 11 + 4 * 2 + 13, "measured in their files")


def test_what_vllm_does_not_load_is_left_out(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3-vl-8b", tie_word_embeddings=True)
    write_safetensors(
        tmp_path / "model.safetensors",
        {
            "model.language_model.layers.35.mlp.up_proj.weight": ("BF16", [1]),
            "model.language_model.layers.36.mlp.up_proj.weight": (
                "BF16",
                [10],
            ),  # of 36 layers: predicts the token after the next
            "mtp.fc.weight": ("BF16", [100]),
            "lm_head.weight": ("BF16", [1000]),  # tied to the embeddings
            "model.visual.blocks.36.attn.qkv.weight": ("BF16", [10000]),
        },
    )
    assert weights(tmp_path).nbytes == 2 * 10001
    assert weights(tmp_path, language_model_only=True).nbytes == 2


def test_files_of_an_index(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3-8b")
    index = {"metadata": {"total_size": 12345}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_safetensors(tmp_path / "model-1.safetensors", {"a": ("BF16", [5])})
    assert weights(tmp_path) == Weights(12345, "told by the index of their files")  # one of two is missing
    write_safetensors(tmp_path / "model-2.safetensors", {"b": ("BF16", [6])})
    write_safetensors(tmp_path / "other.safetensors", {"c": ("BF16", [7])})
    assert weights(tmp_path) == Weights(22, "measured in their files")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        b"\xff" * 8 + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 1 << 20) + b"[" * (1 << 20),
        *(header({"a": {"dtype": "F32", "shape": shape}}) for shape in ([inf], [nan], [1.5], [-3], [10**400], "7")),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    write_config(tmp_path, "qwen3-8b")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SawkvError, match=rf"got {len(content)} bytes that are not, in .*model\.safetensors"):
        weights(tmp_path)


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3-8b")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(SawkvError, match=r"got what cannot be read in .*model\.safetensors: Is a directory"):
        weights(tmp_path)


def test_a_git_lfs_pointer_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3-8b")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(SawkvError, match=r"a Git LFS pointer in .*model\.safetensors. Run `git lfs pull`"):
        weights(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "[" * 100_000,
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": []}}',
        '{"weight_map": {"a": "b"}, "metadata": {"total_size": 1e400}}',
        '{"weight_map": {"a": "b"}, "metadata": {"total_size": "much"}}',
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    write_config(tmp_path, "qwen3-8b")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(SawkvError, match=r"index of safetensors files in .*index.json"):
        weights(tmp_path)


def test_the_shipped_models_files_agree_with_its_shape() -> None:
    checkpoint = read_checkpoint(str(MODEL))
    assert weights(MODEL).source == "measured in their files"
    assert weights(MODEL).nbytes == pytest.approx(count(checkpoint.config).nbytes, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "nbytes"),
    [
        # 2 bytes for each of: embeddings and output 2 x 128256 x 4096; in 32 layers q, o 2 x 4096 x 4096, k, v 2 x 1024
        # x 4096, 3 x 14336 x 4096, and two norms of 4096; one more norm. The 8.03 billion that its name rounds.
        (CONFIGS["llama-3.1-8b"], 2 * 8_030_261_248),
        # The same, with the 32 x 218,103,808 weights of linear layers in one byte. Its files take 9.08 GB.
        (CONFIGS["llama-3.1-8b"] | {"quantization_config": FP8}, 2 * 8_030_261_248 - 6_979_321_856),
        # 8,190,735,360 weights, of which 36 x 192,937,984 in linear layers take 4 bits and a share of 20 / 128 in
        # scales and zero points: 6,945,767,424 x 4.15625 / 8 bytes, and 2 for each of the others. Its files take 6.1
        # GB.
        (CONFIGS["qwen3-8b"] | {"quantization_config": AWQ}, 6_098_489_344),
        # 36 x 128 x 3 x 2880 x 2880 weights of experts in 4 bits and a scale of 8 for each 32; 2,166,870,000 others in
        # 16. Its files take 65.3 GB.
        (CONFIGS["gpt-oss-120b"], 36 * 128 * 3 * 2880 * 2880 * 4.25 / 8 + 2 * 2_166_870_000),
        # A vision tower of 27 layers is 0.58 of 8.77 billion.
        (CONFIGS["qwen3-vl-8b"], 2 * 8_767_123_696),
    ],
    ids=["llama-3.1-8b", "llama-3.1-8b-fp8", "qwen3-8b-awq", "gpt-oss-120b", "qwen3-vl-8b"],
)
def test_counted_from_the_shape(config: dict[str, Any], nbytes: float) -> None:
    assert count(config).nbytes == pytest.approx(nbytes, rel=1e-4)


def test_the_source_says_what_was_assumed() -> None:
    assert count(CONFIGS["qwen3-8b"]).source == "counted from the shape, in 16 bits"
    assert (
        count(CONFIGS["qwen3-8b"] | {"quantization_config": AWQ}).source
        == "counted from the shape, linear layers in 4.16 bits (awq)"
    )


@pytest.mark.parametrize("name", SHAPES)
def test_benchmark_shapes_count_as_transformers_makes_them(name: str) -> None:
    """A tied output layer is counted once, a bias or norm not forgotten."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[SHAPES[name]["model_type"]].from_dict(dict(SHAPES[name]))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert count(SHAPES[name]).nbytes == 2 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"0": {"weights": {"num_bits": 4, "group_size": 128}}},
            },
            4.125,
        ),
    ],
)
def test_bits_of_linear_layers(quantization: dict[str, Any], bits: float) -> None:
    linear, others = 36 * 192_937_984, 8_190_735_360 - 36 * 192_937_984
    assert count(CONFIGS["qwen3-8b"] | {"quantization_config": quantization}).nbytes == pytest.approx(
        linear * bits / 8 + 2 * others, rel=1e-6
    )


@pytest.mark.parametrize(
    ("key", "entry"),
    [("ignore", "re:.*mlp.*"), ("modules_to_not_convert", "mlp"), ("exclude_modules", "model.layers.*.mlp*")],
)
def test_layers_that_a_quantization_leaves_out_count_in_16_bits(key: str, entry: str) -> None:
    mlp = 36 * 3 * 4096 * 12288
    left_out = count(CONFIGS["qwen3-8b"] | {"quantization_config": {"quant_method": "fp8", key: [entry]}}).nbytes
    assert left_out == count(CONFIGS["qwen3-8b"] | {"quantization_config": {"quant_method": "fp8"}}).nbytes + mlp


def test_an_unknown_quantization_asks_for_the_size() -> None:
    with pytest.raises(UnsupportedError, match="got aqlm: give --weights SIZE"):
        count(CONFIGS["qwen3-8b"] | {"quantization_config": {"quant_method": "aqlm"}})


def test_the_hub_tells_the_size_where_there_are_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    told = SimpleNamespace(safetensors=SimpleNamespace(parameters={"BF16": 100, "F8_E4M3": 1000, "I32": 10}))
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: told)
    checkpoint = Checkpoint("owner/name", CONFIGS["qwen3-8b"], None)
    assert weights_of(checkpoint, read_shape(checkpoint.config)) == Weights(2 * 100 + 1000 + 4 * 10, "told by the hub")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(hub.HfApi, "model_info", fail)
    assert weights_of(checkpoint, read_shape(checkpoint.config)).source == "counted from the shape, in 16 bits"
