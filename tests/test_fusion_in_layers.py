"""Blocks inside the language model: they stand before its layers, whatever its family, and below them nothing is kept."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, chatml_tokenizer
from fusing import SMALL, batch_of, fused, saved, ways_of_seeing
from torch import Tensor, nn
from transformers import BartConfig, BartForCausalLM, LlamaConfig

from bridges.build import build
from bridges.data.batch import pack
from bridges.data.conversation import Turn
from bridges.objectives.language import language_loss
from bridges.towers.language import LanguageTower, decoder_layers
from bridges.towers.vision import VisionTower

pytest_plugins = ["fusing"]


def test_nothing_is_kept_for_the_layers_below_the_first_block(
    vision: VisionTower, conversations: list[list[Turn]], tmp_path: Path
):
    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": 5, "intermediate_size": 48}
    config = LlamaConfig(**sizes, vocab_size=len(chatml_tokenizer()))
    language = LanguageTower(str(saved(config, tmp_path)), dtype=torch.float32)
    model, template = fused(vision, language, every=2, offset=2)
    batch = batch_of(model, [pack([template.encode(turns)]) for turns in conversations])
    kept, entered, entering = Counter(), {}, ["bridge"]

    def enters(index: int) -> Callable[..., None]:
        return lambda *_: entering.append(f"layer {index}")

    def has_entered(index: int) -> Callable[..., None]:
        return lambda _, args, kwargs: entered.update(
            {index: (args[0] if args else kwargs["hidden_states"]).requires_grad}
        )

    for index, layer in enumerate(language.layers):
        layer.register_forward_pre_hook(enters(index), prepend=True)  # before its block
        layer.register_forward_pre_hook(has_entered(index), with_kwargs=True)  # after it

    def keep(tensor: Tensor) -> Tensor:
        kept.update(entering[-1:])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = language_loss(model, batch)
    assert entered == {0: False, 1: False, 2: True, 3: True, 4: True}
    assert set(kept) == {"bridge", "layer 2", "layer 3", "layer 4"}
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.bridge.parameters())


def test_layers_of_every_family_are_found_and_run_in_their_order(tower: LanguageTower):
    assert len(tower.layers) == tower.num_layers == 2
    ran: list[nn.Module] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, _: ran.append(layer)) for layer in tower.layers]
    tower.model(torch.tensor([[3, 4, 5]]))
    for hook in hooks:
        hook.remove()
    assert ran == tower.layers
    assert len({type(layer) for layer in tower.layers}) == 1
    assert decoder_layers(tower.model, 3) == []


def test_a_language_model_without_a_list_of_its_layers_is_refused(recipe: Any, tmp_path: Path):
    sizes: dict[str, Any] = dict(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32)
    heads: dict[str, Any] = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    decoder: dict[str, Any] = dict(is_decoder=True, is_encoder_decoder=False, tie_word_embeddings=False)
    # says that it has as many layers as its encoder has, which is not there
    config = BartConfig(
        vocab_size=len(chatml_tokenizer()), encoder_layers=2, decoder_layers=3, **sizes, **heads, **decoder
    )
    BartForCausalLM(config).save_pretrained(tmp_path / "bart")
    chatml_tokenizer().save_pretrained(tmp_path / "bart")
    language = replace(recipe.language, name=str(tmp_path / "bart"))
    with pytest.raises(
        ValueError, match=r"^flamingo puts blocks between the layers of a decoder, and .*bart shows no list of layers$"
    ):
        build(replace(recipe, language=language, bridge={"name": "flamingo", **SMALL}))
    build(replace(recipe, language=language))


@pytest.mark.parametrize("wrong", [{"every": 3}, {"every": 0}, {"every": 2, "offset": 2}, {"offset": 5}])
def test_blocks_where_there_is_no_layer_are_refused(recipe: Any, wrong: dict[str, int]):
    every, offset = wrong.get("every", 1), wrong.get("offset", 0)
    with pytest.raises(
        ValueError, match=f"^blocks before every {every}. layer from {offset} on: .* has 2 layers; choose a smaller .*$"
    ):
        build(replace(recipe, bridge={"name": "flamingo", **SMALL, **wrong}))


def test_an_encoder_decoder_is_refused(recipe: Any, tiny_t5: Path):
    language = replace(recipe.language, name=str(tiny_t5), template="t5")
    with pytest.raises(ValueError, match=r"^flamingo puts blocks .* has an encoder; choose a causal language model$"):
        build(replace(recipe, language=language, bridge={"name": "flamingo", **SMALL}))


@ways_of_seeing
def test_layers_computed_again_give_the_same_gradients_and_keep_less(
    vision: VisionTower, tower: LanguageTower, conversations: list[list[Turn]], sees: str, tmp_path: Path
):
    """Gradient checkpointing, of the layers and of the blocks before them."""
    again = LanguageTower(tower.name, dtype=tower.dtype)
    again.checkpoint_gradients()
    found = []
    for language in (tower, again):
        model, template = fused(vision, language, sees=sees)
        rows = [pack([template.encode(turns)]) for turns in conversations]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            loss, _ = language_loss(model, batch_of(model, rows))
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.bridge.named_parameters()}, sum(kept)))
    (loss, gradients, bytes_kept), (other, others, fewer) = found
    torch.testing.assert_close(other, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, msg=name)
    assert fewer < 0.7 * bytes_kept
