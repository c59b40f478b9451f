"""One family of each kind of attention: sawkv's pages against vLLM's own cache, or a refusal by name; and nothing
changed without them.

`benchmarks.families` has the families and what is expected of each, `benchmarks.architectures` the checks. One process
runs all of them, as most of a first start is imports.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.architectures import Task, expected, run
from benchmarks.families import FAMILIES, SERVED

pytestmark = pytest.mark.vllm

ALL = ("plain", "int4", "simulated")
TESTED = {
    "gpt-oss": ("plain",),
    "gemma-2": ("plain",),
    "minicpm-3": ("plain",),
    "qwen3-next": ("plain",),
    "granite-4-h": ("plain", "int4"),
    "lfm-2": ("plain",),
    "gemma-3n": ("plain",),
    "gemma-4": ALL,
    "gemma-4-e": ("plain",),
    "deepseek-v3": ("int4",),
    "llama-4": ("int4",),
    "bloom": ("int4",),
}
"""What is checked of each. gpt-oss and Qwen3-Next are MoE. Dense models are in `test_controls`, windows in
`test_windows`, encoders in `test_other_models`. M-RoPE is missing, as vLLM's files of such models need torchvision.
"""
RECURRENT = ("qwen3-next", "granite-4-h")
UNTOUCHED = (*RECURRENT, "gemma-3n")

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found() -> Found:
    """By family."""
    tasks = [Task(name, "vllm", formats) for name, formats in TESTED.items()]
    return {task.name: record for task, record in run(tasks, gpu=False)}


@pytest.mark.parametrize("name", TESTED)
def test_a_family_is_served_as_vllms_own_cache_serves_it_or_refused_by_name(found: Found, name: str) -> None:
    family, record = FAMILIES[name], found[name]
    assert expected(family, "vllm", record, gpu=False), {key: value for key, value in record.items() if key != "texts"}
    assert set(record["checks"]) == (set(TESTED[name]) if family.vllm == SERVED else set())


@pytest.mark.parametrize("name", RECURRENT)
def test_prefixes_are_found_and_requests_preempted_beside_recurrent_states(found: Found, name: str) -> None:
    happened = found[name]["happened"]
    assert happened["hits"] > 0
    assert happened["preemptions"] > 0
    assert happened["block"] == 128, "the prompts take several steps, and several blocks"


def test_a_plugin_that_is_not_used_changes_no_text_and_no_log_probability(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    for task, without in run([Task(name, "vllm", ()) for name in UNTOUCHED], gpu=False):
        assert len(without["texts"]) == 9
        assert without["texts"] == found[task.name]["texts"], task.name


def test_what_is_not_expected_fails() -> None:
    """A family that stops being served, and one that stops being refused."""
    served, refused = FAMILIES["llama-3"], FAMILIES["llama-4"]
    assert expected(served, "vllm", {"outcome": "served", "detail": ""}, gpu=False)
    for outcome in ("refused", "served wrong", "not served by the engine alone"):
        assert not expected(served, "vllm", {"outcome": outcome, "detail": "sawkv: out of order"}, gpu=False)
    assert expected(refused, "vllm", {"outcome": "refused", "detail": f"sawkv: {refused.vllm}"}, gpu=False)
    for outcome, detail in (
        ("refused", "sawkv: another reason"),
        ("served", ""),
        ("not served by the engine alone", refused.vllm),
    ):
        assert not expected(refused, "vllm", {"outcome": outcome, "detail": detail}, gpu=False)
