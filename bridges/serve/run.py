"""`bridges serve`: the model is loaded, an address opened, and Ctrl-C ends both."""

import logging
import socket
from pathlib import Path
from types import FrameType


def serve(
    checkpoint: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    sessions: int = 8,
    remote_images: bool = False,
) -> None:
    """Answer over HTTP as OpenAI's API for chats does, so that its clients talk with a checkpoint about pictures.

    Ctrl-C ends it, as KeyboardInterrupt. Raises ValueError where the extra is not installed, the address cannot be had,
    or the checkpoint is wrong.

    Args:
        checkpoint: folder that `bridges train` made, by whose name clients call the model
        host: address to listen on; 0.0.0.0 lets other machines in
        port: number of the port; 0 takes any that is free, and says which
        token: what clients must send as their API key; by default nothing
        sessions: conversations in memory at once: those being answered, in turns, and those kept for their next message
        remote_images: fetch pictures from any http address that a client names, not only from the message itself
    """
    try:
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f"bridges serve needs {error.name}: pip install 'mm-bridges[serve]'") from error
    from bridges.checkpoint import load
    from bridges.serve.app import Api
    from bridges.serve.engine import Engine

    opened = address(host, port)  # before the model is loaded, which takes long
    assembled = load(checkpoint)
    name, engine = Path(checkpoint).resolve().name, Engine(assembled, sessions)
    where = f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"listening on http://{where}:{opened.getsockname()[1]}/v1, model {name}", flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            engine.close()  # those who wait are told, so that nobody keeps the server waiting
            super().handle_exit(sig, frame)

    show_log()
    app = Api(engine, name, token, remote_images).app()
    try:
        Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)).run([opened])
    finally:
        engine.close()
        engine.thread.join(5)


def show_log() -> None:
    """What the engine tells goes to stderr, each line with the time."""
    talk = logging.getLogger("bridges.serve")
    talk.setLevel(logging.INFO)
    talk.addHandler(logging.StreamHandler())
    talk.handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))


def address(host: str, port: int) -> socket.socket:
    """Nobody else can have it now, but nobody is let in yet. Port 0 is any that is free. ValueError if it is taken."""
    if not 0 <= port < 2**16:
        raise ValueError(f"no port {port}: they go from 0 (any that is free) to 65535")
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except OSError as error:
        opened.close()
        raise ValueError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; give another --port or --host"
        ) from None
    return opened
