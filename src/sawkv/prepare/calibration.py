"""The calibration file: static centers, gains and error feedback of K and V for one model and one format, as
safetensors.

A row is stored as (x - center) * gain, and readers undo both, so centers and gains change only the quantization error.
Feedback (`format.feedback`) changes which codes are chosen, and readers do not use it. `sawkv prepare` writes the file,
and engines load it. docs/calibration.md describes it. Over 400 lines: checks of a file from elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sawkv.errors import CalibrationError, FormatError
from sawkv.files import writing
from sawkv.format.feedback import Feedback, takes_from
from sawkv.format.layout import PAGE_SIZE_MULTIPLE, PageLayout
from sawkv.format.spec import FORMAT_VERSION, CacheFormat, ResolvedFormat

ONE_CENTER, VERSION = "2", "3"
"""Versions of the file. Without buckets of positions it is of the older one, and as it was before there were any."""
MAX_FILE_BYTES: Final = 512 << 20
"""Larger files are refused. Feedback of 80 layers with 8 KV heads of 128 channels takes 21 MB; with 64 KV heads 168 MB.
"""
MAX_CENTER: Final = 65504.0
"""The largest fp16, which bounds K and V of a 16-bit model."""
MAX_GAIN: Final = 1024.0
"""Gains lie between 1 / MAX_GAIN and MAX_GAIN. A factor common to all gains of a head changes only the size of scales,
so gains can be divided by their geometric mean.
"""
MAX_STEP: Final = 1.0
"""Largest feedback step. Fitted steps are near 1e-4."""

_CENTERS: Final = ("k_center", "v_center")
_GAINS: Final = ("k_gain", "v_gain")
_FEEDBACK: Final = ("k_feedback", "k_feedback_step", "v_feedback", "v_feedback_step")
_ENERGIES: Final = ("k_energy", "v_energy")
_TENSORS: Final = (*_CENTERS, *_GAINS, *_FEEDBACK, *_ENERGIES)
_KEYS: Final = ("version", "format", "model", "num_layers", "num_kv_heads", "head_dim", "fingerprint", "made_by")
_BUCKETS: Final = "num_buckets"
_OPTIONAL_KEYS: Final = ("weights",)


@dataclass(frozen=True, eq=False)
class LayerCalibration:
    """The static tensors of one layer, and the energy of its rows. A field is None if the layer does not have it.

    Attributes:
        k_center, v_center, k_gain, v_gain, k_feedback, v_feedback: as in `PagedKVCache`, which takes `**constants()`.
            `k_center` has buckets, be it one.
        k_energy, v_energy: [num_kv_heads * parts] fp32, mean squared length of centered and scaled rows on the text of
            the fit. Quantization errors are proportional to it.
    """

    k_center: torch.Tensor | None = None
    v_center: torch.Tensor | None = None
    k_gain: torch.Tensor | None = None
    v_gain: torch.Tensor | None = None
    k_feedback: Feedback | None = None
    v_feedback: Feedback | None = None
    k_energy: torch.Tensor | None = None
    v_energy: torch.Tensor | None = None

    def constants(self) -> dict[str, Any]:
        """The fields that change the bytes of pages, by the names that `PagedKVCache` takes."""
        return {name: part for name, part in vars(self).items() if name not in _ENERGIES}

    @classmethod
    def blank(cls, layout: PageLayout, device: torch.device | str, num_buckets: int) -> LayerCalibration:
        """Allocate every constant that a layer of this layout can have, with values that change nothing. `fill` sets
        them in place later.
        """
        shape, rows = (layout.num_kv_heads, layout.head_dim), layout.rows

        def vectors(value: float) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.float32, device=device)

        def feedback() -> Feedback | None:
            if not layout.format.feeds_back:
                return None
            heads, row_dim = rows.num_kv_heads, rows.head_dim
            weights = torch.zeros(heads, row_dim, row_dim, dtype=torch.int8, device=device)
            return Feedback(weights, torch.zeros(heads, dtype=torch.float32, device=device))

        return cls(vectors(0).repeat(num_buckets, 1, 1), vectors(0), vectors(1), vectors(1), feedback(), feedback())

    def fill(self, values: LayerCalibration) -> None:
        """Copy the constants of `values` into this object's tensors, in place. Parts that `values` lacks are left as
        they are. Buckets that it lacks take the center of its last one.

        Raises:
            CalibrationError: `values` has a part that this object lacks.
        """
        for name, part in values.constants().items():
            mine = getattr(self, name)
            if part is not None and mine is None:
                raise CalibrationError(f"{name}: expected none, as in the layer, got one")
            if isinstance(part, Feedback):
                mine.weights.copy_(part.weights)
                mine.step.copy_(part.step)
            elif part is not None:
                mine.copy_(_buckets(part, len(mine)) if name == "k_center" else part)

    def to(self, device: torch.device | str) -> LayerCalibration:
        """A copy on a device."""
        return LayerCalibration(
            **{name: None if part is None else part.to(device) for name, part in vars(self).items()}
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """Centers, gains and feedback of all layers of a model with this many KV heads and channels per head. Layers of
    another shape have a `Calibration` of their own, and change nothing in this one, as layers without attention.

    Attributes:
        format: the format that they were fitted for.
        model: `model_id` of the model that they were fitted to.
        k_center: [num_layers, num_buckets, num_kv_heads, head_dim] fp32 on the CPU, for the whole model, or without
            num_buckets for one bucket. Zeros change nothing.
        v_center: [num_layers, num_kv_heads, head_dim] fp32, likewise.
        k_gain, v_gain: shape of v_center, fp32, from 1 / MAX_GAIN to MAX_GAIN, or None. Ones change nothing.
        k_feedback, v_feedback: [num_layers, num_rows, row_dim, row_dim] int8, weights as in `Feedback`, or None. Only
            formats below 8 bits have them. A layer of zeros passes no errors on. A head is `parts` rows
            (`PageLayout.rows`).
        k_feedback_step, v_feedback_step: [num_layers, num_rows] fp32, as in `Feedback`; None if the weights are.
        k_energy, v_energy: [num_layers, num_rows] fp32, as in `LayerCalibration`, or None. Zero means unknown.
        weights: `store.contents_digest` of the measured checkpoint, or "" if unknown. The fingerprint does not cover
            it, because it changes no page.

    Raises:
        CalibrationError: a tensor or the format does not fit this description.
    """

    format: ResolvedFormat
    model: str
    k_center: torch.Tensor
    v_center: torch.Tensor
    _: KW_ONLY
    k_gain: torch.Tensor | None = None
    v_gain: torch.Tensor | None = None
    k_feedback: torch.Tensor | None = None
    k_feedback_step: torch.Tensor | None = None
    v_feedback: torch.Tensor | None = None
    v_feedback_step: torch.Tensor | None = None
    k_energy: torch.Tensor | None = None
    v_energy: torch.Tensor | None = None
    weights: str = ""

    def __post_init__(self) -> None:
        if self.k_center.ndim == 3:
            object.__setattr__(self, "k_center", self.k_center[:, None])
        vectors = {name: x for name in (*_CENTERS, *_GAINS) if (x := getattr(self, name)) is not None}
        for name, x in vectors.items():
            ndim = 4 if name == "k_center" else 3
            if x.dtype != torch.float32 or x.ndim != ndim or not x.numel() or x.device.type != "cpu":
                raise CalibrationError(
                    f"{name}: expected float32 [num_layers, num_kv_heads, head_dim] on the CPU, got {x.dtype}"
                    f" {list(x.shape)} on {x.device}"
                )
            expected = [len(self.k_center), *self.k_center.shape[-2:]]
            if [len(x), *x.shape[-2:]] != expected:
                raise CalibrationError(f"{name}: expected the shape of k_center, {expected}, got {list(x.shape)}")
            # NaN fails both
            if name in _CENTERS and not bool((x.abs() <= MAX_CENTER).all()):
                raise CalibrationError(
                    f"{name}: expected finite values up to {MAX_CENTER:g}, got NaN, infinity or larger"
                )
            if name in _GAINS and not bool(((x >= 1 / MAX_GAIN) & (x <= MAX_GAIN)).all()):
                raise CalibrationError(
                    f"{name}: expected values from 1/{MAX_GAIN:g} to {MAX_GAIN:g}, got NaN or others"
                )
        object.__setattr__(self, "format", _with_orders(self.format, self.head_dim))
        for name in ("k_feedback", "v_feedback"):
            self._check_feedback(name, getattr(self, name), getattr(self, f"{name}_step"))
        for name in _ENERGIES:
            x, shape = getattr(self, name), [self.num_layers, self.rows.num_kv_heads]
            if x is None:
                continue
            if x.dtype != torch.float32 or list(x.shape) != shape or x.device.type != "cpu":
                raise CalibrationError(
                    f"{name}: expected float32 {shape} on the CPU, got {x.dtype} {list(x.shape)} on {x.device}"
                )
            if not bool(((x >= 0) & (x < torch.inf)).all()):  # NaN fails both
                raise CalibrationError(f"{name}: expected finite values from 0, got NaN or others")

    def _check_feedback(self, name: str, weights: torch.Tensor | None, step: torch.Tensor | None) -> None:
        if weights is None and step is None:
            return
        if weights is None or step is None:
            raise CalibrationError(
                f"{name}: expected weights and steps, got {'steps' if weights is None else 'weights'} alone"
            )
        if not self.format.feeds_back:
            raise CalibrationError(f"{name}: expected a format below 8 bits, got {self.format}")
        rows = self.rows
        shape = [self.num_layers, rows.num_kv_heads]
        for part, x, dtype, wanted in (
            ("", weights, torch.int8, [*shape, rows.head_dim, rows.head_dim]),
            ("_step", step, torch.float32, shape),
        ):
            if x.dtype != dtype or list(x.shape) != wanted or x.device.type != "cpu":
                raise CalibrationError(
                    f"{name}{part}: expected {dtype} {wanted} on the CPU, got {x.dtype} {list(x.shape)} on {x.device}"
                )
        if not bool(((step >= 0) & (step <= MAX_STEP)).all()):  # NaN fails too
            raise CalibrationError(f"{name}_step: expected values from 0 to {MAX_STEP:g}, got NaN or others")
        never = ~takes_from(rows.head_dim)
        # Layer by layer, so that no copy of all weights is made.
        if any(bool(layer[:, never].any()) for layer in weights):
            raise CalibrationError(
                f"{name}: expected weights of 0 for channels whose block is not coded before, got others"
            )

    @property
    def num_layers(self) -> int:
        return self.v_center.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.v_center.shape[1]

    @property
    def head_dim(self) -> int:
        return self.v_center.shape[2]

    @property
    def num_buckets(self) -> int:
        """Buckets of positions that have a center of K."""
        return self.k_center.shape[1]

    @property
    def _version(self) -> str:
        return ONE_CENTER if self.num_buckets == 1 else VERSION

    @property
    def rows(self) -> PageLayout:
        """Rows in which pages store the KV heads of one layer."""
        return _rows(self.format, self.num_kv_heads, self.head_dim)

    def fingerprint(self) -> str:
        """Hash everything that changes the bytes of a cache, and the model.

        Returns:
            16 hex digits.
        """
        text = "|".join(
            [
                f"sawkv/{FORMAT_VERSION}",
                f"calibration/{self._version}",
                str(self.format),
                f"model={self.model}",
                f"shape={'x'.join(map(str, self._tensors()['k_center'].shape))}",
                *(
                    f"{name}={hashlib.sha256(x.contiguous().numpy().data).hexdigest()}"
                    for name, x in self._tensors().items()
                ),
            ]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that are not None, by their names in the file, in a fixed order."""
        found = {name: x for name in _TENSORS if (x := getattr(self, name)) is not None}
        return found | ({"k_center": self.k_center[:, 0]} if self.num_buckets == 1 else {})

    def check(
        self, *, cache_format: ResolvedFormat, model: str, num_layers: int, num_kv_heads: int, head_dim: int
    ) -> None:
        """Refuse a cache or a model that this calibration was not made for.

        Args:
            cache_format: of the cache.
            model: `model_id` of the served model.
            num_layers, num_kv_heads: of the whole model, not of one rank.
            head_dim: channels per head.

        Raises:
            CalibrationError: something differs. The message names all differences.
        """
        compared = {
            "format": (str(cache_format), str(self.format)),
            "layers": (num_layers, self.num_layers),
            "KV heads": (num_kv_heads, self.num_kv_heads),
            "head_dim": (head_dim, self.head_dim),
            "model": (model, self.model),
        }
        wrong = [f"{name}: expected {wanted}, got {got}" for name, (wanted, got) in compared.items() if wanted != got]
        if wrong:
            raise CalibrationError(
                f"the calibration file is made for something else; {'; '.join(wrong)}. `sawkv prepare` makes one"
            )

    def layer(self, index: int, heads: slice = slice(None), num_buckets: int | None = None) -> LayerCalibration:
        """The static tensors of one layer's KV heads and first buckets (None: all), as copies on the CPU. Parts that
        would change nothing are None.

        Raises:
            CalibrationError: the layer or a head does not exist.
        """
        if not 0 <= index < self.num_layers:
            raise CalibrationError(
                f"layer: expected 0 to {self.num_layers - 1}, as the calibration file has them, got {index}"
            )
        if heads.stop is not None and heads.stop > self.num_kv_heads:
            raise CalibrationError(
                f"KV heads: expected up to {self.num_kv_heads}, as the calibration file has them, got {heads.stop}"
            )
        parts = self.rows.num_kv_heads // self.num_kv_heads
        first, end, _ = heads.indices(self.num_kv_heads)
        rows = slice(first * parts, end * parts)
        taken = {name: x[index, heads if name in (*_CENTERS, *_GAINS) else rows] for name, x in self._tensors().items()}
        taken["k_center"] = self.k_center[index, :num_buckets, heads]
        taken = {name: x.clone(memory_format=torch.contiguous_format) for name, x in taken.items()}

        def center(name: str) -> torch.Tensor | None:
            return taken[name] if taken[name].any() else None

        def gain(name: str) -> torch.Tensor | None:
            return taken[name] if name in taken and bool((taken[name] != 1).any()) else None

        def feedback(name: str) -> Feedback | None:
            return Feedback(taken[name], taken[f"{name}_step"]) if name in taken and taken[name].any() else None

        energies = {name: taken[name] for name in _ENERGIES if name in taken and bool(taken[name].any())}
        return LayerCalibration(
            center("k_center"),
            center("v_center"),
            gain("k_gain"),
            gain("v_gain"),
            feedback("k_feedback"),
            feedback("v_feedback"),
            **energies,
        )

    @classmethod
    def from_layers(
        cls, cache_format: ResolvedFormat, model: str, num_layers: int, layers: Mapping[int, LayerCalibration]
    ) -> Calibration:
        """Assemble the calibration of a model from those of its layers. The inverse of `layer`.

        Args:
            cache_format: the format that they were fitted for.
            model: `model_id` of the model that they were fitted to.
            num_layers: of the whole model.
            layers: by layer index, all KV heads of each, on any device. A missing layer (one without attention) and a
                missing part get zeros for centers and feedback, and ones for gains.

        Raises:
            CalibrationError: an index is out of range, two layers differ in shape, or no layer has any part.
        """
        if any(not 0 <= index < num_layers for index in layers):
            raise CalibrationError(f"layers: expected indices from 0 to {num_layers - 1}, got {sorted(layers)}")
        parts: dict[str, dict[int, torch.Tensor]] = {name: {} for name in _TENSORS}
        found, rows_found = [], []
        for index, layer in layers.items():
            for name, part in vars(layer).items():
                if isinstance(part, Feedback):
                    parts[name][index], parts[f"{name}_step"][index] = part.weights, part.step
                    rows_found.append(part.weights.shape[:2])
                elif part is not None:
                    parts[name][index] = part
                    if name not in _ENERGIES:
                        found.append(part.shape[1:] if name == "k_center" else part.shape)
        if not found and not rows_found:
            raise CalibrationError("layers: expected a center, gain or feedback in one of them, got none")
        shape = (found or rows_found)[0]
        if len(shape) != 2 or any(other != shape for other in found):
            raise CalibrationError(
                f"layers: expected [num_kv_heads, head_dim] alike in all of them, got {[list(x) for x in found]}"
            )
        layout = _rows(cache_format, *shape)
        rows = layout.num_kv_heads, layout.head_dim
        if any(tuple(other) != rows for other in rows_found):
            raise CalibrationError(
                f"layers: expected feedback of {list(rows)} in all of them, got {[list(x) for x in rows_found]}"
            )

        buckets = {len(part) for part in parts["k_center"].values()} or {1}
        if len(buckets) > 1:
            raise CalibrationError(f"layers: expected one number of buckets in all of them, got {sorted(buckets)}")

        def assembled(
            name: str, size: Sequence[int], fill: int = 0, dtype: torch.dtype = torch.float32
        ) -> torch.Tensor:
            whole = torch.full((num_layers, *size), fill, dtype=dtype, device="cpu")
            for index, part in parts[name].items():
                whole[index] = part
            return whole

        others: dict[str, Any] = {name: assembled(name, shape, 1) for name in _GAINS if parts[name]}
        for name in ("k_feedback", "v_feedback"):
            if parts[name]:
                others |= {
                    name: assembled(name, (*rows, rows[1]), dtype=torch.int8),
                    f"{name}_step": assembled(f"{name}_step", rows[:1]),
                }
        others |= {name: assembled(name, rows[:1]) for name in _ENERGIES if parts[name]}
        k_center = assembled("k_center", (*buckets, *shape))
        return cls(cache_format, model, k_center, assembled("v_center", shape), **others)

    def save(self, path: str | Path) -> None:
        """Write the file.

        Raises:
            SawkvError: it cannot be written. No partial file is left.
        """
        metadata = {
            "version": self._version,
            "format": str(self.format),
            "model": self.model,
            "num_layers": str(self.num_layers),
            "num_kv_heads": str(self.num_kv_heads),
            "head_dim": str(self.head_dim),
            "fingerprint": self.fingerprint(),
            "made_by": f"sawkv {importlib.metadata.version('sawkv')}",
        }
        if self.weights:
            metadata["weights"] = self.weights
        if self._version == VERSION:
            metadata[_BUCKETS] = str(self.num_buckets)
        tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in self._tensors().items()}
        with writing(Path(path)) as part:
            part.write_bytes(save(tensors, metadata))  # save_file would put a file in the place of a device

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read and check a file. Nothing in it is executed, and its size is checked before anything is allocated.

        Raises:
            CalibrationError: the file is missing, damaged or too large, or is no calibration.
        """
        try:
            return cls._load(Path(path))
        except CalibrationError as error:
            raise CalibrationError(f"calibration file {path}: {error}") from error

    @classmethod
    def _load(cls, path: Path) -> Calibration:
        try:
            size = path.stat().st_size
        except (OSError, ValueError) as error:  # ValueError: the path contains a null byte
            raise CalibrationError(f"cannot be read: {getattr(error, 'strerror', error)}") from error
        if not path.is_file() or size > MAX_FILE_BYTES:
            raise CalibrationError(
                f"expected a file of at most {MAX_FILE_BYTES} bytes, got {size if path.is_file() else 'no file'}"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, sorted(file.keys())
                _check_metadata(metadata)
                wrong = set(_CENTERS) - set(names) or set(names) - set(_TENSORS)
                if wrong:
                    raise CalibrationError(
                        f"tensors: expected {' and '.join(_CENTERS)}, {' and '.join(_GAINS)} where there are gains, "
                        f"{', '.join(_FEEDBACK)} where there is feedback, and perhaps {' and '.join(_ENERGIES)}, "
                        f"got {_show(', '.join(names) or 'none')}"
                    )
                shape = [_whole(metadata, key) for key in ("num_layers", "num_kv_heads", "head_dim")]
                cache_format = _with_orders(_parse(metadata["format"]), shape[-1])
                rows = _rows(cache_format, *shape[1:])
                buckets = [_whole(metadata, _BUCKETS)] if metadata["version"] == VERSION else []
                for name in names:
                    wanted = ("F32", shape if name in (*_CENTERS, *_GAINS) else [shape[0], rows.num_kv_heads])
                    if name == "k_center":
                        wanted = ("F32", [shape[0], *buckets, *shape[1:]])
                    if name in ("k_feedback", "v_feedback"):
                        wanted = ("I8", [shape[0], rows.num_kv_heads, rows.head_dim, rows.head_dim])
                    part = file.get_slice(name)
                    if (part.get_dtype(), part.get_shape()) != wanted:
                        raise CalibrationError(
                            f"{name}: expected {wanted[0]} {wanted[1]}, got {part.get_dtype()} {part.get_shape()}"
                        )
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except (SafetensorError, OSError) as error:
            raise CalibrationError(f"expected safetensors, got what cannot be parsed: {_show(str(error))}") from error
        calibration = cls(cache_format, metadata["model"], weights=metadata.get("weights", ""), **tensors)
        if calibration.fingerprint() != metadata["fingerprint"]:
            raise CalibrationError(
                f"fingerprint: expected {calibration.fingerprint()}, that of the contents, got"
                f" {_show(metadata['fingerprint'])}"
            )
        return calibration


def model_id(config: object) -> str:
    """A digest of a model's configuration.

    It covers the shape of the language model, on which engines and versions of Transformers agree. It does not cover
    weights: a fine-tuned or quantized copy has the same identity. The calibration of another model costs accuracy, and
    never correctness.

    Args:
        config: a Transformers configuration; of the text model in multimodal models.

    Returns:
        16 hex digits.
    """
    names = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    fields = {name: _config_field(config, name) for name in names}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _config_field(config: object, name: str) -> object:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # Transformers raises it if layers differ in this field
        return [getattr(layer, name, None) for layer in config.per_layer_config]  # type: ignore[attr-defined]


def _rows(cache_format: CacheFormat | ResolvedFormat, num_kv_heads: int, head_dim: int) -> PageLayout:
    return PageLayout(cache_format.resolve(head_dim), num_kv_heads, head_dim, PAGE_SIZE_MULTIPLE).rows


def _parse(name: str) -> CacheFormat:
    try:
        return CacheFormat.parse(name)
    except FormatError as error:
        raise CalibrationError(str(error)) from error


def _with_orders(cache_format: CacheFormat, head_dim: int) -> ResolvedFormat:
    """The format of a calibration. Its name has to give both rotation orders, and no newest tokens."""
    try:
        resolved = cache_format.resolve(head_dim)
    except FormatError as error:
        raise CalibrationError(f"format {cache_format}: {error}") from error
    if cache_format.k_rotation_order is None:
        raise CalibrationError(f"format: expected rotation orders, for example {resolved}, got {cache_format}")
    if cache_format.recent:
        raise CalibrationError(f"format: expected that of the pages, {resolved}, got {cache_format}")
    return resolved


def _check_metadata(metadata: dict[str, str]) -> None:
    if metadata.get("version") not in (ONE_CENTER, VERSION):
        raise CalibrationError(
            f"metadata: expected a calibration of version {ONE_CENTER} or {VERSION}, got"
            f" {_show(repr(metadata.get('version', 'no version')))}. `sawkv prepare` makes it again"
        )
    keys = _KEYS if metadata["version"] == ONE_CENTER else (*_KEYS, _BUCKETS)
    if sorted(set(metadata) - set(_OPTIONAL_KEYS)) != sorted(keys):
        raise CalibrationError(
            f"metadata: expected the keys {', '.join(sorted(keys))}, got {_show(', '.join(sorted(metadata)))}"
        )


def _buckets(center: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """The first buckets of a center. Those behind the last are as the last, which holds all later positions."""
    return center[torch.arange(num_buckets, device=center.device).clamp_max(len(center) - 1)]


def _whole(metadata: dict[str, str], key: str) -> int:
    text = metadata[key]
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 6 and text[0] != "0"):
        raise CalibrationError(f"{key}: expected a positive integer, got {_show(repr(text))}")
    return int(text)


def _show(text: str) -> str:
    """At most 100 printable characters, for an error message."""
    return "".join(c if c.isprintable() else "?" for c in text[:100])
