"""What `sawkv plan` does. A module of its own, so that other commands do not load what it needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from sawkv.capacity import COMMON_CONTEXT, memory, table
from sawkv.capacity.caches import KVCache, engine_caches, own_caches
from sawkv.capacity.drafts import Drafts, said
from sawkv.capacity.host import HostPlan, make_host_plan
from sawkv.capacity.model import ModelShape, read_shape
from sawkv.capacity.weights import Weights, weights_of
from sawkv.checkpoint import Checkpoint, read_checkpoint
from sawkv.errors import SawkvError
from sawkv.format.spec import CacheFormat


def run(args: argparse.Namespace, asked: CacheFormat, refusals_of: Callable[[CacheFormat], Iterable[str]]) -> int:
    """Print the plan.

    Args:
        args: the command's.
        asked: the format beside 16 bits and fp8, unless --tokens chooses one.
        refusals_of: why the engine here would not serve a format.

    Returns:
        The exit status: 1 if a request of this length fits in no format.
    """
    setting = _setting(args)
    model = _Model.read(args, setting.tensor_parallel)
    chosen, notes = KVCache.of_format(asked, model.shape, args.speculative_config is not None), []
    setting = replace(setting, drafted=0 if model.drafts is None else model.drafts.tokens)
    longest = model.shape.max_context
    if longest is not None and setting.context > longest:
        if args.context is not None:
            notes.append(
                f"The model reads at most {longest:,} tokens, and vLLM refuses a longer --max-model-len: planned with"
                " these."
            )
        setting = replace(setting, context=longest)

    def planned(cache: KVCache) -> memory.Plan:
        return memory.make_plan(model.shape, setting, cache, model.weights.nbytes)

    own = [(cache, planned(cache)) for cache in own_caches(model.shape)]
    if args.tokens is not None:
        chosen = memory.widest(own, args.tokens)
        notes += _advice(args, chosen)
    shown = [*engine_caches(model.shape), chosen]
    notes += refusals_of(chosen.cache_format or asked)
    plans = [planned(cache) for cache in shown]
    for cache, plan in zip(shown, plans, strict=True):
        if not plan.fits:
            start = memory.longest_context(model.shape, setting, cache, model.weights.nbytes)
            notes.append(table.shortage(plan, setting, start))
    if any(state.value_bytes == 4 for state in model.shape.states):
        narrow = memory.make_plan(model.with_states_of_16_bits(args), setting, chosen, model.weights.nbytes)
        notes.append(table.narrower_states(plans[-1], narrow))
    assumed = table.assumptions(setting, model.shape, model.weights, said(model.drafts))
    hosts = _hosts(args, model.shape, setting, shown)
    assumed += [table.link_assumption()] * bool(hosts)
    ladder = [plan for _, plan in own]
    print(
        table.as_json(args.model, plans, setting, assumed, notes, hosts, ladder)
        if args.json
        else table.text(plans, setting, assumed, notes, hosts, ladder)
    )
    return 0 if any(plan.fits for plan in plans) else 1


@dataclass(frozen=True)
class _Model:
    """What is planned for. `shape` and `weights` include those of `drafts`."""

    checkpoint: Checkpoint
    shape: ModelShape
    weights: Weights
    drafts: Drafts | None

    @classmethod
    def read(cls, args: argparse.Namespace, ranks: int) -> _Model:
        """The model that was named. `ranks`: of tensor parallelism.

        Raises:
            SawkvError: there is no such model, or no source gives the size of its weights.
            UnsupportedError: sawkv does not serve it, or its draft.
        """
        given = None if args.weights is None else memory.size_bytes("--weights", args.weights)
        checkpoint = read_checkpoint(args.model)
        if checkpoint is None:
            raise SawkvError(
                f"plan: expected a checkpoint directory with a config.json, or a model of the hub, got {args.model}"
            )
        shape, drafts = _read_shape(args, checkpoint, args.mamba_ssm_cache_dtype), None
        if args.speculative_config is not None:
            drafts = Drafts.read(args.speculative_config, shape, ranks)
        if given is not None:
            weights = whole = Weights(given, "as given")
        else:
            weights = weights_of(checkpoint, shape, args.language_model_only)
            whole = weights if drafts is None else drafts.add_weights(weights, shape)
        if drafts is not None:
            shape = drafts.beside(shape, whole.nbytes - weights.nbytes)
        return cls(checkpoint, shape, whole, drafts)

    def with_states_of_16_bits(self, args: argparse.Namespace) -> ModelShape:
        """The shape if recurrent states had 16 bits."""
        shape = _read_shape(args, self.checkpoint, "bfloat16")
        return shape if self.drafts is None else self.drafts.beside(shape, self.shape.draft_bytes)


def _read_shape(args: argparse.Namespace, checkpoint: Checkpoint, ssm_dtype: str) -> ModelShape:
    return read_shape(checkpoint.config, args.language_model_only, args.mamba_cache_dtype, ssm_dtype)


def _setting(args: argparse.Namespace) -> memory.Setting:
    """vLLM's options. The context may be longer than the model's."""
    gpu_memory, gpu_name = memory.card(args.gpu_memory)
    return memory.Setting(
        gpu_memory,
        COMMON_CONTEXT if args.context is None else args.context,
        gpu_name,
        gpu_memory_utilization=args.gpu_memory_utilization,
        tensor_parallel=args.tensor_parallel,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        prefix_caching=not args.no_enable_prefix_caching,
        pipeline_parallel=args.pipeline_parallel,
    )


def _advice(args: argparse.Namespace, chosen: KVCache) -> Iterator[str]:
    """How to serve the format that --tokens has chosen, and to measure what it costs."""
    assert chosen.cache_format is not None  # one of sawkv's
    yield (
        f"{chosen.name} has the most bits of the formats that hold {args.tokens:,} tokens: sawkv serve {args.model}"
        f" --format {chosen.cache_format}"
    )
    if chosen.cache_format.codec not in ("int8", "int4"):
        yield (
            f"What it costs: sawkv eval {args.model} --text FILE --formats"
            f" prepared,prepared_{chosen.cache_format.codec}"
        )


def _hosts(
    args: argparse.Namespace, shape: ModelShape, setting: memory.Setting, caches: list[KVCache]
) -> list[HostPlan]:
    """What host memory adds to each cache; empty without --host-memory."""
    if args.host_memory is None:
        if args.prefill_speed is not None:
            raise SawkvError("--prefill-speed: expected --host-memory beside it")
        return []
    nbytes = memory.size_bytes("--host-memory", args.host_memory)
    return [make_host_plan(shape, setting, cache, nbytes, prefill_speed=args.prefill_speed) for cache in caches]
