from pathlib import Path

import pytest
import torch
from conftest import chatml_tokenizer, tiny_language, tiny_vision
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig

from bridges.towers.frozen import fingerprint
from bridges.towers.language import LanguageTower


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))


AT = (torch.tensor([0, 0, 1, 1, 1]), torch.tensor([3, 11, 0, 7, 8]))


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def read(tower: LanguageTower, ids: Tensor) -> Tensor:
    return tower(tower.embed(ids), torch.ones_like(ids), positions(ids), AT)


@torch.no_grad()
def test_logits_at_chosen_positions_are_those_of_the_whole_model(
    family: LanguageTower, family_folder: Path, ids: Tensor
):
    reference = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32)
    expected = reference(input_ids=ids).logits[AT]
    assert expected.std() > 0.1, "weights of no consequence"
    torch.testing.assert_close(read(family, ids), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_position_chosen_gives_no_logits_but_fills_the_cache(family: LanguageTower, ids: Tensor):
    cache, none = family.empty_cache(), ids.new_zeros(0)
    logits = family(family.embed(ids), torch.ones_like(ids), positions(ids), (none, none), cache)
    assert logits.shape == (0, family.model.config.vocab_size)
    assert cache.get_seq_length() == ids.shape[1]


def test_gradients_pass_through_and_none_stays_behind(family: LanguageTower, ids: Tensor):
    embeds = family.embed(ids).clone().requires_grad_()
    family(embeds, torch.ones_like(ids), positions(ids), AT).sum().backward()
    assert embeds.grad is not None
    assert embeds.grad[0].abs().min() > 0
    assert all(not p.requires_grad and p.grad is None for p in family.parameters())


def test_gradients_are_those_of_the_whole_model_also_where_a_position_is_chosen_twice(
    family: LanguageTower, ids: Tensor
) -> None:
    at = (torch.tensor([0, 1, 1, 1]), torch.tensor([3, 5, 5, 11]))
    worth = torch.randn(4, family.model.config.vocab_size)
    few, whole = (family.embed(ids).clone().requires_grad_() for _ in range(2))
    (family(few, torch.ones_like(ids), positions(ids), at) * worth).sum().backward()
    given = {"position_ids": positions(ids)} if family.takes_positions else {}
    (
        family.model(inputs_embeds=whole, attention_mask=torch.ones_like(ids), **given).logits[at] * worth
    ).sum().backward()
    assert few.grad is not None
    torch.testing.assert_close(few.grad, whole.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_train_does_not_wake_dropout(family: LanguageTower, family_folder: Path, ids: Tensor):
    awake = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32).train()
    assert not torch.equal(awake(input_ids=ids).logits, awake(input_ids=ids).logits), "no dropout that could wake"
    before = read(family, ids)
    family.train()
    assert torch.equal(read(family, ids), before)
    torch.nn.ModuleList([family]).train()
    assert torch.equal(read(family, ids), before)


@torch.no_grad()
def test_embedding_rms_is_that_of_what_enters_the_first_layer(family: LanguageTower):
    every = torch.arange(family.model.config.vocab_size)[None]
    assert family.embedding_rms() == pytest.approx(family.embed(every).pow(2).mean().sqrt().item(), rel=0.1)
    if family.model.config.model_type == "gemma3_text":  # 0.2 as all, times the square root of the width
        assert family.embedding_rms() == pytest.approx(0.2 * 32**0.5, rel=0.1)


def test_sizes_are_read_from_any_familys_config(family: LanguageTower):
    assert (family.dim, family.num_layers, family.context) == (32, 2, 512)
    assert family.takes_positions


def test_texts_share_a_row_unless_a_window_is_shorter(tiny_llama: Path, tmp_path: Path):
    everywhere = LanguageTower(str(tiny_llama))
    assert (everywhere.window, everywhere.shares(10_000)) == (None, True)
    near = LanguageTower(str(tiny_language("mistral", tmp_path, sliding_window=24)))
    assert (near.window, near.shares(24), near.shares(25)) == (24, True, False)


@pytest.mark.parametrize(
    "config", [BloomConfig(hidden_size=32, n_layer=2, n_head=4), MptConfig(d_model=32, n_layers=2, n_heads=4)]
)
@torch.no_grad()
def test_a_model_with_alibi_works_and_says_that_it_takes_no_positions(config, ids: Tensor, tmp_path: Path):
    config.vocab_size = 400
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    chatml_tokenizer().save_pretrained(tmp_path)
    tower = LanguageTower(str(tmp_path), dtype=torch.float32)
    assert not tower.takes_positions
    assert not tower.shares(2)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(read(tower, ids), reference(input_ids=ids).logits[AT], atol=1e-5, rtol=1e-5)


def test_a_fingerprint_is_of_the_weights_whatever_the_dtype(family: LanguageTower, family_folder: Path):
    half = LanguageTower(str(family_folder), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.fingerprint() == family.fingerprint()


def test_other_weights_have_another_fingerprint(tiny_llama: Path, tmp_path: Path):
    one = LanguageTower(str(tiny_llama), dtype=torch.float32)
    other = LanguageTower(str(tiny_language("llama", tmp_path, seed=1)), dtype=torch.float32)
    assert one.fingerprint() != other.fingerprint()
    one_again = LanguageTower(str(tiny_llama), dtype=torch.float32)
    assert one.fingerprint() == one_again.fingerprint()
    one_again.model.model.norm.weight[0] += 0.1
    assert one.fingerprint() != fingerprint(one_again.model)


def test_an_answer_ends_where_tokenizer_or_model_say(tiny_llama: Path, tmp_path: Path):
    tower = LanguageTower(str(tiny_llama))
    assert tower.end_ids == {tower.tokenizer.eos_token_id}
    tower.model.generation_config.eos_token_id = [0, 7]
    tower.model.save_pretrained(tmp_path)
    tower.tokenizer.save_pretrained(tmp_path)
    assert LanguageTower(str(tmp_path)).end_ids == {0, 7, tower.tokenizer.eos_token_id}


def test_decode_gives_words_and_no_special_tokens(tiny_llama: Path):
    tower = LanguageTower(str(tiny_llama))
    ids = tower.tokenizer("A cat – 猫.<|im_end|>")["input_ids"]
    assert tower.decode(ids) == "A cat – 猫."


def test_what_is_no_language_model_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no folder .*gone"):
        LanguageTower(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"no causal language model in '.*eye'"):
        LanguageTower(str(tiny_vision(tmp_path / "eye")))
    tiny_language("llama", tmp_path / "headless")
    file = tmp_path / "headless" / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"headless lacks 1 weights .* such as lm_head.weight"):
        LanguageTower(str(tmp_path / "headless"))
    tiny_language("llama", tmp_path / "cut")
    for weights in (tmp_path / "cut").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"no causal language model in '.*cut'"):
        LanguageTower(str(tmp_path / "cut"))
