"""A model of transformers under HF's Trainer as a contestant: the same steps, led from outside by a callback."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

from bridges.benchmark.contest import FIRST, Clock, Lap, Size, Task, examples, held_out, ready
from bridges.benchmark.multiplications import counted
from bridges.benchmark.parts import Parts
from bridges.benchmark.peers import PEERS
from bridges.build import build_bridge, vision_tower
from bridges.data.batch import shorten
from bridges.data.conversation import Example
from bridges.data.template import IGNORE_INDEX, IMAGE_TOKEN_ID, Template
from bridges.towers.bundled import resolve
from bridges.towers.precision import fastest_dtype
from bridges.towers.vision import VisionTower

THEIRS = ["tuned", "default", "trl"]
"""`default` is as it comes: in bfloat16, which a checkpoint says, and from_pretrained then takes; the others are in
what this machine is fastest in, as we are."""


@dataclass(frozen=True)
class Text:
    """One text and its picture, tokenized ahead."""

    ids: list[int]
    labels: list[int]
    looks: list[int]
    image: Image.Image


class Collator:
    """A step's texts, each with its own picture, padded to the longest."""

    def __init__(self, vision: VisionTower, image_id: int, tagged: bool) -> None:
        self.vision, self.image_id, self.tagged = vision, image_id, tagged

    def __call__(self, steps: Sequence[Sequence[Text]]) -> dict[str, Tensor]:
        (texts,) = steps
        ids = padded([t.ids for t in texts], IMAGE_TOKEN_ID - 1)
        pixels: Float[Tensor, "n 3 y x"] = self.vision.preprocess([t.image for t in texts])
        real = ids >= IMAGE_TOKEN_ID
        batch = {
            "input_ids": torch.where(ids == IMAGE_TOKEN_ID, self.image_id, ids.clamp(min=0)),
            "attention_mask": real.long(),
            "labels": padded([t.labels for t in texts], IGNORE_INDEX),
        }
        if not self.tagged:
            return batch | {"pixel_values": pixels}
        looks = padded([t.looks for t in texts], 0)
        return batch | {"pixel_values": pixels[:, None], "image_attention_mask": looks[..., None]}


class Gate(TrainerCallback):
    """Lets the Trainer go on for as many steps as are asked for, and tells how long they took; `look` is taken then."""

    def __init__(self, pipe: Connection, look: Callable[[Lap], Lap]) -> None:
        self.pipe, self.look, self.left, self.parts = pipe, look, 0, Parts()
        self.clock, self.loss, self.targets = Clock(self.parts), 0.0, 0

    def wait(self, control: TrainerControl) -> None:
        self.left = self.pipe.recv()
        self.clock = Clock(self.parts)
        control.should_training_stop = not self.left

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self.wait(control)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self.clock.tick(self.loss, self.targets)
        self.left -= 1
        if not self.left:
            self.pipe.send(self.look(self.clock.lap()))
            self.wait(control)


def led(kind: type[Trainer], gate: Gate) -> type[Trainer]:
    """A Trainer that tells the gate its loss."""

    class Led(kind):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            gate.targets = int((inputs["labels"] != IGNORE_INDEX).sum())
            loss = super().training_step(model, inputs, *args, **kwargs)
            gate.loss = float(loss)
            return loss

    return Led


def run(pipe: Connection, task: Task, name: str) -> None:
    """Take part."""
    recipe = task.recipe
    where, dtype = resolve(recipe.language.name), torch.bfloat16 if name == "default" else fastest_dtype()
    vision = vision_tower(recipe)
    language: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, attn_implementation="sdpa")
    with torch.device("meta"):
        width, layers = language.config.hidden_size, language.config.num_hidden_layers
        bridge = build_bridge(recipe.bridge, vision.dim, vision.num_patches, width, layers)
    tokenizer = AutoTokenizer.from_pretrained(where)
    template = Template(tokenizer, bridge.num_slots, recipe.language.template, recipe.language.system)
    steps = [texts_of(step, template, recipe.data.max_length) for step in examples(task)]
    image_id = unused(steps, language.config.vocab_size)
    if type(bridge) not in PEERS:
        raise ValueError(f"transformers has no model with the bridge {recipe.bridge['name']}")
    model, names = PEERS[type(bridge)](vision, language, bridge, image_id)
    take(model, names, load_file(task.folder / FIRST))

    collate = Collator(vision, image_id, tagged=not bridge.num_slots)
    held = [collate([texts_of(some, template, recipe.data.max_length)]) for some in held_out(task)]
    gate = Gate(pipe, lambda lap: replace(lap, held_out=loss_of(trainer, held)) if held else lap)
    trainer = trainer_of(name, model, steps, collate, gate, task, tokenizer)
    batch = collate(steps[:1])
    targets = int((batch["labels"] != IGNORE_INDEX).sum())
    loss, flops = counted(lambda: trainer.training_step(model, dict(batch), torch.tensor(targets)))
    gradient = {ours: given(model.get_parameter(theirs).grad, ours) for ours, theirs in names.items()}
    pipe.send(ready(task, name, float(loss), Size(targets, batch["input_ids"].numel(), flops), gradient))
    model.zero_grad()
    gate.parts.watch("vision", vision)
    gate.parts.watch("forward", model)
    gate.parts.watch("backward", trainer.accelerator, "backward")
    trainer.train()


@torch.no_grad()
def loss_of(trainer: Trainer, batches: Sequence[dict[str, Tensor]]) -> float:
    """Mean over all targets, asleep."""
    model: Any = trainer.model
    model.eval()
    counts = [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches]
    on = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]
    total = sum(float(model(**batch).loss) * count for batch, count in zip(on, counts, strict=True))
    model.train()
    return total / sum(counts)


def trainer_of(
    name: str, model: nn.Module, steps: Any, collate: Collator, gate: Gate, task: Task, tokenizer: Any
) -> Trainer:
    """A Trainer; TRL's SFTTrainer is given the same batches.

    Off are its preparation, checkpointing of gradients, and bfloat16.
    """
    arguments = arguments_of(task, name)
    if name != "trl":
        kind: Any = led(Trainer, gate)
        settled = TrainingArguments(**arguments)
        return kind(model=model, args=settled, train_dataset=steps, data_collator=collate, callbacks=[gate])
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    off: dict[str, Any] = dict(bf16=False, max_length=None, gradient_checkpointing=False)
    sft: Any = led(SFTTrainer, gate)
    return sft(
        model=model,
        args=SFTConfig(**arguments, **off, dataset_kwargs={"skip_prepare_dataset": True}),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"step": list(range(len(steps)))}),  # it takes nothing else
        data_collator=lambda rows: collate([steps[rows[0]["step"]]]),
        callbacks=[gate],
    )


def arguments_of(task: Task, name: str) -> dict[str, Any]:
    """Trainer's own ways, but for the optimizer's numbers, which are the recipe's, and the order of the data."""
    settings = task.recipe.train
    return dict(
        output_dir=str(task.folder / name),
        per_device_train_batch_size=1,  # a step's texts are one item: the collator lays them out
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def take(model: nn.Module, names: dict[str, str], weights: dict[str, Tensor]) -> None:
    """Our bridge's weights, in their own dtype; nothing else trains. ValueError where one has no place."""
    if left := sorted(weights.keys() ^ names.keys()):
        raise ValueError(f"{len(left)} of the bridge's tensors have no counterpart, such as {left[0]}")
    model.requires_grad_(False)
    for ours, theirs in names.items():
        parameter = model.get_parameter(theirs)
        with torch.no_grad():
            parameter.copy_(weights[ours].reshape(parameter.shape))
        parameter.requires_grad_(True)


def given(gradient: Tensor | None, ours: str) -> Tensor:
    """In our shape: only `queries` and gates differ, by dimensions of 1."""
    assert gradient is not None, f"{ours} has no gradient"
    if ours == "queries":
        return gradient[0]
    return gradient.flatten() if ours.endswith("_gate") else gradient


def texts_of(step: Sequence[Example], template: Template, longest: int) -> list[Text]:
    """Every text for itself, its picture with it. ValueError for one without a picture, or with several."""
    found = []
    for example in step:
        for conversation in example.conversations:
            text = shorten(template.encode(conversation.turns), longest)
            if len(text.images) != 1:
                raise ValueError(f"a text with {len(text.images)} pictures; texts with one each can be compared")
            found.append(Text(text.ids, text.labels, text.looks, text.images[0]))
    return found


def unused(steps: Sequence[Sequence[Text]], size: int) -> int:
    """A token that no text has; theirs mark a picture by one of the vocabulary."""
    used = {token for step in steps for text in step for token in text.ids}
    return next(token for token in reversed(range(size)) if token not in used)


def padded(rows: Sequence[list[int]], fill: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
