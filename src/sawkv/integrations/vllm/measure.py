"""Preparation in a worker: layers attend exactly, measure Q, K and V, and take the fitted calibration.

`prepare` conducts it from the engine core, by the functions at the end of this file. Pages written without preparation
would change the states of all later layers, so no page is read or written while layers measure. They attend to the K
and V of the step itself, in 16 bits. Only prompts that lie in one step count, because only their tokens see their whole
prefix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, get_world_group
from vllm.model_executor.layers.linear import RowParallelLinear

from sawkv.errors import CalibrationError, UnsupportedError
from sawkv.format.feedback import Feedback
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.config import SawConfig
from sawkv.integrations.vllm.exact import attend_exactly
from sawkv.integrations.vllm.prepare import served_context
from sawkv.prepare.calibration import Calibration, LayerCalibration, model_id
from sawkv.prepare.fit import fit
from sawkv.prepare.linear import LinearInFp32
from sawkv.prepare.statistics import LayerStatistics

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from sawkv.integrations.vllm.backend import SawAttentionImpl

HeadShape = tuple[int, int]
"""KV heads of a layer, on all ranks together, and channels per head. In some models layers differ in it (Gemma 4)."""
IDENTITY_ROWS = 256
"""Rows of the identity per pass through a packed projection."""


@dataclass(frozen=True)
class Prompt:
    """A request whose tokens all lie in this step.

    Attributes:
        tokens: its rows in the step's tensors.
        cu_seqlens: [2] int32 on the device, 0 and the number of its tokens.
    """

    tokens: slice
    cu_seqlens: torch.Tensor


def whole_prompts(common: CommonAttentionMetadata) -> list[Prompt]:
    """Requests of the step that start with its first token. Waits for the device."""
    starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
    spans = [
        (first, last)
        for first, last, length in zip(starts, starts[1:], lengths, strict=False)
        if length == last - first > 0
    ]
    device = common.seq_lens.device
    return [Prompt(slice(a, b), torch.tensor([0, b - a], dtype=torch.int32, device=device)) for a, b in spans]


class LayerMeasurement:
    """Measurement of one layer.

    Attributes:
        statistics: sums that it adds to. A layer that reads the pages of another layer adds to that layer's.
        source: measurement of the layer whose pages this layer reads, or None.
        rows: K and V of the step, for layers that read this layer's pages.
        positions, is_probe: of the prompt, as in `corpus.Pass`.
    """

    def __init__(self, statistics: LayerStatistics, source: LayerMeasurement | None = None) -> None:
        self.statistics, self.source = statistics, source
        self.rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self.positions, self.is_probe = torch.empty(0), False

    def attend(
        self,
        impl: SawAttentionImpl,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prompts: Sequence[Prompt],
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Attend each prompt to itself, exactly, and add its rows. Shapes as in `SawAttentionImpl.forward`. Other rows
        get zeros.
        """
        if self.source is None:
            self.rows = key, value
        elif self.source.rows is not None:
            key, value = self.source.rows
        output.zero_()
        for prompt in prompts:
            q, k, v = query[prompt.tokens], key[prompt.tokens], value[prompt.tokens]
            if impl.prefill is not None:
                impl.prefill.attend_exactly(q, k, v, prompt.cu_seqlens, output[prompt.tokens])
            else:
                output[prompt.tokens] = attend_exactly(
                    q,
                    k,
                    v,
                    softmax_scale=impl.scale,
                    sliding_window=impl.sliding_window,
                    logit_softcap=impl.logits_soft_cap,
                    sinks=impl.sinks,
                ).to(output.dtype)
            self.statistics.add(q, k, v, self.positions, self.is_probe)
        return output


class MeasuredModel:
    """Wraps a runner's model during measurement: shifts the positions that the model sees, and counts its calls.

    RoPE turns keys with their position, so prompts are spread over the context that will be served. The shift is made
    in place, because a captured graph reads that address, and undone after each call, because the step and a draft
    model's slots depend on these positions.

    Attributes:
        shifts: [window] int64 on the device, added to the position of each token of a prompt.
        calls: number of calls of the model.

    Args:
        is_eager: whether the model runs without `torch.compile`.
    """

    def __init__(self, model: Any, device: torch.device, *, is_eager: bool = False) -> None:
        self.model, self.calls = model, 0
        self._linear = LinearInFp32 if is_eager else contextlib.nullcontext
        self.shifts = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self, *args: Any, positions: torch.Tensor, **kwargs: Any) -> Any:
        self.calls += 1
        shifts = self.shifts[positions.clamp(0, len(self.shifts) - 1)]
        positions += shifts
        try:
            with self._linear():
                return self.model(*args, positions=positions, **kwargs)
        finally:
            positions -= shifts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def layer_index(name: str) -> int:
    """The layer's number in the model, from vLLM's name of its attention.

    Raises:
        CalibrationError: the name has no number, or more than one.
    """
    indices = [int(part) for part in name.split(".") if part.isdigit()]
    if len(indices) != 1:
        raise CalibrationError(f"sawkv calibration: expected a layer name with one index, got {name}")
    return indices[0]


def head_shape(model_config: Any, name: str, impl: SawAttentionImpl) -> HeadShape:
    """The shape of the layer whose pages this layer reads."""
    config = model_config.hf_text_config
    if not getattr(config, "is_heterogeneous", False):
        return int(model_config.get_total_num_kv_heads()), impl.head_size
    index = layer_index(impl.kv_sharing_target_layer_name or name)
    return int(config.per_layer_config[index].num_key_value_heads), impl.head_size


def first_kv_head(num_kv_heads: int) -> int:
    """First KV head of this rank, of `num_kv_heads` in the whole model. If there are more ranks than heads, ranks share
    a head, as vLLM replicates it.
    """
    return int(get_tensor_model_parallel_rank()) * num_kv_heads // int(get_tensor_model_parallel_world_size())


# What `prepare` calls in every worker, in this order.


def waiting(worker: Any) -> set[HeadShape]:
    """Shapes of the layers of this worker that wait to be prepared."""
    model_config = worker.vllm_config.model_config
    return {head_shape(model_config, name, layer.impl) for name, layer in _waiting(worker).items()}


@torch.inference_mode()
def begin(worker: Any) -> None:
    """Make the layers measure from now on."""
    runner, layers = worker.model_runner, _waiting(worker)
    model, context = runner.get_model(), served_context(worker.vllm_config)
    for name, layer in layers.items():
        impl = layer.impl
        if impl.kv_sharing_target_layer_name is None:
            statistics = LayerStatistics(
                impl.num_kv_heads, impl.head_size, worker.device, impl.scale, impl.sliding_window, context
            )
            if (weight := output_weight(model, name, layer, worker.device)) is not None:
                statistics.set_output_weight(weight)
            impl.measurement = LayerMeasurement(statistics)
    for layer in layers.values():
        if (target := layer.impl.kv_sharing_target_layer_name) is not None:
            source = layers[target].impl.measurement
            layer.impl.measurement = LayerMeasurement(source.statistics, source)
    is_eager = bool(worker.vllm_config.model_config.enforce_eager)
    runner.model = MeasuredModel(runner.model, worker.device, is_eager=is_eager)


def place(worker: Any, positions: torch.Tensor, is_probe: bool) -> None:
    """Set the positions of the next prompt's tokens, [window] int64 on the CPU, and whether it is a probe."""
    shifts = positions - torch.arange(len(positions), device="cpu")
    worker.model_runner.model.shifts = shifts.to(worker.device)
    for layer in _waiting(worker).values():
        layer.impl.measurement.positions, layer.impl.measurement.is_probe = positions, is_probe


@torch.inference_mode()
def finish(worker: Any) -> list[Calibration]:
    """Fit the measurements, and set the calibration of the layers. All ranks return those of the whole model, one for
    each shape of layers.

    Raises:
        UnsupportedError: a rank measured nothing, or NaN.
    """
    runner = worker.model_runner
    measured, runner.model = runner.model, runner.model.model
    own: dict[int, tuple[int, LayerCalibration]] | str
    try:
        own = _fit(worker, measured.calls)
    except Exception as error:  # raised below, when all ranks have said how they fared: they wait for each other
        own = str(error) or type(error).__name__
    parts = [own]
    if get_world_group().world_size > 1:
        parts = [own] * get_world_group().world_size
        torch.distributed.all_gather_object(parts, own, group=get_world_group().cpu_group)
    if failed := [part for part in parts if isinstance(part, str)]:
        raise UnsupportedError(failed[0])
    calibrations = _assemble(worker, [part for part in parts if not isinstance(part, str)])
    apply(worker, calibrations)
    return calibrations


@torch.inference_mode()
def apply(worker: Any, calibrations: Sequence[Calibration]) -> None:
    """Set the calibration of the layers that wait. There is one for each shape of layers."""
    by_shape: dict[HeadShape, Calibration] = {(found.num_kv_heads, found.head_dim): found for found in calibrations}
    for name, layer in _waiting(worker).items():
        impl = layer.impl
        calibration = by_shape[head_shape(worker.vllm_config.model_config, name, impl)]
        first = first_kv_head(calibration.num_kv_heads)
        part = calibration.layer(
            layer_index(impl.kv_sharing_target_layer_name or name), slice(first, first + impl.num_kv_heads)
        )
        impl.take_prepared(part, worker.device)


def all_agree(worker: Any, found: bool) -> bool:
    """Whether every rank of all engines that step together has `found`."""
    answer = torch.tensor([int(found)])
    if get_world_group().world_size > 1:
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MIN, group=get_world_group().cpu_group)
    return bool(answer)


def _waiting(worker: Any) -> dict[str, Any]:
    """Attention layers of the model that wait, by vLLM's name. Layers of a draft model belong to another model."""
    own = {id(module) for module in worker.model_runner.get_model().modules()}
    layers = worker.vllm_config.compilation_config.static_forward_context
    mine = {name: layer for name, layer in layers.items() if id(layer) in own}
    return {name: layer for name, layer in mine.items() if getattr(getattr(layer, "impl", None), "unprepared", False)}


def _fit(worker: Any, calls: int) -> dict[int, tuple[int, LayerCalibration]]:
    """Calibrations of this rank's layers on the CPU, by layer index, each with the index of its first KV head."""
    if not calls:
        raise UnsupportedError("the engine never called its model")
    impls = {name: layer.impl for name, layer in _waiting(worker).items()}
    owners = {name: impl for name, impl in impls.items() if impl.kv_sharing_target_layer_name is None}
    statistics = [impl.measurement.statistics for impl in owners.values()]
    for impl in impls.values():
        impl.measurement = None
    fitted = fit(statistics, _format(worker)) if owners else []  # a stage of a pipeline may have no attention
    model_config = worker.vllm_config.model_config
    return {
        layer_index(name): (first_kv_head(head_shape(model_config, name, impl)[0]), part.to("cpu"))
        for (name, impl), part in zip(owners.items(), fitted, strict=True)
    }


def _assemble(worker: Any, parts: Sequence[Mapping[int, tuple[int, LayerCalibration]]]) -> list[Calibration]:
    """The whole model's calibrations by shape, from those of the ranks. For a KV head that ranks share, the first rank
    counts.
    """
    config = worker.vllm_config.model_config.hf_text_config
    heads: dict[int, dict[int, LayerCalibration]] = {}
    for part in parts:
        for index, (first, layer) in part.items():
            heads.setdefault(index, {}).setdefault(first, layer)
    by_shape: dict[HeadShape, dict[int, LayerCalibration]] = {}
    for index, found in heads.items():
        layer = _joined([found[first] for first in sorted(found)])
        assert layer.k_center is not None  # every fitted layer has one
        num_kv_heads, head_dim = layer.k_center.shape[1:]
        by_shape.setdefault((num_kv_heads, head_dim), {})[index] = layer
    return [
        Calibration.from_layers(_format(worker).resolve(shape[1]), model_id(config), config.num_hidden_layers, layers)
        for shape, layers in sorted(by_shape.items())
    ]


def _format(worker: Any) -> CacheFormat:
    config = SawConfig.from_vllm(worker.vllm_config, worker.vllm_config.cache_config.cache_dtype)
    if config is None:
        raise UnsupportedError("its cache is not sawkv's")
    return config.format


def _joined(parts: list[LayerCalibration]) -> LayerCalibration:
    """One layer's calibration, from parts with consecutive heads."""

    def join(name: str, pieces: list[Any]) -> Any:
        if any(piece is None for piece in pieces):
            return None
        if isinstance(pieces[0], Feedback):
            return Feedback(torch.cat([piece.weights for piece in pieces]), torch.cat([piece.step for piece in pieces]))
        return torch.cat(pieces, 1 if name == "k_center" else 0)

    return LayerCalibration(**{name: join(name, [getattr(part, name) for part in parts]) for name in vars(parts[0])})


def output_weight(
    model: torch.nn.Module, name: str, layer: torch.nn.Module, device: torch.device
) -> torch.Tensor | None:
    """The output projection of an attention layer, [hidden_size, num_heads * head_size] of this rank's heads. None if
    it is not found.

    Weights that are quantized or packed are measured: the projection of the identity is its weight.
    """
    impl: Any = layer.impl
    size = impl.num_heads * impl.head_size
    beside = [linear for linear in _beside(model, layer) if linear.input_size_per_partition == size]
    numbered = [linear for linear in _numbered(model, layer_index(name)) if linear.input_size_per_partition == size]
    if not beside and len(numbered) != 1:
        return None
    projection = (beside or numbered)[0]
    weight: torch.Tensor | None = getattr(projection, "weight", None)
    if (
        weight is not None
        and weight.is_floating_point()
        and weight.element_size() > 1
        and weight.shape == (projection.output_size, size)
    ):
        return weight
    identity = torch.eye(size, dtype=projection.params_dtype, device=device)
    return torch.cat(
        [projection.quant_method.apply(projection, rows.contiguous()) for rows in torch.split(identity, IDENTITY_ROWS)]
    ).T


def _beside(model: torch.nn.Module, layer: torch.nn.Module) -> Iterator[Any]:
    """Row-parallel projections with the same parent as the attention layer."""
    for parent in model.modules():
        if any(child is layer for child in parent.children()):
            yield from _row_parallel(parent.children())


def _numbered(model: torch.nn.Module, index: int) -> Iterator[Any]:
    """Row-parallel projections of the layer with this number, for models that keep attention apart."""
    yield from _row_parallel(module for path, module in model.named_modules() if str(index) in path.split("."))


def _row_parallel(modules: Iterable[torch.nn.Module]) -> Iterator[Any]:
    inner = (getattr(module, "base_layer", module) for module in modules)  # of a projection with LoRA
    yield from (module for module in inner if isinstance(module, RowParallelLinear))
