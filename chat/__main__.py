"""`python -m chat CHECKPOINT`: what the user can mend is one line and exit code 2; Ctrl-C is 130."""

import sys
from argparse import ArgumentParser

from chat.terminal import run


def main() -> None:
    parser = ArgumentParser(prog="python -m chat", description="Talk with a trained model about pictures.")
    parser.add_argument("checkpoint", help="folder that `bridges train` made")
    parser.add_argument(
        "--image", dest="images", nargs="+", action="extend", default=[], help="pictures of the first message"
    )
    parser.add_argument("--prompt", help="the first and only message: print its answer and end")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from tokens with this much of the probability")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    try:
        run(**vars(parser.parse_args()))
    except ValueError as error:
        print(f"chat: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
