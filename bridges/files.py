"""Files that are whole or not there."""

import shutil
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Replace a file in one go: a crash leaves the old one or the new one. ValueError when there is no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror}; {len(content) / 1e6:.1f} MB are needed") from error


def prepare_output(folder: Path, needed: int) -> None:
    """ValueError unless `folder` can be written and has room for `needed` bytes: known before training, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"output {folder} is a file, or lies in one; choose a folder") from None
    except OSError as error:
        raise ValueError(f"cannot make the output folder {folder}: {error.strerror}") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e6:.0f} MB free, a checkpoint needs {needed / 1e6:.0f} MB; make room there"
        )
