"""What a draft adds in vLLM's `--speculative-config`: layers with a cache of their own, weights, and states."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from sawkv.capacity.model import ModelShape, read_shape
from sawkv.capacity.weights import Weights, weights_of
from sawkv.checkpoint import Checkpoint, read_checkpoint
from sawkv.errors import SawkvError, UnsupportedError

_OPTION = "--speculative-config"
_OWN_LAYERS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
_OWN_LAYER_BY_DEFAULT = ("minimax_m3", "qwen3_5", "qwen3_next", "step3p5")
"""Starts of the model types that have one draft layer if their config does not say."""
_WITHOUT_MODEL = ("ngram", "[ngram]", "ngram_gpu", "suffix")
_WITH_MODEL = ("draft_model", "eagle", "eagle3")
_SUFFIX_DEPTH = 24
"""Of vLLM's `suffix_decoding_max_tree_depth`, where method suffix names no tokens."""


@dataclass(frozen=True)
class Drafts:
    """A draft, as vLLM is told of it.

    Attributes:
        tokens: that it proposes per step.
        shape: of the draft model; None if the model's own layers draft, or none do.
        checkpoint: of the draft model, or None.
        own_layers: draft layers of the model itself (MTP). Each is like the model's last layer of attention.
    """

    tokens: int
    shape: ModelShape | None = None
    checkpoint: Checkpoint | None = None
    own_layers: int = 0

    @classmethod
    def read(cls, text: str, model: ModelShape, ranks: int = 1) -> Drafts:
        """Read vLLM's JSON object. `ranks`: of the model, by tensor parallelism.

        Raises:
            SawkvError: it is none, lacks what is needed, or asks for what is not counted.
            UnsupportedError: sawkv does not serve the draft model.
        """
        try:
            given = json.loads(text)
        except ValueError:
            given = None
        given = given if isinstance(given, dict) else {}
        tokens, name = given.get("num_speculative_tokens"), given.get("model")
        method = given.get("method") or (name if name in _WITHOUT_MODEL else "draft_model")
        if tokens is None and method == "suffix":
            tokens = given.get("suffix_decoding_max_tree_depth", _SUFFIX_DEPTH)
        if type(tokens) is not int or tokens < 1:
            raise SawkvError(f"{_OPTION}: expected a JSON object with num_speculative_tokens, got {text}")
        if method in _WITHOUT_MODEL:
            return cls(tokens)
        if given.get("draft_tensor_parallel_size") not in (None, ranks):
            raise SawkvError(
                f"{_OPTION}: expected a draft_tensor_parallel_size that is --tensor-parallel, {ranks}, got {text}"
            )
        if given.get("kv_cache_dtype") is not None:
            raise SawkvError(f"{_OPTION}: expected a draft with a cache in the model's format, got {text}")
        if str(method).endswith("mtp"):
            own_layers = _own_layers(model)
            if tokens > own_layers and tokens % own_layers:
                raise SawkvError(
                    f"{_OPTION}: expected num_speculative_tokens that {own_layers} draft layers divide, got {tokens}"
                )
            return cls(tokens, own_layers=own_layers)
        if not isinstance(name, str) or method not in _WITH_MODEL:
            raise SawkvError(f"{_OPTION}: expected a draft model, or method mtp, ngram or suffix, got {text}")
        checkpoint = read_checkpoint(name)
        if checkpoint is None:
            raise SawkvError(f"{_OPTION}: expected a checkpoint directory, or a model of the hub, got {name}")
        try:
            shape = read_shape(checkpoint.config)
        except UnsupportedError as error:
            raise UnsupportedError(f"the draft model: {error}") from error
        if shape.states:
            raise UnsupportedError("plan: expected a draft model of attention alone, got one with recurrent states")
        return cls(tokens, shape, checkpoint)

    def beside(self, model: ModelShape, nbytes: int = 0) -> ModelShape:
        """The model's shape with the draft's layers, which run in the last stage of a pipeline, and with tokens that
        may be taken back in the states of convolutions. `nbytes`: of the draft's weights.
        """
        layers = self.shape.attention if self.shape else model.attention[-1:] * self.own_layers
        drafting = tuple(replace(layer, drafts=True) for layer in layers)
        return replace(
            model,
            attention=model.attention + drafting,
            attention_places=model.attention_places + (model.num_layers - 1,) * len(drafting),
            states=tuple(
                # Not where there is no recurrence, nor in Mamba 1, which has a head per channel.
                state
                if state.heads in (0, state.channels)
                else replace(state, conv_tokens=state.conv_tokens + self.tokens)
                for state in model.states
            ),
            draft_bytes=nbytes,
        )

    def add_weights(self, weights: Weights, model: ModelShape) -> Weights:
        """The model's weights with the draft's. Draft layers of the model count as layers of it."""
        if self.checkpoint is not None and self.shape is not None:
            draft = weights_of(self.checkpoint, self.shape)
            return Weights(weights.nbytes + draft.nbytes, f"{weights.source}; of the draft {draft.source}")
        if not self.own_layers:
            return weights
        layers = weights.nbytes - model.table_bytes * (1 if model.ties else 2)
        joint = 2 * model.hidden_size * model.hidden_size * 2  # of the embedding and the state, in 16 bits
        return Weights(
            weights.nbytes + self.own_layers * (layers // model.num_layers + joint),
            f"{weights.source}; draft layers as layers of the model",
        )


def said(drafts: Drafts | None) -> str:
    """For a list of assumptions."""
    if drafts is None:
        return "no speculative decoding"
    layers: Any = drafts.own_layers or (len(drafts.shape.attention) if drafts.shape else "no")
    return f"{drafts.tokens} tokens drafted per step, by {layers} layers with a cache"


def _own_layers(model: ModelShape) -> int:
    """Draft layers of the model itself.

    Raises:
        UnsupportedError: it has none.
    """
    decoder = model.config.get_text_config(decoder=True)
    by_default = 1 if decoder.model_type.startswith(_OWN_LAYER_BY_DEFAULT) else 0
    found = (getattr(decoder, key, None) for key in _OWN_LAYERS)
    count: int = next((n for n in found if n is not None), by_default)
    if count < 1:
        raise UnsupportedError(f"{_OPTION}: expected a model with draft layers of its own, got a {decoder.model_type}")
    return count
