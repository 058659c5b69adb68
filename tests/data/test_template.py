"""What is learnt is what the assistant said and the token that ends it: nothing more, nothing less, in any template."""

import json
import re
from typing import Any

import pytest
from conftest import CHATML, SENTENCES, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bridges.data.conversation import Turn, images_of
from bridges.data.template import IGNORE_INDEX, IMAGE_MARK, IMAGE_TOKEN_ID, Template

SLOTS = 3
# Written after the published ones, with what makes each of them hard.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (  # the system's words inside the first user turn
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first %}{{ system }}{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (  # no system, another name for the assistant, an end that no attribute of the tokenizer names
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
ZEPHYR = (  # everyone's turn ends alike, and the names of who speaks are plain words
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
)
QWEN = (  # a system of its own where there is none
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
ENDLESS = (  # nothing special ends a turn
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
# name: (template, special tokens: bos, eos and others, how the assistant's turn ends, whether it takes a system turn)
CHATS = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"], "<|im_end|>", True),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        "<|eot_id|>",
        True,
    ),
    "llama2": (LLAMA2, ["<s>", "</s>"], " </s>", True),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", False),
    "phi3": (PHI3, ["<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"], "<|end|>", True),
    "mistral": (MISTRAL, ["<s>", "</s>"], "</s>", True),
    "zephyr": (ZEPHYR, ["<s>", "</s>"], "</s>", True),
    "qwen": (QWEN, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"], "<|im_end|>", True),
    "endless": (ENDLESS, ["<s>", "</s>"], "", True),
    "plain": ("plain", ["<s>", "</s>"], "</s>", True),
    "vicuna": ("vicuna", ["<s>", "</s>"], "</s>", True),
    "vicuna0": ("vicuna0", ["<s>", "</s>"], "</s>", True),
    "t5": ("t5", ["<s>", "</s>"], "</s>", True),
}


def sentencepiece(specials: list[str], **named: Any) -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are part of the words, a text begins with one, and what has no token is spelt in bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    trained.train_from_iterator(SENTENCES, trainer)
    learnt = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    words = ["<unk>", *specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **named)


KINDS = ["bytes", "bytes, offsets without spaces", "sentencepiece"]


def tokenizer_of(chat: str, kind: str) -> PreTrainedTokenizerBase:
    template, specials, _, _ = CHATS[chat]
    named: dict[str, Any] = {"bos_token": specials[0], "eos_token": specials[1]}
    if "{" in template:
        named["chat_template"] = template
    if kind == "sentencepiece":
        return sentencepiece(specials, **named)
    template = named.pop("chat_template", None)
    return make_tokenizer(specials, template, trim_offsets=kind != "bytes", **named)


@pytest.fixture(scope="module", params=[(chat, kind) for chat in CHATS for kind in KINDS], ids=", ".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str, Template]:
    chat, kind = request.param
    source = CHATS[chat][0] if "{" not in CHATS[chat][0] else "chat"
    return chat, kind, Template(tokenizer_of(chat, kind), SLOTS, source)


PICTURE = Image.new("RGB", (2, 2))
# "▁" is how SentencePiece writes a space
anything = st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0\ufdd1\ufdd2▁"), min_size=1, max_size=12)
words = st.one_of(st.sampled_from(["A cat.", "Two small birds\n", "  4 ", "猫 и собака 🐈‍⬛", "naïve"]), anything)
content = st.lists(st.one_of(words, st.just(PICTURE)), min_size=1, max_size=4)


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    turns = [Turn("system", ["Be brief."])] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn("user", draw(content)))
        said = draw(content)
        first = said[0].lstrip() if isinstance(said[0], str) else said[0]
        turns.append(Turn("assistant", [first or "Yes.", *said[1:]]))
    return turns


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # beartype does, to look into lists
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(turns=conversations())
def test_targets_are_what_the_assistant_said_and_its_end(case: tuple[str, str, Template], turns: list[Turn]):
    chat, kind, template = case
    _, _, end, takes_system = CHATS[chat]
    if not takes_system and turns[0].role == "system":
        turns = turns[1:]
    encoded = template.encode(turns)
    targets = [i for i in encoded.labels if i != IGNORE_INDEX]
    decoded = template.tokenizer.decode(targets, clean_up_tokenization_spaces=False)
    said = ["".join(p for p in t.content if isinstance(p, str)) + end for t in turns if t.role == "assistant"]
    if kind == "sentencepiece" or not end:  # puts a space before every text; nothing marks the end of spaces
        assert re.sub(r"\s", "", decoded) == re.sub(r"\s", "", "".join(said))
    else:  # a word has the template's space before it in its token
        assert re.fullmatch("".join(f" ?{re.escape(words)}" for words in said), decoded)

    assert all(label in (token, IGNORE_INDEX) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    assert encoded.ids.count(IMAGE_TOKEN_ID) == SLOTS * len(images_of(turns)) == SLOTS * len(encoded.images)
    assert all(label == IGNORE_INDEX for token, label in zip(encoded.ids, encoded.labels, strict=True) if token < 0)


def test_a_reply_is_learnt_after_the_very_tokens_that_ask_for_it(case: tuple[str, str, Template]):
    _, _, template = case
    turns = [Turn("user", ["What is it?", PICTURE]), Turn("assistant", ["A cat."]), Turn("user", ["Sure?", PICTURE])]
    turns += [Turn("assistant", ["Yes, very."])]
    learnt = template.encode(turns)
    starts = [
        place
        for place, label in enumerate(learnt.labels)
        if label != IGNORE_INDEX and learnt.labels[place - 1] == IGNORE_INDEX
    ]
    assert len(starts) == 2
    for number, start in enumerate(starts):
        assert template.encode(turns[: 2 * number + 1], reply=True).ids == learnt.ids[:start]


def test_without_pictures_ids_are_the_tokenizers_own(case: tuple[str, str, Template]):
    _, _, template = case
    turns = [Turn("user", ["What is the picture? 猫"]), Turn("assistant", ["A cat."]), Turn("user", ["And\nnow?"])]
    messages = [{"role": turn.role, "content": turn.content[0]} for turn in turns]
    own = template.tokenizer.apply_chat_template(
        messages, chat_template=template.jinja, add_generation_prompt=True, return_dict=False
    )
    assert template.encode(turns, reply=True).ids == own


@pytest.fixture(scope="module")
def chatml() -> Template:
    return Template(tokenizer_of("chatml", "bytes"), SLOTS)


def test_a_picture_takes_its_slots_where_it_stands(chatml: Template):
    other = Image.new("RGB", (3, 3))
    encoded = chatml.encode([Turn("user", ["Is ", PICTURE, " or ", other, other, " a cat?"])])
    text = chatml.tokenizer.decode([i if i >= 0 else chatml.tokenizer.bos_token_id for i in encoded.ids])
    assert text.replace(chatml.tokenizer.bos_token, "#") == ("<|im_start|>user\nIs ### or ###### a cat?<|im_end|>\n")
    assert [id(image) for image in encoded.images] == [id(PICTURE), id(other), id(other)]


def test_no_target_without_anything_before_it():
    template = Template(tokenizer_of("chatml", "bytes"), SLOTS, "{% for m in messages %}{{ m.content }}{% endfor %}")
    encoded = template.encode([Turn("user", [""]), Turn("assistant", ["A cat."])])
    assert encoded.labels[0] == IGNORE_INDEX
    assert encoded.labels[1:] == encoded.ids[1:]
    assert template.encode([Turn("user", [""])]).ids == template.encode([Turn("user", [""])]).labels == []


def test_the_default_system_turn_opens_conversations_that_have_none():
    template = Template(tokenizer_of("chatml", "bytes"), SLOTS, system="Be brief.")
    opened = template.render([Turn("user", ["Hi."])], reply=True)[0]
    assert opened.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.")
    own = template.render([Turn("system", ["Rhyme."]), Turn("user", ["Hi."])])[0]
    assert "Rhyme." in own
    assert "Be brief." not in own
    silent = Template(tokenizer_of("chatml", "bytes"), SLOTS).render([Turn("user", ["Hi."])])[0]
    assert "system" not in silent


def test_a_tokenizer_without_a_template_is_refused_with_the_mend():
    with pytest.raises(
        ValueError, match="this tokenizer has no chat template; choose one of plain, vicuna0, vicuna, t5, or"
    ):
        Template(tokenizer_of("plain", "bytes"), SLOTS)


def test_an_unknown_template_is_refused_with_those_that_there_are():
    with pytest.raises(
        ValueError, match="no template 'vicunna': choose chat, one of plain, vicuna0, vicuna, t5, or a Jinja"
    ):
        Template(tokenizer_of("plain", "bytes"), SLOTS, "vicunna")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "what the assistant says",
        ),
        (
            "{% for m in messages %}{% if m.role != 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "what the user says",
        ),
        ("{% for m in messages %}{{ m.content }}", "refuses this conversation: .*endfor"),
        ("{{ raise_exception('No!') }}", "refuses this conversation: No!"),
    ],
)
def test_a_template_that_cannot_teach_is_refused_at_once(source: str, message: str):
    with pytest.raises(ValueError, match=message):
        Template(tokenizer_of("chatml", "bytes"), SLOTS, source)


def test_a_system_turn_that_the_template_cannot_say_is_not_dropped_in_silence():
    with pytest.raises(ValueError, match="System role not supported"):
        Template(tokenizer_of("gemma", "bytes"), SLOTS, system="Be brief.")
    deaf = "{% for m in messages if m.role != 'system' %}{{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out what the system says"):
        Template(tokenizer_of("chatml", "bytes"), SLOTS, deaf, system="Be brief.")


def test_a_text_that_holds_the_mark_of_a_picture_is_refused(chatml: Template):
    with pytest.raises(ValueError, match="marks a picture"):
        chatml.encode([Turn("user", [f"Look: {IMAGE_MARK}"])])
    chatml.encode([Turn("user", ["\uf8ff made by Apple"])])


def test_where_a_bridge_fills_no_slots_the_words_of_a_tag_look_at_the_picture() -> None:
    tokenizer = tokenizer_of("chatml", "bytes")
    tag = tokenizer("<image>", add_special_tokens=False)["input_ids"]
    one, other = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "red")
    turns = [Turn("user", [one, other, "Which?"]), Turn("assistant", ["None."])]
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    text = Template(tokenizer, 0, bare).encode(turns)
    assert text.ids[: 2 * len(tag)] == tag + tag
    assert text.looks == [1] * len(tag) + [2] * (len(text.ids) - len(tag))
    assert text.images == [one, other]
    assert all(label == -100 for label in text.labels[: 2 * len(tag)])
    assert tokenizer.decode(text.ids) == "<image><image>Which?None."
