"""Exact next-token distributions of a served model, kept and compared inside vLLM's workers.

An answer over HTTP has log-probabilities of a few tokens; those of the whole vocabulary for 16,000 predictions would
take gigabytes. So the worker keeps the hidden states from which logits are computed (megabytes). A second server
compares its own states with those of the first, both through its `compute_logits`, over the whole vocabulary. vLLM
gives its workers these methods by `--worker-extension-cls benchmarks.recorder.Recorder`, and clients call them at
`/collective_rpc`. Both are vLLM's own interfaces.

vLLM's runners call `compute_logits` with the states of all prompt tokens if a request asks for prompt
log-probabilities, and with one row per sampled token. Requests are sent one at a time, so calls with several rows
belong to the prompts, in order.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sawkv.integrations.vllm.layers import Layers
from sawkv.lab.divergence import score


class Recorder(Layers):
    """Methods added to a worker of one GPU, or of a CPU."""

    model_runner: Any

    def record_states(self) -> None:
        """From now on, keep what logits are computed from."""
        model = self.model_runner.model
        compute, kept = model.compute_logits, []

        def recording(states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if len(states) > 1:
                kept.append(states.detach().cpu())
            return compute(states, *arguments, **options)

        model.compute_logits = recording
        self.recorded, self.compute_logits = kept, compute

    def save_states(self, file: str, window: str) -> None:
        """Write the states [num_windows, window - 1, size] of the windows asked for since `record_states`."""
        save_file({"states": self._take(int(window))}, file)

    def compare_states(self, file: str, window: str, ids: str, out: str) -> None:
        """Compare with those in `file`, of the same windows by another server.

        Args:
            file: that `save_states` wrote.
            window: tokens of a window.
            ids: safetensors file with `ids`, [num_windows, window].
            out: file for `kl`, `loss` and `same_top1`, and `loss_16bit` of the other server, each [num_windows, window
                - 1].
        """
        device = next(self.model_runner.model.parameters()).device
        states = {"": load_file(file)["states"], "this": self._take(int(window))}
        found: dict[str, list[torch.Tensor]] = {"kl": [], "loss": [], "same_top1": [], "loss_16bit": []}
        for row, tokens in enumerate(load_file(ids)["ids"]):
            pair = {name: rows[row : row + 1].to(device) for name, rows in states.items()}
            scores = score(pair, tokens[None], lambda rows: self.compute_logits(rows).float())
            for name, values in zip(found, (*scores["this"], scores[""][1]), strict=True):
                found[name].append(values)
        save_file({name: torch.cat(rows) for name, rows in found.items()}, out)

    def _take(self, window: int) -> torch.Tensor:
        rows = torch.cat(self.recorded)
        self.recorded.clear()
        # vLLM's first runner leaves the last token of a prompt out, its second does not.
        for size in (window - 1, window):
            if len(rows) % size == 0:
                return rows.view(-1, size, rows.shape[1])[:, : window - 1].contiguous()
        raise RuntimeError(f"expected states of whole windows of {window} tokens, got {len(rows)} rows")
