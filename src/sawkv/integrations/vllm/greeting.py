"""What `sawkv serve` prints when the server answers: its address, and a chat request to try."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
import urllib.request
from typing import Final

from sawkv.checkpoint import Checkpoint, parse_config
from sawkv.integrations.vllm.options import Options
from sawkv.integrations.vllm.preflight import PORT

PLAIN_CHAT: Final = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    + "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""The chat template of a checkpoint that has none: without one, vLLM refuses chat requests."""
POLL: Final = 0.5
"""Seconds between two attempts to reach the server."""
_OTHER_TOKENIZERS: Final = ("tekken.json", "tokenizer.model.v3", "params.json")
_TEMPLATES: Final = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


def lacks_chat_template(checkpoint: Checkpoint | None, options: Options) -> bool:
    """Whether vLLM would certainly find no chat template, in the checkpoint's files or by model type."""
    named = (
        "--chat-template",
        "--tokenizer",
        "--tokenizer-mode",
        "--skip-tokenizer-init",
        "--runner",
        "--convert",
        "--load-format",
    )
    if checkpoint is None or checkpoint.folder is None or any(options.has(name) for name in named):
        return False
    folder, config = checkpoint.folder, checkpoint.config
    tokenizer = folder / "tokenizer_config.json"
    if not tokenizer.is_file() or any((folder / name).exists() for name in (*_OTHER_TOKENIZERS, *_TEMPLATES)):
        return False
    # vLLM has some for these.
    if "auto_map" in config or any(key.endswith("_config") and key != "quantization_config" for key in config):
        return False
    return not parse_config(tokenizer).get("chat_template")


def base_url(options: Options) -> str | None:
    """Address of the server; None if a plain HTTP client on this machine cannot reach it."""
    if any(options.has(name) for name in ("--uds", "--headless", "--ssl-certfile", "--ssl-keyfile", "--root-path")):
        return None
    host = options.get("--host") or ""
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{host}:{options.get('--port') or PORT}"


def greeting(model: str, options: Options, plain_chat: bool) -> list[str]:
    """Lines to print.

    Args:
        model: as given to `sawkv serve`.
        options: of vLLM.
        plain_chat: whether the chat template is `PLAIN_CHAT`.
    """
    url = base_url(options)
    name = (options.get("--served-model-name") or model).split()[0]
    key = " -H 'Authorization: Bearer KEY'" if options.has("--api-key") or os.environ.get("VLLM_API_KEY") else ""
    if options.has("--runner") or options.has("--convert"):
        return [f"sawkv: the server answers on {url}/v1"]
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    return [
        f"sawkv: the server answers on {url}/v1. Ctrl-C ends it. A request to try:",
        f"  curl {url}/v1/chat/completions{key} \\",
        f"    -H 'Content-Type: application/json' -d '{body}'",
        "The same in Python:",
        "  import openai",
        f'  client = openai.OpenAI(base_url="{url}/v1", api_key="KEY")',
        f'  client.chat.completions.create(model="{name}", messages=[{{"role": "user", "content": "Hello"}}])',
        *(
            ["The model has no chat template, so `user: ...` lines are used: --chat-template names another."]
            if plain_chat
            else []
        ),
    ]


def greet_when_ready(server: subprocess.Popen[bytes], lines: list[str], url: str) -> None:
    """Print lines from a thread as soon as the server answers. Prints nothing if the server ends first."""

    def wait() -> None:
        while server.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                print("\n".join(lines), flush=True)
                return
            time.sleep(POLL)

    threading.Thread(target=wait, name="sawkv-greeting", daemon=True).start()
