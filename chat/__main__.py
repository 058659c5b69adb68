"""`python -m chat CHECKPOINT`: what the user can mend is one line and exit code 2; Ctrl-C is 130."""

import sys
from argparse import ArgumentParser
from dataclasses import fields

from bridges.inference.settings import Settings
from chat.start import start


def main() -> None:
    parser = ArgumentParser(prog="python -m chat", description="Talk with a trained model about pictures.")
    parser.add_argument("checkpoint", help="folder that `bridges train` made")
    parser.add_argument(
        "--image", dest="images", nargs="+", action="extend", default=[], help="pictures of the first message"
    )
    parser.add_argument("--prompt", help="the first and only message: print its answer and end")
    parser.add_argument("--system", help="what the conversation begins with")
    parser.add_argument("--json", action="store_true", help="each answer as a line of JSON, with what it cost")
    parser.add_argument("--web", action="store_true", help="talk in a web page instead")
    parser.add_argument("--host", help="of the page; by default 127.0.0.1, which only this machine reaches")
    parser.add_argument("--port", type=int, help="of the page; by default the first free one from 7860")
    for entry in fields(Settings):
        kind = type(entry.default)
        parser.add_argument(f"--{entry.name}", type=kind, default=entry.default, help="see /set and the README")
    given = vars(parser.parse_args())
    try:
        settings = Settings(**{entry.name: given[entry.name] for entry in fields(Settings)})
        where = given["web"], given["host"], given["port"]
        start(given["checkpoint"], given["images"], given["prompt"], settings, given["system"], given["json"], *where)
    except ValueError as error:
        print(f"chat: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
