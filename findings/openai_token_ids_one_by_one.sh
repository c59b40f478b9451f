#!/usr/bin/env bash
# OpenAI's Python client looks at the type of each token of a prompt of token ids, twice, before it sends the request, and
# the asynchronous client does so in the event loop.
#
# Versions: openai 3.57.0, httpx 0.28.1, Python 3.11.
# Seen: for a prompt of 28,000 ids, `completions.create` makes some 2.7 million calls of functions; the same prompt in
#       `extra_body`, which the client sends as it is, 3,400. In time: 0.4 s and 0.006 s of one core.
# Why it matters: a load generator that keeps many conversations in flight by this client measures itself. While it prepares
#       a prompt, no answer of the others is read: with 64 conversations of 28,000 tokens, a turn of all of them waits some
#       10 s, which look like the server's time to first token.
# Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check openai==3.57.0 httpx==0.28.1
venv/bin/python - <<'PYTHON'
import asyncio
import cProfile
import json
import pstats
import time

import httpx
import openai

sent = []


def answer(request: httpx.Request) -> httpx.Response:
    sent.append(json.loads(request.content)["prompt"])
    choice = {"index": 0, "text": "a", "finish_reason": "length", "logprobs": None}
    return httpx.Response(200, json={"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})


async def main() -> None:
    client = openai.AsyncOpenAI(
        api_key="-", base_url="http://localhost/v1", http_client=httpx.AsyncClient(transport=httpx.MockTransport(answer))
    )
    prompt = list(range(28_000))
    ways = {"prompt": {"prompt": prompt}, "extra_body": {"prompt": "", "extra_body": {"prompt": prompt}}}
    calls = {}
    for name, words in ways.items():
        await client.completions.create(model="m", max_tokens=1, **words)  # imports, caches
        start = time.perf_counter()
        await client.completions.create(model="m", max_tokens=1, **words)
        seconds = time.perf_counter() - start
        with cProfile.Profile() as profile:
            await client.completions.create(model="m", max_tokens=1, **words)
        calls[name] = pstats.Stats(profile).total_calls
        print(f"{name:<10} {calls[name]:>9,} calls, {seconds:.3f} s")
    assert all(each == prompt for each in sent), "what is sent differs"
    assert calls["prompt"] > 20 * len(prompt) and calls["extra_body"] < len(prompt), "the behaviour has changed"


print(f"openai {openai.__version__}:")
asyncio.run(main())
PYTHON
