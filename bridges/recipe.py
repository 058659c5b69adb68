"""Reading a recipe: its YAML, and what overrides it. Needs no torch."""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from bridges.config import Recipe


def recipe_parser() -> ArgumentParser:
    """Every key of a recipe as a dotted option, with its type, default and meaning."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, usage="%(prog)s [--train.steps 100 --bridge.depth 2 …]")
    parser.add_class_arguments(Recipe)
    return parser


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from its YAML and dotted overrides such as `--train.lr 1e-3`.

    Raises ValueError: no such file, no YAML, an unknown key (the nearest one is named), a value of the wrong type.
    """
    path = find_recipe(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ValueError(f"no recipe {path}" + (f"; did you mean {path.parent / near[0]}?" if near else "")) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} is no recipe: it should hold keys such as output, bridge, train")
    return recipe_from(given, overrides, source=str(path))


def recipe_or_data(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe; or where `name` is data, one with all else at its default. ValueError as `read_recipe`."""
    path = find_recipe(name)
    if path.suffix in (".yaml", ".yml") or (not path.exists() and "/" not in name and "{" not in name):
        return read_recipe(name, overrides)
    return recipe_from({"output": "runs/inspected", "data": {"source": name}}, overrides, source=name)


def find_recipe(name: str | Path) -> Path:
    """A path as it is; a bare name such as `demo` or `demo.yaml` may also be a recipe of the library."""
    path = Path(name)
    own = Path(__file__).parents[1] / "recipes" / (path.name if path.suffix == ".yaml" else f"{path.name}.yaml")
    return own if not path.exists() and "/" not in str(name) and own.is_file() else path


def recipe_from(given: dict[str, Any], overrides: Sequence[str] = (), source: str = "recipe") -> Recipe:
    """A recipe from what its YAML holds. Raises ValueError as `read_recipe` does."""
    refuse_unknown(given, Recipe, source)
    parser = recipe_parser()
    parser.add_argument("--config", action="config")  # so that what the YAML says has its types checked like an option
    try:
        options = parser.parse_args([f"--config={json.dumps(given, default=str, ensure_ascii=False)}", *overrides])
        found = parser.instantiate(options)
    except (ArgumentError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: {explain(error, overrides)}") from error
    return Recipe(**{f.name: found[f.name] for f in fields(Recipe)})


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line of what the parser has to say, with the nearest option where one is unknown."""
    line = " ".join(str(getattr(error, "message", error)).split())
    unknown = next(
        (o.split("=")[0] for o in overrides if line.startswith("unrecognized") and o.split("=")[0] in line), None
    )
    near = get_close_matches(unknown or "", [f"--{key}" for key in known_keys(Recipe)], n=1)
    return line + (f"; did you mean {near[0]}?" if near else "")


def known_keys(schema: Any, prefix: str = "") -> list[str]:
    """Dotted names of everything that a recipe may say."""
    keys = []
    for entry in fields(schema):
        inner = section(entry.type)
        keys += known_keys(inner, f"{prefix}{entry.name}.") if inner else [f"{prefix}{entry.name}"]
    return keys


def section(kind: Any) -> Any:
    """The dataclass whose keys a key holds, which may be optional; None where it holds a value, or a list."""
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    return next((k for k in kinds if is_dataclass(k)), None)


def refuse_unknown(given: dict[str, Any], schema: type, source: str, prefix: str = "") -> None:
    """ValueError at the first key that a recipe does not have, with the nearest that it has, or that has no value."""
    known = {entry.name: entry.type for entry in fields(schema)}
    for key, value in given.items():
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{source}: unknown key {prefix}{key}; {hint}")
        inner = known[key]
        if (part := section(inner)) and not (value is None and part is not inner):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{source}: {prefix}{key} should hold keys such as {fields(part)[0].name}, not {value!r}"
                )
            refuse_unknown(value, part, source, f"{prefix}{key}.")
        elif isinstance(value, list) and (kind := next(map(section, get_args(inner)), None)):
            for entry in value:
                if not isinstance(entry, dict):
                    first = fields(kind)[0].name
                    raise ValueError(f"{source}: {key} should hold entries with keys such as {first}, not {entry!r}")
                refuse_unknown(entry, kind, source, f"{key}.")
        elif value is None and type(None) not in get_args(inner):
            raise ValueError(f"{source}: {prefix}{key} has no value; give it one, or leave the key out")
