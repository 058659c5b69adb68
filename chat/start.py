"""At the terminal, or as a web page."""

from collections.abc import Sequence

from bridges.inference.settings import Settings
from chat.terminal import run


def start(
    checkpoint: str,
    images: Sequence[str],
    prompt: str | None,
    settings: Settings,
    system: str | None,
    as_json: bool,
    web: bool,
    host: str | None,
    port: int | None,
) -> None:
    """Talk with the model of a checkpoint. ValueError for an option of one way that was given with the other."""
    if not web:
        if host is not None or port is not None:
            raise ValueError("--host and --port are the web page's; give --web too")
        return run(checkpoint, images, prompt, settings, system, as_json)
    if images or prompt is not None or as_json:
        raise ValueError("--web takes no --image, --prompt or --json: pictures and messages are given in the page")
    from chat import web as page

    return page.run(checkpoint, settings, system, host, port)
