"""Pages that leave the engine are bound to what wrote them (docs/offload.md)."""

from __future__ import annotations

import inspect
import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sawkv import CacheFormat
from sawkv.errors import SawkvError, UnsupportedError
from sawkv.prepare.calibration import Calibration
from tests.conftest import MODEL
from tests.vllm import stored
from tests.vllm.engine import run_process

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what vLLM's engine core imports
]

PREPARED = {"prepare": True}
OTHER = {"prepare": False, "format": "int4-k64-v64"}
"""Pages of the same bytes per token, which mean something else."""


FORMAT = CacheFormat("int4").resolve(64)
RANK = {"layers.0": {"format": "int4-k128-v128", "page size": 32, "shape": [2, 32, 136], "strides": [1, 2, 3]}}
WRITTEN_WITH = {"rank 0": RANK, "model": {"config": {"hidden_size": 8}, "dtype": "bf16", "weights": "f00"}}


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """`WRITTEN_WITH` with another value at a path of names."""
    copy = json.loads(json.dumps(WRITTEN_WITH))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("rank 0", "layers.0", "format"), "int4-k64-v64", "rank 0, layers.0, format: int4-k128-v128, here int4-k64"),
        (("rank 0", "layers.0", "page size"), 16, "rank 0, layers.0, page size: 32, here 16"),
        (("rank 0", "layers.0", "strides"), [1, 2, 4], "rank 0, layers.0, strides: [1, 2, 3], here [1, 2, 4]"),
        (("rank 1",), RANK, "rank 1: None, here {"),
        (("model", "weights"), "beef", "model, weights: f00, here beef"),
        (("model", "config", "hidden_size"), 16, "model, config, hidden_size: 8, here 16"),
    ],
)
def test_what_was_written_otherwise_is_in_another_folder_and_said(
    path: tuple[str, ...], value: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sawkv.integrations.vllm import disk
    from sawkv.integrations.vllm.offload import differences, fingerprint

    other, warned = changed(path, value), []
    monkeypatch.setattr(disk.logger, "warning", lambda text, *values: warned.append(text % values))
    same = dict(reversed(json.loads(json.dumps(WRITTEN_WITH)).items()))
    folders = [disk.open_folder(tmp_path / "root", fingerprint(each), each) for each in (WRITTEN_WITH, same)]
    assert folders[0] == folders[1]
    assert not warned
    assert disk.open_folder(tmp_path / "root", fingerprint(other), other) not in folders
    assert said in warned[0]
    assert len(differences(other, WRITTEN_WITH)) == len(warned) == 1
    assert stat.S_IMODE(folders[0].stat().st_mode) == 0o700
    folders[0].chmod(0o755)  # as a copy has
    disk.open_folder(tmp_path / "root", fingerprint(WRITTEN_WITH), WRITTEN_WITH)
    assert stat.S_IMODE(folders[0].stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(SawkvError, match=r"expected a root_dir that can be written to, got .*/file/root: Not a dir"):
        disk.open_folder(tmp_path / "file/root", fingerprint(WRITTEN_WITH), WRITTEN_WITH)
    folders[0].chmod(0o770)
    with pytest.raises(UnsupportedError, match="expected one that this user owns and no other can write to"):
        disk.open_folder(tmp_path / "root", fingerprint(WRITTEN_WITH), WRITTEN_WITH)


def test_the_tier_is_of_engines_with_sawkv_alone() -> None:
    from sawkv.integrations.vllm.disk import CheckedFileTier

    with pytest.raises(UnsupportedError, match="expected an engine with sawkv"):
        CheckedFileTier(root_dir="unused")


def test_what_both_ends_of_nixl_compare_depends_on_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m benchmarks.disaggregation` runs both ends."""
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlHandshakePayload
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

    from sawkv.integrations.vllm import offload

    handshake = inspect.getsource(NixlPullConnectorWorker._nixl_handshake)
    assert "handshake_payload.compatibility_hash != self.compat_hash" in handshake, "vLLM compares these two"
    ends = []
    layer = RANK["layers.0"] | {"centers, gains and feedback": "0123"}
    for written_with in (WRITTEN_WITH, changed(("model", "weights"), "beef")):
        written_with = written_with | {"rank 0": {"layers.0": layer}}
        payload = NixlHandshakePayload(compatibility_hash="vllm", agent_metadata_bytes=b"")
        end = SimpleNamespace(compat_hash="vllm", xfer_handshake_metadata=payload)
        agent = SimpleNamespace(connector_worker=end)
        monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", agent)
        monkeypatch.setattr(kv_transfer_state, "get_kv_transfer_group", lambda agent=agent: agent)
        offload._bind_handshake(None, offload.summary(written_with))
        assert end.compat_hash == payload.compatibility_hash
        ends.append(end.compat_hash)
    assert ends[0] != ends[1]
    assert ends[0].startswith("vllm sawkv ")
    assert "(int4-k128-v128, page size 32, calibration" in ends[0]
    assert "weights beef" in ends[1]
    end.compat_hash = "something new"
    with pytest.raises(UnsupportedError, match=r"does not fit this vLLM: it needs NixlConnectorWorker\.compat_hash"):
        offload._bind_handshake(None, "")


def test_the_fingerprint_is_of_the_centers_that_are_served() -> None:
    """Of all their buckets. What serves fewer positions knows nothing of later ones."""
    from sawkv.integrations.vllm import offload
    from sawkv.integrations.vllm.backend import SawAttentionImpl

    def fingerprint(calibration: Calibration, num_buckets: int) -> str:
        impl: Any = object.__new__(SawAttentionImpl)
        part = calibration.layer(0, num_buckets=num_buckets)
        vars(impl).update(_format=FORMAT, num_kv_heads=2, head_size=64, unprepared=False, _layer_calibration=part)
        return offload.fingerprint({"rank 0": {"a layer": impl.written_with(torch.empty(1, 2, 32, 68))}})

    k_center = torch.randn(1, 3, 2, 64)
    made = Calibration(FORMAT, "a model", k_center, torch.randn(1, 2, 64))
    k_center = k_center.clone()
    k_center[0, 2, 1, 63] += 1
    other = replace(made, k_center=k_center)
    found = [fingerprint(each, num_buckets) for each in (made, other) for num_buckets in (1, 2, 3)]
    assert found[:2] == found[3:5]
    assert len(set(found)) == 4


def test_checksums_notice_any_damage(tmp_path: Path) -> None:
    from sawkv.integrations.vllm.disk import damaged, missing, sum_path, write_sums

    key, blocks = "0" * 64, []
    for i in range(5):
        content = bytes(torch.randint(256, (5000,), dtype=torch.uint8).tolist())
        path = tmp_path / f"{i}.bin"
        blocks.append((str(path), memoryview(content)))
    assert missing(blocks) == blocks
    write_sums(missing(blocks), key)
    assert damaged(blocks, key) == []
    assert len(damaged(blocks, "1" * 64)) == 5, "written with something else"
    for path, content in blocks:
        Path(path).write_bytes(content)
    assert missing(blocks) == []
    paths, contents = map(list, zip(*blocks, strict=True))
    flipped = bytearray(contents[1])
    flipped[4999] ^= 128
    contents[1] = memoryview(flipped)
    Path(sum_path(paths[3])).unlink()
    contents[4] = contents[0]  # one file in the place of another, with its checksum
    Path(sum_path(paths[4])).write_bytes(Path(sum_path(paths[0])).read_bytes())
    assert damaged(list(zip(paths, contents, strict=True)), key) == [paths[1], paths[3], paths[4]]


def generate(folder: Path, entry: dict[str, Any], **options: Any) -> dict[str, Any]:
    entry = entry | {"prepare_cache": str(folder / "prepared")}
    return run_process(stored.generate, json.dumps({"folder": str(folder), "entry": entry, **options}))


@pytest.mark.parametrize(("flipped", "read", "kept"), [(1, 3, 1), (1, 4, 1), (2, 2, None), (3, 4, 3), (None, 4, None)])
def test_blocks_that_vllm_keeps_of_a_load_are_checked(
    flipped: int | None, read: int, kept: int | None, tmp_path: Path
) -> None:
    """Of 4 blocks vLLM reads the first `read`. It keeps those that it read before one that cannot be read."""
    from sawkv.integrations.vllm.disk import CheckedFileTier, sum_path, write_sums

    blocks = [(str(tmp_path / f"{i}.bin"), memoryview(bytearray([i] * 100))) for i in range(4)]
    write_sums(blocks, "0" * 64)
    for path, content in blocks:
        Path(path).write_bytes(content)
        content[:] = bytes([255] * 100)  # until it is read
    if flipped is not None:
        Path(blocks[flipped][0]).write_bytes(bytes([flipped] * 99 + [flipped ^ 8]))
    tier = CheckedFileTier.__new__(CheckedFileTier)
    tier._key, tier._lost, tier._kept = "0" * 64, set(), {}

    def load() -> None:
        for path, content in blocks[:read]:
            content[:] = Path(path).read_bytes()
        if read < 4:
            tier._kept[7] = read
            raise OSError("vLLM's")

    noticed = flipped is not None and flipped < read
    if noticed or read < 4:
        with pytest.raises(OSError, match="1 of . without" if noticed else "vLLM's"):
            tier._read(7, blocks, load)
    else:
        tier._read(7, blocks, load)
    assert tier._kept.get(7) == (kept if noticed or read == 4 else read)
    left = {i for i, (path, _) in enumerate(blocks) if Path(path).exists() and Path(sum_path(path)).exists()}
    assert left == {0, 1, 2, 3} - ({flipped} if noticed else set())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def first(folder: Path) -> dict[str, Any]:
    return generate(folder, PREPARED)


@pytest.fixture(scope="module")
def second(folder: Path, first: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The second prompt's file is damaged before it is read. In the end, the weights are loaded again, then others."""
    other = tmp_path_factory.mktemp("other")
    for file in MODEL.glob("*.json"):
        shutil.copy(file, other)
    weights = load_file(MODEL / "model.safetensors")
    name = next(name for name in weights if "v_proj" in name)
    weights[name] = weights[name] * 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    return generate(folder, PREPARED, damage=5000, other_weights=str(other))


def test_another_start_reads_the_same_bytes_and_notices_one_that_changed(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    """Two prompts of 200 tokens in blocks of 32."""
    assert first["cached"] == [0, 0]
    assert second["cached"][0] == 192
    assert second["cached"][1] < 192, "blocks before the damaged one at most"
    assert second["texts"] == first["texts"]
    assert len(first["pages"]) == 12
    assert second["pages"] == first["pages"], "all bytes of all layers' pages, by the block's hash"
    assert any("a stored block is damaged and is removed" in line for line in second["log"])
    assert set(first["files"]) <= set(second["files"]), "the damaged one is written again"


def test_weights_that_are_loaded_again_keep_the_calibration_and_others_stop_the_engine(second: dict[str, Any]) -> None:
    reloaded, log = second["reloaded"], second["log"]
    assert reloaded["after"] == reloaded["before"]
    assert reloaded["after"][0][-1] == 0, "the prompt was computed"
    warning = next(i for i, line in enumerate(log) if "other weights were loaded" in line)
    assert warning > log.index("sawkv: now other weights")
    assert "expected the weights of the start" in reloaded["error"]


@pytest.mark.newest
def test_pages_of_another_format_are_not_found(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    other = generate(folder, OTHER)
    assert other["cached"] == [0, 0]
    assert any("format: int4-k128-v128, here int4-k64-v64" in line for line in other["log"])
    assert len(set(other["files"]) - set(second["files"])) == 12


@pytest.mark.newest
def test_without_the_binding_they_would_be_read_wrongly(folder: Path, first: dict[str, Any]) -> None:
    """The control: an engine with the other format claims the fingerprint of the first."""
    wrong = generate(folder, OTHER, claims=first["fingerprint"])
    assert wrong["cached"] == [192, 192]
    assert wrong["texts"] != first["texts"]


def test_another_training_step_is_other_weights() -> None:
    from sawkv.integrations.vllm.weights import sample

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(300, 70), "b": torch.nn.Conv1d(5, 6, 3)})
    before = sample(model)
    assert sample(model) == before
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(1e-3)
        after = sample(model)
        assert after != before
        before = after
