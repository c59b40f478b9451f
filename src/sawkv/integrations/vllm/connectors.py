"""Which of vLLM's KV connectors carry our pages, and why the others are refused. Imports no vLLM.

A connector is served if it copies pages as opaque bytes, and if what it stores or sends is bound to format, calibration
and model (`offload`) or ends with the engine. docs/offload.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sawkv.errors import SawkvError

NATIVE: Final = "OffloadingConnector"
CHECKED_TIER: Final = "sawkv_fs"
"""Our `type` of a secondary tier: vLLM's file tier with a checksum beside each block."""
TIERED_SPEC: Final = "TieringOffloadingSpec"
HOST_SPEC: Final = "HostTieringSpec"
"""Our `spec_name`: vLLM's tiered offloading, which then runs on a CPU too."""
SPECS: Final = ("CPUOffloadingSpec", TIERED_SPEC, HOST_SPEC)
"""Each `spec_name` that is served; the first is vLLM's default. vLLM loads others from `spec_module_path`."""

SENDING: Final = ("NixlConnector", "NixlPullConnector")
"""Two names of one connector, whose decoding engine reads pages from the prefilling one."""

_TOKEN_KEYS: Final = "it keys pages by token ids alone, so it would load those of another format or calibration"
_BY_NUMBER: Final = "its two ends name pages by block number, and it has not been tried"
_LMCACHE: Final = (
    "it allocates and copies K and V as [2, tokens, heads, head_dim] of one dtype, and our pages are bytes with scales"
    " beside them"
)
_UNBOUND: Final = "other engines may read it, and nothing binds its pages to format and calibration"
_OUTSIDE: Final = "it is not one that vLLM ships, and nothing binds the pages that it carries to format and calibration"
_UNTRIED: Final = "sawkv's pages have not been tried with it"
_REASONS: Final = {
    "ExampleConnector": _TOKEN_KEYS,
    "HF3FSKVConnector": _TOKEN_KEYS,
    "FlexKVConnectorV1": "FlexKV makes its keys outside of vLLM, and has not been tried",
    "LMCacheConnectorV1": _LMCACHE,
    "LMCacheMPConnector": "its server is told the model's name and the block size, and not format and calibration",
    "NixlPushConnector": _BY_NUMBER,
    "MooncakeConnector": _BY_NUMBER,
    "MoRIIOConnector": _BY_NUMBER,
    "MooncakeStoreConnector": _UNBOUND,
    "SimpleCPUOffloadConnector": _UNTRIED,
    "DecodeBenchConnector": "it fills pages with made-up values, which are no rows of ours",
    "ExampleHiddenStatesConnector": "it stores hidden states, and it has not been tried",
    "HiSparseConnector": "it is of sparse attention, which sawkv lacks",
}
_TIERS: Final = {
    "fs": f'it would not notice a damaged file (write "type": "{CHECKED_TIER}" for vLLM\'s file tier with checksums)',
    "obj": _UNBOUND,
    "p2p": _UNBOUND,
    "kvcr": _UNBOUND,
    "example": "it is vLLM's example",
}
WAY_OUT: Final = f"expected {NATIVE} or {SENDING[0]} (docs/offload.md)"


@dataclass(frozen=True)
class Engine:
    """What a connector's use depends on.

    Attributes:
        on_gpu: whether vLLM runs on a GPU.
        lora: whether LoRA is on.
        hybrid: whether the model has layers with recurrent states.
        speculates: whether there is speculative decoding.
    """

    on_gpu: bool
    lora: bool = False
    hybrid: bool = False
    speculates: bool = False


def refused(
    connector: str | None,
    extra: Mapping[str, Any],
    engine: Engine,
    option: str = "--kv-transfer-config",
    module: str | None = None,
) -> list[str]:
    """Reasons not to serve with a connector.

    Args:
        connector: `kv_connector` of vLLM's --kv-transfer-config. --kv-offloading-size sets it too.
        extra: its `kv_connector_extra_config`.
        engine: that uses it.
        option: what the user gave.
        module: its `kv_connector_module_path`, from which vLLM loads a connector of any name.

    Returns:
        One reason per fault, in the words of the options; empty if it is served.

    Raises:
        SawkvError: a part of `extra` has another type.
    """
    if not isinstance(extra, Mapping):
        raise SawkvError(f"{option}: expected an object in kv_connector_extra_config, got {extra!r}")
    if module:
        return [f"{option} with kv_connector_module_path {module}: {_OUTSIDE}; {WAY_OUT}"]
    if connector == "MultiConnector":
        children = _objects(extra, "connectors", option) or [{}]
        names = [child.get("kv_connector") for child in children]
        together = [f"{option} with {name} in a MultiConnector (not tried)" for name in names if name in SENDING]
        return together + [
            reason
            for name, child in zip(names, children, strict=True)
            for reason in refused(
                name,
                child.get("kv_connector_extra_config") or {},
                engine,
                option,
                child.get("kv_connector_module_path"),
            )
        ]
    if connector in SENDING:
        return [f"{option} {what}" for asked, what in _faults_of_sending(extra, engine) if asked]
    if connector != NATIVE:
        why = _REASONS.get(str(connector), "it is not one that sawkv knows")
        return [f"{option} with {connector}: {why}; {WAY_OUT}"]
    tiers = _objects(extra, "secondary_tiers", option)
    found = [f"{option} {what}" for asked, what in _faults(extra, engine, bool(tiers)) if asked]
    for tier in tiers:
        if (kind := tier.get("type")) != CHECKED_TIER:
            why = _TIERS.get(str(kind), "sawkv does not know it")
            found.append(f"{option} with a secondary tier of type {kind}: {why}")
    return found


def _objects(extra: Mapping[str, Any], name: str, option: str) -> list[dict[str, Any]]:
    """A part of `extra` that is a list of objects, empty if it is not there."""
    found = extra.get(name) or []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise SawkvError(f"{option}: expected a list of objects in {name}, got {found!r}")
    return found


def _faults(extra: Mapping[str, Any], engine: Engine, tiers: bool) -> list[tuple[bool, str]]:
    """What of vLLM's native offloading is not served: whether it is asked for, and its name and reason."""
    spec = extra.get("spec_name", SPECS[0])
    return [
        (spec not in SPECS, f"with spec_name {spec}: {_OUTSIDE}"),
        (
            not engine.on_gpu and extra.get("spec_name") != HOST_SPEC,
            f'on a CPU: vLLM copies pages between a GPU and host memory (write "spec_name": "{HOST_SPEC}" for a CPU)',
        ),
        (engine.hybrid, "with recurrent layers (not tried)"),
        (
            bool(extra.get("canonical_layout")),
            "with canonical_layout: it copies pages head by head, and ours are whole",
        ),
        (
            tiers and engine.speculates,
            "with a secondary tier and speculative decoding: the weights of a draft model are not in the keys",
        ),
        (
            tiers and engine.lora,
            "with a secondary tier and --enable-lora: vLLM keys pages by the adapter's name, and another start may give"
            " the name to other weights",
        ),
    ]


def _faults_of_sending(extra: Mapping[str, Any], engine: Engine) -> list[tuple[bool, str]]:
    """The same of NIXL."""
    return [
        (engine.hybrid, "with recurrent layers (not tried)"),
        (
            engine.speculates,
            "with NIXL and speculative decoding: the handshake says nothing of a draft model's weights",
        ),
        (engine.lora, "with NIXL and --enable-lora: the handshake says nothing of an adapter's weights"),
        (
            not extra.get("enforce_handshake_compat", True),
            "with enforce_handshake_compat false: pages of another format or calibration would be read",
        ),
    ]


def leaves_the_engine(transfer: Any) -> bool:
    """Whether other engines may read what vLLM's `kv_transfer_config`, or None, stores or sends."""
    if transfer is None:
        return False
    extra = transfer.kv_connector_extra_config or {}
    return transfer.kv_connector in SENDING or bool(checked_tiers(transfer.kv_connector, extra))


def checked_tiers(connector: str | None, extra: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Options of our file tiers, also those of a MultiConnector's children."""
    if connector == "MultiConnector":
        return [
            tier
            for child in extra.get("connectors") or []
            for tier in checked_tiers(child.get("kv_connector"), child.get("kv_connector_extra_config") or {})
        ]
    return [tier for tier in extra.get("secondary_tiers") or [] if tier.get("type") == CHECKED_TIER]
