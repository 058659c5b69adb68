"""The loss is that of a language model over its whole text, taken at the targets."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bridges.build import Assembled
from bridges.data.batch import Batch, Row, collate, rows_of
from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.data.template import IGNORE_INDEX
from bridges.objectives.language import language_loss, target_nll


@pytest.fixture
def rows(assembled: Assembled, pictures: list[Image.Image]) -> list[Row]:
    """Texts of several lengths, one of them with two replies, each a row of its own."""
    first, second, third = pictures
    dialogue = [Turn("user", ["What is ", first, "?"]), Turn("assistant", ["A cat."]), Turn("user", ["Sure?"])]
    examples = [
        Example([Conversation([*dialogue, Turn("assistant", ["Yes, very."])])]),
        Example([ask("How many birds are there?", "Four, I think.", second)]),
        Example([ask("Name it.", "A dog.", third)]),
    ]
    return [row for example in examples for row in rows_of(example, assembled.template)]


def with_batch(assembled: Assembled, rows: list[Row]) -> Batch:
    return collate(rows, assembled.model.vision.preprocess)


@torch.no_grad()
def test_it_is_the_cross_entropy_of_the_shifted_logits(assembled: Assembled, rows: list[Row]):
    model, batch = assembled.model, with_batch(assembled, rows)
    embeds = model.embed(batch.input_ids, model.see(batch.pixel_values).slots)
    logits = model.language.model(inputs_embeds=embeds, attention_mask=(batch.segments >= 0).long()).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    expected = expected[batch.labels[:, 1:].flatten() != IGNORE_INDEX]
    torch.testing.assert_close(target_nll(model, batch), expected, atol=1e-5, rtol=1e-5)
    loss, targets = language_loss(model, batch)
    assert targets == len(expected) == sum(label >= 0 for row in rows for label in row.labels)
    torch.testing.assert_close(loss, expected.sum(), atol=1e-4, rtol=1e-5)


def test_sums_and_counts_add_up_over_any_split_of_a_batch(assembled: Assembled, rows: list[Row]):
    model = assembled.model
    loss, targets = language_loss(model, with_batch(assembled, rows))
    loss.backward()
    together = {name: p.grad.clone() for name, p in model.bridge.named_parameters()}
    model.zero_grad()
    parts = [language_loss(model, with_batch(assembled, [row])) for row in rows]
    sum(part for part, _ in parts).backward()
    assert sum(count for _, count in parts) == targets
    torch.testing.assert_close(sum(part.detach() for part, _ in parts), loss.detach(), atol=1e-4, rtol=1e-5)
    for name, parameter in model.bridge.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], atol=1e-4, rtol=1e-4)


def test_a_batch_without_targets_has_no_loss(assembled: Assembled, rows: list[Row]):
    batch = with_batch(assembled, rows)
    batch.labels.fill_(IGNORE_INDEX)
    loss, targets = language_loss(assembled.model, batch)
    assert (loss.item(), targets) == (0, 0)


def test_only_labels_decide_what_counts(assembled: Assembled, rows: list[Row]):
    batch = with_batch(assembled, rows)
    every = target_nll(assembled.model, batch)
    kept = (batch.labels != IGNORE_INDEX).nonzero()[2]
    batch.labels.masked_fill_(
        torch.ones_like(batch.labels).bool().index_put(tuple(kept), torch.tensor(False)), IGNORE_INDEX
    )
    torch.testing.assert_close(target_nll(assembled.model, batch), every[2:3], atol=1e-5, rtol=1e-5)
