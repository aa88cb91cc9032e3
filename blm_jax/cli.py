"""`blm`: joins the other processes of a run, calls one command, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from blm_jax.accelerators import has_tpu, settle_platform
from blm_jax.commands import OutputClosed, say
from blm_jax.errors import RequestError, RunError, StoppedError
from blm_jax.flags import parse

INTERRUPTED, STOPPED = 128 + 2, 128 + 15
TUNABLES = "GLIBC_TUNABLES"
# Each is set by one kind of launcher for every process it starts: Slurm's srun, Open MPI's mpirun, an indexed Kubernetes job.
LAUNCHER_VARIABLES = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "JOB_COMPLETION_INDEX")


def entry() -> NoReturn:
    """The program `blm`. Standard output is for what commands answer: what native libraries print there goes to standard error."""
    sys.stdout.flush()
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(answers, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
    code = main(before_jax=lambda: _take_large_pages(answers))
    if code == INTERRUPTED:
        # A device may be in the middle of a program: the interpreter's own way out would take its buffers from under it.
        sys.stdout.flush()
        os._exit(code)
    jax = sys.modules.get("jax")
    if code and jax is not None and jax.distributed.is_initialized():
        # An orderly end waits minutes for the other processes, which wait for this one: leave, and they are told.
        # The end of process 0 is the end of all, so it lets the others say first what stopped them.
        time.sleep(0 if jax.process_index() else 2)
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _take_large_pages(answers: int) -> None:
    """Begin again with memory in large pages: a program on a CPU gets its memory anew each time it runs, and in pages of 4 KB that was a
    third of a training step. The C library reads how to only when a process begins."""
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
        os.dup2(answers, 1)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(argv: Sequence[str] | None = None, before_jax: Callable[[], None] = lambda: None) -> int:
    """The exit code: 0 done, 2 the request is wrong, 1 it failed on the way, 143 it was asked to stop and can go on."""
    process = 0
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.uses_jax:
            before_jax()
        process = _start_jax(args)
        result = args.run(args, process)
        if args.json and process == 0:
            say(json.dumps(result or {}, ensure_ascii=False))
        return 0
    except SystemExit as stop:  # argparse after --help and --version
        return stop.code if isinstance(stop.code, int) else 1
    except OutputClosed:
        # Whoever read our output has gone (`blm ... | head`); Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except KeyboardInterrupt:
        return INTERRUPTED
    except StoppedError as stop:
        if process == 0:
            print(f"blm: {stop}", file=sys.stderr)
        return STOPPED
    except Exception as error:
        return _report(error, process)


def _report(error: Exception, process: int) -> int:
    if os.environ.get("BLM_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    if isinstance(error, RequestError | RunError):
        message = " ".join(str(error).split())
    else:
        message = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]} (BLM_DEBUG=1 shows where)"
    where = f" (process {process})" if process else ""
    print(f"blm: error{where}: {message}", file=sys.stderr)
    return 2 if isinstance(error, RequestError) else 1


# --- processes -----------------------------------------------------------------------------------------------------------


def _start_jax(args: argparse.Namespace) -> int:
    """Join the other processes of this run, if there are any. The number of this one: only 0 prints."""
    if not args.uses_jax:
        return 0
    # Programs of a model are the same from run to run, and take longer to compile than to answer with.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "blm_jax" / "programs"))
    settle_platform()
    asked = {"coordinator": args.coordinator, "processes": args.processes, "process": args.process}
    if args.processes == 1 and args.coordinator is None:
        return 0
    if any(value is not None for value in asked.values()):
        missing = [f"--{name}" for name, value in asked.items() if value is None]
        if missing:
            raise RequestError(f"{' and '.join(missing)} missing: --coordinator, --processes and --process go together")
        if not re.fullmatch(r".+:\d+", args.coordinator):
            raise RequestError(f"--coordinator is {args.coordinator!r}: write HOST:PORT")
        if not 0 <= args.process < args.processes:
            raise RequestError(f"--process is {args.process}: it must lie between 0 and --processes - 1 = {args.processes - 1}")
        return _join(coordinator_address=args.coordinator, num_processes=args.processes, process_id=args.process)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        return _join(coordinator_address=address, num_processes=_number("JAX_NUM_PROCESSES"), process_id=_number("JAX_PROCESS_ID"))
    launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
    return _join(alone_is_fine=not launched) if launched or has_tpu() else 0


def _join(*, alone_is_fine: bool = False, **known: Any) -> int:
    import jax

    if not jax.distributed.is_initialized():
        # CPUs of several processes meet through sockets, where programs that overlap wait for each other.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        try:
            jax.distributed.initialize(**known)  # finds out from the launcher what is not known
        except ValueError as error:
            if alone_is_fine:
                return 0  # a TPU host that belongs to no pod
            raise RequestError(
                f"cannot join the other processes: {error} Give --coordinator, --processes and --process, or --processes 1"
            ) from error
    if jax.process_index():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nor do the native libraries of other processes print
    return jax.process_index()


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdecimal():
        raise RequestError(f"{variable} is {text!r}: it must be a whole number")
    return None if text is None else int(text)


if __name__ == "__main__":
    entry()
