import inspect

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from bridges.projector import Projector, merge_patches, num_slots


@pytest.fixture
def features() -> torch.Tensor:
    """Three images of 6 x 6 patches, 5 channels."""
    return torch.randn(3, 36, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle_is_that_of_idefics3_to_the_bit(features: torch.Tensor, factor: int):
    config = Idefics3Config(scale_factor=factor, vision_config={"hidden_size": 5}, text_config={"hidden_size": 32})
    theirs = Idefics3Connector(config).pixel_shuffle(features, factor)
    assert torch.equal(merge_patches(features, "shuffle", factor), theirs)


def test_strips_are_a_row_major_view(features: torch.Tensor):
    assert torch.equal(merge_patches(features, "strip", 4), features.view(3, 9, 20))


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 6])
def test_average_is_adaptive_pooling_onto_the_grid(features: torch.Tensor, factor: int):
    pooled = nn.AdaptiveAvgPool2d(factor)(rearrange(features, "n (y x) v -> n v y x", y=6))
    expected = rearrange(pooled, "n v y x -> n (y x) v")
    torch.testing.assert_close(merge_patches(features, "average", factor), expected)


def test_none_and_average_onto_the_whole_grid_change_nothing(features: torch.Tensor):
    assert torch.equal(merge_patches(features, "none", 2), features)
    assert torch.equal(merge_patches(features, "average", 6), features)


@pytest.mark.parametrize("merge", ["none", "average", "shuffle", "strip"])
def test_the_number_of_slots_is_known_before_any_image(features: torch.Tensor, merge):
    assert num_slots(36, merge, 3) == merge_patches(features, merge, 3).shape[1]
    assert num_slots(36, merge, 3) == merge_patches(features[:0], merge, 3).shape[1]


@pytest.mark.parametrize(
    ("patches", "merge", "factor", "message"),
    [
        (257, "average", 2, "257 patches are none; is the CLS token kept"),
        (257, "shuffle", 2, "257 patches are none; is the CLS token kept"),
        (49, "shuffle", 2, "by 2 does not fit a 7x7 grid; choose a factor that divides 7"),
        (49, "average", 8, "of a 7x7 grid onto 8x8: choose a factor of at most 7"),
        (49, "strip", 4, "strips of 4 do not fill 49 patches"),
        (49, "strip", 0, "factor 0 .* at least 1"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_with_the_numbers(patches: int, merge, factor: int, message: str):
    with pytest.raises(ValueError, match=message):
        Projector(8, patches, 16, 2, merge=merge, factor=factor)


def test_an_unknown_way_to_merge_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"merge 'pool' .* choose one of none, average, shuffle, strip"):
        inspect.unwrap(num_slots)(49, "pool", 2)  # beneath the type checks of the tests, where a user is


def test_no_layer_at_all_is_refused():
    with pytest.raises(ValueError, match="depth 0"):
        Projector(8, 49, 16, 2, depth=0)


@pytest.mark.parametrize(
    ("vision_dim", "options", "slots", "parameters"),
    [
        (1024, {}, 576, 4_198_400),  # LLaVA
        (1024, {"depth": 2}, 576, 20_979_712),  # LLaVA-1.5
        (1024, {"depth": 3}, 576, 37_761_024),
        (1024, {"merge": "strip", "factor": 4}, 144, 16_781_312),
        (1024, {"merge": "shuffle", "bias": False}, 144, 16_777_216),  # Idefics3
        (1024, {"merge": "shuffle", "factor": 3, "bias": False}, 64, 37_748_736),  # SmolVLM 2.2B
        (1024, {"merge": "average", "factor": 12, "depth": 2}, 144, 20_979_712),
        (1408, {"merge": "strip", "factor": 4}, 144, 23_072_768),  # MiniGPT-v2
    ],
)
def test_parameters_and_slots_are_the_published_ones(vision_dim: int, options: dict, slots: int, parameters: int):
    with torch.device("meta"):
        bridge = Projector(vision_dim, 576, 4096, 32, **options)
    assert bridge.num_slots == slots
    assert sum(p.numel() for p in bridge.parameters()) == parameters


def test_depth_two_is_linear_exact_gelu_linear(features: torch.Tensor):
    bridge = Projector(5, 36, 8, 2, depth=2)
    first, _, last = bridge.layers
    inner = F.linear(features, first.weight, first.bias)
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(bridge(features).slots, F.linear(inner, last.weight, last.bias))


def test_norm_makes_slots_of_the_embeddings_size_from_features_of_any_size(features: torch.Tensor):
    bridge = Projector(5, 36, 64, 2, norm=True, depth=2)
    bridge.match_scale(0.03)
    for size in (0.1, 1, 50):
        assert bridge(size * features).slots.pow(2).mean().sqrt().item() == pytest.approx(0.03, rel=0.3)
