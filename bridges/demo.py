"""`bridges demo`: the main job from end to end on what comes with the library."""

from pathlib import Path

from rich.console import Console

from bridges.checkpoint import load
from bridges.data.conversation import images_of
from bridges.data.scenes import Scenes
from bridges.evaluation.run import evaluate
from bridges.inference.decoding import answers
from bridges.recipe import read_recipe
from bridges.training.loop import train

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"


def run(output: Path) -> None:
    """Train, measure, and ask about a few held-out pictures, which are left in the folder to try by hand."""
    console = Console()
    train(read_recipe(RECIPE, [f"--output={output}"]), resume=True)
    evaluate(output, ["val"], size=144)
    assembled = load(output)
    (output / "pictures").mkdir(exist_ok=True)
    scenes = Scenes("val", 500, seed=1, captions=1, questions=1)
    for index in range(3):
        path = output / "pictures" / f"{index}.png"
        for conversation in scenes[index].conversations:
            turns = conversation.turns[:1]
            images_of(turns)[0].save(path)
            said = answers(assembled, [turns], max_new_tokens=40)[0]
            console.print(f"{path}  {turns[0].content[1]}  [bold]{said}[/bold]", highlight=False)
    console.print(f"\nLook at {output / 'report.html'}, then talk to it:\n  bridges chat {output}", highlight=False)
