"""Run as a program: loads vLLM's plugins as an engine would, and prints what it finds as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from sawkv.errors import UnsupportedError


def probe() -> dict[str, Any]:
    """Versions, and whether sawkv is installed as a plugin. Keys: version, platform, installed, backend, problem (a
    text, or None).
    """
    import vllm
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention import selector

    load_general_plugins()  # type: ignore[no-untyped-call]
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from sawkv.integrations.vllm import selection
    from sawkv.integrations.vllm.contract import check_contract

    found: dict[str, Any] = {"version": vllm.__version__, "platform": current_platform.device_type, "problem": None}
    found["installed"] = isinstance(getattr(selector, selection.REPLACED, None), selection.Selection)
    custom = AttentionBackendEnum.CUSTOM
    found["backend"] = custom.get_path() if custom.is_overridden() else None
    found["ours"] = selection.BACKEND
    try:
        check_contract()
    except UnsupportedError as error:
        found["problem"] = str(error)
    return found


if __name__ == "__main__":
    json.dump(probe(), sys.stdout)
