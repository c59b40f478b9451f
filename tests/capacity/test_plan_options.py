"""`sawkv plan` with dtypes of states, stages of a pipeline and drafts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sawkv import cli
from sawkv.capacity.memory import GIB
from tests.capacity.configs import write_config
from tests.capacity.test_plan import plan


def test_dtypes_of_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state of Qwen3.5-35B-A3B has 3 x 8192 values of a convolution and 32 x 128 x 128 of a recurrence."""
    model = write_config(tmp_path, "qwen3.5-35b-a3b")
    options = ("--language-model-only", "--weights", "65GiB")
    wide = plan(capsys, model, *options)
    narrow = plan(capsys, model, *options, "--mamba-ssm-cache-dtype", "float16")
    both = plan(capsys, model, *options, "--mamba-ssm-cache-dtype", "bfloat16", "--mamba-cache-dtype", "float32")
    # Of 528 bytes per token: 49,152 + 2,097,152, 49,152 + 1,048,576, and 98,304 + 1,048,576 bytes, 64 tokens at a time.
    assert [each["formats"]["int4"]["block_size"] for each in (wide, narrow, both)] == [4096, 2112, 2176]
    (said,) = wide["notes"]
    assert f"would hold {narrow['formats']['int4']['tokens']:,} tokens instead of" in said
    assert f"{wide['formats']['int4']['tokens']:,};" in said
    assert not narrow["notes"]


def test_the_page_has_what_its_commands_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of hybrids in docs/plan.md."""
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text().partition("## Hybrids")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")][1:]
    model, names = write_config(tmp_path, "qwen3.5-35b-a3b"), {"16 bits": "bf16", "fp8": "fp8", "INT4": "int4"}
    printed: list[dict[str, Any]] = []
    for states, cache, least_hit, *tokens in rows:
        if states:
            options = states.partition("`")[2].rstrip("`").split()
            fixed = ("--gpu-memory", "141GiB", "--language-model-only", *options)
            printed = [plan(capsys, model, *fixed, "--context", str(n << 10))["formats"] for n in (4, 32, 128)]
        found = [each[names[cache]] for each in printed]
        hits = [f"{each['least_prefix_hit']:,}" if each["least_prefix_hit"] else "none" for each in found]
        assert hits == [least_hit] * 3
        assert [f"{each['tokens']:,}" for each in found] == tokens, (states, cache)
    assert len(rows) == 12


def test_stages_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 36 layers each of two stages stores 18, and has one of the two tables; the last makes the logits."""
    model = write_config(tmp_path, "qwen3-8b")
    one, two = plan(capsys, model), plan(capsys, model, "--pipeline-parallel", "2")
    whole, half = one["formats"]["int4"], two["formats"]["int4"]
    assert two["pipeline_parallel"] == 2
    assert half["bytes_per_token"] * 2 == whole["bytes_per_token"] == 39168
    assert half["weights"] * 2 == pytest.approx(whole["weights"], rel=1e-6)
    assert half["token_counts"] == whole["token_counts"]
    assert half["tokens"] > 2 * whole["tokens"]
    said = "Bytes are those of the fullest of 2 cards, tokens and requests those of all together."
    assert said in two["assumed"]
    assert said.replace("the fullest", "each") in plan(capsys, model, "--tensor-parallel", "2")["assumed"]
    assert not any("cards" in line for line in one["assumed"])
    tied = write_config(tmp_path / "tied", "qwen3-8b", tie_word_embeddings=True)
    apart, all_in_one = (
        plan(capsys, tied, *options)["formats"]["int4"] for options in (("--pipeline-parallel", "2"), ())
    )
    assert apart["weights"] * 2 - all_in_one["weights"] == pytest.approx(2 * 151936 * 4096, rel=1e-6), "on both"
    # Of 40 layers every fourth attends: 3 of the first 13, 4 of the next 14 and 3 of the last 13.
    hybrid = write_config(tmp_path / "hybrid", "qwen3.5-35b-a3b")
    found = plan(capsys, hybrid, "--language-model-only", "--pipeline-parallel", "3", "--weights", "60GiB")
    assert found["formats"]["bf16"]["bytes_per_token"] in (3 * 2048, 4 * 2048)


def test_bits_of_a_format_where_the_fullest_stage_has_no_attention(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_config(tmp_path, "nemotron-nano-9b-v2")
    found = plan(capsys, model, "--weights", "30GiB", "--pipeline-parallel", "7")
    assert found["formats"]["bf16"]["bytes_per_token"] == 0
    assert found["curve"] == [
        {**row, "bits": alone["bits"]} for row, alone in zip(found["curve"], plan(capsys, model)["curve"], strict=True)
    ]


def test_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, draft = write_config(tmp_path, "qwen3-8b"), write_config(tmp_path / "draft", "gpt2")

    def speculate(served: Path, *options: str, **config: Any) -> dict[str, Any]:
        return plan(capsys, served, "--speculative-config", json.dumps(config), *options)

    alone, of_draft = plan(capsys, model), plan(capsys, draft)
    both = speculate(model, model=str(draft), num_speculative_tokens=4)
    for name in ("bf16", "int4"):
        for size in ("bytes_per_token", "weights"):
            wanted = alone["formats"][name][size] + of_draft["formats"][name][size]
            assert both["formats"][name][size] == wanted
    assert "4 tokens drafted per step, by 12 layers with a cache" in " ".join(both["assumed"])
    narrow = speculate(model, "--format", "int3", model=str(draft), num_speculative_tokens=4)["formats"]
    # Of GPT-2 12 layers of 12 heads of 64 channels, which vLLM stores in INT4: the name of the format is the model's.
    assert [narrow["int3"]["bytes_per_token"], both["formats"]["int4"]["bytes_per_token"]] == [
        36 * 8 * 104 + 12 * 12 * 72,
        36 * 8 * 136 + 12 * 12 * 72,
    ]
    last = speculate(model, "--pipeline-parallel", "2", model=str(draft), num_speculative_tokens=4)["formats"]["int4"]
    of_half = alone["formats"]["int4"]["weights"] / 2
    assert last["weights"] == pytest.approx(of_half + of_draft["formats"]["int4"]["weights"], abs=1), "all in one stage"
    ngram = speculate(model, method="ngram", num_speculative_tokens=4)
    assert ngram["formats"] == alone["formats"]
    suffix = speculate(model, method="suffix")
    assert suffix["formats"] == alone["formats"]
    assert "24 tokens drafted per step, by no layers with a cache" in " ".join(suffix["assumed"])
    # Of 40 layers 10 attend, and one more drafts. A request holds 2 + 2 states in each of 3 groups of 11 layers.
    hybrid = write_config(tmp_path / "hybrid", "qwen3.5-35b-a3b")
    options = ("--language-model-only", "--weights", "65GiB")
    drafting = speculate(hybrid, *options, method="mtp", num_speculative_tokens=2)["formats"]["int4"]
    assert drafting["bytes_per_token"] == 11 * 528
    # A state: (3 + 2) x 8192 x 2 + 32 x 128 x 128 x 4 = 2,179,072 bytes: 4,127.03 tokens of 528, 65 times 64.
    assert drafting["state_bytes_per_request"] == 12 * 11 * 4160 * 528
    counted = speculate(hybrid, "--language-model-only", method="mtp", num_speculative_tokens=2)
    assert counted["formats"]["int4"]["weights"] / GIB == pytest.approx(64.56 + 1.6, abs=0.1)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"method": "mtp"}',
        '{"model": "x", "num_speculative_tokens": 0}',
        '{"method": "ngram", "num_speculative_tokens": true}',
    ],
)
def test_a_draft_that_is_not_described_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    model = write_config(tmp_path, "qwen3-8b")
    assert cli.main(["plan", str(model), "--gpu-memory", "80GiB", "--speculative-config", text]) == 2
    assert "--speculative-config: expected a JSON object with num_speculative_tokens, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("qwen3-8b", {"method": "mtp"}, "expected a model with draft layers of its own, got a qwen3"),
        ("three drafting", {"method": "mtp", "num_speculative_tokens": 4}, "that 3 draft layers divide, got 4"),
        ("qwen3-8b", {"method": "eagle3"}, "expected a draft model, or method mtp, ngram or suffix, got"),
        ("qwen3-8b", {}, "expected a draft model, or method mtp, ngram or suffix, got"),
        ("qwen3-8b", {"model": 3}, "expected a draft model, or method mtp, ngram or suffix, got"),
        ("qwen3-8b", {"model": "granite-4-h-small"}, "expected a draft model of attention alone"),
        ("qwen3-8b", {"model": "gpt2", "method": "medusa"}, "expected a draft model, or method mtp, ngram or suffix"),
        ("qwen3-8b", {"model": "gpt2", "method": ["eagle"]}, "expected a draft model, or method mtp, ngram or suffix"),
        ("qwen3-8b", {"model": "gpt2", "draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size that is"),
        ("qwen3-8b", {"model": "gpt2", "kv_cache_dtype": "auto"}, "expected a draft with a cache in the model's"),
    ],
)
def test_drafts_that_vllm_would_not_start_or_plan_cannot_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, config: dict[str, Any], reason: str
) -> None:
    drafting = name == "three drafting"
    model = write_config(tmp_path, "qwen3-8b", num_nextn_predict_layers=3) if drafting else write_config(tmp_path, name)
    if isinstance(draft := config.get("model"), str):
        config = config | {"model": str(write_config(tmp_path / "draft", draft))}
    text = json.dumps({"num_speculative_tokens": 2} | config)
    assert cli.main(["plan", str(model), "--gpu-memory", "80GiB", "--speculative-config", text]) == 2
    assert reason in capsys.readouterr().err
