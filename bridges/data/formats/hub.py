"""Raw rows of a data set on the Hugging Face hub, streamed; its pictures stay as they are encoded."""

from collections.abc import Mapping
from typing import Any

from datasets import Image, Sequence, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # pyright: ignore[reportPrivateImportUsage]

from bridges.data.formats.text import Raw

SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}


def hub_rows(source: str) -> Raw:
    """The rows of every split of `owner/name` or `owner/name:config`; each knows its split.

    Raises ValueError at once where the hub cannot be reached or has no such data: without this look `datasets` tries
    for half a minute.
    """
    name, _, config = source.partition(":")
    try:
        HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise ValueError(
            f"no file or folder {name}, and no data set of that name on the hub that you may read"
        ) from None
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no file or folder {name}, and the hub cannot be reached: {reason:.120}") from None
    yield from split_rows(load_dataset(name, config or None, streaming=True))


def split_rows(splits: Mapping[Any, Any]) -> Raw:
    """The rows of data sets by the names of their splits."""
    for split, data in splits.items():
        encoded = data
        for column, feature in (data.features or {}).items():
            if isinstance(feature, Image):
                encoded = encoded.cast_column(column, Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), Image):
                encoded = encoded.cast_column(column, Sequence(Image(decode=False)))
        for number, row in enumerate(encoded, 1):
            yield f"{split} row {number}", {**row, "split": SPLITS.get(str(split))}
