"""`bridges doctor` tells what is there and what is not, and the mend."""

from pathlib import Path

import pytest

from bridges import doctor
from bridges.cli import main


def test_it_tells_the_machine_the_packages_the_recipes_and_the_caches(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path))
    (tmp_path / "weights").write_bytes(b"x" * 30_000_000)
    main(["doctor"])
    told = capsys.readouterr().out
    assert "frozen towers in " in told
    assert f"0.03 GB in {tmp_path}" in told
    assert "to be fetched: bundled:efficientnet-lite0, bundled:smollm2-135m-instruct" in told
    assert "transformers" in told


def test_a_missing_extra_is_no_fault_and_a_missing_or_old_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy<1", "no-such-package>=2", 'neither-this; extra == "web"', "pillow"]
    monkeypatch.setattr(doctor, "requires", lambda _: lines)
    found = {name: (told, well) for name, told, well in doctor.packages()}
    assert not found["numpy"][1]
    assert "is not <1" in found["numpy"][0]
    assert found["no-such-package"] == ("missing: pip install -c constraints.txt -e .", False)
    assert found["neither-this  [web]"] == ("missing: pip install -c constraints.txt 'mm-bridges[web]'", True)
    assert found["pillow"][1]
