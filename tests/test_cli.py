"""The command line, and the pure parts of the demonstration."""

from __future__ import annotations

import sys

import pytest

import sawkv
from sawkv import cli, demo
from sawkv.integrations.vllm import server
from sawkv.spec import CacheFormat


def test_info_shows_the_choice_and_its_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--head-dim", "96"]) == 0
    shown = capsys.readouterr().out
    assert "int4-k32-v32" in shown
    assert "kernels: cpu" in shown
    assert "not cuda: " in shown


def test_serve_hands_other_options_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(server, "serve", lambda *arguments: seen.append(arguments) or 0)
    assert cli.main(["serve", "a/model", "--format", "int8", "--port", "9000"]) == 0
    assert cli.main(["serve", "a/model", "--max-model-len", "64", "--fo", "x"]) == 0
    assert seen == [("a/model", "int8", ["--port", "9000"], None), ("a/model", None, ["--max-model-len", "64", "--fo", "x"], None)]


@pytest.mark.parametrize(
    ("name", "dtype"), [("int4-k128-v0", "int4_per_token_head"), ("int8", "int8_per_token_head"), ("bf16-k128-v128", "auto")]
)
def test_the_servers_command(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.torch.cuda, "device_count", lambda: 1)
    command = server.server_command("m", CacheFormat.parse(name), ["--port", "1"])
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "m"]
    assert command[command.index("--kv-cache-dtype") + 1] == dtype
    assert command[command.index("--additional-config") + 1] == f'{{"sawkv": {{"format": "{name}"}}}}'
    assert command[-4:] == ["--attention-backend", "CUSTOM", "--port", "1"]
    assert "--kv-cache-dtype" not in server.server_command("m", None)


def test_bad_input_is_named_and_gives_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "m", "--format", "int5"]) == 2
    assert "got 'int5'" in capsys.readouterr().err
    assert cli.main(["info", "--head-dim", "72"]) == 2
    assert "head_dim: expected a multiple of 16" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["info", "--colour"])


def test_agreement_counts_tokens_before_the_first_that_differs() -> None:
    assert demo._agreement(["a", "b"], ["a", "b"]) == (2, 2)
    assert demo._agreement(["a", "b", "c"], ["a", "x", "c"]) == (1, 3)
    assert demo._agreement(["a", "b"], ["a"]) == (1, 2)


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert demo._lines("a\x1b[2J\tb\nc", 20) == ["a?[2J   b", "c"]


def test_everything_exported_exists_and_is_listed() -> None:
    assert sorted(sawkv.__all__) == sawkv.__all__
    assert all(hasattr(sawkv, name) for name in sawkv.__all__)
