from copy import deepcopy

import pytest
import torch

from bridges.towers import precision
from bridges.towers.precision import CHOICE, NAMED, bfloat16_wins, fastest_dtype, has_bfloat16_instructions

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv(CHOICE)
    fastest_dtype.cache_clear()
    yield
    fastest_dtype.cache_clear()


def test_a_cpu_without_bfloat16_instructions_takes_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert fastest_dtype(CPU) is torch.float32


@pytest.mark.parametrize("flag", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
@pytest.mark.parametrize(("wins", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_instructions_alone_do_not_decide_the_race_does(monkeypatch, flag, wins, expected):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == flag)
    times = {torch.bfloat16: 1.0 if wins else 3.0, torch.float32: 2.0}
    monkeypatch.setattr(precision, "seconds", times.__getitem__)
    assert fastest_dtype(CPU) is expected


@pytest.mark.skipif(has_bfloat16_instructions(), reason="this CPU has bfloat16")
def test_emulated_bfloat16_loses_a_real_race():
    assert not bfloat16_wins()


def test_the_race_is_run_once(monkeypatch):
    races = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(precision, "bfloat16_wins", lambda: not races.append(bfloat16_wins()))
    assert fastest_dtype(CPU) is fastest_dtype(CPU) is torch.bfloat16
    assert len(races) == 1


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), torch.float32)],
)
def test_a_gpu_takes_bfloat16_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fastest_dtype(torch.device("cuda")) is expected


@pytest.mark.parametrize(("name", "dtype"), NAMED.items())
@pytest.mark.parametrize("device", [CPU, torch.device("cuda")], ids=str)
def test_the_environment_chooses_for_every_machine(monkeypatch, name, dtype, device):
    monkeypatch.setenv(CHOICE, name)
    assert fastest_dtype(device) is dtype


def test_an_unknown_choice_is_told(monkeypatch):
    monkeypatch.setenv(CHOICE, "fp32")
    with pytest.raises(ValueError, match="BRIDGES_DTYPE is 'fp32'; it may be float32, bfloat16, float16, or not set"):
        fastest_dtype(CPU)


def test_without_a_device_it_is_this_machines(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert fastest_dtype() is fastest_dtype(CPU)
    fastest_dtype.cache_clear()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert fastest_dtype() is torch.float16


def test_weights_for_few_tokens_lie_by_column_and_are_the_same(built):
    model = deepcopy(built.model.language.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    precision.for_few_tokens(model)
    laid = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "head" not in n]
    assert len(laid) == 14
    assert all(p.t().is_contiguous() for p in laid)
    assert model.get_output_embeddings().weight.is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    places = [p.data_ptr() for p in laid]
    precision.for_few_tokens(model)
    assert [p.data_ptr() for p in laid] == places, "a second time nothing is moved"
