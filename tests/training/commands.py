"""What tests do in processes of their own. As a script: several commands of `bridges` in those that torchrun started.

After `stop=N` the next one gets Ctrl-C on the first process alone, once step N is logged; after `kill=N` kill -9 there
at the N-th time that it touches a file of its output; `copy=FROM=TO` copies a folder.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed

from bridges.cli import main
from bridges.files import replacing, write

TOUCHES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def kill_at(killed_at: int, output: str) -> list[int]:
    """kill -9 at the n-th time that this process opens, makes, moves or removes something whose name begins so.

    Returns the running count of these times. 0 only counts.
    """
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event in TOUCHES and str(arguments[0]).startswith(output):
            count[0] += 1
            if count[0] == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def counted(work: Callable[[], object], touched: str, killed_at: int, told: Any) -> None:
    """Do something under `kill_at`, and tell the count at the end."""
    count = kill_at(killed_at, touched)
    work()
    told.put(count[0])


def save(folder: Path, content: bytes) -> None:
    """Replace three files at once."""
    with replacing(folder) as fresh:
        for name in ("a", "b", "deep/c"):
            write(fresh / name, content)


def stop_at(step: int | str, output: str) -> None:
    """A real SIGINT as soon as a step is in the log."""

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
                source, target = value.split("=")
                shutil.copytree(source, target)
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
