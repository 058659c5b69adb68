"""A recipe says what it means, or is refused in one line with the nearest thing that could be meant."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridges.config import Data, Language, Recipe, Train, Vision
from bridges.recipe import read_recipe, recipe_from

TEXT = """\
output: runs/x
vision: {name: some/encoder, layer: -2}
bridge: {name: projector, depth: 2}
train: {lr: 2e-3, betas: [0.9, 0.95], micro_batch: 4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text(TEXT)
    return tmp_path / "mine.yaml"


def test_what_is_not_said_has_its_default(file: Path):
    recipe = read_recipe(file)
    assert recipe.output == "runs/x"
    assert recipe.vision == Vision(name="some/encoder", layer=-2)
    assert recipe.language == Language()
    assert recipe.bridge == {"name": "projector", "depth": 2}
    assert recipe.data == Data()
    assert recipe.train == Train(lr=2e-3, betas=(0.9, 0.95), micro_batch=4)


def test_a_recipe_of_its_output_alone_is_all_defaults():
    assert recipe_from({"output": "a"}) == Recipe(output="a")


def test_numbers_are_numbers_however_they_are_written(file: Path):
    file.write_text("output: a\ntrain: {lr: 1e-3, weight_decay: 1, clip: '0.5'}\n")
    train = read_recipe(file).train
    assert (train.lr, train.weight_decay, train.clip) == (0.001, 1.0, 0.5)
    assert all(isinstance(value, float) for value in (train.lr, train.weight_decay, train.clip))


def test_text_stays_text_whatever_it_looks_like(file: Path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}: [{{ m.role }}]\n{% endfor %}"
    prompts = ["", "1", "null", "yes", "a: b", "[x]", "{x: 1}", "1e-3"]
    given = {"output": "5", "language": {"template": template, "system": "true"}, "data": {"prompts": prompts}}
    file.write_text(yaml.safe_dump(given))
    recipe = read_recipe(file)
    assert (recipe.output, recipe.language.template, recipe.language.system) == ("5", template, "true")
    assert recipe.data.prompts == prompts
    options = read_recipe(
        file, ["--language.template", template, "--language.system", "1: 2", "--output", "2024-01-01"]
    )
    assert (options.output, options.language.template, options.language.system) == ("2024-01-01", template, "1: 2")


def test_a_dotted_option_overrides_the_file(file: Path):
    options = ["--train.lr", "5e-4", "--train.micro_batch=null", "--data.prompts", '["A?", "B?"]', "--output", "runs/y"]
    recipe = read_recipe(file, [*options, "--language.system", "Be brief.", "--train.betas", "[0.8, 0.9]"])
    assert recipe.train == Train(lr=5e-4, betas=(0.8, 0.9))
    assert recipe.data.prompts == ["A?", "B?"]
    assert recipe.output == "runs/y"
    assert recipe.language.system == "Be brief."
    assert recipe.vision.layer == -2


def test_a_bridges_option_is_overridden_by_itself(file: Path):
    assert read_recipe(file, ["--bridge.depth", "3"]).bridge == {"name": "projector", "depth": 3}
    assert read_recipe(file, ["--bridge.merge=average", "--bridge.norm", "true"]).bridge == {
        "name": "projector",
        "depth": 2,
        "merge": "average",
        "norm": True,
    }
    assert read_recipe(file, ["--bridge.name", "my.own"]).bridge == {"name": "my.own", "depth": 2}
    assert read_recipe(file, ["--bridge.rate", "1e-3"]).bridge["rate"] == 0.001
    assert recipe_from({"output": "a"}, ["--bridge.depth", "2"]).bridge == {"name": "projector", "depth": 2}
    assert Recipe(output="a").bridge == {"name": "projector"}, "an override has changed the default"


def test_data_to_mix_are_a_list(file: Path):
    file.write_text("output: a\nalso:\n- {source: b.csv, weight: 0.2, batch: 4}\n- {source: c.csv}\n")
    assert read_recipe(file).also == [Data(source="b.csv", weight=0.2, batch=4), Data(source="c.csv")]
    values: dict[str, Any] = {**asdict(read_recipe(file))}
    values["train"]["betas"] = list(values["train"]["betas"])
    file.write_text(yaml.safe_dump(values))
    assert len(read_recipe(file).also) == 2


def test_a_recipe_survives_yaml(file: Path):
    recipe = read_recipe(file, ["--data.images", "pictures", "--language.template", "vicuna"])
    values: dict[str, Any] = {**asdict(recipe)}
    values["train"]["betas"] = list(values["train"]["betas"])
    file.write_text(yaml.safe_dump(values))
    assert read_recipe(file) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: a\nvison: {layer: -1}", "unknown key vison; did you mean vision"),
        ("output: a\ntrain: {stepps: 3}", "unknown key train.stepps; did you mean train.steps"),
        ("output: a\ntrain: {zzzz: 3}", "unknown key train.zzzz; there are steps, batch, .*workers"),
        ("output: a\n1: 2", "unknown key 1"),
        ("output: a\nalso: [{source: a}, {wait: 1}]", "unknown key also.wait; did you mean also.weight"),
        ("output: a\nalso: [5]", "also should hold entries with keys such as source, not 5"),
        ("output: a\ntrain: 5", "train should hold keys such as steps, not 5"),
        ("output: a\ntrain:", "train should hold keys such as steps, not None"),
        ("output: a\ntrain: {steps: many}", "train.steps.*many"),
        ("output: a\ntrain: {steps: 1.5}", "train.steps.*1.5"),
        ("output: a\ntrain: {lr: fast}", "train.lr.*fast"),
        ("output: a\ntrain: {betas: [0.9]}", "train.betas"),
        ("output: a\nvision: {keep_cls: perhaps}", "vision.keep_cls.*perhaps"),
        ("output: a\nbridge: projector", "bridge.*projector"),
        ("output: a\ndata: {prompts: Why}", "data.prompts.*Why"),
        ("train: {steps: 3}", "output"),
        ("output: 5", "output"),
        ("", "is no recipe: it should hold keys such as output, bridge, train"),
        ("- a\n- b", "is no recipe"),
        ("output: [a", "is no YAML"),
        ("output: a\n\ttrain: 3", "is no YAML"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_in_one_line_that_names_it(file: Path, text: str, message: str):
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(file)
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.stepps", "3"], r"train.stepps.*did you mean --train.steps\?"),
        (["--train.stepps=3"], r"train.stepps.*did you mean --train.steps\?"),
        (["--trian.steps", "3"], r"trian.steps.*did you mean --train.steps\?"),
        (["--zzzz", "3"], "zzzz"),
        (["--train.steps", "many"], "train.steps.*many"),
        (["--train.steps"], "train.steps"),
        (["steps=3"], "steps=3"),
        (["--train", "3"], "train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_with_a_mistake_is_refused_in_one_line_that_names_it(file: Path, options: list[str], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(file, options)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(file: Path):
    with pytest.raises(ValueError, match=r"no recipe .*myne.yaml; did you mean .*mine.yaml\?"):
        read_recipe(file.with_name("myne.yaml"))
    with pytest.raises(ValueError, match=r"no recipe .*nowhere.x.yaml$"):
        read_recipe(file.parent / "nowhere" / "x.yaml")


def test_what_is_no_text_file_is_refused(file: Path):
    with pytest.raises(ValueError, match="is no YAML"):
        read_recipe(file.parent)
    file.write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(ValueError, match="is no YAML"):
        read_recipe(file)


def test_reading_a_recipe_needs_no_torch(file: Path):
    """Help and mistakes come at once."""
    code = f"import sys; from bridges.recipe import read_recipe; read_recipe({str(file)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_any_kind_stay_as_they_are(tmp_path: Path) -> None:
    names = {"output": "runs/a 'b' \"c\" 🐈 é 猫 #1: {x}", "data": {"source": "my pictures 🐈\\captions.csv"}}
    recipe = recipe_from(names)
    assert (recipe.output, recipe.data.source) == (names["output"], names["data"]["source"])
    (tmp_path / "🐈.yaml").write_text(yaml.safe_dump(names, allow_unicode=True), encoding="utf-8")
    assert read_recipe(tmp_path / "🐈.yaml") == recipe
