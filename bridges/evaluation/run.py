"""`bridges evaluate`: a checkpoint on held-out splits; the table, evaluation.json and report.html."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from bridges.build import Assembled, Built, Paired, towers_of, trained
from bridges.checkpoint import load, load_pairs
from bridges.data.conversation import images_of
from bridges.data.pictures import SkipBroken
from bridges.data.sources import open_split, told
from bridges.evaluation.pairs import measure_pairs
from bridges.evaluation.report import Shown, write_report
from bridges.evaluation.table import table_text
from bridges.evaluation.tasks import Said, captions_of, listen, questions_of, tabulate
from bridges.files import write
from bridges.saved import recipe_of
from bridges.store import open_store

RESULTS, REPORT = "evaluation.json", "report.html"
AT_ONCE = 48  # examples; pictures are shuffled among them
OPENMOJI = "Pictures composed of OpenMoji 17, the open-source emoji and icon project, CC BY-SA 4.0 (openmoji.org)."


def evaluate(
    checkpoint: str | Path, splits: Sequence[str] = ("val",), size: int = 200, data: str | None = None
) -> dict[str, Any]:
    """Measure a checkpoint on the first `size` examples of each split; print, write and return the table.

    `data` is another source than the checkpoint's own; its splits are told as `val of <data>`.
    Splits measured before stay in evaluation.json. Raises ValueError where the split is empty or unknown.
    """
    folder = Path(checkpoint)
    built: Built = load_pairs(folder) if recipe_of(folder).objectives else load(folder)
    asked = built
    if data:
        source = replace(built.recipe.data, source=data, validation=None)
        asked = built._replace(recipe=replace(built.recipe, data=source))
    console = Console()
    measured: dict[str, Any] = {}
    shown: list[Shown] = []
    for split in splits:
        name = f"{split} of {data}" if data else split
        if isinstance(asked, Paired):
            measured[name], pictures = measure_pairs(asked, split, size, console)
        else:
            said = measure(asked, split, size, console)
            pictured = [one for one in said if one.pictured]
            measured[name], pictures = tabulate(said, namer(asked)), [show(one) for one in pictured[:12]]
        shown = shown or pictures
    results = folder / RESULTS
    table = {**(json.loads(results.read_text()) if results.exists() else {}), **measured}
    write(results, json.dumps(table, indent=2).encode())
    report(folder, built, table, shown)
    Console(width=max(console.width, 100)).print(table_text(measured))
    console.print(f"{results} and {folder / REPORT} written", highlight=False)
    return table


def measure(assembled: Assembled, split: str, size: int, console: Console) -> list[Said]:
    """Everything the model says on a split, with progress."""
    data = SkipBroken(open_split(assembled.recipe.data, split))
    count = min(size, len(data))
    if count < 2:
        raise ValueError(f"split {split} has {count} example; at least 2 are needed, so that pictures can be shuffled")
    console.print(told(f"{split} of {assembled.recipe.data.source}", data.rows), highlight=False, markup=False)
    starts = list(range(0, count, AT_ONCE))
    if count - starts[-1] < 2:  # a last example alone would have no other picture
        starts.pop()
    said: list[Said] = []
    store = open_store(assembled)
    for start, end in track(
        list(zip(starts, [*starts[1:], count], strict=True)), f"evaluating {split}", console=console
    ):
        said += listen(assembled, [data[i] for i in range(start, end)], store)
    if store:
        store.flush()
    if data.broken:
        console.print(data.summary())
    if texts := sum(not one.pictured for one in said):
        what = (
            f"{texts} of {len(said)} examples have no picture: nothing but the likelihood of their answers is measured"
        )
        console.print(what, highlight=False)
    return said


def namer(assembled: Assembled) -> Any:
    """How object names are found in a caption: only `scenes` knows its objects."""
    if assembled.recipe.data.source.partition(":")[0] != "scenes":
        return lambda _text: frozenset()
    from bridges.data.scenes import named  # extra [demo]

    return named


def show(one: Said) -> Shown:
    """An example for the report: its caption, or else its first question."""
    if one.captions:
        asked, reference = captions_of(one.example)[0], one.references[0]
        answer, shuffled = one.captions["image"], one.captions["shuffled"]
    elif one.kinds:
        asked, reference = questions_of(one.example)[0], one.expected[0]
        answer, shuffled = one.answers["image"][0], one.answers["shuffled"][0]
    else:
        asked, reference, answer, shuffled = one.example.conversations[0], "", "", ""
    words = "".join(part for part in asked.turns[0].content if isinstance(part, str))
    return Shown(images_of(asked.turns)[0], words, reference, answer, shuffled)


def report(folder: Path, built: Built, table: dict[str, Any], shown: Sequence[Shown]) -> None:
    """report.html beside the checkpoint."""
    recipe, towers = built.recipe, towers_of(built)
    metrics = folder / "metrics.jsonl"
    history = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    took = max((row.get("seconds", 0) for row in history), default=0)
    done = max((row["step"] for row in history), default=recipe.train.steps)
    steps = f"{done}" + (f" of the recipe's {recipe.train.steps}" if done < recipe.train.steps else "")
    details = {
        **{f"{kind.capitalize()} tower": tower.name for kind, tower in towers.items()},
        "Bridge": f"{recipe.bridge['name']}, {built.model.bridge.shape()}",
        **({"Objectives": ", ".join(recipe.objectives)} if recipe.objectives else {}),
        "Trained": f"{sum(p.numel() for p in trained(built)):,} parameters; the towers are frozen",
        "Steps": f"{steps}, each of {recipe.train.batch} pictures, {took / 60:.1f} minutes",
        "Data": recipe.data.source,
    }
    attribution = OPENMOJI if recipe.data.source.partition(":")[0] == "scenes" else None
    title = f"{folder.name}: a bridge {'between two frozen models' if len(towers) > 1 else 'on a frozen encoder'}"
    write_report(
        folder / REPORT,
        title=title,
        history=history,
        table=table,
        pictures=shown,
        details=details,
        attribution=attribution,
        unit="loss a pair" if recipe.objectives else "nats per token",
    )
