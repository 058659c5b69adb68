"""A BLIP-2 saved by transformers, loaded here: the same tensors, the same loss, and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import chatml_tokenizer, randomise, tiny_bert
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from bridges.base import Bridge
from bridges.build import build, build_bridge
from bridges.data.batch import collate, rows_of
from bridges.data.conversation import Example, ask
from bridges.interop.blip2 import is_blip2, names, read_blip2, read_options, to_blip2
from bridges.objectives.language import language_loss
from bridges.recipe import recipe_from
from bridges.towers.vision import VisionTower

VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28)
QFORMER: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    encoder_hidden_size=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
OPT = dict(
    model_type="opt",
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=32,
    word_embed_proj_dim=24,
    max_position_embeddings=128,
    dropout=0.0,
)
T5 = dict(
    model_type="t5",
    d_model=24,
    d_kv=6,
    d_ff=32,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    decoder_start_token_id=0,
    pad_token_id=0,
    dropout_rate=0.0,
)


def save(folder: Path, language: dict[str, Any], kind: str = "blip2") -> Any:
    """A tiny whole model with random weights everywhere, its image processor, and its language model apart."""
    tokenizer = chatml_tokenizer()
    language = {**language, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    sizes = dict(vision_config={**VISION, "patch_size": 14}, num_query_tokens=3, image_token_index=None)
    if kind == "instructblip":
        sizes |= dict(qformer_config={**QFORMER, "vocab_size": 60}, text_config=language)
        model: Any = InstructBlipForConditionalGeneration(InstructBlipConfig(**sizes))
    else:
        family = Blip2ForImageTextRetrieval if kind == "retrieval" else Blip2ForConditionalGeneration
        own = {**QFORMER, "use_qformer_text_input": kind == "retrieval", "vocab_size": 60}
        model = family(Blip2Config(**sizes, qformer_config=own, text_config=language))
    randomise(model, 4)
    model.save_pretrained(folder / "whole")
    BlipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder / "whole")
    if kind != "retrieval":
        model.language_model.save_pretrained(folder / "language")
        tokenizer.save_pretrained(folder / "language")
    return model.eval()


@pytest.mark.parametrize("kind", ["blip2", "retrieval", "instructblip"])
def test_a_saved_model_becomes_our_bridge_and_back_to_the_bit(tmp_path: Path, kind: str) -> None:
    save(tmp_path, OPT, kind)
    folder = tmp_path / "whole"
    assert is_blip2(folder)
    assert not is_blip2(tmp_path)
    weights, options = read_blip2(folder), read_options(folder)
    options["words"] = str(tiny_bert(tmp_path / "bert"))
    if kind == "retrieval":
        options["reads"] = "pairs"
    bridge = build_bridge(options, 16, 5, 24, 2)
    if kind == "blip2":
        bridge.load_state_dict(weights, strict=True)
        weights = bridge.state_dict()
    family = "instructblip" if kind == "instructblip" else "blip-2"
    saved, back = load_file(folder / "model.safetensors"), to_blip2(weights, 2, family)
    outside = ("vision_model.e", "language_model.")
    assert back.keys() == {name for name in saved if not name.startswith(outside)}
    for name, tensor in back.items():
        assert torch.equal(tensor, saved[name]), name
    assert set(weights) <= set(bridge.state_dict()), "a tensor of theirs has no place here"


def test_no_two_tensors_share_a_name() -> None:
    for family in ("blip-2", "instructblip"):
        there = list(names(12, family).values())
        assert len(there) == len(set(there))


@pytest.mark.parametrize(("language", "template"), [(OPT, "plain"), (T5, "t5")])
def test_the_second_stage_is_that_of_transformers(
    tmp_path: Path, pictures: list[Image.Image], language: dict[str, Any], template: str
) -> None:
    theirs = save(tmp_path, language).double()
    recipe = recipe_from(
        {
            "output": str(tmp_path / "run"),
            "start": str(tmp_path / "whole"),
            "vision": {"name": str(tmp_path / "whole"), "keep_cls": True},
            "language": {"name": str(tmp_path / "language"), "template": template},
            "bridge": {**read_options(tmp_path / "whole"), "dropout": 0.0},
        }
    )
    assembled = build(recipe)
    model = assembled.model.double()
    model.bridge.vision_norm.eps = 1e-6  # theirs; LAVIS has 1e-5
    examples = [Example([ask("", "A cat.", pictures[0], "caption")]), Example([ask("", "Two birds.", pictures[1])])]
    rows = [row for example in examples for row in rows_of(example, assembled.template, share=False)]
    batch = collate(rows, model.vision.preprocess)
    assert batch.pixel_values is not None
    batch.pixel_values = batch.pixel_values.double()
    loss, _ = language_loss(model, batch)
    loss.backward()

    summed = torch.zeros((), dtype=torch.float64)
    for number, row in enumerate(rows):
        place = row.ids.index(-1)
        before, after = row.ids[:place], row.ids[place + 3 :]
        labels = [token if token >= 0 else -100 for token in row.labels]
        pixels = batch.pixel_values[number : number + 1]
        vision = theirs.vision_model(pixel_values=pixels).last_hidden_state
        queries = theirs.qformer(query_embeds=theirs.query_tokens, encoder_hidden_states=vision).last_hidden_state
        slots = theirs.language_projection(queries)
        embed = theirs.get_input_embeddings()
        if language is T5:
            cut = next(i for i, label in enumerate(labels) if label != -100)
            read = embed(torch.tensor([row.ids[place + 3 : cut]]).long())
            prompt = torch.cat([embed(torch.tensor([before]).long()), slots, read], 1)
            logits = theirs.language_model(inputs_embeds=prompt, labels=torch.tensor([labels[cut:]])).logits
            targets = torch.tensor(labels[cut:])
            summed = summed + torch.nn.functional.cross_entropy(logits[0], targets, reduction="sum")
        else:
            whole = torch.cat([embed(torch.tensor([before]).long()), slots, embed(torch.tensor([after]))], 1)
            logits = theirs.language_model(inputs_embeds=whole).logits
            summed = summed + torch.nn.functional.cross_entropy(
                logits[0, :-1], torch.tensor(labels[1:]), reduction="sum", ignore_index=-100
            )
    torch.testing.assert_close(loss, summed, atol=1e-10, rtol=0)
    summed.backward()
    for ours, there in names(2, "blip-2").items():
        mine = dict(model.bridge.named_parameters()).get(ours)
        if mine is None or ".key.bias" in ours:
            continue
        assert mine.grad is not None
        gradient = theirs.get_parameter(there).grad
        gradient = gradient[0] if ours == "queries" else gradient
        torch.testing.assert_close(mine.grad, gradient, atol=1e-9, rtol=1e-7, msg=ours)


def test_its_encoder_is_a_vision_tower(tmp_path: Path, pictures: list[Image.Image]) -> None:
    theirs = save(tmp_path, OPT)
    tower = VisionTower(str(tmp_path / "whole"), keep_cls=True)
    pixels = tower.preprocess(pictures)
    with torch.no_grad():
        expected = theirs.vision_model(pixel_values=pixels).last_hidden_state
        found = theirs.vision_model.post_layernorm(tower(pixels))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (tower.num_patches, tower.dim) == (5, 16)


def test_a_folder_without_a_qformer_is_refused(tmp_path: Path) -> None:
    save(tmp_path, OPT)
    folder = tmp_path / "whole"
    weights = load_file(folder / "model.safetensors")
    del weights["query_tokens"]
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lacks query_tokens"):
        read_blip2(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*.safetensors in"):
        read_blip2(folder)


def test_other_sizes_are_refused_in_one_line(tmp_path: Path) -> None:
    save(tmp_path, OPT)
    bridge: Bridge = build_bridge({**read_options(tmp_path / "whole"), "layers": 1}, 16, 5, 24, 2)
    with pytest.raises(ValueError, match="of other sizes"):
        bridge.adopt(read_blip2(tmp_path / "whole"))
