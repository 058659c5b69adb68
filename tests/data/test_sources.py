"""Which rows are learnt from, which are held out, and that it is said."""

from dataclasses import replace
from pathlib import Path

from bridges.config import Data
from bridges.data.sources import open_split, told


def test_what_is_held_out_is_said(tmp_path: Path) -> None:
    lines = ["path,caption", *(f"{number}.png,A cat number {number}." for number in range(40))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    data = Data(source=str(tmp_path / "a.csv"))
    for chosen in (data, replace(data, prefix=True)):
        said = told("a.csv", open_split(chosen, "train"))
        assert said == "a.csv: the first 38 of 40 examples; the others are held out to measure on"
    said = told("val of a.csv", open_split(data, "val"))
    assert said == "val of a.csv: the last 2 of 40 examples, which training leaves out"
    given = replace(data, validation=data.source)
    assert told("a.csv", open_split(given, "train")) == "a.csv: 40 examples"
