"""Runs several commands of `bridges` one after another in processes that torchrun started once.

After `stop=N` the next one gets Ctrl-C on the first process alone, once step N is logged; after `kill=N` kill -9 there
at the N-th time that it touches a file of its output; `copy=FROM=TO` copies a folder.
"""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from torch import distributed

from bridges.cli import main


def kill_at(count: int, output: str) -> None:
    """kill -9 at the `count`-th time that this process opens, makes, moves or removes something in `output`."""
    left = [count]

    def hook(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(arguments[0]).startswith(output):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def stop_at(step: str, output: str) -> None:
    def wait() -> None:
        log = Path(output) / "metrics.jsonl"
        while not log.exists() or f'"step": {step},' not in log.read_text():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def run(lines: list[str]) -> None:
    planned: list[tuple[str, str]] = []
    first = os.environ.get("RANK", "0") == "0"
    for line in lines:
        name, _, value = line.partition("=")
        if name in ("stop", "kill"):
            planned.append((name, value))
        elif name == "copy":
            if first:
                shutil.copytree(*value.split("="))
            distributed.barrier()
        else:
            output = next(word.split("=")[1] for word in line.split() if word.startswith("--output="))
            for what, number in planned if first else []:
                stop_at(number, output) if what == "stop" else kill_at(int(number), output)
            try:
                main(line.split())
            except SystemExit as ended:
                if not planned or ended.code != 130:
                    raise
            planned = []


if __name__ == "__main__":
    run(sys.argv[1:])
