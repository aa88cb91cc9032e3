"""The launchers: what they would run, what reaches `blm`, and when it is started again. Clusters are stood in for by scripts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
# What a shell would change if it were let.
OVERRIDES = [
    "a=it's",
    'b="x" y',
    "c=$HOME",
    "d=*",
    "e=",
    "f=$(touch made)",
    "g=a\\b",
    "h=ä!`id`;&|<>",
    "i=line\nline",
    "",
    " ",
    "--json",
    "j={x}",
]
CONFIG = "my configs/run.yaml"
WHERE = {
    "local": [],
    "slurm": ["--nodes", "2", "--gpus", "4", "--sbatch", "--comment=two words"],
    "tpu_vm": ["--name", "pod", "--zone", "here", "--project", "ours", "--dir", "a dir"],
    "tpu_vm --multislice": ["--name", "pods", "--zone", "here", "--multislice"],
    "xpk": ["--cluster", "c", "--workload", "w", "--tpu-type", "v5litepod-16", "--image", "an/image:1", "--slices", "3"],
}
TOOLS = ("bash", "env", "sed", "dirname", "sleep", "cat", "flock")
NOTE = """import json, os, sys
with open(sys.argv[0] + ".log", "a") as log:
    print(json.dumps([sys.argv[1:], os.environ.get("SAID"), os.path.basename(os.getcwd())]), file=log)
"""
SAVE = """import os, signal, sys, time
log = os.open(sys.argv[0] + ".starts", os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # a signal may come while it is written
def save(code):
    time.sleep(0.2)
    os.write(log, b"saved\\n")
    os._exit(code)
signal.signal(signal.SIGTERM, lambda *_: save(143))
try:
    os.write(log, b"started\\n")
    for _ in range(2000):
        time.sleep(0.01)  # Python does not notice a signal that comes just before it sleeps
except KeyboardInterrupt:
    save(130)
"""


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory to stand in, with bin/ for all that is installed: a few tools, and a blm that notes how it was called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (tools / tool).symlink_to(found)
    script(tools / "blm", f"#!{sys.executable} -IS\n{NOTE}")
    # Each runs what it was given for the hosts, as they would: in a shell of their own.
    ssh = 'for word; do case $word in --command=*) command=${word#--command=};; esac; done\nprintf "%s\\0" "$@" >"$0.log"\n'
    script(tools / "gcloud", f'#!/usr/bin/env bash\n{ssh}exec bash -c "$command"\n')
    script(tools / "xpk", f'#!/usr/bin/env bash\n{ssh}exec bash -c "($command)"\n')
    script(tools / "sbatch", '#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$0.log"\nexec bash -s\n')
    script(tools / "srun", '#!/usr/bin/env bash\nshift\nexec "$@"\n')
    script(tools / "scontrol", '#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$0.log"\n')
    (tmp_path / "a dir").mkdir()
    return tmp_path


def run(command: list[str], place: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(place / "bin"), "HOME": str(place), "BLM_RESTART_SECONDS": "0", **variables}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=30, check=False)


def launch(where: str, *rest: str, place: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run([str(LAUNCH / f"{where.split()[0]}.sh"), *WHERE[where], *rest], place, **variables)


def calls(place: Path) -> list[list[object]]:
    log = place / "bin/blm.log"
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def asked(place: Path, tool: str) -> list[str]:
    return (place / f"bin/{tool}.log").read_text().split("\0")[:-1]


@pytest.mark.parametrize("where", WHERE)
def test_every_word_reaches_blm(where: str, place: Path) -> None:
    """As it was written, through all the shells between, and from what --dry-run prints too."""
    words = ["--env", "SAID=don't  $X", CONFIG, *OVERRIDES]
    directory = "a dir" if where == "tpu_vm" else place.name
    dry = launch(where, "--dry-run", *words, place=place)
    assert dry.returncode == 0 and not dry.stderr and not calls(place)
    real = launch(where, *words, place=place)
    assert real.returncode == 0, real.stderr
    expected = [[["train", CONFIG, *OVERRIDES], "don't  $X", directory]]
    assert calls(place) == expected
    pasted = run(["bash", "-c", dry.stdout], place)
    assert pasted.returncode == 0, pasted.stderr
    assert calls(place) == expected
    assert not list(place.rglob("made"))


ASKED = {
    "slurm": (
        "sbatch",
        "--job-name=blm --nodes=2 --requeue --open-mode=append --output=%x-%j.log --gpus-per-node=4 --ntasks-per-node=4 "
        "--signal=TERM@120 '--comment=two words'",
    ),
    "tpu_vm": ("gcloud", "compute tpus tpu-vm ssh pod --zone=here --project=ours --worker=all"),
    "tpu_vm --multislice": ("gcloud", "compute tpus queued-resources ssh pods --node=all --zone=here --worker=all"),
    "xpk": (
        "xpk",
        "workload create --cluster=c --workload=w --tpu-type=v5litepod-16 --num-slices=3 --docker-image=an/image:1 "
        "--max-restarts=7 --restart-on-exit-codes=1",
    ),
}


@pytest.mark.parametrize("where", ASKED)
def test_what_a_cluster_is_asked_for(where: str, place: Path) -> None:
    launch(where, "--restarts", "7", "c.yaml", place=place)
    tool, expected = ASKED[where]
    found = [word for word in asked(place, tool) if not word.startswith("--command=")]
    assert found == shlex.split(expected)


def test_another_program_for_blm(place: Path) -> None:
    other = place / "a dir/my blm"
    shutil.copy(place / "bin/blm", other)
    assert launch("local", "c.yaml", place=place, BLM=str(other)).returncode == 0
    assert json.loads((place / "a dir/my blm.log").read_text())[0] == ["train", "c.yaml"]


def test_variables_that_are_set_here_are_passed_on_by_name(place: Path) -> None:
    assert launch("tpu_vm", "--env", "SAID", "c.yaml", place=place, SAID="a b").returncode == 0
    assert calls(place)[0][1] == "a b"
    assert "SAID=a\\ b" in launch("slurm", "--dry-run", "--env", "SAID", "c.yaml", place=place, SAID="a b").stdout


@pytest.mark.parametrize(
    ("where", "words", "message"),
    [
        ("local", [], "local.sh: error: CONFIG is missing"),
        ("local", ["--nodes", "2", "c.yaml"], "unknown option --nodes: see --help; options of blm come after CONFIG"),
        ("local", ["--env"], "--env wants a value"),
        ("local", ["--env", "SAID", "c.yaml"], "--env SAID: it has no value here"),
        ("local", ["--env", "2x=1", "c.yaml"], "--env 2x=1: write NAME=VALUE"),
        ("local", ["--restarts", "many", "c.yaml"], "--restarts wants a whole number, not 'many'"),
        ("slurm", ["--sbatch"], "--sbatch wants a value"),
        ("slurm", ["--nodes"], "--nodes wants a whole number"),
        ("tpu_vm", ["--name"], "--name wants a value"),
        ("slurm", ["--gpus", "-1", "c.yaml"], "--gpus wants a whole number"),
        ("tpu_vm", ["--zone", "z", "c.yaml"], "--name is missing: gcloud compute tpus tpu-vm list"),
        ("tpu_vm", ["--name", "n", "c.yaml"], "--zone is missing"),
        ("xpk", ["--cluster", "c", "--workload", "w", "--image", "i", "c.yaml"], "--tpu-type is missing"),
    ],
)
def test_wrong_requests(where: str, words: list[str], message: str, place: Path) -> None:
    found = run([str(LAUNCH / f"{where}.sh"), *words], place)
    assert found.returncode == 2 and message in found.stderr and found.stderr.count("\n") == 1
    assert not found.stdout and not calls(place)


@pytest.mark.parametrize(
    ("where", "tool", "how"),
    [
        ("local", "blm", "pip install blm-jax"),
        ("slurm", "sbatch", "run this where Slurm is, on a login node"),
        ("tpu_vm", "gcloud", "install the Google Cloud SDK"),
        ("xpk", "xpk", "pip install xpk"),
    ],
)
def test_what_is_not_installed_is_named(where: str, tool: str, how: str, place: Path) -> None:
    (place / "bin" / tool).unlink()
    found = launch(where, "c.yaml", place=place)
    assert found.returncode == 2 and f"{tool} is not installed: {how}" in found.stderr
    assert launch(where, "--dry-run", "c.yaml", place=place).returncode == 0


@pytest.mark.parametrize("where", ["local", "slurm", "tpu_vm", "xpk"])
def test_help(where: str, place: Path) -> None:
    found = launch(where, "--help", place=place)
    assert found.returncode == 0 and f"launch/{where}.sh" in found.stdout and "--dry-run" in found.stdout
    assert not found.stdout.startswith("#") and "common.sh" not in found.stdout
    text = (LAUNCH / f"{where}.sh").read_text()
    assert all(option in found.stdout for option in (line.split(")")[0].strip() for line in text.splitlines() if line.startswith("    --")))


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.sh")), ids=lambda file: file.name)
def test_syntax(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True)
    assert os.access(file, os.X_OK) == (file.name != "common.sh")


# --- starting again --------------------------------------------------------------------------------------------------------


def ends_with(place: Path, *codes: int) -> None:
    """A blm that ends with these codes, one after the other, and with 0 from then on."""
    kept = place / "codes"
    kept.write_text("".join(f"{code}\n" for code in codes))
    text = f'#!/usr/bin/env bash\necho started >>"$0.starts"\nread -r code <{shlex.quote(str(kept))} || exit 0\n'
    script(place / "bin/blm", f"{text}sed -i 1d {shlex.quote(str(kept))}\nexit $code\n")


def starts(place: Path) -> int:
    return len((place / "bin/blm.starts").read_text().splitlines())


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "count"),
    [((), 3, 0, 1), ((1, 137), 3, 0, 3), ((1, 1, 1, 1, 1), 3, 1, 4), ((2,), 3, 2, 1), ((1, 2), 3, 2, 2), ((1,), 0, 1, 1)],
    ids=["done", "killed twice", "too often", "a wrong request", "wrong later", "never again"],
)
@pytest.mark.parametrize("where", ["local", "tpu_vm"])
def test_started_again(where: str, codes: tuple[int, ...], restarts: int, code: int, count: int, place: Path) -> None:
    ends_with(place, *codes)
    found = launch(where, "--restarts", str(restarts), "c.yaml", place=place)
    assert (found.returncode, starts(place)) == (code, count)
    assert found.stderr.count("it ended with code") == count - 1


@pytest.mark.parametrize(("code", "before", "queued"), [(0, "", False), (1, "", True), (143, "2", True), (1, "3", False), (2, "", False)])
def test_a_job_queues_itself_again(code: int, before: str, queued: bool, place: Path) -> None:
    ends_with(place, code)
    variables = {"SLURM_JOB_ID": "77"} | ({"SLURM_RESTART_COUNT": before} if before else {})
    assert launch("slurm", "--restarts", "3", "c.yaml", place=place, **variables).returncode == code
    assert (place / "bin/scontrol.log").exists() == queued
    assert not queued or asked(place, "scontrol") == ["requeue", "77"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_stops_the_launcher_stops_the_run(number: signal.Signals, place: Path) -> None:
    """The signal reaches the run, which has its time to save; then it is not started again."""
    script(place / "bin/blm", f"#!{sys.executable} -IS\n{SAVE}")
    environment = {"PATH": str(place / "bin"), "BLM_RESTART_SECONDS": "0"}
    process = subprocess.Popen(
        [LAUNCH / "local.sh", "c.yaml"],
        cwd=place,
        env=environment,
        start_new_session=True,
        preexec_fn=partial(signal.signal, number, signal.SIG_DFL),  # a shell that was told to ignore it, as in the background, always does
    )
    log = place / "bin/blm.starts"
    for _ in range(500):
        if log.exists() and log.read_text():
            break
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    assert log.read_text() == "started\nsaved\n"
