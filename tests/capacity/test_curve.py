"""What each format holds in `sawkv plan`, and its `--tokens`."""

from __future__ import annotations

from pathlib import Path

import pytest

from sawkv import cli
from tests.capacity.configs import write_config
from tests.capacity.test_plan import plan


def test_the_format_with_the_most_bits_that_holds_the_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 KV heads of 128 in 36 layers. Scale and zero point of a row take 4 bytes. Blocks have 64 tokens."""
    model = write_config(tmp_path, "qwen3-8b")
    found = plan(capsys, model, "--tokens", "1.7M")
    cache = found["formats"]["int4v3"]["kv_cache"]
    rows = {
        "int8": (132, 132),
        "int4": (68, 68),
        "int4v3": (68, 52),
        "int3": (52, 52),
        "int3v2": (52, 36),
        "int2": (36, 36),
    }
    assert [(point["format"].split("-")[0], point["bits"], point["tokens"]) for point in found["curve"]] == [
        (name, (k + v) / 32, cache // (36 * 8 * (k + v) * 64) * 64) for name, (k, v) in rows.items()
    ]
    assert found["formats"]["int4v3"]["bytes_per_token"] == 36 * 8 * (68 + 52)
    assert found["notes"][0].endswith(f"sawkv serve {model} --format int4v3")
    assert "prepared_int4v3" in found["notes"][1]
    least = found["curve"][-1]["tokens"]
    exact = plan(capsys, model, "--tokens", str(least))
    assert "int2" in exact["formats"]
    assert cli.main(["plan", str(model), "--gpu-memory", "80GiB", "--tokens", str(least + 1)]) == 2
    assert f"--tokens: expected at most {least:,}, which int2-k128-v128 holds" in capsys.readouterr().err
    assert cli.main(["plan", str(model), "--gpu-memory", "80GiB", "--tokens", "1.7M"]) == 0
    shown = capsys.readouterr().out
    assert shown.split()[:3] == ["bf16", "fp8", "int4v3-k128-v128"]
    assert max(map(len, shown.replace(str(model), "MODEL").splitlines())) < 80
    # int8 has the most bits, and no note of what it costs.
    assert list(plan(capsys, model, "--tokens", "500k")["formats"])[2] == "int8"


def test_formats_that_do_not_fit_the_heads_are_left_out_of_the_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codes of 3 bits need a head_dim that is a multiple of 32."""
    found = plan(capsys, write_config(tmp_path, "qwen3-8b", head_dim=80))
    assert [point["format"].split("-")[0] for point in found["curve"]] == ["int8", "int4", "int2"]


@pytest.mark.parametrize("tokens", ["0", "2.5", "many", "2G", "9" * 400])
def test_tokens_that_are_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", str(tmp_path), "--tokens", tokens])
    assert (
        f"--tokens: expected a number of tokens such as 500000, 500k or 2M, got '{tokens}'" in capsys.readouterr().err
    )
