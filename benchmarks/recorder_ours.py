"""`benchmarks.recorder` for servers of sawkv, whose workers must have loaded it."""

from __future__ import annotations

from benchmarks.recorder import Recorder
from sawkv.integrations.vllm.worker import Extension


class OurRecorder(Recorder, Extension):
    """Both classes' methods."""
