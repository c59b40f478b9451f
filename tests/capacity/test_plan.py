"""`sawkv plan` as it is run: figures of well-known models, what it prints, what it refuses, and its exit status."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from sawkv import cli
from sawkv.capacity.memory import GIB
from tests.capacity.configs import AWQ, CONFIGS, FP8, write_config


def plan(capsys: pytest.CaptureFixture[str], model: Path, *options: str) -> dict[str, Any]:
    """What it prints with `--json`; plans by format."""
    assert cli.main(["plan", str(model), "--gpu-memory", "80GiB", "--json", *options]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed | {"formats": {plan["format"].split("-")[0]: plan for plan in printed["formats"]}}


@pytest.mark.parametrize(
    ("name", "changes", "options", "weights", "bf16", "int4"),
    [
        # Weights on each card in GiB: test_weights.py has how they are counted. Then for 16 bits and for INT4: bytes a
        # token, all layers; tokens of a block; bytes of a request's states.
        #
        # 36 layers x 8 heads x (128 x 4), and x 2 x (64 + 4).
        ("qwen3-8b", {}, (), 15.256, (147456, 16, 0), (39168, 64, 0)),
        ("qwen3-8b", {"quantization_config": AWQ}, (), 5.680, (147456, 16, 0), (39168, 64, 0)),
        # 32 x 8 x 512, and x 136.
        ("llama-3.1-8b", {"quantization_config": FP8}, (), 8.458, (131072, 16, 0), (34816, 64, 0)),
        ("mistral-7b", {}, (), 13.489, (131072, 16, 0), (34816, 64, 0)),
        # 32 x 32 x (96 x 4), and x 2 x (48 + 4).
        ("phi-3-mini-4k", {}, (), 7.117, (393216, 16, 0), (106496, 64, 0)),
        # 62 x 16 x 512, and x 136; the vision tower is not loaded.
        ("gemma-3-27b", {}, ("--language-model-only",), 50.309, (507904, 16, 0), (134912, 64, 0)),
        # 36 x 8 x (64 x 4), and x 2 x (32 + 4).
        ("gpt-oss-120b", {}, (), 60.768, (73728, 16, 0), (20736, 64, 0)),
        # 36 x 8 x 512, and x 136; with the vision tower.
        ("qwen3-vl-8b", {}, (), 16.330, (147456, 16, 0), (39168, 64, 0)),
        # 12 x 12 x (64 x 4), and x 2 x (32 + 4).
        ("gpt2", {}, (), 0.232, (36864, 16, 0), (10368, 64, 0)),
        # Of 48 layers each fourth stores K and V: on each of 8 cards 12 x 1 head x (256 x 4), and x 2 x (128 + 4).
        # A state: 3 x 8192 / 8 x 2 + 32 / 8 x 128 x 128 x 2 = 137,216 bytes: 134 tokens of 1,024 bytes, 9 times 16;
        # 520 of 264, 9 times 64.
        # States in 3 groups of 12 layers, 2 for each: 6 x 12 x 144 x 1024, and 6 x 12 x 576 x 264.
        ("qwen3-next-80b", {}, ("--tensor-parallel", "8"), 18.551, (12288, 144, 10616832), (3168, 576, 10948608)),
        # Of 40 layers 10 with 2 heads x 1024, and x 264. A state: 3 x 8192 x 2 + 32 x 128 x 128 x 4 = 2,146,304 bytes:
        # 1,048 tokens of 2,048 bytes, 66 times 16; 4064.98 of 528, 64 times 64.
        # 6 x 10 x 1056 x 2048, and 6 x 10 x 4096 x 528.
        ("qwen3.5-35b-a3b", {}, ("--language-model-only",), 64.560, (20480, 1056, 129761280), (5280, 4096, 129761280)),
        # 4 layers x 8 heads x 512, and x 136. A state: 3 x (10240 + 2048) x 2 + 128 x 80 x 128 x 4 = 5,316,608 bytes:
        # 1,298 tokens of 4,096 bytes, 82 times 16; 4886.6 of 1,088, 77 times 64. 27 states in 7 groups of 4 layers, 3
        # for each: 21 x 4 x 1312 x 4096, and 21 x 4 x 4928 x 1088.
        ("nemotron-nano-9b-v2", {}, (), 16.556, (16384, 1312, 451411968), (4352, 4928, 450379776)),
        # 20 of 35 layers x 2 heads x 1024, and x 264.
        ("gemma-3n-e4b", {}, (), 12.732, (40960, 16, 0), (10560, 64, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_well_known_models(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    changes: dict[str, Any],
    options: tuple[str, ...],
    weights: float,
    bf16: tuple[int, int, int],
    int4: tuple[int, int, int],
) -> None:
    printed = plan(capsys, write_config(tmp_path, name, **changes), *options)
    for key, expected in (("bf16", bf16), ("int4", int4)):
        found = printed["formats"][key]
        assert (found["bytes_per_token"], found["block_size"], found["state_bytes_per_request"]) == expected
        assert found["weights"] / GIB == pytest.approx(weights, abs=0.002)
    assert printed["formats"]["fp8"]["bytes_per_token"] == bf16[0] // 2


def test_tokens_and_requests_of_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mistral 7B in 16 bits: a window of 4,096 and two steps of 8,192 tokens exceed 16,384, so a request holds 1,024
    blocks and one more, of 32 x 16 x 4096 bytes.
    """
    found = plan(capsys, write_config(tmp_path, "mistral-7b"))["formats"]["bf16"]
    assert found["requests"] == found["kv_cache"] // (32 * 16 * 4096) / 1025
    assert found["tokens"] == int(found["requests"] * 16384)


def test_json_has_what_programs_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = plan(capsys, write_config(tmp_path, "qwen3-next-80b"), "--weights", "40GiB")
    assert list(printed["formats"]) == ["bf16", "fp8", "int4"]
    for found in printed["formats"].values():
        assert {
            "format",
            "bytes_per_token",
            "state_bytes_per_request",
            "block_size",
            "least_prefix_hit",
            "tokens",
            "requests",
            "fits",
        } <= set(found)
        assert found["weights"] == 40 * GIB
    assert printed["context"] == 16384
    assert "Weights as given." in printed["assumed"]


def test_states_without_prefix_caching(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One state instead of 3 in each of 7 groups of 4 layers."""
    found = plan(capsys, write_config(tmp_path, "nemotron-nano-9b-v2"), "--no-enable-prefix-caching")["formats"]["int4"]
    assert found["state_bytes_per_request"] == 7 * 4 * 4928 * 1088
    assert found["least_prefix_hit"] is None


def test_the_table_fits_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_config(tmp_path, "nemotron-nano-9b-v2"))
    options = ["--context", "999999", "--format", "bf16-k128-v128", "--no-enable-prefix-caching"]
    assert cli.main(["plan", model, "--gpu-memory", "80GiB", *options]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) < 80
    for part in ("bf16-k128-v128", "states of a request", "1,344", "requests of 131,072 at once"):
        assert part in shown


def test_the_longest_name_of_a_format_stands_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, name = str(write_config(tmp_path, "qwen3-8b")), "int4v3-k128-v128-r128"
    assert cli.main(["plan", model, "--gpu-memory", "80GiB", "--format", name]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["bf16", "fp8", name]
    assert max(map(len, shown.splitlines())) < 80


def test_16_bits_fp8_and_the_format_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(write_config(tmp_path, "qwen3-8b", dtype="float16")), "--gpu-memory", "80GiB"]) == 0
    shown = capsys.readouterr().out
    assert shown.split()[:3] == ["fp16", "fp8", "int4-k128-v128"]
    for part in (
        "2.00x",
        "3.76x",
        "--max-num-batched-tokens 8192",
        "(an A100 or GB10 gets 2048 and 256: give them)",
        "92% of it",
    ):
        assert part in " ".join(shown.split())


def test_requests_are_capped_by_what_the_model_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_config(tmp_path, "phi-3-mini-4k")
    silent = plan(capsys, model)
    assert (silent["context"], silent["notes"]) == (4096, [])  # the default, 16,384, is nobody's wish
    told = plan(capsys, model, "--context", "999999999999")
    assert told["context"] == 4096
    assert "reads at most 4,096 tokens" in told["notes"][0]


@pytest.mark.parametrize(
    ("name", "changes", "options", "status", "blamed"),
    [
        # 18.2 GiB for vLLM less 15.3 of weights, 0.2 and 0.5 leave room for 16,021 tokens in 16 bits: one request too
        # long.
        (
            "qwen3-8b",
            {},
            ("--gpu-memory", "20GiB"),
            0,
            "bf16: the KV cache has no room for one request of 16,384 tokens",
        ),
        ("qwen3-8b", {}, ("--gpu-memory", "16GiB"), 1, "int4-k128-v128: no room is left for a KV cache (weights 15.26"),
        (
            "qwen3-8b",
            {"max_position_embeddings": 10_000_000},
            ("--gpu-memory", "80GiB", "--context", "9999999"),
            1,
            "int4-k128-v128: the KV cache has no room for one request of 9,999,999 tokens",
        ),
    ],
)
def test_what_does_not_fit_is_blamed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    changes: dict[str, Any],
    options: tuple[str, ...],
    status: int,
    blamed: str,
) -> None:
    assert cli.main(["plan", str(write_config(tmp_path, name, **changes)), *options]) == status
    shown = " ".join(capsys.readouterr().out.split())
    assert blamed in shown
    assert ("int4-k128-v128: " in shown) == bool(status)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "80"], "--gpu-memory: expected a number with a unit such as 80GiB, got '80'"),
        (["--gpu-memory", "80 apples"], "got '80 apples'"),
        (["--gpu-memory", "80GiB", "--weights", "16"], "--weights: expected a number with a unit"),
        (["--gpu-memory", "80GiB", "--tensor-parallel", "3"], "--tensor-parallel: expected a divisor of 32 and 8"),
        (["--gpu-memory", "80GiB", "--context", "0"], "--context: expected at least 1"),
        (["--gpu-memory", "80GiB", "--gpu-memory-utilization", "90"], "at most 1, got 90"),
        (["--gpu-memory", "80GiB", "--format", "int4-k256-v0"], "divisor of head_dim"),
        (["--gpu-memory", "80GiB", "--format", "fp5"], "--format: unknown codec"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["plan", str(write_config(tmp_path, "qwen3-8b")), *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":', "expected JSON in"),
        (b"", "expected JSON in"),
        (b"\xff\xfe", "expected JSON in"),
        (b"[1, 2]", "expected a JSON object in"),
        (b"null", "got NoneType"),
        (b"{}", "expected a model_type that Transformers"),
        (b'{"model_type": ["qwen3"]}', "expected a model_type that Transformers"),
        (b'{"model_type": "qwen3", "text_config": 3}', "expected the sizes of a decoder in config.json of a qwen3"),
        (
            b'{"model_type": "qwen3_vl", "text_config": 3}',
            "expected a config.json that Transformers' qwen3_vl class reads",
        ),
        (b'{"model_type": "qwen3", "num_attention_heads": 0}', "expected"),
        (b'{"model_type": "qwen3", "layer_types": [1, 2]}', "expected"),
        (b'{"model_type": "bert"}', "sawkv cannot serve this model: the attention of an encoder"),
    ],
)
def test_a_broken_config_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert cli.main(["plan", str(tmp_path), "--gpu-memory", "80GiB"]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_no_field_of_a_config_can_break_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One field, at any depth, made nonsense: figures, or one line."""
    random = Random(0)
    for _ in range(40):
        config = copy.deepcopy(CONFIGS[random.choice(list(CONFIGS))])
        if random.random() < 0.4:
            config["quantization_config"] = copy.deepcopy(random.choice([AWQ, FP8]))
        place = config
        while True:
            key = random.choice(list(place))
            if not isinstance(place[key], dict) or not place[key] or random.random() < 0.2:
                break
            place = place[key]
        place[key] = random.choice([None, -1, 0, "x", [], {}, 1.5, True, [1], {"a": 1}, [None]])
        write_config(tmp_path, config)
        assert cli.main(["plan", str(tmp_path), "--gpu-memory", "80GiB"]) in (0, 1, 2), (key, place[key])
        assert capsys.readouterr().err.count("\n") <= 1, (key, place[key])


class Hub:
    """Stands in for the hub's HTTP session."""

    def __init__(self, status: int | None, content: bytes = b"") -> None:
        self.status, self.content, self.asked = status, content, 0

    def get(self, url: str, **_: object) -> SimpleNamespace:
        self.asked += 1
        if self.status is None:
            raise ConnectionError(url)
        return SimpleNamespace(status_code=self.status, content=self.content, headers={})


def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Hub, model: str) -> int:
    import huggingface_hub
    from huggingface_hub import constants, utils

    monkeypatch.setattr(utils, "get_session", lambda: hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(safetensors=None))
    return cli.main(["plan", model, "--gpu-memory", "80GiB"])


def test_a_model_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(200, json.dumps(CONFIGS["qwen3-8b"]).encode())
    assert ask(monkeypatch, tmp_path, hub, "Qwen/Qwen3-8B") == 0
    assert "39,168" in capsys.readouterr().out
    assert hub.asked == 1


@pytest.mark.parametrize(
    ("status", "model", "message", "asked"),
    [
        (None, "Qwen/Qwen3-8B", "the hub cannot be asked (ConnectionError)", 1),
        (404, "Qwen/Qwen3-80B", "the hub has no config.json of it (status 404)", 1),
        (401, "meta-llama/Llama-3.1-8B", "a login that may see such a model", 1),
        (200, "none/such/model", "no such directory", 0),
        (200, "./Qwen3-8B", "no such directory", 0),
        (200, "/models/Qwen3-8B", "no such directory", 0),
        (200, "a--b/c..d", "no such directory", 0),
    ],
)
def test_what_is_not_found_is_said_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int | None,
    model: str,
    message: str,
    asked: int,
) -> None:
    hub = Hub(status, b"{}")
    assert ask(monkeypatch, tmp_path, hub, model) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert hub.asked == asked


def test_a_file_is_not_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, "qwen3-8b") / "config.json"
    assert cli.main(["plan", str(config), "--gpu-memory", "80GiB"]) == 2
    assert f"expected a checkpoint directory, got the file {config}" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path.parent), "--gpu-memory", "80GiB"]) == 2
    assert "expected a checkpoint directory with a config.json, got" in capsys.readouterr().err


def test_host_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen3 8B: a block of 16 tokens takes 16 x 147,456 bytes in 16 bits, 64 x 39,168 in INT4. Both are multiples of
    4,096.
    """
    model = write_config(tmp_path, "qwen3-8b")
    options = ("--host-memory", "100GiB", "--context", "32768", "--prefill-speed", "20000")
    bf16, fp8, int4 = plan(capsys, model, *options)["host"]
    blocks = 100 * GIB // (16 * 147456), 100 * GIB // (64 * 39168)
    assert abs(bf16["tokens"] - 16 * blocks[0]) <= 1
    assert abs(int4["tokens"] - 64 * blocks[1]) <= 1
    assert int4["tokens"] / bf16["tokens"] == pytest.approx(147456 / 39168, rel=1e-3)
    assert bf16["seconds"] == pytest.approx(32768 * 147456 / 50e9)
    assert int4["seconds"] == pytest.approx(32768 * 39168 / 50e9)
    assert fp8["seconds"] == pytest.approx(bf16["seconds"] / 2)
    assert int4["break_even"] == pytest.approx(50e9 / 39168)
    assert int4["computed"] == pytest.approx(32768 / 20000)
    # Two cards bring their halves at once, and the context bounds the prefix.
    halves = plan(capsys, model, "--host-memory", "100GiB", "--context", "8192", "--tensor-parallel", "2")["host"]
    assert halves[2]["prefix"] == 8192
    assert halves[2]["seconds"] == pytest.approx(8192 * 39168 / 2 / 50e9)
    assert halves[2]["tokens"] == pytest.approx(int4["tokens"], rel=1e-3)
    assert halves[2]["computed"] is None

    assert cli.main(["plan", str(model), "--gpu-memory", "80GiB", *options]) == 0
    printed = capsys.readouterr().out
    assert "host memory, tokens" in printed
    assert "computing 32,768 tokens" in printed
    assert "bringing 32,768 tokens back" in printed
    assert "50 GB/s between host memory and each card" in printed
    assert max(map(len, printed.splitlines())) < 80


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("qwen3-8b", ("--host-memory", "much"), "--host-memory: expected a number with a unit"),
        ("qwen3-8b", ("--prefill-speed", "5"), "--prefill-speed: expected --host-memory beside it"),
        ("qwen3-8b", ("--host-memory", "1GiB", "--prefill-speed", "0"), "--prefill-speed: expected a rate above 0"),
        ("qwen3-next-80b", ("--host-memory", "1GiB"), "expected a model of attention alone"),
    ],
)
def test_what_is_refused_of_host_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, options: tuple[str, ...], said: str
) -> None:
    assert cli.main(["plan", str(write_config(tmp_path, model)), "--gpu-memory", "80GiB", *options]) != 0
    assert said in capsys.readouterr().err
