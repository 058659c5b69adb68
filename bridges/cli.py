"""The command `bridges`: its options are made from the verbs' signatures and docstrings; errors are one line."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from inspect import signature

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser

from bridges import __version__
from bridges.verbs import VERBS

TAKE_OVERRIDES = {name for name, verb in VERBS.items() if "overrides" in signature(verb).parameters}


def parser() -> ArgumentParser:
    """Built from the verbs' signatures and docstrings."""
    about = "Give a frozen language model eyes. More about a verb: bridges VERB --help"
    top = ArgumentParser(prog="bridges", description=about, exit_on_error=False)
    top.add_argument("--version", action="version", version=f"bridges {__version__}")
    verbs = top.add_subcommands(dest="verb", metavar="VERB", title="verbs", description=" ")
    for name, verb in VERBS.items():
        doc, parameters = docstring_parser.parse(verb.__doc__ or ""), signature(verb).parameters
        one = ArgumentParser(description=doc.short_description, exit_on_error=False)
        if name in TAKE_OVERRIDES:
            one.usage = f"bridges {name} RECIPE [options] [--train.steps 100 --bridge.depth 2 …]"
        several = [key for key, p in parameters.items() if p.default == []]
        switches = [key for key, p in parameters.items() if p.default is False]
        told = {p.arg_name: p.description for p in doc.params}
        for key in several:
            one.add_argument(f"--{key}", action="append", default=[], help=told[key])
        for key in switches:
            one.add_argument(f"--{key.replace('_', '-')}", action="store_true", help=told[key])
        required = [key for key, p in parameters.items() if p.default is p.empty and key in ("prompt", "output")]
        by_hand: set[str | int] = {*several, *switches, "overrides", *required}
        one.add_function_arguments(verb, as_group=False, as_positional=True, skip=by_hand)
        for key in required:
            one.add_argument(f"--{key}", required=True, help=told[key])
        verbs.add_subcommand(name, one, help=doc.short_description)
    return top


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The verb's own arguments, and those that override a key of the recipe (with their values)."""
    from bridges.config import Recipe

    tops = tuple(f"--{entry.name}" for entry in fields(Recipe))
    own: list[str] = []
    overrides: list[str] = []
    taken = own
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if (before, argument) == ("--resume", "auto"):
            continue  # what --resume means anyhow
        if argument.startswith("--"):
            taken = overrides if argument.split("=")[0].split(".")[0] in tops else own
        taken.append(argument)
        if not argument.startswith("--") or "=" in argument:
            taken = own
    return own, overrides


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb. What the user can mend is one line on stderr and exit code 2; Ctrl-C is 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    overrides: list[str] = []
    try:
        if arguments[:1] and arguments[0] in TAKE_OVERRIDES:
            arguments, overrides = split_overrides(arguments)
        options = parser().parse_args(arguments or ["--help"]).as_dict()
        verb = options["verb"]
        VERBS[verb](**options[verb], **({"overrides": overrides} if verb in TAKE_OVERRIDES else {}))
    except (ValueError, ArgumentError) as error:
        sys.exit(complain(error))
    except KeyboardInterrupt as error:
        print(f"bridges: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(130)


def complain(error: Exception) -> int:
    """One line that says what is wrong."""
    line = " ".join(str(getattr(error, "message", None) or error).split())
    print(f"bridges: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
