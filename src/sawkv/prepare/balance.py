"""Static factors of key and value channels, folded into a model's weights: nothing is left to do at run time.

K by f and Q by 1 / f changes no score. With f the same for channels i and i + head_dim / 2 it commutes with RoPE, so it can go into the
QK-norms where the model has them, else into q_proj and k_proj. V by g goes into v_proj and 1 / g into o_proj. With powers of two every
product in bf16 is exact, and the 16-bit model stays bit-identical. `stress` makes keys worse this way, `balance` makes them better.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sawkv.errors import SawkvError, UnsupportedError
from sawkv.prepare.model import EvalModel, collect_samples
from sawkv.prepare.samples import LayerSample, Sample
from sawkv.prepare.text import load_text

DEAD_ZONE = 0.75
"""Channels that are off by less than 2 to this power are left alone: rounding to powers of two would gain nothing there."""


def channel_scales(sample: Sample, *, paired: bool, shared: bool) -> torch.Tensor:
    """The scales s at which storing x / s costs least, [num_kv_heads, head_dim] fp32 powers of two.

    The error after a rotation is nearly the same in all channels and grows with sum_i x_i^2 / s_i^2; its cost is sum_i s_i^2 hessian_ii
    times that. The product is least at s_i^4 = mean(x_i^2) / hessian_ii (Cauchy-Schwarz).

    Args:
        sample: rows and what their errors cost.
        paired: whether channels i and i + head_dim / 2 share a scale, as K needs to be folded (RoPE over part of a head pairs others).
        shared: whether all heads share scales, as QK-norm weights do.
    """
    size = sample.rows.square().mean(0)
    weight = sample.hessian.diagonal(dim1=-2, dim2=-1)
    if paired:
        size, weight = _mean_of_pairs(size), _mean_of_pairs(weight)
    if shared:
        size, weight = size.mean(0, keepdim=True).expand_as(size), weight.mean(0, keepdim=True).expand_as(weight)
    exact = (size.clamp_min(1e-12) / weight.clamp_min(1e-12)).log2() / 4
    exact = exact - exact.median(-1, keepdim=True).values  # a common factor changes nothing
    scales: torch.Tensor = exact.round().where(exact.abs() > DEAD_ZONE, 0.0).clamp(-12, 12).exp2()
    return scales


def _mean_of_pairs(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return ((a + b) / 2).repeat(1, 2)


@torch.no_grad()
def scale_keys(layer: nn.Module, factors: torch.Tensor) -> None:
    """Scale key channels by `factors`, [head_dim], and those of queries by their inverse, for all heads of an attention module, in place.

    Raises:
        UnsupportedError: the module has neither QK-norms over head_dim nor q_proj and k_proj.
    """
    head_dim = factors.numel()
    for side, by in (("q", 1 / factors), ("k", factors)):
        norm, projection = getattr(layer, f"{side}_norm", None), getattr(layer, f"{side}_proj", None)
        if norm is not None:
            if norm.weight.shape != factors.shape:
                raise UnsupportedError(f"keys: expected a {side}_norm over head_dim {head_dim}, got {list(norm.weight.shape)}")
            norm.weight.mul_(by.to(norm.weight))
        elif isinstance(projection, nn.Linear) and projection.out_features % head_dim == 0:
            _scale_rows(projection, by.repeat(projection.out_features // head_dim))
        else:
            raise UnsupportedError(f"keys: expected attention with {side}_proj or {side}_norm, got {type(layer).__name__}")


@torch.no_grad()
def scale_values(layer: nn.Module, factors: torch.Tensor) -> None:
    """Scale value channels by `factors`, [num_kv_heads, head_dim], in v_proj, and undo it in o_proj, in place.

    Raises:
        UnsupportedError: the module has no v_proj and o_proj that fit.
    """
    v_proj, o_proj = getattr(layer, "v_proj", None), getattr(layer, "o_proj", None)
    if not isinstance(v_proj, nn.Linear) or not isinstance(o_proj, nn.Linear) or v_proj.out_features != factors.numel():
        raise UnsupportedError(f"values: expected attention with v_proj and o_proj, got {type(layer).__name__}")
    _scale_rows(v_proj, factors.flatten())
    group = o_proj.in_features // factors.numel()
    o_proj.weight.div_(factors.repeat_interleave(group, 0).flatten().to(o_proj.weight))


def _scale_rows(projection: nn.Linear, by: torch.Tensor) -> None:
    projection.weight.mul_(by.to(projection.weight)[:, None])
    if projection.bias is not None:
        projection.bias.mul_(by.to(projection.bias))


def balance(layers: Sequence[nn.Module], samples: Sequence[LayerSample]) -> None:
    """Even out what key and value channels hold beside their centers, as `channel_scales` says, in place."""
    for layer, sample in zip(layers, samples, strict=True):
        k, v = (Sample(part.rows - part.rows.mean(0), part.hessian) for part in (sample.k, sample.v))
        scale_keys(layer, 1 / channel_scales(k, paired=True, shared=True)[0])
        scale_values(layer, 1 / channel_scales(v, paired=False, shared=False))


def write_balanced(folder: Path, text: Path | None, out: Path, *, device: torch.device, window: int = 1024, num_windows: int = 8) -> None:
    """Write a copy of a checkpoint, in bf16, with evened-out keys and values; it computes exactly what the original does.

    Args:
        folder: the checkpoint's directory.
        text: UTF-8 file to measure on; None for the model's held-out text.
        out: a new directory.
        device: where to run the model.
        window, num_windows: how much of the text.

    Raises:
        SawkvError: `out` holds files already.
        UnsupportedError: the model's attention is not built so that this changes nothing; for example, its RoPE pairs other channels.
    """
    if out.exists() and any(out.iterdir()):
        raise SawkvError(f"out: expected a new or empty directory, got {out}")
    _, calibration = load_text(folder, text).split(window, 1, num_windows)
    model = EvalModel.load(folder, device, torch.bfloat16)
    probe = calibration[:1, : min(window, 256)]
    before = model.logits(model.hidden(probe))
    samples = collect_samples(model, calibration)
    balance(model.layers, samples)
    if not torch.equal(model.logits(model.hidden(probe)), before):
        raise UnsupportedError("balance: expected the same logits to the last bit, got others; this model's RoPE pairs other channels")
    out.mkdir(parents=True, exist_ok=True)
    model.model.config.get_text_config().sawkv_balanced = _digest(model.layers)  # part of `calibration.model_id`
    model.model.save_pretrained(out)
    for file in folder.iterdir():  # the tokenizer, and what else lies beside the weights
        of_weights = file.suffix in {".safetensors", ".bin", ".pt"} or file.name.endswith(".index.json")
        if file.is_file() and not of_weights and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)


def _digest(layers: Sequence[nn.Module]) -> str:
    """16 hex digits over the weights that keys and values are made by, so that centers of the original, or of another copy, are refused."""
    digest = hashlib.sha256()
    for layer in layers:
        for name, weight in layer.named_parameters():
            if name.startswith(("k_", "v_")):
                digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
