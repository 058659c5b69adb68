"""The chat as a user has it: keys and screen, pipes, one question, Ctrl-C."""

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
import torch
from PIL import Image
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from rich.console import Console
from torch import Tensor

from bridges.build import Assembled
from bridges.checkpoint import load
from bridges.data.conversation import Turn
from bridges.data.pictures import open_picture
from bridges.data.template import IMAGE_MARK
from bridges.inference.decoding import Choose, answers, greedy
from bridges.inference.session import Session
from bridges.inference.settings import Settings
from chat import __main__
from chat.commands import COMMANDS, obey
from chat.keyboard import Completions, history, typed
from chat.state import Chat
from chat.terminal import answer, run, talk

pytest_plugins = ["talking"]

ROOT = Path(__file__).parents[2]
SaidBy = Callable[[list[list[str | Path]], int], list[str]]
PROMPT = re.escape("\x1b[?2004h")  # bracketed paste is switched on where a line may be typed


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), markup=False, highlight=False, soft_wrap=True)


def shown(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


class Says(Settings):
    """Chooses as it is told to."""

    def __init__(self, choose: Choose, max_new_tokens: int) -> None:
        super().__init__(max_new_tokens=max_new_tokens)
        object.__setattr__(self, "choose", choose)

    def chooser(self, answer: int = 0) -> Choose:
        return vars(self)["choose"]


def started(checkpoint: Path, environment: dict[str, str], max_new_tokens: int) -> "pexpect.spawn[str]":
    arguments = ["-m", "chat", str(checkpoint), "--max_new_tokens", str(max_new_tokens)]
    return pexpect.spawn(
        sys.executable, arguments, cwd=ROOT, env=environment, encoding="utf-8", timeout=120, dimensions=(40, 500)
    )


def test_a_talk_at_a_terminal(
    checkpoint: Path, said_by: SaidBy, picture_files: list[Path], environment: dict[str, str]
) -> None:
    [first] = said_by([[picture_files[0], "Hello"]], 500)
    terminal = started(checkpoint, environment, 500)

    def see(*patterns: str) -> str:
        for pattern in patterns:
            terminal.expect(pattern)
        terminal.expect(PROMPT)
        return terminal.before

    see("projector between .* and .*, 16 slots an image\r\n", "/help")
    terminal.send("/he\t\r")
    see(r"/image PATH… +attach", "/exit")
    terminal.send(f'/image "{picture_files[0]}"\r')
    see(re.escape("red cat.png (64 × 48, 16 slots)"))
    terminal.send("/imgae x\r")
    see(re.escape("no command /imgae; did you mean /image?"))
    terminal.send("/image no.png\r")
    see("no file no.png")
    terminal.send("Hello\r")
    see(re.escape(first))
    terminal.send("And now?\r")
    terminal.expect(re.escape("\x1b[?2004l"))
    terminal.expect("[!-~]{3}")  # it speaks
    terminal.sendintr()
    see(r"\(stopped\)")
    terminal.send(f"{picture_files[1]}\r")
    see(re.escape("blue.png (64 × 48, 16 slots)"))
    terminal.send("half a li")
    terminal.expect("a li")
    terminal.sendintr()
    see("Ctrl-C again leaves")
    terminal.send("Go on\r")
    assert len(see(re.escape("\x1b[?2004l"))) >= 500, "a whole answer"
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    typed_lines = (Path(environment["XDG_STATE_HOME"]) / "mm-bridges" / "history").read_text()
    assert "+And now?" in typed_lines


def test_every_command_of_help_does_its_work_at_a_terminal(
    checkpoint: Path, picture_files: list[Path], environment: dict[str, str], tmp_path: Path
) -> None:
    terminal = started(checkpoint, environment, 6)
    terminal.expect(PROMPT)
    red, blue = picture_files
    steps = [
        ("/help", "/exit"),
        (f'/image "{red}"', "red cat.png .*▀"),
        ("/images", "1  .*red cat.png .*goes with"),
        ("Hello", "."),
        (f"And @{blue} too?", "."),
        ("/images", "2  .*blue.png"),
        ("/drop 2", "no longer in the conversation: .*blue.png"),
        ("/system Be short.", "begins with that"),
        ("/set temperature 0.5", "temperature = 0.5"),
        ("/retry", "."),
        ("/set temperature=0", "temperature = 0.0"),
        ("/history", r"you: \[.*red cat.png\] Hello.*model: "),
        ("/tokens", "16  1 pictures of 16.*of 2048"),
        ("/stats", "first token after"),
        ("/look", "blank .*shuffled .*the answer"),
        (f"/compare {checkpoint}", "this one"),
        (f"/bridge {checkpoint}", "answers from now on"),
        ("/edit And now?", "."),
        ("/edit", "change it"),
    ]
    later = [
        (" Sure?", "."),
        ("/undo", "taken back: And now\\? Sure\\?"),
        ("/multiline", "a line with nothing but a dot"),
        ("One", ""),
        ("two", ""),
        (".", "."),
        (f"/save {tmp_path}/talk.json", "saved: 5 turns and 1 pictures"),
        (f"/export {tmp_path}/talk.md", "written"),
        ("/clear", "forgotten"),
        (f"/load {tmp_path}/talk.json", "5 turns and 1 pictures"),
        ("/history", "One.*two"),
    ]
    for line, pattern in [*steps, *later]:
        terminal.send(f"{line}\r")
        terminal.expect(re.escape("\x1b[?2004l"))  # the line was taken
        terminal.expect(PROMPT)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.before).strip()
        assert re.search(pattern, shown, re.DOTALL), (line, shown)
    terminal.send("/exit\r")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    driven = {line.split()[0] for line, _ in [*steps, *later] if line.startswith("/")} | {"/exit"}
    assert driven == set(COMMANDS)


def test_a_pipe_of_three_turns_with_two_pictures_gives_three_answers_and_nothing_else(
    checkpoint: Path, said_by: SaidBy, picture_files: list[Path], environment: dict[str, str]
) -> None:
    red, blue = picture_files
    lines = f"/image '{red}'\nWhat is it?\n\n/nonsense\nAnd \udcff?\n/image {blue}\r\nWhich is larger?"
    arguments = [sys.executable, "-m", "chat", str(checkpoint), "--max_new_tokens", "12"]
    given = lines.encode(errors="surrogateescape")  # one byte is not UTF-8
    ran = subprocess.run(
        arguments, input=given, check=False, capture_output=True, cwd=ROOT, env=environment, timeout=240
    )
    messages: list[list[str | Path]] = [[red, "What is it?"], ["And �?"], [blue, "Which is larger?"]]
    assert ran.stdout.decode().splitlines() == said_by(messages, 12)
    assert ran.returncode == 0
    notices = ran.stderr.decode().splitlines()
    assert [line.split("; ")[0].split(": ")[0] for line in notices] == [
        "goes with your next message",
        "no command /nonsense",
        "goes with your next message",
    ]


def test_a_reader_that_has_had_enough_ends_the_chat_quietly(checkpoint: Path, environment: dict[str, str]) -> None:
    arguments = [sys.executable, "-m", "chat", str(checkpoint), "--max_new_tokens", "20"]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT, env=environment) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        chat.stdin.write(b"one\n")
        chat.stdin.flush()
        assert len(chat.stdout.readline()) > 20
        chat.stdout.close()
        chat.stdin.write(b"two\n")
        chat.stdin.close()
        assert chat.stderr.read() == b""
        assert chat.wait(120) == 0


def test_one_prompt_gets_one_answer(
    checkpoint: Path, picture_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(str(checkpoint), [str(path) for path in picture_files], "Which?", Settings(max_new_tokens=12))
    turn = Turn("user", [*map(open_picture, picture_files), "Which?"])
    captured = capsys.readouterr()
    assert captured.out == answers(load(checkpoint), [[turn]], max_new_tokens=12)[0] + "\n"
    assert captured.err == ""


def test_for_scripts_an_answer_is_a_line_of_json(
    checkpoint: Path, picture_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        str(checkpoint), [str(picture_files[0])], "Which?", Settings(max_new_tokens=5), system="Be short.", as_json=True
    )
    told = json.loads(capsys.readouterr().out)
    turns = [Turn("system", ["Be short."]), Turn("user", [open_picture(picture_files[0]), "Which?"])]
    assert told["answer"] == answers(load(checkpoint), [turns], max_new_tokens=5)[0]
    assert (told["said"], told["encoded"], told["kept"]) == (5, 1, 0)


def test_a_full_context_is_told(assembled: Assembled, screen: Console) -> None:
    chat = Chat(Session(assembled), Settings(max_new_tokens=8))
    talk(chat, ["Look at the red house. " * 6] * 8, screen)
    assert "the context is full: the first" in shown(screen)
    assert len(chat.session.turns) == 16


def test_a_seed_draws_the_same_answer_again(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for seed in (1, 1, 2):
        run(str(checkpoint), prompt="Hello", settings=Settings(1.0, 0.9, max_new_tokens=12, seed=seed))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no checkpoint in nowhere"),
        (["CHECKPOINT", "--image", "BLUE", "bleu.png"], "no file bleu.png"),
        (["CHECKPOINT", "--prompt", "Hi", "--max_new_tokens", "5000"], "exceed the 2048 positions"),
        (["CHECKPOINT", "--prompt", "Hi", "--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        (["CHECKPOINT", "--temperature", "-1"], "temperature -1.0 is below 0"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    picture_files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"CHECKPOINT": str(checkpoint), "BLUE": str(picture_files[1])}
    monkeypatch.setattr(sys, "argv", ["chat", *(places.get(a, a) for a in arguments)])
    with pytest.raises(SystemExit) as left:
        __main__.main()
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("chat: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def ctrl_c(ids: list[int], times: int = 1) -> Choose:
    """Greedy, as if the user pressed Ctrl-C while the fourth token is made; keeps the ids."""

    def choose(logits: Tensor) -> Tensor:
        tokens = greedy(logits)
        ids.extend(tokens.tolist())
        for _ in range(times if len(ids) == 4 else 0):
            signal.raise_signal(signal.SIGINT)
        return tokens

    return choose


def test_an_answer_is_seen_as_it_comes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    def look(logits: Tensor) -> Tensor:
        seen.append(capsys.readouterr().out)
        return greedy(logits)

    chat = Chat(Session(load(checkpoint)), Says(look, 8))
    chat.message("Hello")
    answer(chat)
    seen.append(capsys.readouterr().out)
    assert seen[0] == ""
    assert all(seen[1:])
    assert "".join(seen) == f"{chat.session.turns[-1].content[0]}\n"


def test_while_somebody_types_the_beginning_of_the_message_is_read(
    assembled: Assembled, screen: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    read, said = {}, {}
    for typed_in in (True, False):
        chat = Chat(Session(assembled), Settings(max_new_tokens=8))
        talk(chat, ["Hello", "Go on"], screen, goes_on=typed_in)
        read[typed_in], said[typed_in] = chat.session.spent.read, capsys.readouterr().out
    assert read[True] < read[False]
    assert said[True] == said[False]


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice at once"])
def test_ctrl_c_stops_the_answer_and_the_talk_goes_on(
    checkpoint: Path, screen: Console, times: int, capsys: pytest.CaptureFixture[str]
) -> None:
    ids: list[int] = []
    chat = Chat(Session(load(checkpoint)), Says(ctrl_c(ids, times), 8))
    handler = signal.getsignal(signal.SIGINT)
    talk(chat, ["Hello", "Go on"], screen, goes_on=True)
    said = [turn.content[0] for turn in chat.session.turns if turn.role == "assistant"]
    words = chat.session.assembled.model.language.decode
    in_hand = 1 if times == 1 else 0  # once, the token in hand is still said; twice, it is dropped
    assert said == [words(ids[: 3 + in_hand]).lstrip(" "), words(ids[4:]).lstrip(" ")]
    assert len(ids) == 4 + 8
    assert capsys.readouterr().out == f"{said[0]}{said[1]}\n"
    assert shown(screen) == "\n(stopped)\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_ends_a_pipe(checkpoint: Path, screen: Console) -> None:
    chat = Chat(Session(load(checkpoint)), Says(ctrl_c([]), 8))
    with pytest.raises(KeyboardInterrupt):
        talk(chat, ["Hello", "Go on"], screen)
    assert len(chat.session.turns) == 2


def test_an_error_is_one_line_and_the_pictures_wait_for_the_next_message(
    assembled: Assembled, screen: Console, picture_files: list[Path]
) -> None:
    chat = Chat(Session(assembled), Settings(max_new_tokens=8))
    blue = picture_files[1]
    talk(chat, [f"/image {blue}", "/image no.png", "word " * 600, f"private {IMAGE_MARK} mark", "Hello", "Bye"], screen)
    assert [len(turn.content) for turn in chat.session.turns] == [2, 1, 1, 1]
    assert isinstance(chat.session.turns[0].content[0], Image.Image), "a picture stands before the text"
    told = shown(screen).splitlines()
    assert [line.split()[0] for line in told] == ["goes", "no", "a", "the"]
    assert "exceed the 512 positions" in told[2]
    assert told[2].endswith("it was not sent (/clear forgets what was said, and every picture)")


def test_exit_ends_the_talk_and_blank_lines_are_nothing(assembled: Assembled, screen: Console) -> None:
    chat = Chat(Session(assembled), Settings(max_new_tokens=2))
    talk(chat, ["", "  \n", "/exit", "Hello"], screen)
    assert chat.session.turns == []


def test_what_a_model_says_does_not_steer_the_terminal(
    assembled: Assembled, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = assembled.template.tokenizer
    said = iter([*tokenizer("a\x1b[2J\x07\tb\n\x9bcé👨‍👩‍👧")["input_ids"], tokenizer.eos_token_id])
    chat = Chat(Session(assembled), Says(lambda _: torch.tensor([next(said)]), 99))
    obey(chat, "Hello")
    answer(chat)
    assert capsys.readouterr().out == "a[2J\tb\ncé👨‍👩‍👧\n"


def keys(text: str, screen: Console) -> list[str]:
    """The lines that come of these keys."""
    with create_pipe_input() as pipe, create_app_session(input=pipe):
        pipe.send_text(text)
        return list(typed(screen))


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_ctrl_c_clears_the_line_and_twice_leaves(state: Path, screen: Console) -> None:
    assert keys("one\rtwo\x03three\r\x03\x03four\r", screen) == ["one", "three"]
    assert shown(screen).splitlines() == ["Ctrl-C again leaves, and so does Ctrl-D"] * 2


def test_ctrl_d_leaves(state: Path, screen: Console) -> None:
    assert keys("one\r\x04two\r", screen) == ["one"]
    assert shown(screen) == ""


def test_what_was_typed_is_there_next_time(state: Path, screen: Console) -> None:
    keys("first\rsecond\r\x04", screen)
    assert keys("\x1b[A\x1b[A\r\x04", screen) == ["first"]
    assert (state / "mm-bridges" / "history").stat().st_mode & 0o077 == 0, "nobody else reads it"


def test_a_home_that_cannot_be_written_costs_only_the_history(state: Path) -> None:
    state.write_text("a file where the folder should be")
    assert isinstance(history(), InMemoryHistory)


def completed(text: str) -> list[str]:
    """The line after each of the completions."""
    found = Completions().get_completions(Document(text), CompleteEvent())
    return sorted(text[: len(text) + each.start_position] + each.text for each in found)


def test_tab_completes_commands_and_after_image_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("red cat.png", "red.png", "it's.png"):
        (tmp_path / name).touch()
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures" / "one.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert completed("/i") == ["/image ", "/images "]
    assert "/compare " in completed("/")
    assert completed("/set te") == ["/set temperature "]
    assert completed("What is in @red.") == ["What is in @red.png"]
    assert completed("@my") == ["@my\\ pictures/"]
    assert completed("/load re") == ["/load red.png", "/load red\\ cat.png"]
    assert completed("Hello /i") == []
    assert completed("re") == []
    assert completed("/help re") == []
    assert completed("/image re") == ["/image red.png", "/image red\\ cat.png"]
    assert completed("/image red\\ c") == ["/image red\\ cat.png"]
    assert completed('/image "red c') == ['/image "red cat.png']
    assert completed("/image red.png it") == ["/image red.png it\\'s.png"]
    assert completed('/image "red cat.png" it') == ['/image "red cat.png" it\\\'s.png']
    assert completed("/image ~/m") == ["/image ~/my\\ pictures/"]
    assert completed("/image my\\ pictures/") == ["/image my\\ pictures/one.png"]


def test_the_terminal_is_there_before_torch() -> None:
    code = "import sys, chat.terminal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
