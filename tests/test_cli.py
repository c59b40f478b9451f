"""The command line, and the pure parts of the demonstration."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import sawkv
from sawkv import cli
from sawkv.format.spec import CODEC_BITS, CacheFormat
from sawkv.integrations.vllm import client, config, server
from sawkv.integrations.vllm.contract import NEWEST_VLLM, OLDEST_VLLM
from sawkv.lab.methods import METHODS
from sawkv.terminal import coloured
from tests.conftest import MODEL
from tools import setup_env


def test_serve_hands_other_options_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(server, "serve", lambda *arguments, **settings: seen.append((arguments, settings)) or 0)
    assert cli.main(["serve", "a/model", "--format", "int8", "--port", "9000"]) == 0
    assert cli.main(["serve", "a/model", "--no-prepare", "--max-model-len", "64", "--fo", "x"]) == 0
    prepared = {"calibration": None, "prepare": True, "prepare_cache": None}
    assert seen == [
        (("a/model", CacheFormat("int8"), ["--port", "9000"]), prepared),
        (("a/model", None, ["--max-model-len", "64", "--fo", "x"]), prepared | {"prepare": False}),
    ]


def test_serve_takes_no_word_of_an_option_for_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "--max-model-len", "4096", "a/model"])
    assert "expected MODEL before vLLM's options, got --max-model-len" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status", "deaf"), [(signal.SIGTERM, 143, False), (signal.SIGHUP, 129, True)])
def test_the_server_ends_with_its_command(number: int, status: int, deaf: bool, tmp_path: Path) -> None:
    """Also where it is deaf, as vLLM is to SIGTERM while it starts."""
    server = f"""
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN if {deaf} else lambda *_: sys.exit(open("ended", "w").close()))
print(os.getpid(), flush=True)
time.sleep(60)
"""
    script = f"""
from sawkv import cli
from sawkv.integrations.vllm import preflight, server
server.STOP_TIMEOUT = 0.5 if {deaf} else 30
preflight.check = lambda *_, **__: None
server.server_command = lambda *_, **__: [{sys.executable!r}, "-c", {server!r}]
cli.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, "serve", "m"], cwd=tmp_path, stdout=subprocess.PIPE
    ) as command:
        assert command.stdout is not None
        pid = int(command.stdout.readline())
        command.send_signal(number)
        assert command.wait(30) == status
    assert (tmp_path / "ended").exists() != deaf
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("vllm", "name", "dtype"),
    [
        ((0, 32), "int4-k128-v0", "int4_per_token_head"),
        ((0, 32), "int8", "int8_per_token_head"),
        ((0, 33), "int4-k128-v0", "sawkv_int4"),
        ((1, 0), "int8", "sawkv_int8"),
        ((0, 33), "bf16-k128-v128", "auto"),
    ],
)
def test_the_servers_command(vllm: tuple[int, ...], name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(config, "installed_release", lambda: vllm)
    command = server.server_command("m", CacheFormat.parse(name), ["--port", "1"])
    assert command[:2] == [sys.executable, "-m"]
    assert command[command.index("--kv-cache-dtype") + 1] == dtype
    assert command[command.index("--additional-config") + 1] == f'{{"sawkv": {{"format": "{name}"}}}}'
    assert command[-4:] == ["--attention-backend", "CUSTOM", "--port", "1"]
    assert "--kv-cache-dtype" not in server.server_command("m", None)


@pytest.mark.parametrize(
    ("options", "gpus", "status", "hinted"),
    [([], 0, 3, 2), (["--kv-cache-memory-bytes", "9"], 0, 3, 0), ([], 1, 3, 0), ([], 0, 2, 1)],
)
def test_a_server_on_a_cpu_says_what_memory_vllm_takes_before_and_after(
    options: list[str],
    gpus: int,
    status: int,
    hinted: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(server.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(server.preflight, "check", lambda *_, **__: None)
    monkeypatch.setattr(
        server, "server_command", lambda *_, **__: [sys.executable, "-c", f"raise SystemExit({status})"]
    )
    assert cli.main(["serve", "m", *options]) == status
    shown = capsys.readouterr().err
    assert f"sawkv: vLLM ended with status {status}" in shown
    assert shown.count("--kv-cache-memory-bytes 1073741824") == hinted


def test_bad_input_is_named_and_gives_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["serve", "m", "--format"], ["bench", "m", "--out", str(tmp_path / "bench.json"), "--formats"]):
        assert cli.main([*command, "int5"]) == 2
        assert re.match(rf"sawkv: {command[-1]}: .* got 'int5'", capsys.readouterr().err)
    for arguments in (
        ["prepare", "m", "--out", "x", "--device", "foo"],
        ["doctor", "--colour"],
        ["demo", "m", "--kv-cache-memory", "0"],
        ["prepare", "m", "--out", "x", "--context", "-1"],
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        assert f"sawkv {arguments[0]}: error: " in capsys.readouterr().err


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sawkv", *arguments], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    """Importing it takes seconds."""
    code = (
        "import sys; from sawkv import cli\ntry: cli.main(sys.argv[1:])\nfinally: assert not {'torch', 'numpy', 'vllm'}"
        " & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 or "--recall" in done.stdout


@pytest.mark.parametrize(
    ("command", "given", "found"),
    [("prepare", None, "passive"), ("eval", None, "passive"), ("analyze", "active", "active"), ("serve", None, "")],
)
def test_threads_of_models_in_this_process_do_not_spin(command: str, given: str | None, found: str) -> None:
    """PyTorch reads the variable when it is imported. A server keeps what vLLM chooses."""
    code = (
        "import importlib, os, sys; from sawkv import cli\n"
        "importlib.import_module(f'sawkv.commands.{sys.argv[1]}').run = lambda _: print(\n"
        "    os.environ.get('OMP_WAIT_POLICY', ''), 'torch' in sys.modules)\n"
        "cli.main([sys.argv[1], 'a/model'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run(
        [sys.executable, "-c", code, command], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == (f"{found} False\n", "")


def test_formats_lists_what_eval_and_serve_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"^int4 +4\.25 +3\.76x ", shown, re.M)
    assert re.search(r"^int8 +8\.25 +1\.94x ", shown, re.M)
    for name in [*CODEC_BITS, *METHODS]:
        assert re.search(rf"\b{name}\b", shown), name


def test_one_range_of_vllm_in_code_package_and_makefile() -> None:
    root = Path(__file__).parents[1]
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST_VLLM, NEWEST_VLLM))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={oldest}"]
    assert f"NEXT := {newest}." in (root / "Makefile").read_text()
    assert (
        f'requires-python = ">={".".join(map(str, setup_env.OLDEST_PYTHON))}"' in (root / "pyproject.toml").read_text()
    )


def test_uv_takes_the_indexes_of_pip() -> None:
    listed = """:env:.cert='/etc/ca.pem'
:env:.timeout='120'
global.cert='/other.pem'
global.extra-index-url='https://a.example/simple\\nhttps://b.example/simple'
global.find-links='/wheels https://c.example/'
"""
    assert setup_env.uv_settings(listed) == {
        "SSL_CERT_FILE": "/etc/ca.pem",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_FIND_LINKS": "/wheels,https://c.example/",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


BROKEN: dict[str, tuple[str, str | None, str]] = {
    "cut off": ("model.safetensors", "cut", "bytes, as its header says, got 100000 in "),
    "an LFS pointer": ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n", "got a Git LFS pointer"),
    "no weights": ("model.safetensors", None, "no file named model.safetensors|expected safetensors or another file"),
    "no JSON": ("config.json", '{"a":', "expected JSON in .*config.json, got: Expecting value"),
    "no object": ("config.json", "null", "expected a JSON object in .*config.json, got NoneType"),
    "no number": (
        "config.json",
        '"num_hidden_layers": "five", "head_dim": "x"',
        "num_hidden_layers: expected a positive .* got 'five'; head_dim: expected a positive .* got 'x'",
    ),
    "no heads": ("config.json", '"num_attention_heads": 0', "num_attention_heads: expected a positive .* got 0"),
}
"""The file that is changed, what into, and what is said."""


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A checkpoint's folder, and what is to be said of it."""
    for file in MODEL.iterdir():
        (tmp_path / file.name).symlink_to(file)
    name, content, words = BROKEN[request.param]
    old = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if content == "cut":
        (tmp_path / name).write_bytes(old[:100000])
    elif content is not None and content.startswith('"'):
        (tmp_path / name).write_text(json.dumps(json.loads(old) | json.loads(f"{{{content}}}")))
    elif content is not None:
        (tmp_path / name).write_text(content)
    return str(tmp_path), words


def test_a_broken_model_is_one_line_in_every_command(
    broken: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And at once: neither vLLM starts, nor is anything measured."""
    pytest.importorskip("vllm")
    for module in (server, client):
        monkeypatch.setattr(module, "running", lambda *_, **__: pytest.fail("vllm was started"))
    monkeypatch.chdir(MODEL.parents[1])
    folder, words = broken
    out = ["--out", str(tmp_path / "out.json")]
    for command in (
        ["serve", folder, "--port", "0"],
        ["demo", folder],
        ["bench", folder, *out],
        ["prepare", folder, *out],
        ["eval", folder, *out],
        ["analyze", folder, *out],
    ):
        assert cli.main(command) == 2, command
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1, shown
        assert re.search(words, shown), (command, shown)
    assert not (tmp_path / "out.json").exists()


def test_a_model_without_a_tokenizer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers makes an empty one of nothing."""
    for name in ("config.json", "model.safetensors", "held_out.npz"):
        (tmp_path / name).symlink_to(MODEL / name)
    for module in (server, client):
        monkeypatch.setattr(module, "running", lambda *_, **__: pytest.fail("vllm was started"))
    monkeypatch.setattr("sawkv.integrations.vllm.preflight.check_installation", lambda: None)
    monkeypatch.setattr("sawkv.bench.run._has_vllm", lambda: True)
    for command in ("eval", "analyze", "prepare", "serve", "demo", "bench"):
        assert cli.main([command, str(tmp_path), *(["--port", "0"] if command == "serve" else [])]) == 2
        assert f"expected a checkpoint with a tokenizer, got none in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", "[" * 10**5])
def test_a_record_that_is_none_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    file.write_text(content)
    for command in (["eval", str(MODEL), "--resume", "--out"], ["bench", str(MODEL), "--resume", "--out"], ["report"]):
        assert cli.main([*command, str(file)]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"sawkv: {file}: expected a record of `sawkv "), shown
        assert shown.count("\n") == 1
    assert file.read_text() == content


def test_python_m_sawkv_is_the_command() -> None:
    done = run("plan", "m", "--gpu-memory", "80")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sawkv: --gpu-memory: expected a number with a unit such as 80GiB, got '80'\n"


def test_one_option_has_one_name_and_one_text() -> None:
    """In all commands but `serve` and `plan`, whose options are explained by what vLLM does with them."""
    texts: dict[str, set[str]] = {}
    for name in set(cli.COMMANDS) - {"serve", "plan"}:
        for action in cli.make_parser()[1][name]._actions:
            for option in action.option_strings:
                texts.setdefault(option, set()).add(f"{action.metavar} {action.help}".partition(" (default")[0])
    assert {
        option: found for option, found in texts.items() if len(found) > 1 and option not in ("--out", "--format")
    } == {}
    assert not {"--methods", "--windows"} & set(texts)


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (KeyboardInterrupt(), 130, "sawkv: interrupted\n"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "sawkv: a/b: No such file or directory\n"),
        (OSError("of a library"), 2, "sawkv: of a library\n"),
        (
            ModuleNotFoundError("No module named 'tqdm'", name="tqdm"),
            2,
            "sawkv: doctor: expected the package tqdm, got none: pip install 'sawkv[eval]'\n",
        ),
    ],
)
def test_what_ends_a_command_is_one_line(
    error: BaseException, status: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("sawkv.doctor.run_doctor", fail)
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == shown


def test_ctrl_c_is_one_line_and_130() -> None:
    script = """
from sawkv import cli
from sawkv.commands import prepare
import time
def run(*_): print("up", flush=True); time.sleep(60)
prepare.run = run
raise SystemExit(cli.main())
"""
    command = [sys.executable, "-c", script, "prepare", "m", "--out", "c"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "sawkv: interrupted\n")


def test_colour_is_for_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    with open(slave, "w") as terminal, open(master), open(os.devnull, "w") as file:
        assert coloured("x", "red", terminal) == "\033[31mx\033[0m"
        assert coloured("x", "red", file) == "x"
        monkeypatch.setenv("NO_COLOR", "1")
        assert coloured("x", "red", terminal) == "x"


def test_a_reader_that_leaves_is_no_fault() -> None:
    code = (
        "import sys\nfrom sawkv import cli\nfrom sawkv.commands import formats\n"
        "formats.run = lambda *_: print('x' * 10**6) or 0\nsys.exit(cli.main())"
    )
    command = f'{sys.executable} -c "{code}" formats | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x", "")


def test_everything_exported_exists_and_is_listed() -> None:
    assert sorted(sawkv.__all__) == sawkv.__all__
    assert all(hasattr(sawkv, name) for name in sawkv.__all__)
