"""The chat as a web page: `bridges chat CHECKPOINT --web`.

Each browser tab has a session of its own. There is one model, so one answer is made at a time, in the order of asking.
"""

import os
from dataclasses import fields
from tempfile import TemporaryDirectory
from typing import Any

from docstring_parser import parse_from_object
from rich.console import Console

try:
    import gradio as gr
    from gradio.themes import Default
except ImportError as error:
    raise ValueError("the web page needs gradio: pip install 'mm-bridges[web]'") from error
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridges.build import Assembled
from bridges.inference.session import Session
from bridges.inference.settings import Settings
from chat.show import model_line
from chat.state import Chat
from chat.tab import Tab, ask, clear, halt, regenerate, undo
from chat.terminal import load_chat

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""The browser loads nothing from elsewhere, whatever gradio's page or a model's words ask for"""
LARGEST = "100mb"
"""Of an uploaded file"""
CSS = '.message-buttons:has(button[aria-label="Share"]) { display: none }  #cost { font-size: 0.85em; opacity: 0.7 }'
"""Gradio's way to share a picture would send it to a hub."""


class OnlyFromHere:
    """Sends `POLICY` with every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = POLICY
            await send(message)

        await self.app(scope, receive, with_policy)


def run(checkpoint: str, settings: Settings, system: str | None, host: str | None, port: int | None) -> None:
    """Serve the page until Ctrl-C, by default to this machine only and at the first free port from 7860.

    Raises ValueError where the checkpoint is wrong, or the port is taken.
    """
    console = Console(stderr=True, highlight=False)
    assembled = load_chat(console, checkpoint, settings).session.assembled
    with TemporaryDirectory() as uploads:  # they go when the page does
        os.environ["GRADIO_TEMP_DIR"] = uploads
        blocks = page(assembled, settings, system or "")
        try:
            blocks.launch(
                server_name=host or "127.0.0.1",
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                max_file_size=LARGEST,
                app_kwargs={"middleware": [Middleware(OnlyFromHere)]},
                css=CSS,
                theme=Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            )
        except OSError as error:
            raise ValueError(f"cannot serve the page: {error}; choose another --port, or --host") from error
        console.print(f"the chat is at {blocks.local_url}   Ctrl-C ends it")
        blocks.block_thread()


def page(assembled: Assembled, settings: Settings, system: str) -> gr.Blocks:
    """What is on it, and what happens when something is clicked."""
    about = {entry.arg_name: entry.description for entry in parse_from_object(Settings).params}
    with gr.Blocks(title="bridges", analytics_enabled=False, fill_height=True) as blocks:
        tab = gr.State(lambda: Tab(Chat(Session(assembled), settings)))  # a new one for each tab
        gr.Markdown(model_line(assembled))
        talk = gr.Chatbot(show_label=False, buttons=["copy"], allow_file_downloads=False, scale=1, min_height=240)
        cost = gr.Markdown(elem_id="cost")
        box = gr.MultimodalTextbox(
            file_count="multiple",
            file_types=["image"],
            placeholder="Write a message; pictures go before it: drop them here, or click on the clip",
            show_label=False,
            autofocus=True,
            max_plain_text_length=100_000,
        )
        with gr.Row():
            stop, again, back = (gr.Button(word, size="sm") for word in ("Stop", "Regenerate", "Undo"))
        with gr.Accordion("Settings", open=False):
            knobs: list[Any] = [gr.Textbox(system, label="system", info="what the conversation begins with")]
            with gr.Row():
                for entry in fields(Settings):
                    knob: Any = gr.Textbox if entry.type is str else gr.Number
                    knobs.append(knob(getattr(settings, entry.name), label=entry.name, info=about[entry.name]))
        shown = [talk, box, cost]
        one: Any = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        box.submit(ask, [tab, box, *knobs], shown, **one)
        again.click(regenerate, [tab, *knobs], shown, **one)
        back.click(undo, [tab], shown, **one)
        talk.clear(clear, [tab], shown, **one)
        stop.click(halt, [tab], queue=False, api_visibility="private")
    return blocks
