"""A recipe: what one YAML file may say, and what each key means."""

from dataclasses import dataclass, field
from typing import Any, Literal

Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]


@dataclass
class Lora:
    """Small matrices beside the frozen linear layers of a tower, which train with the bridge."""

    targets: list[str] = field(default_factory=list)
    """Names of linear layers, such as [q_proj, v_proj]; by default all but the head, or all that features come
    through."""
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
    lora: Lora | None = None
    """LoRA on the encoder (extra `[lora]`), without `cache` and without `objectives`; by default it stays as it is."""


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
    regression: int = 0
    """Examples on which a projector, or a flamingo with `words`, is fitted, in seconds, to the words said about each
    picture, before the first step; 0: it starts at random."""
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
