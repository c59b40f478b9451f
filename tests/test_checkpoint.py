"""What a checkpoint's small files say: right for whole ones, one line for damaged ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sawkv.checkpoint import check_weights, head_dims, parse_config, read_checkpoint, text_config
from sawkv.errors import SawkvError
from tests.conftest import MODEL


def test_the_shipped_model_is_whole() -> None:
    checkpoint = read_checkpoint(str(MODEL))
    assert checkpoint is not None
    assert head_dims(checkpoint.config) == [128]
    check_weights(MODEL)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 4096, "num_attention_heads": 32}, [128]),
        ({"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 80}, [80]),
        ({"hidden_size": 4096, "num_attention_heads": 32, "head_dim": None}, [128]),
        ({"text_config": {"head_dim": 256, "global_head_dim": 512}, "head_dim": 7}, [256, 512]),  # Gemma 4
        (
            {"hidden_size": 4096, "num_attention_heads": 32, "attention_head_dim": 160},
            [],
        ),  # Zamba2: not said for certain
        ({"hidden_size": 100, "num_attention_heads": 3}, []),
        ({"hidden_size": 4096, "num_attention_heads": 0}, []),
        ({"n_embd": 768}, []),
        ({}, []),
    ],
)
def test_head_dims(config: dict[str, Any], expected: list[int]) -> None:
    assert head_dims(config) == expected


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    """As Transformers writes them, in the config.json of Mamba 2."""
    file = tmp_path / "config.json"
    file.write_text('{"a": [0.0, {"__float__": "Infinity"}], "b": {"c": {"__float__": -Infinity}}}')
    assert parse_config(file) == {"a": [0.0, math.inf], "b": {"c": -math.inf}}


def test_the_language_model_of_a_vision_model() -> None:
    assert text_config({"llm_config": {"text_config": {"a": 1}}}) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a":', "expected JSON"),
        ("[1, 2]", "expected a JSON object in .*, got list"),
        ("null", "expected a JSON object in .*, got NoneType"),
        ("\xff", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
    ],
)
def test_a_damaged_config_is_named(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    for read in (lambda: parse_config(tmp_path / "config.json"), lambda: read_checkpoint(str(tmp_path))):
        with pytest.raises(SawkvError, match=words) as error:
            read()
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:4],
        lambda content: b"",
        lambda content: b"\xff" * 64,
        lambda content: b"<html>404</html>" * 10,
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        lambda content: (8).to_bytes(8, "little") + b"[[[[]]]]" + content[20:],
        lambda content: (16).to_bytes(8, "little") + b'{"a": {"b": []}}',
    ],
)
def test_damaged_weights_are_named(damage: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(50), "b": torch.randn(3, 3)}, file, {"format": "pt"})
    check_weights(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SawkvError, match="weights: expected") as error:
        check_weights(tmp_path)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert ("git lfs pull" in str(error.value)) == file.read_bytes().startswith(b"version")


def test_a_file_that_the_index_names_is_missed(tmp_path: Path) -> None:
    save_file({"a": torch.randn(5)}, tmp_path / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(SawkvError, match=r"expected 2 files.*got 1: model-00002-of-00002\.safetensors is missing"):
        check_weights(tmp_path)


def test_an_index_that_names_no_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": [], "b": 1}}')
    with pytest.raises(SawkvError, match=r"expected 2 files.*got 0"):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no/such/model/here", "no such directory"),
        ("../no-such-model", "no such directory"),
        ("/no/such", "no such directory"),
        ("a\0b", "expected a checkpoint directory"),
        ("x" * 5000, "expected a checkpoint directory"),
        ("", "expected a checkpoint directory"),
        ("no-such-owner/no-such-model", "no such directory, it is not in the hub's cache, and the hub cannot be asked"),
    ],
)
def test_a_model_that_is_not_there(model: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SawkvError, match=words) as error:
        read_checkpoint(model)
    assert len(str(error.value)) < 600


def test_what_only_an_engine_can_find_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("GGUF")
    assert read_checkpoint(str(tmp_path)) is None
    assert read_checkpoint(str(tmp_path / "model.gguf")) is None
    assert read_checkpoint("s3://bucket/model") is None
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SawkvError, match=r"got the file .*: name the directory that it is in"):
        read_checkpoint(str(tmp_path / "config.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SawkvError, match=r"with a config\.json, got .*which has none"):
        read_checkpoint(str(tmp_path / "empty"))
