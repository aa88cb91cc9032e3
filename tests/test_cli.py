from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from blm_jax import cli, commands
from blm_jax.config import ComputeConfig, HardwareConfig, MeshConfig, SamplingConfig
from blm_jax.convert import command as convert_command
from blm_jax.errors import RequestError, RunError
from blm_jax.infer import command as generate_command
from tests.tiny_model import write_tiny_model
from tests.weights.hub_dirs import read_tensors, write_tensors

ROOT = Path(__file__).parent.parent
BLM = [sys.executable, "-m", "blm_jax.cli"]
ANSWER = {"text": "It is a cat.", "tokens": [1, 2], "finish": "stop", "prompt_tokens": 3, "seconds": {}}
GENERATE = ["generate", "somewhere", "--prompt", "what is it?"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the functions behind the command line are asked for; they answer at once."""
    found: list[dict[str, Any]] = []

    def stand_in(real: Callable[..., Any], answer: dict[str, Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
            found.append(inspect.signature(real).bind(*args, **kwargs).arguments)
            if (on_text := kwargs.get("on_text")) is not None:
                for piece in ("It is ", "a cat."):
                    on_text(piece)
            return answer

        return call

    converted = {"out": "dst", "to": "hf", "files": 2, "tensors": 7, "bytes": 4_000_000, "seconds": 1.0}
    monkeypatch.setattr(generate_command, "generate", stand_in(generate_command.generate, ANSWER))
    monkeypatch.setattr(convert_command, "convert", stand_in(convert_command.convert, converted))
    return found


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def call(**_: Any) -> None:
        raise error

    monkeypatch.setattr(generate_command, "generate", call)


# --- quick to start, clear when wrong ----------------------------------------------------------------------------------------


def test_help_is_quick() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([*BLM, "--help"], check=True, capture_output=True, cwd=ROOT)
        return time.perf_counter() - start

    assert any(seconds() < 0.5 for _ in range(10))  # others use this machine too


def test_help_imports_nothing_slow() -> None:
    code = "import sys; from blm_jax.cli import main; assert main(['--help']) == 0; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    assert not {"jax", "numpy", "transformers", "yaml", "etils", "flax"} & set(modules)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("blm 0.")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "required: COMMAND; see `blm --help`"),
        (["generat"], "invalid choice: 'generat'"),
        (["generate"], "required: MODEL, --prompt; see `blm generate --help`"),
        ([*GENERATE, "--top_k", "3"], "unknown argument --top_k 3; see `blm generate --help`"),
        ([*GENERATE, "--max", "3"], "unknown argument --max 3"),
        ([*GENERATE, "--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        ([*GENERATE, "--temperature", "-1"], "temperature is -1.0: it must be 0 (greedy) or more"),
        ([*GENERATE, "--mesh", "fspd=2"], "mesh.fspd: no such key; did you mean fsdp?"),
        ([*GENERATE, "--mesh", "8"], "an override is written key=value"),
        ([*GENERATE, "--dtype", "bfloat"], "'bfloat' is not one of float32, bfloat16; did you mean bfloat16?"),
        ([*GENERATE, "--attention", "splat"], "'splat' is not one of auto, xla, splash, cudnn; did you mean splash?"),
        ([*GENERATE, "--processes", "2"], "--coordinator and --process missing"),
        ([*GENERATE, "--coordinator", "a:1", "--processes", "2", "--process", "2"], "--process is 2: it must lie between 0 and"),
        ([*GENERATE, "--coordinator", "here", "--processes", "2", "--process", "0"], "--coordinator is 'here': write HOST:PORT"),
        (["convert", "a", "b"], "required: --to"),
        (["convert", "a", "b", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["convert", "a", "b", "--to", "hf", "--max-shard-size", "5XB"], "'5XB' is no size"),
        (["convert", "a", "b", "--to", "hf", "--max-shard-size", "0"], "'0' is no size"),
        (["bench"], "required: NAME"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    argv: list[str], says: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("blm: error: ") and says in err
    assert not calls


# --- what the commands pass on -----------------------------------------------------------------------------------------------


def test_generate_with_every_flag(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--image a.png --image b.png --video c.mp4 --system terse --max-new-tokens 5 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 4"
    assert cli.main([*GENERATE, *flags.split(), "--mesh", "data=2,tensor=4", "--dtype", "bfloat16", "--attention", "xla"]) == 0
    assert calls == [
        {
            "model": "somewhere",
            "prompt": "what is it?",
            "images": ("a.png", "b.png"),
            "videos": ("c.mp4",),
            "system": "terse",
            "sampling": SamplingConfig(max_new_tokens=5, temperature=0.5, top_k=3, top_p=0.9, seed=4),
            "hardware": HardwareConfig(MeshConfig(data=2, fsdp=-1, tensor=4), ComputeConfig(dtype="bfloat16", attention="xla")),
            "backbone": None,
            "on_text": None,
        }
    ]
    assert capsys.readouterr().out == "It is a cat.\n"


def test_generate_with_none(calls: list[dict[str, Any]]) -> None:
    assert cli.main(GENERATE) == 0
    (call,) = calls
    assert (call["images"], call["videos"], call["system"]) == ((), (), None)
    assert (call["sampling"], call["hardware"]) == (SamplingConfig(), HardwareConfig())


def test_the_help_tells_the_defaults_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    default = SamplingConfig()
    assert f"longest answer ({default.max_new_tokens})" in text
    assert f"likeliest token ({default.temperature:g})" in text and default.top_k is None
    assert f"of the probability ({default.top_p:g})" in text and f"the same answer ({default.seed})" in text
    assert f"bfloat16 ({ComputeConfig().dtype})" in text


@pytest.mark.parametrize("flags", [["--json"], ["--json", "--stream"]])
def test_json_is_the_last_line(flags: list[str], calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GENERATE, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == ANSWER
    assert lines[:-1] == (["It is a cat."] if "--stream" in flags else [])


def test_a_stream_is_printed_once(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GENERATE, "--stream"]) == 0
    assert capsys.readouterr().out == "It is a cat.\n"


@pytest.mark.parametrize(("text", "size"), [("5GB", 5_000_000_000), ("500mb", 500_000_000), ("1.5K", 1500), ("123", 123)])
def test_convert(text: str, size: int, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "src", "dst", "--to", "hf", "--max-shard-size", text]) == 0
    assert calls == [{"src": "src", "dst": "dst", "to": "hf", "max_shard_bytes": size, "backbone": None}]
    assert capsys.readouterr().out == "dst: 7 tensors, 0.00 GB, 1.0 s\n"


SCRIPTS = sorted(script for script in (ROOT / "benchmarks").glob("*.py") if not script.stem.startswith("_"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_benchmark_takes_one_list(script: Path) -> None:
    functions = {node.name: node for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)}
    arguments = functions["main"].args
    assert [ast.unparse(argument.annotation) for argument in arguments.args if argument.annotation] == ["list[str]"]
    assert ast.unparse(arguments) == "argv: list[str]"


def test_a_benchmark_has_help_of_its_own() -> None:
    done = subprocess.run([sys.executable, "benchmarks/pixels.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "torchvision" in done.stdout and "--out" in done.stdout


def test_bench_runs_a_script_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "blm_jax" / "commands.py"))
    assert cli.main(["bench", "speed_of_tests"]) == 2
    assert "benchmarks are run from a checkout" in capsys.readouterr().err
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "speed_of_tests.py").write_text("def main(argv):\n    return {'argv': argv}\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert cli.main(["bench", "sped"]) == 2
    assert "no benchmark 'sped': there are speed_of_tests" in capsys.readouterr().err
    assert cli.main(["bench", "speed_of_tests", "--steps", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"argv": ["--steps", "3"]}


# --- how it ends ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RequestError("no such\n  file"), 2, "blm: error: no such file"),
        (RunError("disk full"), 1, "blm: error: disk full"),
        (ZeroDivisionError("by zero\nsecond line"), 1, "blm: error: ZeroDivisionError: by zero (BLM_DEBUG=1 shows where)"),
    ],
)
def test_failures_are_one_line(
    error: Exception, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, error)
    assert cli.main([*GENERATE, "--json"]) == code
    assert capsys.readouterr() == ("", line + "\n")
    monkeypatch.setenv("BLM_DEBUG", "1")
    assert cli.main(GENERATE) == code
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith(line + "\n")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def cut(model: Path) -> None:
    os.truncate(model / "model.safetensors", 1_000_000)


def drop_a_tensor(model: Path) -> None:
    tensors = read_tensors(model)
    del tensors["model.norm.weight"]
    write_tensors(model, tensors)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "model.safetensors is truncated: its header speaks of"),
        (drop_a_tensor, "model.norm.weight is missing from its safetensors files"),
    ],
)
def test_weights_that_are_damaged_are_one_line(
    damage: Callable[[Path], None], says: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    damage(model)
    for argv in (["generate", str(model), "--prompt", "Hi"], ["convert", str(model), str(tmp_path / "out"), "--to", "checkpoint"]):
        assert cli.main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("blm: error: ") and says in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("to", ["hf", "checkpoint"])
def test_an_output_that_exists_is_one_line(to: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert cli.main(["convert", str(tiny), str(tmp_path / "out"), "--to", to]) == 2
    assert capsys.readouterr() == ("", f"blm: error: {tmp_path / 'out'} exists; choose another directory or remove it\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "mine")]


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert cli.main(GENERATE) == 130
    assert capsys.readouterr() == ("", "")


# A process of its own whose `generate` streams forever, or fails on some of the processes.
DRIVER = """
import time
from blm_jax import cli
from blm_jax.errors import RequestError
from blm_jax.infer import command

def generate(*, prompt, on_text, **_):
    import jax
    if prompt == "refused":
        raise RequestError("no")
    if prompt in ("together", "refused by one"):
        from jax.experimental import multihost_utils
        total = multihost_utils.process_allgather(jax.numpy.ones(1)).sum()
        if prompt == "refused by one" and jax.process_index() == 1:
            time.sleep(2)  # until the other waits in its next collective
            raise RequestError("not here")
        total = multihost_utils.process_allgather(jax.numpy.ones(1)).sum()
        return {"text": f"{jax.process_count()} processes, {jax.device_count()} devices, sum {total}"}
    while True:
        on_text("again and again\\n")

command.generate = generate
cli.entry()
"""


def start(*argv: str, devices: int = 1) -> subprocess.Popen[str]:
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", DRIVER, *argv], stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment)


def test_a_reader_that_leaves_is_no_error() -> None:
    process = start(*GENERATE, "--stream")
    assert process.stdout and process.stderr
    assert process.stdout.readline() == "again and again\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


# --- several processes ----------------------------------------------------------------------------------------------------------


def run_together(prompt: str) -> list[tuple[int, str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
    processes = [start("generate", "somewhere", "--prompt", prompt, *several, str(i), devices=4) for i in range(2)]
    ends = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, ends, strict=True)]


def test_only_the_first_of_two_processes_prints() -> None:
    (code, out, _), (other_code, other_out, other_err) = run_together("together")
    assert (code, out) == (0, "2 processes, 8 devices, sum 2.0\n")
    assert (other_code, other_out, other_err) == (0, "", "")


def test_every_process_says_why_it_stopped() -> None:
    (code, out, err), (other_code, other_out, other_err) = run_together("refused")
    assert (code, out, other_code, other_out) == (2, "", 2, "")
    assert "blm: error: no\n" in err and "blm: error (process 1): no\n" in other_err


def test_one_process_that_fails_does_not_leave_the_other_waiting() -> None:
    start = time.perf_counter()
    (code, out, err), (other_code, _, other_err) = run_together("refused by one")
    assert time.perf_counter() - start < 60  # JAX would wait for five minutes
    assert code != 0 and out == "" and "error" in err
    assert (other_code, other_err) == (2, "blm: error (process 1): not here\n")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **known: found.append(known))
    for name in (*cli.LAUNCHER_VARIABLES, "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_a_process_by_itself_joins_nobody(calls: list[dict[str, Any]], joined: list[dict[str, Any]]) -> None:
    assert cli.main(GENERATE) == 0
    assert joined == []


@pytest.mark.parametrize(
    ("variables", "known"),
    [
        ({"SLURM_STEP_NODELIST": "a,b"}, {}),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"},
            {"coordinator_address": "a:1", "num_processes": 4, "process_id": 0},
        ),
    ],
)
def test_launchers_are_seen(
    variables: dict[str, str],
    known: dict[str, Any],
    calls: list[dict[str, Any]],
    joined: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(GENERATE) == 0
    assert joined == [known]
    assert cli.main([*GENERATE, "--processes", "1"]) == 0
    assert joined == [known]  # one process looks for no others


def test_a_launcher_that_cannot_be_joined_is_an_error(
    calls: list[dict[str, Any]], joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise every process of the job would believe itself alone and write the same files."""

    def initialize(**_: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert cli.main(GENERATE) == 2
    assert "cannot join the other processes: coordinator_address should be defined. Give --coordinator" in capsys.readouterr().err
    assert not calls


def test_a_machine_without_accelerators_hears_no_complaints_of_theirs() -> None:
    """The TPU library is installed for the tests; here it must not look for a TPU when no platform is asked for."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY")}
    command = [*BLM, "generate", "no/such/model", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("blm: error: no/such/model") and done.stderr.count("\n") == 1
