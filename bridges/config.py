"""A recipe: what one YAML file says. Plain dataclasses; reading them needs no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]


@dataclass
class Vision:
    """The frozen encoder."""

    name: str = "bundled:efficientnet-lite0"
    """Hub name or folder of any encoder that AutoModel gives image features for, or `bundled:efficientnet-lite0`."""
    layer: int = -1
    """Which layer's features the bridge reads; LLaVA reads -2."""
    keep_cls: bool = False
    """Keep the CLS token beside the patches."""
    image_mode: Literal["resize", "pad", "crop"] | None = None
    """`resize` squashes a whole picture into the encoder's shape, `pad` puts it on a canvas, `crop` takes its middle;
    by default its own processor decides."""
    image_size: int | None = None
    """Side, in pixels, of what it sees, where it takes another than its own (EfficientNet, DINOv2; no CLIP)."""
    tiles: int | None = None
    """A picture larger than the encoder's becomes a grid of at most so many tiles, by its shape, and the whole of it
    small; each is one more image, with the slots of one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    cache: Literal["fp32", "fp16", "int8"] | None = None
    """Keep what it sees of each picture on disk, in this format, so that no picture is encoded twice; `bridges cache
    RECIPE` says whether that helps, and does it ahead. fp32 changes nothing, fp16 and int8 round."""
    cache_gb: float = 20.0
    """Most that is kept so, in gigabytes; what is beyond is encoded each time."""


@dataclass
class Language:
    """The frozen language model."""

    name: str = "bundled:smollm2-135m-instruct"
    """Hub name or folder of any causal language model, of a T5 or Flan-T5, or `bundled:smollm2-135m-instruct`."""
    template: str = "chat"
    """`chat` (the tokenizer's own), `plain`, `vicuna0`, `vicuna`, `t5`, or a Jinja text."""
    system: str | None = None
    """What the system turn says in training and in chat; by default what the template itself says."""
    quantize: Literal["int8", "nf4"] | None = None
    """Keep its linear layers in 8 bits, or in 4 (NormalFloat, quantized twice), with bitsandbytes (extra `[quant]`)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


@dataclass
class Lora:
    """Small matrices beside the frozen linear layers of the language model, which train with the bridge."""

    targets: list[str] = field(default_factory=list)
    """Names of linear layers, such as [q_proj, v_proj]; by default all but the head."""
    rank: int = 16
    """Rank of what is added to a layer's weight."""
    alpha: int = 32
    """What is added is scaled by alpha / rank."""
    dropout: float = 0.0
    """Of what enters the small matrices, in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dora: bool = False
    """Also learn the size of every column of the weight (arXiv 2402.09353)."""
    lr: float | None = None
    """Its peak learning rate; by default the bridge's."""


@dataclass
class Data:
    """What it learns from."""

    source: str = "scenes"
    """`scenes`; or `scenes:documents`, texts with several pictures; or a path: JSON lines of chats or documents, LLaVA
    JSON, COCO, VQAv2, CSV, Parquet, `s-{0000..0012}.tar` or folder of pictures with captions; or a name on the hub."""
    format: str | None = None
    """Layout of the source, otherwise seen from the data: `messages`, `prompt`, `llava`, `sharegpt`, `cauldron`,
    `document`, `obelics`, `mmc4`, `captions`, `questions`, `coco`, `karpathy`, `vqav2`, `minigpt4`."""
    images: str | None = None
    """Folder, or its URL, that the paths of pictures start from; by default the folder of the file."""
    validation: str | None = None
    """Path of held-out data in the same form; by default the last 5 % (at most 500 rows) of the source are held out."""
    prompts: list[str] = field(default_factory=lambda: ["Describe the image."])
    """Questions to captions that come without one; with the template `plain` rather [""]."""
    size: int = 4000
    """How many pictures of `scenes`, or documents of `scenes:documents`, there are."""
    captions: int = 1
    """Captions of a picture of `scenes`, all in one row."""
    questions: float = 2.0
    """Questions about a picture of `scenes`, all in one row; 0.5 is a question about every second one."""
    max_length: int = 1024
    """A text longer than so many tokens is cut at its end."""
    prefix: bool = False
    """Split training captions at a random place between their first word and their middle; what is before it is read,
    only what is after it is learnt: BLIP-2's prefix language modelling, which it does for encoder-decoders."""
    batch: int | None = None
    """Examples of it a step, over all processes and micro-batches; by default `train.batch`."""
    weight: float = 1.0
    """Weight of its mean loss, where a step mixes several data."""


@dataclass
class Train:
    """How it learns."""

    steps: int = 1000
    """Optimizer steps in all."""
    batch: int = 32
    """Examples a step, over all processes and micro-batches."""
    micro_batch: int | None = None
    """Examples a process computes at once; by default its whole share of the batch."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup: int = 30
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    gradient_checkpointing: bool = False
    """Compute the language model's layers again in the backward pass: less memory, about a third more time."""
    clip: float = 1.0
    """Greatest norm of the gradient."""
    seed: int = 0
    """Of the bridge's first weights and of the order of the data."""
    evaluate_every: int = 100
    """Steps between looks at the held-out loss."""
    evaluate_size: int = 64
    """Held-out examples of such a look."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 1
    """How many checkpoints stay: with more than 1 also the last ones in `steps/`, each to talk to, none to resume."""
    best: Literal["caption_nll", "recall@1", "matching", "captioning"] | None = None
    """Also keep, in `best/`, the checkpoint with the best held-out figure of this name (of the first stage the last
    three)."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    workers: int = 1
    """Threads that prepare pictures ahead."""
    track: list[Tracker] = field(default_factory=list)
    """Also tell `tensorboard`, `trackio`, `wandb`, `mlflow`, whichever are named and installed; metrics.jsonl is always
    written."""


@dataclass
class Recipe:
    """One run, from towers to steps."""

    output: str
    """Folder of the checkpoint."""
    vision: Vision = field(default_factory=Vision)
    """The frozen encoder."""
    language: Language = field(default_factory=Language)
    """The frozen language model."""
    bridge: dict[str, Any] = field(default_factory=lambda: {"name": "projector"})
    """`name` of a file in bridges/ (or of your own module, with a dot) and its options."""
    lora: Lora | None = None
    """LoRA on the language model (extra `[lora]`); by default it stays as it is."""
    start: str | None = None
    """Checkpoint whose bridge is the starting point; or a BLIP-2 or InstructBLIP saved by transformers; or a recipe
    (`.yaml`), which is run first unless that is done."""
    objectives: dict[str, float] = field(default_factory=dict)
    """A first stage without a language model: weights of `contrastive` or `sigmoid`, `matching`, `captioning` on pairs
    of pictures and captions. By default the language model says what the assistant says."""
    data: Data = field(default_factory=Data)
    """What it learns from, and is measured on."""
    also: list[Data] = field(default_factory=list)
    """More to learn from: every step sees a batch of each, and adds their losses up by weight."""
    train: Train = field(default_factory=Train)


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
