"""Resampler and gated blocks beside IDEFICS of transformers, and beside OpenFlamingo's equations written out."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import chatml_tokenizer, randomise
from torch import Tensor, nn
from transformers import IdeficsConfig, IdeficsForVisionText2Text, LlamaConfig, LlamaForCausalLM
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from bridges.data.template import IMAGE_TOKEN_ID
from bridges.flamingo import Flamingo, GatedBlock
from bridges.interop.idefics import names, spell
from bridges.layout import visible
from bridges.model import BridgedModel
from bridges.resampler import Perceiver
from bridges.sight import sight
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower

V, D, M, P, EVERY = 16, 32, 3, 5, 2  # vision width, language width, latents, patches, a block before every second layer
DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
both_dtypes = pytest.mark.parametrize(("dtype", "atol"), DTYPES, ids=["fp64", "fp32"])
norms_or_not = pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])
both_gates = pytest.mark.parametrize("gate", ["scalar", "vector"])


def idefics(qk_norm: bool, gate: str = "scalar") -> IdeficsConfig:
    small: dict[str, Any] = dict(num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=8)
    softmax: dict[str, Any] = dict(attn_implementation="sdpa")  # the other one takes it in float32
    looks: dict[str, Any] = dict(resampler_n_latents=M, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=8)
    return IdeficsConfig(
        vocab_size=len(chatml_tokenizer()),
        additional_vocab_size=2,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=EVERY,
        alpha_type="float" if gate == "scalar" else gate,
        qk_layer_norms=qk_norm,
        use_resampler=True,
        vision_config=dict(embed_dim=V, intermediate_size=16, **small),
        perceiver_config=dict(use_resampler=True, qk_layer_norms_perceiver=qk_norm, **looks),
        **softmax,
    )


def ready(theirs: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Random weights in which gates are open; in float64, norms that are as exact as everything else."""
    randomise(theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "alpha" in name:
                parameter.copy_(torch.linspace(-0.7, 0.5, parameter.numel()).reshape(parameter.shape))
    return exact(theirs.to(dtype).eval()) if dtype is torch.float64 else theirs.eval()


def exact(model: nn.Module) -> nn.Module:
    """The RMS norms of transformers take the mean square in float32, whatever they are given."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.get_parameter("weight").shape[0], eps=1e-6).double()
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm)
    return model


def spelt(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by our names."""
    named = {spell(name): tensor for name, tensor in theirs.items()}
    return {name: tensor.flatten() if name.endswith("_gate") else tensor for name, tensor in named.items()}


def assert_same(mine: nn.Module, found: Tensor, theirs: Mapping[str, nn.Parameter], wanted: Tensor, atol: float):
    """The same results, and the same gradients of some function of them; `theirs` go by our names."""
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).reshape(found.shape)
    (found * weights).sum().backward()
    gradients = torch.autograd.grad((wanted * weights).sum(), list(theirs.values()))
    expected = spelt(dict(zip(theirs, gradients, strict=True)))
    assert expected.keys() == dict(mine.named_parameters()).keys()
    for name, parameter in mine.named_parameters():
        assert parameter.grad is not None, name
        size = expected[name].abs().max().item()
        # what is the same in all keys of a query changes nothing
        assert size > 1e-4 or name.endswith("key_norm.bias"), f"{name}: a gradient of no consequence"
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=atol * max(1, size), rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


@both_dtypes
@norms_or_not
def test_the_perceiver_is_that_of_idefics(dtype: torch.dtype, atol: float, qk_norm: bool):
    theirs = ready(IdeficsPerceiverResampler(idefics(qk_norm), V, 2, 2, 8, M), dtype)
    mine = Perceiver(V, M, 2, 2, 8, activation="relu", qk_norm=qk_norm).to(dtype)
    mine.load_state_dict(spelt(theirs.state_dict()))
    features = drawn(4, P, V).to(dtype)
    assert_same(mine, mine(features), dict(theirs.named_parameters()), theirs(features), atol)


@both_dtypes
@norms_or_not
@both_gates
def test_the_gated_block_is_that_of_idefics(dtype: torch.dtype, atol: float, qk_norm: bool, gate: Any):
    theirs = ready(IdeficsGatedCrossAttentionLayer(idefics(qk_norm, gate), layer_idx=0), dtype)
    mine = GatedBlock(D, V, 4, 8, 48, "gelu", True, "rms", qk_norm, gate, 1.0).to(dtype)
    mine.load_state_dict(spelt(theirs.state_dict()))
    hidden, memory = drawn(2, 7, D).to(dtype), drawn(2, 4, V, seed=1).to(dtype)
    mask = drawn(2, 1, 7, 4, seed=2) > 0
    mask[0, :, :2] = mask[1, :, 3] = False
    blocked = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    some = mask.any(-1)[:, 0].to(dtype)
    wanted = theirs(hidden, None, memory, image_attention_mask=blocked, cross_attention_gate=some)
    found = mine(hidden, mine.keys_values(memory), mask)
    assert_same(mine, found, dict(theirs.named_parameters()), wanted, atol)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Three texts: pictures amid the words, pictures in front of them, and none at all; 0 in the second line is padding.
LOOKS = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [3, 3, 4, 4, 4, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
LENGTHS = torch.tensor([[8], [5], [7]])
OWN = torch.tensor([[1, 2], [3, 4], [5, 5]])


@norms_or_not
@both_gates
@pytest.mark.parametrize("sees", ["last", "all"])
@pytest.mark.parametrize("in_line", [True, False], ids=["in line", "side by side"])
def test_the_whole_model_is_idefics(
    tiny_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qk_norm: bool,
    gate: Any,
    sees: Any,
    in_line: bool,
):
    theirs: Any = ready(IdeficsForVisionText2Text(idefics(qk_norm, gate)), torch.float64)
    language = same_llama(theirs, tmp_path)
    sizes: dict[str, Any] = dict(latents=M, depth=2, resampler_heads=2, resampler_head_dim=8, heads=4, head_dim=8)
    looks_like: dict[str, Any] = dict(activation="relu", swiglu=True, inner=48, norm="rms", qk_norm=qk_norm)
    bridge = Flamingo(V, P, D, 4, every=EVERY, gate=gate, sees=sees, **sizes, **looks_like).double()
    named = idefics_bridge(theirs)
    bridge.load_state_dict(spelt({name: parameter.detach() for name, parameter in named.items()}))
    if not in_line:
        monkeypatch.setattr("bridges.model.LONGEST_LINE", 0)

    real = torch.arange(8) < LENGTHS
    ids = torch.randint(3, 300, (3, 8), generator=torch.Generator().manual_seed(3)).masked_fill(~real, 0)
    pictures = drawn(4, P, V).double()
    columns = torch.arange(8).expand(3, 8)
    model = BridgedModel(VisionTower(str(tiny_clip), dtype=torch.float32), bridge, language, IMAGE_TOKEN_ID)
    at = real.nonzero(as_tuple=True)
    found = model(ids, torch.where(real, 0, -1), columns, at, features=pictures, looks=LOOKS)

    theirs_mask = OWN[:, None] == LOOKS[..., None] if sees == "last" else OWN[:, None] <= LOOKS[..., None]
    wanted = theirs(
        input_ids=ids,
        attention_mask=real.long(),
        image_encoder_embeddings=torch.cat([pictures, pictures[:1] * 0])[OWN - 1],
        image_attention_mask=theirs_mask.long(),
    ).logits[at][:, : found.shape[1]]
    assert_same(bridge, found, named, wanted, 1e-10)


def same_llama(theirs: Any, folder: Path) -> LanguageTower:
    """The layers of an IDEFICS that are no blocks are those of a Llama."""
    config = theirs.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            rms_norm_eps=config.rms_norm_eps,
        )
    ).double()
    weights = theirs.state_dict()
    llama.load_state_dict({name: weights[name] for name in llama.state_dict()})
    llama.save_pretrained(folder)
    chatml_tokenizer().save_pretrained(folder)
    language = LanguageTower(str(folder), dtype=torch.float64)
    exact(language.model)
    return language


def idefics_bridge(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of an IDEFICS that are neither Llama's nor the vision tower's, by our names."""
    found = names([name for name, _ in theirs.named_parameters()], EVERY)
    return {ours: theirs.get_parameter(name) for ours, name in found.items()}


# OpenFlamingo's equations, one picture, one token and one head at a time, on weights with its names.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "squared_relu": lambda x: torch.where(x > 0, x * x, 0 * x),
}
Weights = dict[str, Tensor]


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(w: Weights, name: str, asking: Tensor, asked: Tensor, heads: int) -> Tensor:
    queries, both = asking @ w[f"{name}.to_q.weight"].T, asked @ w[f"{name}.to_kv.weight"].T
    keys, values = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
    found = []
    for q, k, v in zip(queries.chunk(heads, 1), keys.chunk(heads, 1), values.chunk(heads, 1), strict=True):
        scores = (q @ k.T / math.sqrt(q.shape[1])).exp()
        found.append(scores / scores.sum(1, keepdim=True) @ v)
    return torch.cat(found, 1) @ w[f"{name}.to_out.weight"].T


def feed_forward(w: Weights, name: str, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    return activation(layer_norm(w, f"{name}.0", x) @ w[f"{name}.1.weight"].T) @ w[f"{name}.3.weight"].T


def resampled(w: Weights, features: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Of one picture, or of a film: "f p v"."""
    if "frame_embs" in w:
        features = torch.stack([frame + w["frame_embs"][time] for time, frame in enumerate(features)])
    x, latents = features.flatten(0, -2), w["latents"]
    for layer in ("layers.0", "layers.1"):
        of_features = layer_norm(w, f"{layer}.0.norm_media", x)
        of_latents = layer_norm(w, f"{layer}.0.norm_latents", latents)
        latents = latents + attention(w, f"{layer}.0", of_latents, torch.cat([of_features, of_latents]), 2)
        latents = latents + feed_forward(w, f"{layer}.1", latents, activation)
    return layer_norm(w, "norm", latents)


def gated(w: Weights, token: Tensor, seen: Tensor | None, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """One token "1 d", which sees the latents of one picture, or nothing."""
    if seen is not None:
        token = token + torch.tanh(w["attn_gate"]) * attention(w, "attn", layer_norm(w, "attn.norm", token), seen, 3)
    return token + torch.tanh(w["ff_gate"]) * feed_forward(w, "ff", token, activation)


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    weights = {name: drawn(*shape, seed=seed + i).double() * 0.3 for i, (name, shape) in enumerate(shapes.items())}
    return {name: 1 + x if re.search(r"(norm\w*|\b0)\.weight$", name) else x for name, x in weights.items()}


def attention_shapes(name: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    kinds = {"to_q": (inner, width), "to_kv": (2 * inner, V), "to_out": (width, inner)}
    return {f"{name}.{kind}.weight": shape for kind, shape in kinds.items()}


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def feed_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        **norm_shapes(f"{name}.0", width),
        f"{name}.1.weight": (4 * width, width),
        f"{name}.3.weight": (width, 4 * width),
    }


def open_flamingo(frames: int = 0) -> tuple[Weights, dict[str, Weights]]:
    """Weights of a resampler, and of the blocks before layers 1 and 3."""
    shapes: dict[str, tuple[int, ...]] = {"latents": (M, V)} | ({"frame_embs": (frames, V)} if frames else {})
    for layer in ("layers.0", "layers.1"):
        shapes |= norm_shapes(f"{layer}.0.norm_media", V) | norm_shapes(f"{layer}.0.norm_latents", V)
        shapes |= attention_shapes(f"{layer}.0", V, 16) | feed_shapes(f"{layer}.1", V)
    block = norm_shapes("attn.norm", D) | attention_shapes("attn", D, 30) | feed_shapes("ff", D)
    block |= {"attn_gate": (1,), "ff_gate": (1,)}
    return random_weights(shapes | norm_shapes("norm", V), 0), {n: random_weights(block, 100 * int(n)) for n in "13"}


OPEN_SPELLINGS = [
    (r"frame_embs", "frames"),
    (r"(\d)\.0\.norm_media", r"\1.feature_norm"),
    (r"(\d)\.0\.norm_latents", r"\1.latent_norm"),
    (r"layers\.(\d)\.0\.", r"layers.\1.attention."),
    (r"layers\.(\d)\.1\.", r"layers.\1.ff."),
    (r"\battn\.norm", "norm"),
    (r"\battn\.", "attention."),
    (r"\bff\.0", "feed_norm"),
    (r"\bff\.1", "feed.0"),
    (r"\bff\.3", "feed.2"),
    (r"to_out", "out"),
    (r"to_q", "query"),
    (r"attn_gate", "attention_gate"),
    (r"ff_gate", "feed_gate"),
]


def from_open_flamingo(theirs: Weights) -> Weights:
    found = {}
    for name, tensor in theirs.items():
        for pattern, ours in OPEN_SPELLINGS:
            name = re.sub(pattern, ours, name)  # noqa: PLW2901
        if "to_kv" in name:
            found[name.replace("to_kv", "key")], found[name.replace("to_kv", "value")] = tensor.chunk(2)
        else:
            found[name] = tensor
    return found


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
def test_resampler_and_blocks_are_the_equations_of_open_flamingo(activation: Any):
    resampler, blocks = open_flamingo()
    sizes: dict[str, Any] = dict(latents=M, depth=2, resampler_heads=2, resampler_head_dim=8, heads=3, head_dim=10)
    bridge = Flamingo(V, P, D, 4, every=2, offset=1, activation=activation, **sizes).double()
    named = {f"perceiver.{name}": x for name, x in from_open_flamingo(resampler).items()}
    for place, weights in blocks.items():
        named |= {f"blocks.{place}.{name}": x for name, x in from_open_flamingo(weights).items()}
    bridge.load_state_dict(named)
    features, hidden = drawn(4, P, V).double(), drawn(3, 8, D, seed=1).double()

    slots, memory = bridge(features)
    wanted = [resampled(resampler, picture, ACTIVATIONS[activation]) for picture in features]
    assert slots.shape == (4, 0, D)
    assert memory is not None
    torch.testing.assert_close(memory, torch.stack(wanted), atol=1e-12, rtol=0)

    seen = sight(bridge, memory, LOOKS, visible(torch.zeros_like(LOOKS)))
    assert seen.before(0, hidden) is seen.before(2, hidden) is None
    for place, weights in blocks.items():
        found = seen.before(int(place), hidden)
        assert found is not None
        for row, looks in enumerate(LOOKS.tolist()):
            for column, look in enumerate(looks):
                token = hidden[row, column : column + 1]
                one = gated(weights, token, wanted[look - 1] if look else None, ACTIVATIONS[activation])
                torch.testing.assert_close(found[row, column : column + 1], one, atol=1e-12, rtol=0)


@torch.no_grad()
def test_frames_of_a_film_are_told_apart_by_their_time():
    weights, _ = open_flamingo(frames=4)
    perceiver = Perceiver(V, M, 2, 2, 8, frames=4).double()
    perceiver.load_state_dict(from_open_flamingo(weights))
    films = drawn(2, 3, P, V).double()
    wanted = torch.stack([resampled(weights, film, ACTIVATIONS["gelu"]) for film in films])
    torch.testing.assert_close(perceiver(films.flatten(1, 2), frames=3), wanted, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="5 frames, and only 4 places in time; raise `frames`"):
        perceiver(drawn(1, 5 * P, V).double(), frames=5)


@pytest.mark.parametrize(
    ("every", "offset", "places"),
    [
        (1, 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (4, 0, [0, 4]),  # Flamingo-9B, IDEFICS
        (4, 3, [3, 7]),  # OpenFlamingo-9B
        (3, 0, [0, 3, 6]),
        (8, 0, [0]),
    ],
)
def test_blocks_stand_where_the_papers_have_them(every: int, offset: int, places: list[int]):
    bridge = Flamingo(V, P, D, 8, latents=M, depth=1, every=every, offset=offset)
    assert list(bridge.blocks) == [str(place) for place in places]


def test_a_faster_gate_opens_as_many_times_as_far_in_a_step():
    slow, fast = (GatedBlock(D, V, 2, 8, None, "gelu", False, "layer", False, "scalar", speed) for speed in (1.0, 5.0))
    fast.load_state_dict(slow.state_dict())
    hidden, memory, target = drawn(1, 4, D), drawn(1, M, V), drawn(1, 4, D, seed=1)
    mask = torch.ones(1, 1, 4, M, dtype=torch.bool)
    moved = []
    for block in (slow, fast):
        gates = [parameter for name, parameter in block.named_parameters() if name.endswith("_gate")]
        optimizer = torch.optim.Adam(gates, lr=1e-4)
        (block(hidden, block.keys_values(memory), mask) - target).square().sum().backward()
        optimizer.step()
        moved.append((block(hidden, block.keys_values(memory), mask) - hidden).detach())
    assert moved[0].abs().max() > 1e-5
    torch.testing.assert_close(moved[1], 5 * moved[0], atol=1e-6, rtol=1e-2)


def test_words_are_what_an_open_gate_adds() -> None:
    """Where all patches are the same, wherever it looks, a fresh block adds that patch, mapped to words."""
    bridge = Flamingo(V, P, D, 2, depth=0, words=True, heads=2, head_dim=D // 2, inner=4)
    block: Any = bridge.blocks["0"]
    with torch.no_grad():
        block.attention_gate.fill_(50.0)
    features, hidden = drawn(1, 1, V).expand(1, P, V), drawn(1, 4, D)
    memory = bridge(features).memory
    assert memory is not None
    assert bridge.last is bridge.words is not None
    torch.testing.assert_close(memory, bridge.words(nn.functional.layer_norm(features, [V])))
    seen = block(hidden, block.keys_values(memory), torch.ones(1, 1, 4, P, dtype=torch.bool))
    torch.testing.assert_close(seen - hidden, memory[:, :1].expand(1, 4, D), atol=1e-5, rtol=0)


def test_gates_are_watched_from_closed_to_open() -> None:
    sizes: dict[str, Any] = dict(latents=M, depth=1, resampler_heads=2, resampler_head_dim=8, heads=2, head_dim=8)
    bridge = Flamingo(V, P, D, 4, every=2, gate_speed=5.0, **sizes)
    closed = {f"layer {layer}": 0.0 for layer in (0, 2)}
    assert bridge.watched() == {"attention gates": closed, "feed-forward gates": closed}
    block: Any = bridge.blocks["2"]
    with torch.no_grad():
        block.attention_gate.fill_(-0.1)
    assert bridge.watched()["attention gates"] == pytest.approx({"layer 0": 0.0, "layer 2": math.tanh(0.5)})
    assert bridge.watched()["feed-forward gates"] == closed
    assert Flamingo(V, P, D, 4, gate="none", **sizes).watched() == {}
