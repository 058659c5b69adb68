"""Attention by plain products is that of transformers' sdpa: what it says, and its gradients."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bridges.towers import attention
from bridges.towers.attention import MOST, SHORT, attend
from bridges.towers.language import LanguageTower

HEADS, WIDTH, ROWS = 6, 8, 3


def given(new: int, kept: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = [(HEADS, new), (groups, kept + new), (groups, kept + new)]
    return [torch.randn(ROWS, *size, WIDTH, dtype=dtype, requires_grad=True) for size in sizes]


def mask_of(new: int, kept: int) -> Tensor:
    """Any columns, the first at least."""
    sees = torch.rand(ROWS, 1, new, kept + new) < 0.6
    sees[..., 0] = True
    return sees


def with_gradients(way: Any, tensors: list[Tensor], mask: Tensor | None, **more: Any) -> list[Tensor]:
    module = SimpleNamespace(num_key_value_groups=HEADS // tensors[1].shape[1], is_causal=True, training=False)
    found, _ = way(module, *tensors, mask, **more)
    direction = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    return [found, *torch.autograd.grad((found * direction).sum(), tensors)]


@pytest.mark.parametrize(("groups", "kept", "additive"), product([1, 2, 6], [0, 5], [True, False]))
def test_it_is_sdpa_with_its_gradients(groups: int, kept: int, additive: bool) -> None:
    tensors, sees = given(7, kept, groups), mask_of(7, kept)
    mask = torch.zeros(sees.shape, dtype=torch.float64).masked_fill_(~sees, -torch.inf) if additive else sees
    for scaling in (None, 0.7):
        mine = with_gradients(attend, tensors, mask, scaling=scaling)
        its = with_gradients(sdpa_attention_forward, tensors, mask, scaling=scaling)
        for one, other in zip(mine, its, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("additive", [True, False])
def test_in_bfloat16_it_is_as_near_to_float32_as_the_kernel(additive: bool) -> None:
    tensors, sees = given(40, 9, 2, torch.bfloat16), mask_of(40, 9)
    lowest = torch.finfo(torch.bfloat16).min
    mask = torch.zeros(sees.shape, dtype=torch.bfloat16).masked_fill_(~sees, lowest) if additive else sees
    exact = with_gradients(sdpa_attention_forward, [t.detach().float().requires_grad_() for t in tensors], sees)
    mine, its = (with_gradients(way, tensors, mask) for way in (attend, sdpa_attention_forward))
    for one, other, true in zip(mine, its, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - true).norm() < 2 * (other - true).norm() < 0.05 * true.norm()


def test_what_is_not_short_or_not_plain_is_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    monkeypatch.setattr(
        attention,
        "sdpa_attention_forward",
        lambda *args, **more: (left.append("sdpa"), sdpa_attention_forward(*args, **more))[1],
    )
    by_heads = mask_of(4, 0).expand(ROWS, HEADS, 4, 4)
    long = int((MOST[torch.float32] // (HEADS // 2)) ** 0.5) + 1
    cases: list[tuple[list[Tensor], Tensor | None]] = [
        (given(4, 0, 2), None),
        (given(4, 0, 2), by_heads),
        (given(1, 4, 2), mask_of(1, 4)),
        (given(4, 0, 2, torch.float16), mask_of(4, 0)),
        (given(long, 0, 2, torch.float32), mask_of(long, 0)),
    ]
    for count, (tensors, mask) in enumerate(cases, start=1):
        with_gradients(attend, tensors, mask)
        assert len(left) == count
    with_gradients(attend, given(4, 0, 2), mask_of(4, 0))
    assert len(left) == len(cases), "this one is short and plain"


def test_a_language_model_takes_it_where_its_attention_is_the_usual_one(tiny_llama: Path) -> None:
    tower = LanguageTower(str(tiny_llama))
    assert tower.model.config._attn_implementation == SHORT
    embeds = torch.randn(2, 9, tower.dim)
    mask = torch.zeros(2, 1, 9, 9).masked_fill_(torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.float32).min)
    at = (torch.tensor([0, 1]), torch.tensor([8, 8]))
    steps = torch.arange(9).expand(2, -1)
    found = tower(embeds, mask, steps, at)
    tower.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, tower(embeds, mask, steps, at), atol=1e-5, rtol=1e-5)
    tower.model.set_attn_implementation("eager")
    attention.take_short(tower.model)
    assert tower.model.config._attn_implementation == "eager"
