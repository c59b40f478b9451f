"""`sawkv serve` as the documentation shows it: requests as typed, what it says, and metrics that are whole when it is
idle.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sawkv.integrations.vllm.client import Client, serving
from sawkv.integrations.vllm.options import Options
from tests.conftest import REPOSITORY
from tests.test_docs import PAGES, blocks, console, flags, inline
from tests.vllm.engine import ENVIRONMENT, vllms_parser

pytestmark = pytest.mark.vllm
MODEL = "models/sawkv-6m"
LAYERS, KV_HEADS = 5, 2


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model as a base model is published: without a chat template."""
    folder = tmp_path_factory.mktemp("base")
    for file in (REPOSITORY / MODEL).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def server(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    command = [sys.executable, "-m", "sawkv", "serve", str(base_model), "--served-model-name", MODEL, "--enforce-eager"]
    command += ["--max-model-len", "4096", "--kv-cache-memory-bytes", "268435456"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            key: value for key, value in ENVIRONMENT.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"
        }.items():
            patch.setenv(name, value)
        with serving(command, tmp_path_factory.mktemp("served") / "log") as client:
            yield client


def published(client: Client) -> dict[str, float]:
    """sawkv's metrics, summed over their labels."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^(sawkv_\w+?)(?:\{.*\})? (\S+)$", client.get("/metrics"), re.M):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def test_metrics_are_exact_without_a_later_request(server: Client) -> None:
    before = published(server)
    options = {"model": MODEL, "max_tokens": 20, "ignore_eos": True}
    usages = [server.post("/v1/completions", options | {"prompt": prompt})["usage"] for prompt in ("a b", "c")]
    # The last is not appended.
    tokens = sum(usage["prompt_tokens"] + usage["completion_tokens"] - 1 for usage in usages)
    end = time.monotonic() + 20
    while (now := published(server)).get("sawkv_tokens_total", 0) - before.get("sawkv_tokens_total", 0) < tokens:
        assert time.monotonic() < end, (now, tokens)
        time.sleep(0.5)
    grown = {name: value - before.get(name, 0) for name, value in now.items()}
    assert grown["sawkv_tokens_total"] == tokens
    assert grown["sawkv_rows_total"] == 2 * LAYERS * KV_HEADS * tokens
    assert grown["sawkv_saved_bytes_total"] == grown["sawkv_rows_total"] * (256 - 68)
    time.sleep(3)
    assert published(server) == now, "nothing counts twice"


def test_the_requests_of_the_documentation_are_answered(server: Client) -> None:
    requests = [
        words
        for page in PAGES
        for words in console(page)
        if words[0] == "curl" and any("/v1/" in word for word in words)
    ]
    assert requests
    for words in requests:
        (url,) = (word for word in words if word.startswith("http"))
        answer = server.post(re.sub(r".*?//[^/]*", "", url), json.loads(words[words.index("-d") + 1]))
        assert answer["usage"]["completion_tokens"] > 0


def test_what_it_says_when_it_answers_can_be_typed(server: Client) -> None:
    log, url = server.log.read_text(), f"http://127.0.0.1:{server.port}"
    assert log.count(f"sawkv: the server answers on {url}/v1") == 1
    shown = log[log.index("sawkv: the server answers") :]
    words = shlex.split(shown[shown.index("curl ") : shown.index("The same in Python")].replace("\\\n", " "))
    assert words[1].startswith(url)
    answer = server.post(words[1].removeprefix(url), json.loads(words[words.index("-d") + 1]))
    assert answer["usage"]["completion_tokens"] > 0
    python = shown[shown.index("client =") : shown.index("The model has no chat template")]
    compile(python.replace("  client", "client"), "shown", "exec")
    assert "Route: /v1/chat/completions" not in shown, "it comes after the routes"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
def test_every_option_of_vllm_that_is_named_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = vllms_parser(FlexibleArgumentParser())
    known = {option for action in parser._actions for option in action.option_strings}
    known |= {"--format", "--calibration", "--no-prepare", "--prepare-cache"}
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for text in blocks(page, "yaml"):
            if named := re.match(r"# ([\w.]+)$", text, re.M):
                Path(named[1]).write_text(text)
        for words in [*console(page), *inline(page)]:
            if words[:2] in (["vllm", "serve"], ["sawkv", "serve"]):
                assert flags(words) <= known, words
                Options(words)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_argument_of_llm_that_is_named_exists() -> None:
    from vllm.engine.arg_utils import EngineArgs

    fields: Any = {field.name for field in dataclasses.fields(EngineArgs)}
    for page in PAGES:
        for call in re.findall(r"LLM\(([^)]*)\)", page.read_text()):
            assert set(re.findall(r"(\w+)=", call)) <= fields, call
