"""Our model is LLaVA where a recipe asks for LLaVA: same weights, same text, same logits as in transformers."""

from copy import deepcopy

import pytest
import torch
from conftest import randomise
from transformers import LlavaConfig, LlavaForConditionalGeneration

from bridges.build import Assembled, build
from bridges.data.batch import Row, collate
from bridges.data.template import IGNORE_INDEX, IMAGE_TOKEN_ID
from bridges.interop.llava import NAMES

THEIR_IMAGE = 5  # in transformers the image token takes an id of the vocabulary, which no text below uses


def llava_of(assembled: Assembled, layer: int, strategy: str) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with the weights of our three parts."""
    vision, bridge, language = assembled.model.vision, assembled.model.bridge, assembled.model.language
    config = LlavaConfig(
        vision_config=vision.encoder.config,
        text_config=language.model.config,
        image_token_index=THEIR_IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    inner = theirs.model
    inner.vision_tower.load_state_dict(vision.encoder.state_dict())
    inner.language_model.load_state_dict(language.model.model.state_dict())
    theirs.lm_head.load_state_dict(language.model.lm_head.state_dict())
    for ours, name in NAMES.items():
        theirs.get_parameter(name).data.copy_(bridge.get_parameter(ours))
    return theirs


def rows(images: list[int], slots: int) -> list[Row]:
    """Text with so many images, at its start, in its midst or at its end."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for number, count in enumerate(images):
        words = torch.randint(6, 300, (count + 1, 4), generator=generator).tolist()
        ids = words[0][number:] if number < 3 else []
        for more in words[1:]:
            ids = ids + [IMAGE_TOKEN_ID] * slots + more
        result.append(Row(ids, [IGNORE_INDEX] * len(ids), [0] * len(ids), list(range(len(ids))), []))
    return result


Pair = tuple[Assembled, LlavaForConditionalGeneration]


@pytest.fixture(scope="module", params=[(-2, "default"), (-1, "default"), (-2, "full"), (-1, "full")], ids=str)
def pair(request: pytest.FixtureRequest, built: Assembled) -> Pair:
    """Our model and theirs, for a layer and a way to treat the CLS token."""
    layer, strategy = request.param
    recipe = deepcopy(built.recipe)
    recipe.vision.layer, recipe.vision.keep_cls = layer, strategy == "full"
    assembled = build(recipe)
    randomise(assembled.model.bridge)
    assert assembled.model.bridge.num_slots == (17 if strategy == "full" else 16)
    return assembled, llava_of(assembled, layer, strategy)


@pytest.mark.parametrize("images", [[1], [2], [0], [1, 2, 0, 1, 1]], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@torch.no_grad()
def test_logits_are_those_of_transformers_llava(pair: Pair, images: list[int], dtype: torch.dtype, tolerance: float):
    model, theirs = deepcopy(pair[0].model).to(dtype), deepcopy(pair[1]).to(dtype)
    batch = collate(rows(images, model.bridge.num_slots))
    pixels = torch.randn(sum(images), 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
    text = batch.segments >= 0
    at = text.nonzero(as_tuple=True)
    ours = model(batch.input_ids, batch.segments, batch.positions, at, pixels)
    expected = theirs(
        input_ids=batch.input_ids.masked_fill(batch.input_ids == IMAGE_TOKEN_ID, THEIR_IMAGE),
        attention_mask=text.long(),
        pixel_values=pixels if sum(images) else None,
    ).logits[at]
    assert ours.dtype == expected.dtype == dtype
    assert expected.std() > 0.1, "weights of no consequence"
    assert (ours - expected).abs().max() < tolerance
