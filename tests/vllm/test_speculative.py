"""Speculative decoding verifies several tokens of a sequence at once (query lengths above 1): greedy outputs must not
change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.families import make_model
from tests.conftest import MODEL
from tests.vllm.engine import run_engine
from tests.vllm.test_centering import write_calibration

pytestmark = pytest.mark.vllm

PROMPTS = [[[300 + (i * j) % 23 for j in range(1, 120 + 30 * i)] for i in range(1, 5)]]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "waves": PROMPTS,
    "max_tokens": 64,
    "kv_cache_dtype": "int4_per_token_head",
}


def test_a_draft_has_a_cache_of_its_own(tmp_path: Path) -> None:
    """Of other heads than the target's, which has a named format and a calibration: neither is the draft's."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(vocab_size=AutoConfig.from_pretrained(MODEL).vocab_size, head_dim=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "draft")
    calibration = write_calibration(tmp_path, "int4-k64-v128")
    entry = {"additional_config": {"sawkv": {"format": "int4-k64-v128", "calibration": calibration}}}
    alone = run_engine(**OPTIONS, **entry)
    drafted = {"method": "draft_model", "model": str(tmp_path / "draft"), "num_speculative_tokens": 2}
    for options, of_draft in (({}, "SawAttentionImpl"), ({"kv_cache_dtype": "auto"}, "CPUAttentionBackendImpl")):
        result = run_engine(**OPTIONS, **entry, speculative_config=drafted | options)
        assert result.get("implementation") == sorted({"SawAttentionImpl", of_draft}), result.get("error")
        assert result["metrics"]["spec_decode_num_draft_tokens"] > 0
        assert result["tokens"] == alone["tokens"]


def test_a_models_own_draft_head_is_served_from_int4_too(tmp_path: Path) -> None:
    """MTP: a further layer of the model, with pages of its own. Preparation passes it by, and holds without it."""
    model = predictable(tmp_path / "model")
    prompts = [[[(3 * i * j + 7) % 50 + 2 for j in range(1, 90 + 30 * i)] for i in range(1, 4)]]
    options = OPTIONS | {
        "model": str(model),
        "waves": prompts,
        "skip_tokenizer_init": True,
        "additional_config": {"sawkv": {"prepare": True, "prepare_cache": str(tmp_path / "kept")}},
    }
    drafted = run_engine(**options, speculative_config={"method": "mtp", "num_speculative_tokens": 2})
    alone = run_engine(**options)
    for result, prepared in ((drafted, "kept in"), (alone, "prepared in")):
        assert result.get("implementation") == ["SawAttentionImpl"], result.get("error")
        assert any(prepared in line and str(tmp_path / "kept") in line for line in result["log"])
    assert not any("preparing" in line for line in alone["log"])
    assert drafted["metrics"]["spec_decode_num_accepted_tokens"] > 0
    assert drafted["tokens"] == alone["tokens"]


def predictable(folder: Path, family: str = "glm-4.5") -> Path:
    """A family in small, with an MTP layer that is its last layer, reads embeddings alone and so guesses some tokens:
    embeddings outweigh what layers add.
    """
    make_model(folder, family)
    config = json.loads((folder / "config.json").read_text())
    last = config["num_hidden_layers"] - 1
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        added = any(part in name for part in ("o_proj", "out_proj", "down_proj"))
        weight *= 20 if "embed_tokens" in name else 0.15 if added else 1
    extra = f"model.layers.{last + 1}."
    layer, product, norms = {
        "glm-4.5": (extra, f"{extra}eh_proj", ("enorm", "hnorm", "shared_head.norm")),
        "qwen3-next": ("mtp.layers.0.", "mtp.fc", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")),
    }[family]
    head = {
        f"{layer}{name.split('.', 3)[3]}": x for name, x in weights.items() if name.startswith(f"model.layers.{last}.")
    }
    around = product.rpartition(".")[0]
    head |= {f"{around}.{name}.weight": weights["model.norm.weight"] for name in norms}
    size = config["hidden_size"]
    head[f"{product}.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1)
    if family == "glm-4.5":
        head[f"{layer}shared_head.head.weight"] = weights["lm_head.weight"]
        head[f"{layer}embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    save_file(weights | {name: x.clone() for name, x in head.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder
