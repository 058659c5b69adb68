"""What is read once for many queries gives what each prompt gives when it is read alone."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import chatml_tokenizer, randomise, tiny_encoder_decoder, tiny_language
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig

from bridges.benchmark.ours import open_gates
from bridges.build import Assembled, build
from bridges.config import Recipe
from bridges.data.template import IMAGE_TOKEN_ID
from bridges.inference.features import Features
from bridges.inference.fewshot import FewShot, complete, score
from bridges.inference.lines import evenly, parts
from bridges.inference.prompts import Prompt, turns_of
from bridges.inference.scoring import tree_of
from bridges.towers import beginning

GATED: dict[str, Any] = dict(name="flamingo", latents=5, depth=1, resampler_heads=2, resampler_head_dim=8)
GATED |= dict(heads=2, head_dim=8, inner=24)
BRIDGES: dict[str, dict[str, Any]] = {
    "projector": dict(name="projector", merge="average", factor=2),
    "flamingo": GATED,
    "flamingo that sees all": GATED | dict(sees="all"),
    "qformer": dict(name="qformer", queries=3, layers=2, width=32, heads=4, inner=48),
    "resampler": dict(name="resampler", latents=3, depth=2, heads=2, head_dim=8),
}
LABELS = [" cat", " car", " cat and a dog", " house", " two small birds"]


def opened(recipe: Recipe, **bridge: Any) -> Assembled:
    """A model whose gates let its pictures through."""
    recipe.bridge = bridge
    assembled = build(recipe)
    open_gates(assembled.model.bridge, 0.8)
    return assembled


@pytest.fixture(params=BRIDGES)
def model(request: pytest.FixtureRequest, recipe: Recipe) -> Assembled:
    return opened(recipe, **BRIDGES[request.param])


@pytest.fixture
def shots(pictures: list[Image.Image]) -> list[Prompt]:
    texts = ["This is a cat.\n", "This is the red house on the left.\n", "Two small birds sit.\n"]
    return [[picture, text] for picture, text in zip(pictures, texts, strict=True)]


@pytest.fixture
def queries(pictures: list[Image.Image]) -> list[Prompt]:
    """Of different lengths; one has two pictures, and two begin with text."""
    turned = [picture.rotate(90, expand=True) for picture in pictures]
    return [
        [turned[0], "This is a"],
        [turned[1], "There is", turned[2], "This is larger than the"],
        ["What is in the picture?", turned[2], "A"],
        ["Name it. It is a"],
    ]


def whole(shots: Sequence[Prompt], query: Prompt) -> Prompt:
    return [*chain(*shots), *query]


def alone(assembled: Assembled, prompt: Prompt, more: Sequence[int] = ()) -> Tensor:
    """Logits after every position of a text that is read in one go, by the model's own forward."""
    text = FewShot(assembled).plain.encode(prompt)
    ids = torch.tensor([[*text.ids, *more]])
    looks = torch.tensor([[*text.looks, *[len(text.images)] * len(more)]])
    every = torch.arange(ids.shape[1])
    pixels = assembled.model.vision.preprocess(text.images)
    with torch.no_grad():
        return assembled.model(
            ids, torch.zeros_like(ids), every[None], (torch.zeros_like(every), every), pixels, None, text.asked, looks
        ).log_softmax(-1)


def likely(assembled: Assembled, prompt: Prompt, label: str) -> tuple[float, float]:
    """Log-probability of a label, one row for it alone; total and mean."""
    ids = assembled.template.tokenizer(label, add_special_tokens=False)["input_ids"]
    told = alone(assembled, prompt, ids)[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None])
    return told.sum().item(), told.mean().item()


def widths(assembled: Assembled) -> list[tuple[int, int]]:
    """(rows, columns) of everything that the language model reads from now on."""
    seen: list[tuple[int, int]] = []
    assembled.model.language.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    return seen


def test_answers_after_kept_shots_are_those_to_the_whole_prompts(
    model: Assembled, shots: list[Prompt], queries: list[Prompt]
) -> None:
    model.model.language.end_ids = frozenset()
    kept = FewShot(model, shots).complete(queries, 12)
    assert kept == FewShot(model, shots, reuse=False).complete(queries, 12)
    assert kept == [complete(model, [whole(shots, query)], 12)[0] for query in queries]
    assert len(set(kept)) == len(queries), "answers that are all alike would hide a mix-up"


def test_the_tree_gives_each_label_what_a_row_of_its_own_gives(
    model: Assembled, shots: list[Prompt], queries: list[Prompt]
) -> None:
    for found in (
        FewShot(model, shots).score(queries, LABELS),
        FewShot(model, shots, reuse=False).score(queries, LABELS),
    ):
        for query, totals, means in zip(queries, *found, strict=True):
            expected = [likely(model, whole(shots, query), label) for label in LABELS]
            assert totals.tolist() == pytest.approx([total for total, _ in expected], abs=1e-4)
            assert means.tolist() == pytest.approx([mean for _, mean in expected], abs=1e-4)
    assert found.total.std(0).min() > 1e-3, "scores that are all alike would hide a mix-up"


def test_a_batch_scores_and_says_what_each_query_does_alone(
    model: Assembled, shots: list[Prompt], queries: list[Prompt]
) -> None:
    model.model.language.end_ids = frozenset()
    reader, one = FewShot(model, shots, batch=1), FewShot(model, shots)
    said, read = [one.complete([query], 8)[0] for query in queries], widths(model)
    assert reader.complete(queries, 8) == said
    before, own = read[0][1], max(width for _, width in read[1:]) + 8
    assert 1 < max(rows for rows, _ in read) <= (before + own) // own, "the room of one whole prompt"
    read.clear()
    assert FewShot(model, shots, batch=3, reuse=False).complete(queries, 8) == said
    assert max(rows for rows, _ in read) == 2, "equally many"
    expected = torch.cat([one.score([query], LABELS).total for query in queries])
    torch.testing.assert_close(reader.score(queries, LABELS).total, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["apart", "written out", "not its own attention"])
def test_in_every_family_a_batch_says_what_each_whole_prompt_alone_does(
    family_folder: Path,
    how: str,
    recipe: Recipe,
    shots: list[Prompt],
    queries: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows end at different steps and drop out, however the attention gets to what is kept."""
    recipe.language.name = str(family_folder)
    assembled = build(recipe)
    language = assembled.model.language
    language.end_ids = frozenset()
    if how == "written out":
        monkeypatch.setattr(beginning, "FEW", 0)
    if how == "not its own attention":
        language.model.set_attn_implementation("eager")
    expected = [complete(assembled, [whole(shots, query)], 10)[0] for query in queries]
    reader, read = FewShot(assembled, shots), widths(assembled)
    assert reader.complete(queries, 10) == expected
    assert {rows for rows, _ in read[1:]} == {len(queries)}
    stops = [text[len(text) // 2 :][:2] for text in expected if len(text) > 4]
    read.clear()
    assert reader.complete(queries, 10, stops) == [
        complete(assembled, [whole(shots, query)], 10, stops)[0] for query in queries
    ]
    assert read[-1][0] < len(queries), "a row that has ended is read no more"
    assert reader.complete(queries, 10) == expected, "what is kept stays as it was"


def test_pictures_matter_and_so_do_those_of_the_shots(
    model: Assembled, shots: list[Prompt], queries: list[Prompt], pictures: list[Image.Image]
) -> None:
    base = FewShot(model, shots).score(queries[:1], LABELS).total
    other_query = FewShot(model, shots).score([[pictures[2], *queries[0][1:]]], LABELS).total
    other_shot = FewShot(model, [[pictures[1], *shots[0][1:]], *shots[1:]]).score(queries[:1], LABELS).total
    assert (base - other_query).abs().max() > 1e-5
    assert (base - other_shot).abs().max() > 1e-5


def test_shots_are_read_once_and_a_query_costs_its_own_tokens_only(
    model: Assembled, shots: list[Prompt], queries: list[Prompt]
) -> None:
    reader, read = FewShot(model, shots), widths(model)
    query = queries[0]
    reader.score([query], [" a", " b"])
    reader.score([query, query], [" a", " b"])
    before, own = (sum(len(reader.plain.encode(part, first=False).ids) for part in parts) for parts in (shots, [query]))
    bos = len(reader.plain.encode([]).ids)
    assert read == [(1, before + bos), (1, own), (1, 2 * own)], "two queries stand in one line"


def test_labels_of_one_token_need_no_more_than_the_prompt_and_a_common_beginning_is_read_once(
    assembled: Assembled, queries: list[Prompt]
) -> None:
    read = widths(assembled)
    label = " the house is larger"
    ids = assembled.template.tokenizer(label)["input_ids"]
    own = len(FewShot(assembled).plain.encode(queries[0]).ids)
    score(assembled, queries[:1], [label, label + " x", label + " y"])
    assert read == [(1, own + len(ids) + 1)], "the common beginning, and the space that goes with neither letter"


def test_no_picture_is_encoded_twice(model: Assembled, shots: list[Prompt], queries: list[Prompt]) -> None:
    seen: list[int] = []
    model.model.vision.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    features = Features(model)
    for reader in (FewShot(model, shots, features), FewShot(model, shots[1:], features)):
        reader.complete(queries, 4)
        reader.score(queries, LABELS)
    again = [[part.copy() if isinstance(part, Image.Image) else part for part in query] for query in queries]
    complete(model, [whole(shots, query) for query in again], 4, features=features)
    assert sum(seen) == features.encoded == 3 + 3, "three pictures of the shots, and three of the queries"


def test_a_stop_text_ends_an_answer_and_is_cut_off(
    model: Assembled, shots: list[Prompt], queries: list[Prompt]
) -> None:
    model.model.language.end_ids = frozenset()
    reader = FewShot(model, shots)
    full = reader.complete(queries, 16)
    place, stop = next((place, x) for place, text in enumerate(full) for x in text[1:] if x not in " \ufffd")
    cut = reader.complete(queries, 16, stop)
    assert cut == [text.split(stop)[0].rstrip("\ufffd") for text in full]
    assert len(cut[place]) < len(full[place])
    read = widths(model)
    assert reader.complete(queries[place : place + 1], 16, [stop, "never said"]) == [cut[place]]
    assert len(read) < 16, "nothing is read after the stop text"
    assert FewShot(model, shots, reuse=False).complete(queries, 16, stop) == cut


def test_an_answer_ends_at_the_end_token(assembled: Assembled, queries: list[Prompt]) -> None:
    language = assembled.model.language
    language.end_ids = frozenset()
    text = FewShot(assembled).plain.encode(queries[0])
    ids: list[int] = []
    for _ in range(6):
        ids.append(int(alone(assembled, queries[0], ids)[-1].argmax()))
    language.end_ids = frozenset(ids[3:4])
    expected = language.decode(ids[: ids.index(ids[3])]).lstrip(" ").rstrip("\ufffd")
    assert complete(assembled, queries[:1], 6) == [expected]
    assert text.ids.count(IMAGE_TOKEN_ID) == assembled.model.bridge.num_slots


def test_a_label_takes_the_space_before_it_though_the_prompt_ends_with_one(assembled: Assembled) -> None:
    apart = score(assembled, [["This is a"]], [" cat", " dog"])
    together = score(assembled, [["This is a "]], ["cat", "dog"])
    torch.testing.assert_close(apart.total, together.total)


def test_a_model_without_positions_to_restart_reads_everything_anew_and_says_the_same(
    tiny_clip: Path, recipe: Recipe, shots: list[Prompt], queries: list[Prompt], tmp_path: Path
) -> None:
    tokenizer = chatml_tokenizer()
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=len(tokenizer))
    randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    recipe.language.name = str(tmp_path)
    assembled = build(recipe)
    reader = FewShot(assembled, shots)
    assert reader.complete(queries, 8) == [complete(assembled, [whole(shots, query)], 8)[0] for query in queries]
    found = reader.score(queries, LABELS)
    for query, totals in zip(queries, found.total, strict=True):
        assert totals.tolist() == pytest.approx(
            [likely(assembled, whole(shots, query), la)[0] for la in LABELS], abs=1e-4
        )


def test_a_window_shorter_than_the_prompt_reads_everything_anew(
    recipe: Recipe, shots: list[Prompt], queries: list[Prompt], tmp_path: Path
) -> None:
    recipe.language.name = str(tiny_language("mistral", tmp_path, sliding_window=24))
    assembled = build(recipe)
    found = FewShot(assembled, shots).score(queries, LABELS)
    expected = [likely(assembled, whole(shots, queries[1]), label)[0] for label in LABELS]
    assert found.total[1].tolist() == pytest.approx(expected, abs=1e-4)
    reader = FewShot(assembled, shots)
    assert reader.complete(queries, 8) == [complete(assembled, [whole(shots, query)], 8)[0] for query in queries]


def test_a_line_is_no_longer_than_the_window(
    recipe: Recipe, shots: list[Prompt], queries: list[Prompt], tmp_path: Path
) -> None:
    recipe.language.name = str(tiny_language("mistral", tmp_path, sliding_window=110))
    recipe.bridge = BRIDGES["projector"]
    assembled = build(recipe)
    assembled.model.language.end_ids = frozenset()
    reader, read = FewShot(assembled, shots), widths(assembled)
    said = reader.complete(queries, 12)
    before = read[0][1]
    assert read[1][0] == len(queries), "one line would be longer than the window"
    assert before + read[1][1] + 12 <= 110
    assert said == FewShot(assembled, shots, reuse=False).complete(queries, 12)
    found = reader.score(queries, LABELS).total
    assert found[1].tolist() == pytest.approx(
        [likely(assembled, whole(shots, queries[1]), label)[0] for label in LABELS], abs=1e-4
    )


def test_an_encoder_reads_the_demonstrations_too(
    recipe: Recipe, shots: list[Prompt], queries: list[Prompt], tmp_path: Path
) -> None:
    recipe.language.name, recipe.language.template = str(tiny_encoder_decoder(tmp_path)), "t5"
    assembled = build(recipe)
    reader = FewShot(assembled, shots)
    assert reader.complete(queries, 8) == [complete(assembled, [whole(shots, query)], 8)[0] for query in queries]
    found, language = reader.score(queries[:2], ["cat", "house"]), assembled.model.language
    label = assembled.template.tokenizer("cat", add_special_tokens=False)["input_ids"]
    text = reader.plain.encode(whole(shots, queries[0]))
    assert text.ids[-1] == assembled.template.tokenizer.eos_token_id
    slots = assembled.model.see(assembled.model.vision.preprocess(text.images)).slots
    embeds = assembled.model.embed(torch.tensor([text.ids]), slots)
    said = torch.tensor([[language.start_id, *label]])
    with torch.no_grad():
        logits = language.model(inputs_embeds=embeds, decoder_input_ids=said).logits[0].log_softmax(-1)
    expected = sum(logits[place, token].item() for place, token in enumerate(label))
    assert found.total[0, 0].item() == pytest.approx(expected, abs=1e-4)


def test_what_a_bridge_reads_beside_a_picture_is_the_text_up_to_the_next(
    assembled: Assembled, pictures: list[Image.Image]
) -> None:
    plain = FewShot(assembled).plain
    plain.template.instructed = True
    text = plain.encode(["Look: ", pictures[0], "This is ", "a cat.", pictures[1], pictures[2], "What?"])
    assert text.asked == ["This is a cat.", "", "What?"]


def test_batches_are_of_like_size() -> None:
    assert [evenly(count, 32) for count in (0, 1, 32, 33, 64, 100)] == [0, 1, 32, 17, 32, 25]
    assert parts([9] * 5, 3, 99) == [slice(0, 3), slice(3, 5)]
    assert parts([9, 9, 30, 1], 4, 20) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert parts([9, 9, 9], 4, 28) == [slice(0, 3)]
    assert parts([], 4, 28) == []


def test_a_tree_has_every_common_beginning_once() -> None:
    tree = tree_of([[5], [5, 7], [6, 7]])
    assert (tree.tokens, tree.parents, tree.paths) == ((5, 7, 6, 7), (-1, 0, -1, 2), ((0,), (0, 1), (2, 3)))
    assert tree.inner == [0, 2]
    assert tree.ancestors(1) == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([" cat", " dog", " cat"], "label ' cat' is there twice"),
        ([" cat", " "], "label 1 of 2 is empty"),
        ([], "at least one"),
    ],
)
def test_labels_that_are_none_are_refused(
    assembled: Assembled, queries: list[Prompt], labels: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(assembled, queries, labels)


def test_shots_beyond_the_context_are_refused_with_how_many_fit(
    model: Assembled, shots: list[Prompt], queries: list[Prompt]
) -> None:
    many = shots * 20
    reader = FewShot(model, many)
    with pytest.raises(ValueError, match=r"60 demonstrations .* exceed the 512 positions .*; \d+ of them fit") as error:
        reader.complete(queries, 20)
    fit = int(str(error.value).split("; ")[1].split()[0])
    assert 0 < fit < 60
    FewShot(model, many[:fit]).check(queries, 20)
    with pytest.raises(ValueError, match=f"{fit} of them fit"):
        FewShot(model, many[: fit + 1]).check(queries, 20)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("This is a", "a prompt is a list of texts and pictures"),
        ([Path("cat.png"), "This is a"], "not .*cat.png"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        turns_of(prompt)


def test_a_prompt_of_no_token_is_refused(
    assembled: Assembled, shots: list[Prompt], pictures: list[Image.Image]
) -> None:
    for reader, query in ((FewShot(assembled, shots), []), (FewShot(assembled), [""])):
        reader.plain.begin = ""
        with pytest.raises(ValueError, match="the prompt is empty"):
            reader.complete([query])
        with pytest.raises(ValueError, match="the prompt is empty"):
            reader.score([query], LABELS)


def test_nothing_asked_is_nothing_said(assembled: Assembled, shots: list[Prompt]) -> None:
    reader = FewShot(assembled, shots)
    assert reader.complete([]) == []
    assert reader.score([], LABELS).total.shape == (0, len(LABELS))
    with pytest.raises(ValueError, match="stop text is empty"):
        reader.complete([], 4, "")


def test_in_several_lines_all_is_said_and_scored_as_in_one(
    model: Assembled, shots: list[Prompt], queries: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an end token, so that texts end at different steps, and lines get emptier than others."""
    free = FewShot(model, shots).complete(queries * 2, 12)
    said = [model.template.tokenizer(text, add_special_tokens=False)["input_ids"] for text in free]
    model.model.language.end_ids = frozenset(ids[place % 4 + 1] for place, ids in enumerate(said) if len(ids) > 5)
    reader, read = FewShot(model, shots), widths(model)
    one = reader.complete(queries * 2, 12), reader.score(queries * 2, LABELS).total
    monkeypatch.setattr("bridges.inference.fewshot.LINE", 60)
    read.clear()
    assert reader.complete(queries * 2, 12) == one[0] == FewShot(model, shots, reuse=False).complete(queries * 2, 12)
    assert read[0][0] > 1
    assert len({len(text) for text in one[0]}) > 1
    read.clear()
    torch.testing.assert_close(reader.score(queries * 2, LABELS).total, one[1], atol=1e-4, rtol=1e-4)
    assert read[0][0] > 1
