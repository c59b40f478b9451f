"""What a SawCache refuses of its arguments and its use, and what it warns of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sawkv import FormatError, LayoutError, SawkvError, UnsupportedError
from sawkv.integrations.transformers import SawCache
from sawkv.integrations.transformers.prepare import warn_once
from tests.transformers.models import make_model, using


def states(batch: int, tokens: int) -> list[torch.Tensor]:
    return [torch.randn(batch, 2, tokens, 16) for _ in range(2)]


def test_bad_arguments() -> None:
    config = make_model("llama").config
    with pytest.raises(FormatError, match="format name: expected one such as int4"):
        SawCache(config, "int4-128")
    with pytest.raises(FormatError, match="divisor of head_dim 16"):
        SawCache(config, "int4-k128-v128")
    with pytest.raises(UnsupportedError, match="without -r32, which vLLM alone serves, got int4-r32"):
        SawCache(config, "int4-r32")
    with pytest.raises(LayoutError, match="at least 1, got 0"):
        SawCache(config, max_cache_len=0)
    with pytest.raises(UnsupportedError, match="expected max_cache_len or offload"):
        SawCache(config, max_cache_len=10, offload=True)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"format": None}, "format name: expected one such as int4 or .*, got None"),
        ({"format": b"int4"}, "got b'int4'"),
        ({"max_cache_len": "7"}, "max_cache_len: expected a whole number, got '7'"),
        ({"max_cache_len": 7.5}, r"got 7\.5"),
        ({"calibration": 3}, "expected a Calibration or the path of its file, got 3"),
        ({"prepare": "no"}, "expected prepare=True or False, got 'no'"),
        ({"offload": None}, "expected offload=True or False, got None"),
    ]
    for arguments, words in wrong:
        with pytest.raises(SawkvError, match=words):
            SawCache(config, **arguments)
    cache = SawCache(config, prepare=False)
    cache.update(*states(2, 3), 0)
    cache.update(*states(2, 3), 1)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: cache.crop("3"), "crop: expected a whole number, got '3'"),  # type: ignore[arg-type]
        (lambda: cache.batch_repeat_interleave(-1), "batch_repeat_interleave: expected at least 1, got -1"),
        (lambda: cache.batch_select_indices(torch.tensor(True)), r"a bool for each of 2 sequences, got \[\]"),
    ]
    for call, words in calls:
        with pytest.raises(SawkvError, match=words):
            call()
    with pytest.raises(UnsupportedError, match="expected one of"):
        SawCache(config, backend="fast").update(*states(1, 3), 0)


def test_bad_use() -> None:
    model, ids = make_model("llama"), torch.randint(1, 99, (2, 10))
    cache = SawCache(model.config)
    with torch.no_grad():
        model(ids, **using(cache))
        with pytest.raises(LayoutError, match="expected 2 sequences"):
            model(ids[:1], **using(cache))
        with pytest.raises(UnsupportedError, match="attention weights"):
            model(ids, **using(cache), output_attentions=True)
    with pytest.raises(LayoutError, match="at most max_cache_len=12"):
        model.generate(ids, **using(SawCache(model.config, max_cache_len=12)), max_new_tokens=8)


def test_the_wrong_attention_is_an_error_not_a_wrong_answer() -> None:
    """The cache was made for another model's config."""
    cache = SawCache(make_model("llama").config)
    with pytest.raises(UnsupportedError, match=r"llama.*SawCache\(model.config\) of that same model"):
        make_model("llama", "sdpa").generate(torch.randint(1, 99, (2, 10)), **using(cache), max_new_tokens=2)


def test_slow_attention_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama", "sdpa")
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model.generate(torch.randint(1, 99, (2, 10)), **using(SawCache(model.config)), max_new_tokens=5)
    lines = [record.getMessage() for record in caplog.records if "cannot read pages" in record.getMessage()]
    assert len(lines) == 1
    assert 'set_attn_implementation("sawkv")' in lines[0]
