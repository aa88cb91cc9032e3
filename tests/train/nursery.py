"""Starts `blm` again and again without importing it anew: forks before JAX has looked for devices.

A line on standard input is a start, as JSON: its arguments, and after how many steps told, and how many seconds more, it is killed; 0 steps
let it live. The answer is its exit code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

from blm_jax.cli import main
from blm_jax.train import command, loop  # what takes long to import

assert command


def kill_after(steps: int, seconds: float) -> None:
    told, whole = 0, loop.values

    def values(report: Any) -> dict[str, Any]:
        nonlocal told
        told += 1
        if told == steps:
            threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        return whole(report)

    loop.values = values


for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        kill_after(asked["steps"], asked["seconds"])
        code = 1
        try:
            code = main(asked["arguments"])
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
