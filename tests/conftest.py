"""Tiny real models, made from configs, saved to disk with tokenizer and image processor, and loaded by the real code."""

import os
import re
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["BRIDGES_DTYPE"] = "float32"  # whatever this machine is fastest in: what is equal is equal to rounding

import numpy as np
import pytest
import seeding
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from bridges.build import Assembled, build
from bridges.checkpoint import save_checkpoint
from bridges.config import Recipe
from bridges.data.batch import Batch
from bridges.recipe import recipe_from
from bridges.towers.language import LanguageTower

# A shell that starts the tests in the background has them ignore Ctrl-C, and every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
pytest.register_assert_rewrite("adapting", "fusing")  # their assertions tell as much as those of a test
torch.set_num_threads(1)  # for tensors this small a second thread costs several times what it saves


def pytest_configure(config: pytest.Config) -> None:
    """Of a conftest the hooks see no fixture of the session; of a plugin they see all."""
    config.pluginmanager.register(seeding)


SENTENCES = [
    "There is a cat on the left of the red house, and a dog that looks at it.",
    "What is in the picture? Describe the image. How many birds are there? Is it a cat? Name it.",
    "Yes. No. A cat. Two small birds sit above the blue car. The house is larger than the tree.",
    "user assistant system You are a helpful assistant. The answer is four, I think.",
]
NAMES = ("cat", "dog", "house", "tree", "bird", "car")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SIZES: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
GROUPED: dict[str, Any] = dict(SIZES, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=512)
SLEEPY: dict[str, Any] = dict(attention_dropout=0.5)
# Every family that takes positions, with dropout that a frozen tower must not wake.
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **k: LlamaConfig(**GROUPED, **SLEEPY, **k),
    "qwen3": lambda **k: Qwen3Config(**GROUPED, **SLEEPY, head_dim=8, **k),
    "gemma3": lambda **k: Gemma3TextConfig(**GROUPED, **SLEEPY, head_dim=8, query_pre_attn_scalar=8, **k),
    "mistral": lambda **k: MistralConfig(**GROUPED, **SLEEPY, **k),
    "phi3": lambda **k: Phi3Config(**GROUPED, **SLEEPY, resid_pdrop=0.5, embd_pdrop=0.5, **k),
    "gpt2": lambda **k: GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, **k
    ),
    "opt": lambda **k: OPTConfig(
        **SIZES, **SLEEPY, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=512, dropout=0.5, **k
    ),
    "gpt_neox": lambda **k: GPTNeoXConfig(
        **SIZES, **SLEEPY, intermediate_size=48, max_position_embeddings=512, hidden_dropout=0.5, **k
    ),
}


def make_tokenizer(
    specials: list[str], template: str | None = None, trim_offsets: bool = False, **named: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences: any text has ids, and ids have their text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 120, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return make_tokenizer(
        specials, CHATML, bos_token=specials[0], pad_token=specials[0], unk_token=specials[0], eos_token=specials[2]
    )


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights with which every activation, norm, bias and scale shows in the result; those of a fresh model hide them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model


def tiny_language(family: str, folder: Path, seed: int = 0, **options: Any) -> Path:
    """A language model of one of FAMILIES, with a ChatML tokenizer, in a folder."""
    tokenizer = chatml_tokenizer()
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    config = FAMILIES[family](vocab_size=len(tokenizer), **ends, **options)
    randomise(AutoModelForCausalLM.from_config(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def t5_tokenizer() -> T5Tokenizer:
    """As T5's own: words begin with their space, `</s>` ends a text, and there is no beginning and no chat template."""
    words = sorted({f"▁{word}" for sentence in SENTENCES for word in sentence.split()})
    letters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    scored = [*((word, -4.0) for word in words), *((letter, -8.0) for letter in letters)]
    return T5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scored], extra_ids=0)


def tiny_encoder_decoder(folder: Path, seed: int = 0, **options: Any) -> Path:
    """A T5 of the newer kind, like Flan-T5, in a folder; its halves are of different depths."""
    tokenizer = t5_tokenizer()
    sizes: dict[str, Any] = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4)
    newer: dict[str, Any] = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False) | options
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, dropout_rate=0.5, **sizes, **newer)
    randomise(T5ForConditionalGeneration(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_vision(folder: Path, seed: int = 0, hidden_size: int = 16) -> Path:
    """A CLIP of 4 x 4 patches and a CLS token, with its image processor, in a folder."""
    config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        attention_dropout=0.5,
    )
    randomise(CLIPVisionModel(config), seed).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)
    return folder


def tiny_bert(folder: Path, seed: int = 0, **options: Any) -> Path:
    """A BERT with its head, and a WordPiece tokenizer that knows some words and every letter, in a folder."""
    words = sorted({word for sentence in SENTENCES for word in re.findall(r"[a-z]+|[.,?]", sentence.lower())})
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = dict.fromkeys([*named.values(), "[MASK]", *words, *letters])
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    sizes = {**SIZES, "intermediate_size": 48, **options}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=512, **sizes)
    randomise(BertForMaskedLM(config), seed).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session", params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of each family."""
    return tiny_language(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def family(family_folder: Path) -> LanguageTower:
    """The tower of each family."""
    return LanguageTower(str(family_folder), dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_decoder(tmp_path_factory.mktemp("t5"))


def tiny_recipe(clip: Path, llama: Path, output: Path) -> Recipe:
    return recipe_from(
        {
            "output": str(output),
            "vision": {"name": str(clip), "layer": -2},
            "language": {"name": str(llama)},
            "bridge": {"name": "projector", "depth": 2},
            "train": {"steps": 2, "batch": 4},
        }
    )


@pytest.fixture
def recipe(tiny_clip: Path, tiny_llama: Path, tmp_path: Path) -> Recipe:
    return tiny_recipe(tiny_clip, tiny_llama, tmp_path / "run")


@pytest.fixture(scope="session")
def built(tiny_clip: Path, tiny_llama: Path) -> Assembled:
    """What `build` makes of the recipe; nobody changes it."""
    return build(tiny_recipe(tiny_clip, tiny_llama, Path("unused")))


@pytest.fixture
def assembled(built: Assembled, recipe: Recipe) -> Assembled:
    """A model of its own for every test, so that a test may train it: a copy, which takes a twentieth of the time."""
    return deepcopy(built)._replace(recipe=recipe)


@pytest.fixture
def tiny_checkpoint(assembled: Assembled) -> Path:
    folder = Path(assembled.recipe.output)
    save_checkpoint(folder, assembled)
    return folder


def captioned(folder: Path, captions: Sequence[str], pictures: Sequence[Image.Image] = ()) -> Path:
    """Write a folder of pictures, each with its caption; of noise, all different, where no pictures are given."""
    noise = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    lines = ["file_name,caption"]
    for i, caption in enumerate(captions):
        pixels = noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        (pictures[i] if pictures else Image.fromarray(pixels)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{caption}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Twelve pictures in a folder with their captions, all different."""
    return captioned(tmp_path / "pictures", [f"A {NAMES[i % 6]} and a {NAMES[i // 2]}." for i in range(12)])


def said_afresh(folder: Path, batch: Batch) -> Tensor:
    """Nats of a batch's targets, by a checkpoint that a process of its own loads."""
    torch.save(vars(batch), folder / "batch.pt")
    program = (
        "import sys, torch; from bridges.checkpoint import load; from bridges.data.batch import Batch\n"
        "from bridges.objectives.language import target_nll\n"
        "folder = sys.argv[1]; batch = Batch(**torch.load(folder + '/batch.pt', weights_only=False))\n"
        "with torch.no_grad(): torch.save(target_nll(load(folder).model, batch), folder + '/said.pt')"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    return torch.load(folder / "said.pt")


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Three pictures of noise, of different sizes."""
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 255, (y, x, 3), dtype=np.uint8)) for y, x in ((32, 32), (48, 40), (20, 64))
    ]
