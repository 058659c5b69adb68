"""What the command can do: one function a verb, no logic. A verb imports torch when it runs, so help is quick.

`serve` and `benchmark` are in the rooms of their name.
"""

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Literal

from rich.console import Console

from bridges.benchmark.run import benchmark
from bridges.serve.run import serve


def demo(output: str = "runs/demo") -> None:
    """Train the demo's bridge on the bundled towers, measure it, and show what it says.

    Args:
        output: folder of the checkpoint; a run that was stopped goes on from there
    """
    from bridges.demo import run

    run(Path(output))


def evaluate(checkpoint: str, split: list[str] = [], size: int = 200, data: str | None = None) -> None:
    """Measure a checkpoint on held-out data, beside shuffled and blank pictures; write evaluation.json, report.html.

    Args:
        checkpoint: folder that `bridges train` made
        split: val (the default); of scenes also val_pairs (objects never seen together) and val_sprites (pictures never
            seen); give the option again for more
        size: number of examples of each split
        data: another source than the checkpoint's own, such as scenes:documents
    """
    from bridges.evaluation.run import evaluate

    evaluate(checkpoint, split or ["val"], size, data)


def generate(
    checkpoint: str,
    prompt: str,
    image: list[str] = [],
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    answers: int = 1,
) -> None:
    """Answer one prompt about any number of pictures.

    Args:
        checkpoint: folder that `bridges train` made
        prompt: what to ask
        image: a picture; give the option again for more
        temperature: 0 always takes the likeliest token
        max_new_tokens: longest answer
        answers: how many, a line each: the likeliest by beam search, or with a temperature as many draws
    """
    from bridges.inference.settings import Settings
    from chat.several import tell_several
    from chat.terminal import run

    settings = Settings(temperature=temperature, max_new_tokens=max_new_tokens)
    if answers > 1:
        tell_several(checkpoint, prompt, image, answers, settings)
    else:
        run(checkpoint, image, prompt, settings)


def chat(
    checkpoint: str,
    image: list[str] = [],
    prompt: str | None = None,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    json: bool = False,
    web: bool = False,
    host: str | None = None,
    port: int | None = None,
) -> None:
    """Talk about pictures. /help lists the commands; reads a pipe when there is no terminal.

    Args:
        checkpoint: folder that `bridges train` made
        image: a picture to begin with; give the option again for more
        prompt: the first and only message: print its answer and end
        system: what the conversation begins with
        temperature: 0 always takes the likeliest token
        top_p: draw from the likeliest tokens that together have this probability
        max_new_tokens: longest answer
        seed: of what is drawn
        json: each answer as a line of JSON, with what it cost
        web: talk in a web page instead, with stop, regenerate, undo and all settings
        host: of the page; by default 127.0.0.1, which only this machine reaches
        port: of the page; by default the first free one from 7860
    """
    from bridges.inference.settings import Settings
    from chat.start import start

    settings = Settings(temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens)
    start(checkpoint, image, prompt, settings, system, json, web, host, port)


def retrieve(
    checkpoint: str,
    images: str | None = None,
    image: list[str] = [],
    text: list[str] = [],
    texts: str | None = None,
    top: int = 5,
    rerank: int = 16,
) -> None:
    """Find the pictures of a folder that fit a text, or the text that fits a picture; one of each: do they match?

    Args:
        checkpoint: folder that `bridges train` made with a recipe of the first stage, such as demo_qformer_stage1
        images: folder of pictures to search; what the encoder sees in them is kept, so that the next search is quick
        image: a picture whose text is looked for; give the option again for more
        text: what to look for, or to compare with; give the option again for more
        texts: a file with a text in each line
        top: how many to show
        rerank: how many of the nearest the matching head looks at and reorders
    """
    from bridges.inference.retrieve import retrieve

    retrieve(checkpoint, images=images, image=image, text=text, texts=texts, top=top, rerank=rerank)


def fewshot(
    checkpoint: str,
    data: str | None = None,
    task: Literal["caption", "vqa", "classify", "binding"] = "caption",
    shots: str | None = None,
    choose: Literal["fixed", "random", "nearest"] = "fixed",
    queries: int = 100,
    seeds: int = 3,
    template: str | None = None,
    kind: str | None = None,
    pool: int = 1000,
    text_shots: int = 2,
    batch: int = 32,
) -> None:
    """Measure a checkpoint with demonstrations in front of each query; write fewshot.json and a plot beside it.

    Args:
        checkpoint: folder that `bridges train` made
        data: another source than the checkpoint's own; demonstrations are of its training part, queries held out
        task: captions, questions (vqa), labels by their likelihood (classify), or invented names (binding)
        shots: numbers of demonstrations, by default 0,4,8,16; of binding 1,3,5
        choose: demonstrations fixed in a trial, drawn at random for each query, or those with the nearest pictures
        queries: number of held-out queries
        seeds: number of trials, of which mean and spread are told
        template: such as "{image}Output: {caption}\\n"; or a YAML file with a text for each task
        kind: kind of the questions, such as background; by default all
        pool: training examples that demonstrations are chosen from
        text_shots: demonstrations without their pictures that stand for 0 shots, as in Flamingo
        batch: whole prompts at once; of queries after demonstrations that are kept, as many as take the same room
    """
    from bridges.evaluation.fewshot import fewshot

    fewshot(checkpoint, data, task, shots, choose, queries, seeds, template, kind, pool, text_shots, batch)


def train(recipe: str, overrides: list[str], resume: bool = False, engine: str | None = None) -> None:
    """Train a bridge as a recipe says; every key can be overridden: --train.lr 1e-3 --bridge.depth 2.

    Args:
        recipe: YAML file, or the name of one that comes with the library
        resume: go on with the run in the output folder, if there is one (also --resume auto)
        engine: how processes share the work: ddp (the default), zero1, zero2, zero3, or a JSON of DeepSpeed; start them
            with torchrun or accelerate launch
    """
    from bridges.recipe import read_recipe
    from bridges.training.loop import train

    read = read_recipe(recipe, overrides)
    output = quote(str(train(read, resume, engine)))
    use = "retrieve" if read.objectives else "chat"
    Console().print(f"done: bridges evaluate {output}   bridges {use} {output}", highlight=False)


def merge(checkpoint: str, output: str) -> None:
    """Fold a checkpoint's LoRA into its towers: models in transformers' format, and the checkpoint with them.

    Args:
        checkpoint: folder that `bridges train` made with a recipe that has lora, or vision.lora
        output: folder to write; the language model is in `language` there, the encoder in `vision`
    """
    from bridges.merge import merge

    folders = merge(checkpoint, output)
    Console().print("done:", *folders, f"  bridges chat {quote(output)}", highlight=False)


def inspect(recipe: str, overrides: list[str], samples: int = 3, rows: int = 200, html: str = "inspect.html") -> None:
    """Show samples as the language model will see them, slots and targets coloured, and count, before paying for a run.

    Args:
        recipe: YAML file, or the name of one that comes with the library; or data alone, for the bundled towers
        samples: how many examples to show
        rows: how many examples, from all over the data, to count over
        html: the page to write, with pictures
    """
    from bridges.recipe import recipe_or_data
    from bridges.training.inspection import inspect

    inspect(recipe_or_data(recipe, overrides), samples, rows, Path(html))


def plan(recipe: str, overrides: list[str], gpu: str | None = None) -> None:
    """Say what a run takes: parameters, memory, tokens, steps, time, what choices cost. Computes two small steps.

    Args:
        recipe: YAML file, or the name of one that comes with the library; or data alone, for the bundled towers
        gpu: memory of the GPU that is meant, such as 24GB
    """
    from bridges.recipe import recipe_or_data
    from bridges.training.plan import plan

    plan(recipe_or_data(recipe, overrides), gpu)


def cache(recipe: str, overrides: list[str]) -> None:
    """Encode the pictures of a recipe ahead, and keep what the encoder sees; say first whether that will help.

    Args:
        recipe: YAML file, or the name of one that comes with the library; with torchrun each process does its share
    """
    from bridges.recipe import read_recipe
    from bridges.training.ahead import encode_ahead

    encode_ahead(read_recipe(recipe, overrides))


def doctor() -> None:
    """Say what this machine has, what is missing for which recipe, and what the caches hold."""
    from bridges.doctor import doctor

    doctor()


VERBS: dict[str, Callable[..., None]] = {
    v.__name__: v
    for v in (
        *(demo, train, evaluate, generate, chat, serve, retrieve, fewshot),
        *(inspect, plan, cache, doctor, merge, benchmark),
    )
}
