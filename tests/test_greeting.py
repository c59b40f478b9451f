"""What `sawkv serve` says when the server answers, and to which models it gives a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sawkv.checkpoint import Checkpoint
from sawkv.integrations.vllm import greeting
from sawkv.integrations.vllm.options import Options


@pytest.mark.parametrize(
    ("files", "config", "options", "lacks"),
    [
        ({"tokenizer_config.json": {}}, {}, [], True),
        ({"tokenizer_config.json": {"chat_template": None}}, {"quantization_config": {}}, ["--port", "1"], True),
        ({"tokenizer_config.json": {"chat_template": "{{ x }}"}}, {}, [], False),
        ({"tokenizer_config.json": {}, "chat_template.jinja": {}}, {}, [], False),
        ({"tokenizer_config.json": {}, "tekken.json": {}}, {}, [], False),
        ({}, {}, [], False),
        ({"tokenizer_config.json": {}}, {"vision_config": {}}, [], False),
        ({"tokenizer_config.json": {}}, {"auto_map": {}}, [], False),
        ({"tokenizer_config.json": {}}, {}, ["--chat-template", "mine.jinja"], False),
        ({"tokenizer_config.json": {}}, {}, ["--runner=pooling"], False),
    ],
)
def test_a_template_is_given_where_there_is_none_for_certain(
    files: dict[str, object], config: dict[str, object], options: list[str], lacks: bool, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert greeting.lacks_chat_template(Checkpoint("m", config, tmp_path), Options(options)) is lacks
    assert greeting.lacks_chat_template(None, Options(options)) is False


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ([], "http://127.0.0.1:8000"),
        (["--host", "0.0.0.0", "--port=90"], "http://127.0.0.1:90"),
        (["--host", "::1"], "http://[::1]:8000"),
        (["--host", "gpu7"], "http://gpu7:8000"),
        (["--uds", "/tmp/x"], None),
        (["--ssl-certfile", "x"], None),
    ],
)
def test_the_address(options: list[str], url: str | None) -> None:
    assert greeting.base_url(Options(options)) == url


def test_the_name_and_the_key_are_those_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(greeting.greeting("a/b", Options(["--served-model-name", "mine", "--api-key", "secret"]), True))
    assert '"model": "mine"' in text
    assert "Authorization: Bearer KEY" in text
    assert "secret" not in text
    assert "--chat-template" in text
    assert "chat" not in "\n".join(greeting.greeting("a/b", Options(["--runner", "pooling"]), False))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert "Bearer" not in "\n".join(greeting.greeting("a/b", Options([]), True))
    monkeypatch.setenv("VLLM_API_KEY", "secret")  # which vLLM takes too
    text = "\n".join(greeting.greeting("a/b", Options([]), True))
    assert "Authorization: Bearer KEY" in text
    assert "secret" not in text
