"""The plugin must not change models that do not use it. It stands in for vLLM's CPU backend, whose subclasses serve
encoders.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MODEL
from tests.vllm.engine import ENVIRONMENT

pytestmark = pytest.mark.vllm

SCRIPT = """
import json, sys

if __name__ == "__main__":
    from vllm import LLM

    options = dict(runner="pooling", dtype="float32", enforce_eager=True, max_model_len=128, gpu_memory_utilization=0.1)
    llm = LLM(sys.argv[1], **options)
    prompts = [{"prompt_token_ids": [(i * 37 + 11) % 500 for i in range(n)]} for n in (5, 40)]
    outputs = llm.embed(prompts, use_tqdm=False)
    print("EMBEDDINGS", json.dumps([output.outputs.embedding for output in outputs]))
"""


@pytest.mark.newest
def test_an_encoder_gives_the_embeddings_of_vllm_without_the_plugin(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    BertModel(BertConfig(vocab_size=4096, max_position_embeddings=128, initializer_range=0.2, **shape)).save_pretrained(
        tmp_path
    )
    for file in Path(MODEL).glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with_it, without = (embeddings(tmp_path, plugins) for plugins in ({}, {"VLLM_PLUGINS": ""}))
    assert with_it == without
    assert without[0] != without[1], "the first token, whose state is the embedding, sees the others"


def embeddings(model: Path, plugins: dict[str, str]) -> list[list[float]]:
    environment = os.environ | ENVIRONMENT | plugins
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model)], env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("EMBEDDINGS ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    got: list[list[float]] = json.loads(lines[0].removeprefix("EMBEDDINGS "))
    return got
