"""`bridges serve` as a user starts and ends it; and a crowd that talks with it for minutes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pytest
from clients import QUESTIONS, alone, client_of, crowd, streamed, user
from PIL import Image

from bridges.checkpoint import load
from bridges.cli import main
from bridges.data.conversation import Turn
from bridges.serve.run import address

SECONDS = float(os.environ.get("CROWD_SECONDS", "120"))


@contextmanager
def command(checkpoint: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command, and the address that it prints."""
    line = [sys.executable, "-m", "bridges.cli", "serve", str(checkpoint), "--port", "0", *options]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            found = re.match(r"listening on (http://127\.0\.0\.1:\d+)/v1, model (\S+)$", said)
            assert found, said + (process.stderr.read() if process.stderr and not said else "")
            assert found[2] == checkpoint.name
            yield process, found[1]
        finally:
            process.kill()


def test_ctrl_c_amid_an_answer_ends_it_and_the_server_with_one_line(tiny_checkpoint: Path) -> None:
    with command(tiny_checkpoint) as (process, url), client_of(url) as client:
        assert process.stderr is not None
        name = tiny_checkpoint.name
        streamed(client, [user("Hi.")], name)
        messages = [user("Long.")]
        long = client.chat.completions.create(model=name, messages=messages, max_tokens=480, stream=True)  # pyright: ignore
        next(iter(long))
        process.send_signal(signal.SIGINT)
        with pytest.raises(Exception, match="the server is being stopped"):
            list(long)
        assert process.wait(10) == 130
        told = process.stderr.read().splitlines()
        assert told[-1] == "bridges: stopped"
        assert len(told) == 2, told
        assert "1 messages, 0 pictures: 0 tokens known" in told[0]


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_what_cannot_be_served_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny_checkpoint)
    assert "no checkpoint" in complaint(capsys, str(tmp_path), "--port", "0")
    assert "no port 70000" in complaint(capsys, folder, "--port", "70000")
    assert "at least 1" in complaint(capsys, folder, "--port", "0", "--sessions", "0")
    assert "cannot listen on no.such.host" in complaint(capsys, folder, "--host", "no.such.host.invalid")[:60]
    taken = address("127.0.0.1", 0)
    taken.listen()
    assert "give another --port" in complaint(capsys, folder, "--port", str(taken.getsockname()[1]))
    taken.close()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'mm-bridges[serve]'" in complaint(capsys, folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thirty_two_clients_for_two_minutes_neither_mix_nor_fill_the_memory(tiny_checkpoint: Path) -> None:
    pictures = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8)) for seed in range(32)
    ]
    model = load(tiny_checkpoint)
    turns = [
        [Turn("user", [picture, QUESTIONS[0]]), *(Turn("user", [q]) for q in QUESTIONS[1:])] for picture in pictures
    ]
    expected = [alone(model, questions) for questions in turns]
    with command(tiny_checkpoint, "--sessions", "64") as (process, url):
        memory: list[float] = []
        over = time.monotonic() + SECONDS

        def watch() -> None:
            server = psutil.Process(process.pid)
            while time.monotonic() < over:
                memory.append(server.memory_info().rss / 2**20)
                time.sleep(SECONDS / 60)

        Thread(target=drain, args=(process,), daemon=True).start()
        watching = Thread(target=watch)
        watching.start()
        counts = crowd(url, tiny_checkpoint.name, pictures, expected, SECONDS, 16)
        watching.join()
    third = len(memory) // 3
    grown = max(memory[-third:]) - max(memory[third : 2 * third])
    print(counts, "MiB:", [round(size) for size in memory[::6]])
    assert counts["conversations"] >= 32
    assert (counts["mixed"], counts["errors"]) == (0, 0)
    assert grown < 10, f"{grown:.0f} MiB more in the last third than in the second"


def drain(process: subprocess.Popen[str]) -> None:
    """A pipe that nobody reads fills up, and the one who writes into it waits."""
    assert process.stderr is not None
    for _ in process.stderr:
        pass
