"""`bridges benchmark`: which measurement, and what belongs to it."""

from typing import Literal


def benchmark(
    what: Literal["train", "growth", "chat", "fewshot", "score", "retrieve"],
    subject: str,
    rounds: int = 3,
    steps: int = 4,
    texts: int = 1,
    contestant: list[str] = [],
    vision: str | None = None,
    language: str | None = None,
    batch: int | None = None,
    questions: float | None = None,
    until: float | None = None,
    image: list[str] = [],
    task: Literal["caption", "vqa", "classify"] = "caption",
    kind: str | None = None,
    shots: int = 16,
    queries: int = 32,
    context: int = 120,
    plot: str = "growth.svg",
    json: str | None = None,
) -> None:
    """Measure on this machine, side by side: training against its peers, and answers where what was read is kept.

    Args:
        what: train (against transformers' Llava, Blip2 or Idefics under HF's Trainer), chat (the fourth turn of a
            conversation), fewshot (queries after demonstrations), score (40 labels), retrieve (pictures by texts), or
            growth (a step over slots, texts, words, pictures and shots, beside what its multiplications foretell)
        subject: of train and growth a recipe such as benchmark_llava, whose bridge decides which peer there is; of the
            others the folder of a checkpoint
        rounds: how often each way is timed
        steps: of train, how many in a round
        texts: of train, of every picture, drawn of its captions and questions
        contestant: of train, tuned, default (both by default), trl; or ours without one technique (no-), with one alone
            (only-), or with none (plain): no-cache, no-prefix, no-sharing, no-lines, no-logits, no-graph; give the
            option again for more
        vision: of train, another tower than the recipe's, or one that is only a shape, with random weights: siglip-b,
            vit-l, vit-l-336
        language: of train, another language model, or a shape: llama-1b, llama-7b
        batch: of train and growth, pictures a step; of growth 2 by default
        questions: of train, of scenes, for each caption, instead of the recipe's; 0 for captions alone
        until: of train, held-out loss (nats a target) up to which all train, instead of rounds; it is looked at after
            every so many steps, outside of what is timed
        image: of chat, a picture of the conversation; give the option twice, or not at all
        task: of fewshot, captions, questions (vqa), or labels by their likelihood (classify)
        kind: of fewshot, kind of the questions, such as background; of growth what grows, such as slots, by default all
        shots: of fewshot, how many demonstrations
        queries: of fewshot and retrieve, how many queries
        context: of score, tokens before a label
        plot: of growth, the SVG to write
        json: file for the figures
    """
    if what == "growth":
        from bridges.benchmark.growth import growth

        growth(subject, rounds, batch or 2, plot, json, kind)
        return
    if what == "train":
        from bridges.benchmark.train import train
        from bridges.benchmark.until import train_until

        if until is not None:
            train_until(subject, until, steps, texts, contestant, vision, language, batch, questions, json)
            return
        train(subject, rounds, steps, texts, contestant, vision, language, batch, questions, json)
        return
    from bridges.benchmark.chat import chat
    from bridges.benchmark.fewshot import fewshot
    from bridges.benchmark.retrieve import retrieve
    from bridges.benchmark.rounds import write_figures
    from bridges.benchmark.score import score

    if what == "chat":
        found = chat(subject, rounds, image)
    elif what == "fewshot":
        found = fewshot(subject, rounds, task, kind, shots, queries)
    elif what == "retrieve":
        found = retrieve(subject, rounds, queries)
    else:
        found = score(subject, rounds, context)
    write_figures(json, what, subject, found)
