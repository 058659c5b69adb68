"""Tiny random encoders of every family, saved and read back by the real code."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image

from bridges import adapter
from bridges.config import Lora
from bridges.towers.vision import VisionTower

SIZE = {"height": 56, "width": 56}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
VIT: dict[str, Any] = {**LAYERS, "image_size": 56, "patch_size": 14}
TEXT = {**LAYERS, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
CNN: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
CLIP_PIXELS = hf.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=SIZE)
SQUASH = hf.ViTImageProcessorPil(size=SIZE)
SQUASH_64 = hf.ViTImageProcessorPil(size={"height": 64, "width": 96})


def clip_vision() -> Any:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT))


def siglip_vision() -> Any:
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT))


# family: (model, processor, tokens that are no patch, grid)
FAMILIES = {
    "clip": (clip_vision, CLIP_PIXELS, 1, (4, 4)),
    "siglip": (siglip_vision, hf.SiglipImageProcessorPil(size=SIZE), 0, (4, 4)),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**VIT | {"image_size": 112})), SQUASH, 1, (4, 4)),
    "dinov2 with registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VIT, num_register_tokens=4)),
        hf.BitImageProcessorPil(size={"shortest_edge": 56}, crop_size=SIZE),
        5,
        (4, 4),
    ),
    "dinov3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VIT, num_register_tokens=4)), SQUASH, 5, (4, 4)),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**VIT)), SQUASH, 1, (4, 4)),
    "deit": (lambda: hf.DeiTModel(hf.DeiTConfig(**VIT)), SQUASH, 2, (4, 4)),
    "swin": (
        lambda: hf.SwinModel(
            hf.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=4)
        ),
        hf.ViTImageProcessorPil(size={"height": 64, "width": 64}),
        0,
        (4, 4),
    ),
    "convnext": (lambda: hf.ConvNextModel(hf.ConvNextConfig(**CNN)), SQUASH_64, 0, (2, 3)),
    "resnet": (lambda: hf.ResNetModel(hf.ResNetConfig(**CNN, embedding_size=8)), SQUASH_64, 0, (2, 3)),
}


def save(folder: Path, model: Any, processor: Any = SQUASH) -> str:
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return str(folder)


def pictures(n: int = 2) -> list[Image.Image]:
    gradient = Image.merge(
        "RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90)]
    )
    return [gradient.rotate(30 * i).resize((90 + 10 * i, 60)) for i in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_its_patches_and_nothing_else(tmp_path, family):
    build, processor, prefix, grid = FAMILIES[family]
    model = build().eval()
    tower = VisionTower(save(tmp_path, model, processor), dtype=torch.float32)
    assert tower.grid == grid
    assert tower.num_patches == grid[0] * grid[1]
    pixels = processor(pictures(), return_tensors="pt")["pixel_values"]
    assert torch.equal(tower.preprocess(pictures()), pixels)
    assert torch.equal(tower.preprocess([]), pixels[:0])
    assert tower.image_size == pixels.shape[2:]
    with torch.no_grad():
        hidden = model(pixels, output_hidden_states=True).hidden_states[-1]
    expected = hidden[:, prefix:] if hidden.ndim == 3 else hidden.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower(pixels), expected)
    assert tower(pixels).shape == (2, tower.num_patches, tower.dim)
    assert tower(pixels[:0]).shape == (0, tower.num_patches, tower.dim)


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2 with registers", "dinov3"])
def test_patches_come_in_reading_order(tmp_path, family):
    build, processor, _, _ = FAMILIES[family]
    tower = VisionTower(save(tmp_path, build(), processor), layer=0)
    pixels = torch.zeros(2, 3, *tower.image_size)
    pixels[1, :, 14:28, 42:56] = 1  # row 1, column 3
    plain, touched = tower(pixels)
    assert (plain != touched).any(dim=1).nonzero().flatten().tolist() == [1 * 4 + 3]


def test_a_map_is_read_row_by_row(tmp_path):
    build, processor, _, _ = FAMILIES["convnext"]
    tower = VisionTower(save(tmp_path, build(), processor), layer=0)
    rows, columns = tower.grid
    pixels = torch.zeros(2, 3, *tower.image_size)
    stride = tower.image_size[0] // rows
    pixels[1, :, :stride, stride : 2 * stride] = 1  # row 0, column 1
    plain, touched = tower(pixels)
    assert (rows, columns) == (16, 24)
    assert (plain != touched).any(dim=1).nonzero().flatten().tolist() == [1]


@pytest.fixture(scope="module")
def llava() -> Any:
    vision, text = {**VIT, "model_type": "clip_vision_model"}, {**TEXT, "model_type": "llama"}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text)).eval()


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize(("keep_cls", "strategy"), [(False, "default"), (True, "full")])
def test_features_are_those_of_llava(tmp_path, llava, layer, keep_cls, strategy):
    folder = save(tmp_path, llava.model.vision_tower, CLIP_PIXELS)
    tower = VisionTower(folder, layer=layer, keep_cls=keep_cls, dtype=torch.float32)
    pixels = tower.preprocess(pictures())
    with torch.no_grad():
        expected = llava.get_image_features(pixels, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
        found = llava.model.multi_modal_projector(tower(pixels))
    assert tower.num_patches == 16 + keep_cls
    assert torch.equal(found, torch.stack(list(expected.pooler_output)))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_of_a_full_checkpoint_only_the_vision_half_is_loaded(tmp_path, family):
    config, model = {"clip": (hf.CLIPConfig, hf.CLIPModel), "siglip": (hf.SiglipConfig, hf.SiglipModel)}[family]
    full: Any = model(config(text_config=TEXT, vision_config=VIT)).eval()
    processor = FAMILIES[family][1]
    whole = VisionTower(save(tmp_path / "full", full, processor), layer=-2)
    half = VisionTower(save(tmp_path / "vision", full.vision_model, processor), layer=-2)
    assert whole.state_dict().keys() == half.state_dict().keys()
    assert not any("text" in key for key in whole.state_dict())
    assert whole.fingerprint() == half.fingerprint()
    pixels = whole.preprocess(pictures())
    assert torch.equal(whole(pixels), half(pixels))


def test_nothing_wakes_a_tower(tmp_path):
    model = hf.ResNetModel(hf.ResNetConfig(**CNN, embedding_size=8))
    tower = VisionTower(save(tmp_path, model, SQUASH_64), dtype=torch.float32)
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    torch.nn.Sequential(tower).train()
    features = tower(torch.randn(4, 3, 64, 96, requires_grad=True))
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not any(module.training for module in tower.modules())
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())


def test_a_bridge_can_be_trained_on_the_features(tmp_path):
    tower = VisionTower(save(tmp_path, siglip_vision()), dtype=torch.float32)
    bridge = torch.nn.Linear(tower.dim, 4)
    bridge(tower(tower.preprocess(pictures()))).sum().backward()
    assert bridge.weight.grad is not None
    assert bridge.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "resnet"])
def test_an_adapter_trains_all_that_features_come_through_and_can_be_folded(tmp_path, family, dtype):
    build, processor, _, _ = FAMILIES[family]
    tower = VisionTower(save(tmp_path, build(), processor), layer=-2, dtype=dtype)
    pixels, names = tower.preprocess(pictures()), tower.state_dict().keys()
    before = tower(pixels)
    adapter.attach(tower, Lora(rank=2))
    features = tower(pixels)
    assert torch.equal(features, before)
    features.float().pow(2).sum().backward()
    gradients = [layer.lora_B["default"].weight.grad for layer in tower.adapters]
    assert len(gradients) > 3
    assert all(gradient.dtype is torch.float32 and gradient.any() for gradient in gradients)
    adapter.fold(tower)
    assert torch.equal(tower(pixels), before)
    assert tower.state_dict().keys() == names


def test_an_encoder_of_convolutions_alone_takes_no_adapter(tmp_path):
    build, processor, _, _ = FAMILIES["resnet"]
    tower = VisionTower(save(tmp_path, build(), processor))
    with pytest.raises(ValueError, match=r"vision.lora: features of .* come through no linear layer"):
        adapter.attach(tower, Lora())


def test_features_have_the_dtype_of_the_tower(tmp_path):
    tower = VisionTower(save(tmp_path, clip_vision(), CLIP_PIXELS), dtype=torch.bfloat16)
    assert tower.preprocess(pictures()).dtype is torch.float32
    assert tower(tower.preprocess(pictures())).dtype is tower.dtype is torch.bfloat16
    assert tower(tower.preprocess([])).dtype is torch.bfloat16


def test_any_picture_is_taken(tmp_path):
    tower = VisionTower(save(tmp_path, siglip_vision()))
    odd = [Image.new("L", (3, 3), 255), Image.new("P", (1, 500)), Image.new("RGBA", (500, 1)), Image.new("1", (7, 7))]
    pixels = tower.preprocess(odd)
    assert pixels.shape == (4, 3, 56, 56)
    torch.testing.assert_close(pixels[0], torch.ones(3, 56, 56))


def test_a_processor_that_exists_for_torchvision_only_runs_on_pil(tmp_path):
    build = FAMILIES["dinov3"][0]
    save(tmp_path, build())
    settings = tmp_path / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("ViTImageProcessor", "DINOv3ViTImageProcessorFast"))
    tower = VisionTower(str(tmp_path))
    torch.testing.assert_close(tower.preprocess(pictures()), SQUASH(pictures(), return_tensors="pt")["pixel_values"])


def test_the_fingerprint_is_that_of_the_features_in_any_dtype(tmp_path):
    model = clip_vision()
    folder = save(tmp_path / "a", model, CLIP_PIXELS)
    first = VisionTower(folder, layer=-2).fingerprint()
    assert first == VisionTower(folder, layer=-2, dtype=torch.bfloat16).fingerprint()
    assert (
        first == VisionTower(folder, layer=2, dtype=torch.float16).fingerprint()
    )  # the same layer, counted from the front
    model.encoder.layers[1].mlp.fc2.weight.data.mul_(1.01)
    others = [
        VisionTower(folder, layer=-1),
        VisionTower(folder, layer=-2, keep_cls=True),
        VisionTower(save(tmp_path / "b", model, CLIP_PIXELS), layer=-2),
        VisionTower(save(tmp_path / "c", clip_vision(), CLIP_PIXELS), layer=-2),
    ]
    darker = hf.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=SIZE, image_mean=[0.4, 0.4, 0.4])
    darker.save_pretrained(folder)
    others.append(VisionTower(folder, layer=-2))
    assert len({first, *(tower.fingerprint() for tower in others)}) == 6


def test_loading_says_nothing(tmp_path, capfd):
    full = hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VIT))
    save(tmp_path, full, CLIP_PIXELS)
    capfd.readouterr()
    VisionTower(str(tmp_path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("model", "processor", "options", "message"),
    [
        (clip_vision, CLIP_PIXELS, {"layer": -5}, r"no layer -5: its hidden states are -4 … 3"),
        (clip_vision, CLIP_PIXELS, {"layer": 4}, r"no layer 4: its hidden states are -4 … 3"),
        (clip_vision, CLIP_PIXELS, {"revision": "v2"}, "has no revisions: leave revision='v2' out"),
        (siglip_vision, SQUASH, {"keep_cls": True}, r"has no CLS token, only 4 x 4 patches"),
        (clip_vision, SQUASH_64, {}, r"cannot take images of 64 x 96: Input image size"),
        (
            clip_vision,
            hf.CLIPImageProcessorPil(do_center_crop=False),
            {},
            r"\(224, 448\) and \(448, 224\): set crop_size",
        ),
        (clip_vision, None, {}, "Can't load image processor"),
        (lambda: hf.LlamaModel(hf.LlamaConfig(**TEXT)), SQUASH, {}, "llama is no image encoder"),
        (
            lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**VIT)),
            SQUASH,
            {},
            r"gives 5 tokens, no grid of patches of a \(56, 56\) image",
        ),
        (
            lambda: hf.YolosModel(hf.YolosConfig(**VIT | {"image_size": [56, 56]})),
            SQUASH,
            {},
            "gives 117 tokens, but has 4 x 4 patches",
        ),
        (
            lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**LAYERS, num_patches=16, patch_size=14)),
            hf.Siglip2ImageProcessorPil(patch_size=14, max_num_patches=16),
            {},
            "NaFlex",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, model, processor, options, message):
    folder = save(tmp_path, model(), processor)
    with pytest.raises(ValueError, match=message) as error:
        VisionTower(folder, **options)
    assert "\n" not in str(error.value)
    assert folder in str(error.value)


def test_a_folder_without_the_vision_weights_is_refused(tmp_path, llava):
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a CLIPVisionModel, such as embeddings"):
        VisionTower(save(tmp_path, llava, CLIP_PIXELS))


def test_a_missing_folder_and_a_name_that_no_hub_knows_fail_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "siglip").mkdir()
    with pytest.raises(ValueError, match=rf"no folder .*; nearest name: {tmp_path}/siglip$"):
        VisionTower(str(tmp_path / "siglib"))
    with pytest.raises(ValueError, match=r"no image encoder in .*siglip"):
        VisionTower(str(tmp_path / "siglip"))


@pytest.mark.parametrize("family", ["dinov2", "dinov2 with registers", "swin", "convnext", "resnet"])
def test_who_takes_another_resolution_takes_it_and_is_another_tower(tmp_path, family):
    model, processor, _, _ = FAMILIES[family]
    folder = save(tmp_path, model(), processor)
    own, larger = VisionTower(folder), VisionTower(folder, image_size=112)
    assert larger.image_size == (112, 112)
    assert larger(larger.preprocess(pictures())).shape == (2, larger.num_patches, larger.dim)
    assert larger.num_patches > own.num_patches
    assert larger.fingerprint() != own.fingerprint()


def test_what_is_cropped_stays_the_same_share(tmp_path):
    processor = hf.BitImageProcessorPil(size={"shortest_edge": 64}, crop_size=SIZE)
    tower = VisionTower(save(tmp_path, FAMILIES["dinov2"][0](), processor), image_size=112)
    assert tower.processor.size["shortest_edge"] == 128


def test_who_takes_one_resolution_only_says_so(tmp_path):
    folder = save(tmp_path, clip_vision(), CLIP_PIXELS)
    with pytest.raises(ValueError, match=r"cannot take images of 112 x 112: Input image size"):
        VisionTower(folder, image_size=112)
    with pytest.raises(ValueError, match=r"vision\.image_size -3: a picture has at least one pixel"):
        VisionTower(folder, image_size=-3)


def test_images_of_another_size_are_refused(tmp_path):
    tower = VisionTower(save(tmp_path, siglip_vision()))
    with pytest.raises(ValueError, match=r"takes images of \(56, 56\) \(y, x\), got \(56, 70\)"):
        tower(torch.zeros(1, 3, 56, 70))


def test_weights_cut_short_are_refused_in_one_line(tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut"):
        VisionTower(str(folder))
