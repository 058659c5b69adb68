import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridges.base import Bridge, bridge_class, bridge_names
from bridges.projector import Projector

ROOT = Path(__file__).parents[1]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which Python imports."""
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_a_file_is_a_bridge_of_its_name():
    assert "projector" in bridge_names()
    assert bridge_class("projector") is Projector


def test_every_file_that_defines_a_bridge_is_found_and_no_other():
    assert "base" not in bridge_names()
    for name in bridge_names():
        assert issubclass(bridge_class(name), Bridge)


def test_a_name_with_a_dot_is_the_users_own_module(modules: Path):
    (modules / "mine").mkdir()
    (modules / "mine" / "tiny.py").write_text(
        "from bridges.base import Bridge\nfrom bridges.projector import Projector\nclass Tiny(Bridge): pass\n"
    )
    assert bridge_class("mine.tiny").__name__ == "Tiny"


def test_the_users_module_is_found_where_a_command_runs(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tiny.py").write_text("from bridges.base import Bridge\nclass Tiny(Bridge): pass\n")
    code = "from bridges.base import bridge_class; assert bridge_class('mine.tiny').__name__ == 'Tiny'"
    python = [sys.executable, "-P", "-c"]  # -P: as an installed command sees it
    subprocess.run([*python, code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_an_unknown_bridge_names_the_nearest_or_all():
    with pytest.raises(ValueError, match="no bridge named 'projektor': did you mean 'projector'"):
        bridge_class("projektor")
    with pytest.raises(ValueError, match=r"no bridge named 'xyz': there are .*projector.*; your own: package.module"):
        bridge_class("xyz")
    with pytest.raises(ValueError, match=r"no bridge named 'nowhere.at_all'"):
        bridge_class("nowhere.at_all")
    with pytest.raises(ValueError, match=r"no bridge named 'bridges.projektor'"):
        bridge_class("bridges.projektor")


def test_a_module_without_a_bridge_or_with_two_is_refused(modules: Path):
    with pytest.raises(ValueError, match=r"bridges.model must define exactly one Bridge, it defines 0"):
        bridge_class("model")
    (modules / "mytwo").mkdir()
    (modules / "mytwo" / "both.py").write_text(
        "from bridges.base import Bridge\nclass A(Bridge): pass\nclass B(Bridge): pass\n"
    )
    with pytest.raises(ValueError, match=r"mytwo.both must define exactly one Bridge, it defines 2"):
        bridge_class("mytwo.both")


def test_a_module_that_misses_something_of_its_own_says_so_itself(modules: Path):
    (modules / "mybroken").mkdir()
    (modules / "mybroken" / "bridge.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        bridge_class("mybroken.bridge")


@pytest.mark.parametrize("missing", ["mynear", "mynear.bridge_help"])
def test_a_missing_import_whose_name_begins_like_the_modules_is_not_taken_for_it(modules: Path, missing: str):
    (modules / "mynear2").mkdir()
    (modules / "mynear2" / "bridge.py").write_text(f"import {missing}\n")
    with pytest.raises(ModuleNotFoundError, match="mynear"):
        bridge_class("mynear2.bridge")
