"""Which of vLLM's KV connectors are served: by name, with the reason."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sawkv.errors import SawkvError
from sawkv.integrations.vllm import connectors
from sawkv.integrations.vllm.connectors import Engine, refused

ON_A_GPU = Engine(on_gpu=True)


def tiers(*kinds: str) -> dict[str, Any]:
    return {"spec_name": connectors.TIERED_SPEC, "secondary_tiers": [{"type": kind} for kind in kinds]}


def test_host_memory_and_files_with_checksums_are_served() -> None:
    assert refused("OffloadingConnector", {"cpu_bytes_to_use": 1}, ON_A_GPU) == []
    assert refused("OffloadingConnector", tiers("sawkv_fs"), ON_A_GPU) == []
    children = [{"kv_connector": "OffloadingConnector", "kv_connector_extra_config": tiers("sawkv_fs")}]
    assert refused("MultiConnector", {"connectors": children}, ON_A_GPU) == []
    assert refused("OffloadingConnector", {"cpu_bytes_to_use": 1}, Engine(on_gpu=True, lora=True)) == []


@pytest.mark.parametrize(
    ("connector", "extra", "changes", "reasons"),
    [
        ("OffloadingConnector", {}, {"on_gpu": False}, ["on a CPU"]),
        ("OffloadingConnector", {}, {"hybrid": True}, ["recurrent layers"]),
        ("OffloadingConnector", {"canonical_layout": True}, {}, ["canonical_layout"]),
        ("OffloadingConnector", tiers("fs", "sawkv_fs", "obj", "new"), {}, ['"type": "sawkv_fs"', "obj", "new: sawkv"]),
        ("OffloadingConnector", tiers("sawkv_fs"), {"lora": True}, ["--enable-lora"]),
        ("OffloadingConnector", tiers("sawkv_fs"), {"speculates": True}, ["speculative decoding"]),
        ("OffloadingConnector", {}, {"speculates": True}, []),
        ("OffloadingConnector", {"spec_name": connectors.HOST_SPEC}, {"on_gpu": False}, []),
        ("OffloadingConnector", {"spec_name": "TheirSpec", "spec_module_path": "their"}, {}, ["spec_name TheirSpec"]),
        ("ExampleConnector", {}, {}, ["token ids alone"]),
        ("NixlConnector", {}, {}, []),
        ("NixlConnector", {"enforce_handshake_compat": False}, {}, ["enforce_handshake_compat false"]),
        ("NixlPullConnector", {}, {"lora": True}, ["--enable-lora"]),
        ("NixlConnector", {}, {"speculates": True}, ["speculative decoding"]),
        ("NixlConnector", {}, {"hybrid": True}, ["recurrent layers"]),
        ("NixlPushConnector", {}, {}, ["by block number"]),
        ("LMCacheConnectorV1", {}, {}, [re.escape("[2, tokens, heads, head_dim]")]),
        ("MultiConnector", {}, {}, ["with None"]),
        (
            "MultiConnector",
            {"connectors": [{"kv_connector": "OffloadingConnector"}, {"kv_connector": "NixlConnector"}]},
            {},
            ["with NixlConnector in a MultiConnector"],
        ),
        (
            "MultiConnector",
            {"connectors": [{"kv_connector": "OffloadingConnector", "kv_connector_module_path": "their.store"}]},
            {},
            [re.escape("kv_connector_module_path their.store: it is not one that vLLM ships")],
        ),
        (None, {}, {}, ["with None: it is not one that sawkv knows"]),
    ],
)
def test_others_are_refused_by_name(
    connector: str | None, extra: dict[str, Any], changes: dict[str, bool], reasons: list[str]
) -> None:
    found = refused(connector, extra, replace(ON_A_GPU, **changes))
    assert len(found) == len(reasons)
    for text, reason in zip(found, reasons, strict=True):
        assert re.search(reason, text)


@pytest.mark.parametrize(
    ("connector", "extra", "words"),
    [
        ("MultiConnector", {"connectors": ["NixlConnector"]}, "a list of objects in connectors"),
        ("MultiConnector", {"connectors": 5}, "a list of objects in connectors"),
        ("OffloadingConnector", {"secondary_tiers": {"type": "sawkv_fs"}}, "a list of objects in secondary_tiers"),
        ("OffloadingConnector", {"secondary_tiers": ["sawkv_fs"]}, "a list of objects in secondary_tiers"),
        ("MultiConnector", {"connectors": [{"kv_connector_extra_config": [1]}]}, "kv_connector_extra_config, got [1]"),
    ],
)
def test_parts_of_another_type_are_named(connector: str, extra: dict[str, Any], words: str) -> None:
    with pytest.raises(SawkvError, match=re.escape(words)):
        refused(connector, extra, ON_A_GPU)


def test_every_connector_that_vllm_ships_has_a_reason_or_is_served() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    factory = Path(spec.origin).parent / "distributed/kv_transfer/kv_connector/factory.py"
    shipped = set(re.findall(r'register_connector\(\s*"(\w+)"', factory.read_text()))
    assert len(shipped) > 10
    for name in shipped - {"MultiConnector", "OffloadingConnector", *connectors.SENDING}:
        (reason,) = refused(name, {}, ON_A_GPU)
        assert name in reason
        assert "not one that sawkv knows" not in reason
