"""Binds pages that leave the engine to what they were written with.

vLLM names a stored block by a hash of its tokens, and a block that is sent by its number, and neither by format nor by
calibration. Host memory belongs to one engine and ends with it. Files do not: engines that share a folder would read
each other's pages wrongly. So the file tier (`disk`) keeps its blocks in a folder that is named by a fingerprint of all
that a block's bytes depend on, besides its tokens. Two engines that send pages compare a string in NIXL's handshake:
it gets the fingerprint too. `bind` does both, when the engine core has prepared the model and has not made its
connector.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from sawkv.errors import UnsupportedError
from sawkv.integrations.vllm.connectors import CHECKED_TIER, HOST_SPEC, SENDING, checked_tiers, leaves_the_engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")


def install() -> None:
    """Make the names of our tier and of our spec known to this process. vLLM's front end asks for them too."""
    with contextlib.suppress(ImportError):  # a vLLM without tiers refuses the names itself
        from vllm.v1.kv_offload.factory import OffloadingSpecFactory
        from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

        with contextlib.suppress(ValueError):  # they are known already
            SecondaryTierFactory.register_tier(CHECKED_TIER, "sawkv.integrations.vllm.disk", "CheckedFileTier")
            OffloadingSpecFactory.register_spec(HOST_SPEC, "sawkv.integrations.vllm.host", "HostTieringSpec")


def bind(executor: Any, vllm_config: VllmConfig) -> None:
    """Tell what may carry pages to other engines what this engine's pages are written with.

    Raises:
        UnsupportedError: vLLM's handshake has changed.
    """
    transfer: Any = vllm_config.kv_transfer_config
    if not leaves_the_engine(transfer):
        return
    ranks = executor.collective_rpc(describe)
    if not any("page size" in layer for layers in ranks for layer in layers.values()):
        return  # no layer is ours
    written_with = {f"rank {rank}": layers for rank, layers in enumerate(ranks)} | {"model": _model(vllm_config)}
    for tier in checked_tiers(transfer.kv_connector, transfer.kv_connector_extra_config or {}):
        tier["written_with"] = written_with
    if transfer.kv_connector in SENDING:
        executor.collective_rpc(_bind_handshake, args=(summary(written_with),))


def summary(written_with: dict[str, Any]) -> str:
    """The fingerprint and what it is of, in one line that tells a reader of both ends' lines what differs."""
    model = written_with["model"]
    layers = [layer for rank, its in written_with.items() if rank != "model" for layer in its.values()]

    def of(name: str) -> str:
        return "/".join(sorted({str(layer[name]) for layer in layers if name in layer}))

    calibration = hashlib.sha256(of("centers, gains and feedback").encode()).hexdigest()
    return (
        f"sawkv {fingerprint(written_with)} ({of('format')}, page size {of('page size')}, calibration"
        f" {calibration[:8]}, weights {model['weights'][:8]}, {len(written_with) - 1} ranks)"
    )


def fingerprint(written_with: dict[str, Any]) -> str:
    """Of what `bind` found.

    Returns:
        64 hex digits.
    """
    return hashlib.sha256(json.dumps(written_with, sort_keys=True, default=str).encode()).hexdigest()


def differences(here: Any, there: Any, name: str = "") -> list[str]:
    """What two `written_with` differ in, by name: one line each."""
    if isinstance(here, dict) and isinstance(there, dict):
        return [
            line
            for key in sorted(here.keys() | there.keys())
            for line in differences(here.get(key), there.get(key), f"{name}, {key}" if name else key)
        ]
    return [] if here == there else [f"{name}: {there}, here {here}"]


def describe(worker: Any) -> dict[str, Any]:
    """What the pages of each of a worker's layers are written with, by the layer's name."""
    from sawkv.integrations.vllm.backend import SawAttentionImpl

    layers: dict[str, Any] = {}
    for name, layer in worker.vllm_config.compilation_config.static_forward_context.items():
        pages = getattr(layer, "kv_cache", None)
        pages = pages[0] if isinstance(pages, (list, tuple)) else pages  # vLLM 0.26 has one per virtual engine
        if pages is None or not pages.numel():
            continue
        impl = getattr(layer, "impl", None)
        layers[name] = {
            "shape": list(pages.shape[1:]),
            "strides": list(pages.stride()),
            "shares the pages of": getattr(impl, "kv_sharing_target_layer_name", None),
            **(
                impl.written_with(pages)
                if isinstance(impl, SawAttentionImpl)
                else {"format": f"{type(layer).__name__} {getattr(layer, 'kv_cache_dtype', '')} {pages.dtype}"}
            ),
        }
    return layers


def _model(vllm_config: VllmConfig) -> dict[str, Any]:
    """What computes K and V: configuration, dtype, quantization, weights, parallel sizes and vLLM's version. Not the
    device, as another one computes the same but for rounding.
    """
    from sawkv.integrations.vllm.prepare import computation, weights_digest

    parallel, found = vllm_config.parallel_config, computation(vllm_config)
    found.pop("device")
    weights = weights_digest(vllm_config)
    if weights is None:
        logger.warning(
            "sawkv: the weights are not files of a checkpoint, so no later start will find what this one stores"
        )
    return {
        **found,
        "weights": weights or uuid.uuid4().hex,
        "tensor parallel": parallel.tensor_parallel_size,
        "pipeline parallel": parallel.pipeline_parallel_size,
    }


def _bind_handshake(worker: Any, what: str) -> None:
    """Add a line to the string that NIXL's two ends compare, here and in what peers ask for."""
    from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group

    ours: Any = getattr(get_kv_transfer_group(), "connector_worker", None)
    payload: Any = getattr(ours, "xfer_handshake_metadata", None)
    if getattr(payload, "compatibility_hash", None) is None or payload.compatibility_hash != ours.compat_hash:
        raise UnsupportedError(
            "sawkv does not fit this vLLM: it needs NixlConnectorWorker.compat_hash and .xfer_handshake_metadata"
        )
    ours.compat_hash = payload.compatibility_hash = f"{ours.compat_hash} {what}"


@contextlib.contextmanager
def disconnected(executor: Any, vllm_config: VllmConfig) -> Iterator[None]:
    """Keep the workers' connector out of the steps within: preparation measures with blank constants, and what it
    computes must not be stored.
    """
    if vllm_config.kv_transfer_config is None:
        yield
        return
    executor.collective_rpc(_connect, args=(False,))
    try:
        yield
    finally:
        executor.collective_rpc(_connect, args=(True,))


def _connect(worker: Any, on: bool) -> None:
    from vllm.distributed.kv_transfer import kv_transfer_state as state

    switch = getattr(getattr(worker.model_runner, "kv_connector", None), "set_disabled", None)
    if switch is not None:  # the newer model runner's own
        switch(not on)
    elif not hasattr(state, "_KV_CONNECTOR_AGENT"):
        raise UnsupportedError("sawkv does not fit this vLLM: it needs kv_transfer_state._KV_CONNECTOR_AGENT")
    elif on:
        state._KV_CONNECTOR_AGENT = worker.sawkv_connector
    else:
        worker.sawkv_connector, state._KV_CONNECTOR_AGENT = state._KV_CONNECTOR_AGENT, None
