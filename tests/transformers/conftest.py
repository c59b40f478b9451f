"""Preparation is brief, and what it keeps on disk stays with the run of the tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from sawkv.integrations.transformers import prepare, stored
from sawkv.prepare.store import CalibrationStore


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(autouse=True)
def _brief(prepared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Little text: tiny models have little to learn."""
    monkeypatch.setattr(stored, "CalibrationStore", functools.partial(CalibrationStore, prepared_folder))
    monkeypatch.setattr(prepare, "WINDOW", 128)
    yield
    prepare.warn_once.cache_clear()
