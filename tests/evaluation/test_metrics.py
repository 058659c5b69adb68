"""Captions are scored as the released scorers do; names, answers and intervals as a hand would count them."""

import time

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from bridges.evaluation.metrics import (
    accuracy,
    bleu,
    bleu4,
    bleu_counts,
    cider_d,
    f1,
    interval,
    majority,
    naming,
    normalize,
    tokenize,
)

WORDS = ["a", "the", "red", "dog", "'s", "t-shirt", "on", "mat", "3.5", "two"]
sentence = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
full_sentence = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
images = st.lists(st.tuples(sentence, st.lists(full_sentence, min_size=1, max_size=4)), min_size=1, max_size=6)


def released_cider(candidates: list[str], references: list[list[str]]) -> np.ndarray:
    _, scores = Cider().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)})
    return np.asarray(scores)


def released_bleu(candidates: list[str], references: list[list[str]]) -> float:
    streams = [[texts[i] if i < len(texts) else texts[0] for texts in references] for i in range(4)]
    score = sacrebleu.corpus_bleu(
        candidates, streams, smooth_method="none", tokenize="none", force=True, use_effective_order=False
    )
    return score.score / 100


@settings(deadline=None, max_examples=200)
@given(images)
def test_cider_d_is_that_of_pycocoevalcap(drawn):
    candidates, references = [c for c, _ in drawn], [r for _, r in drawn]
    np.testing.assert_allclose(cider_d(candidates, references), released_cider(candidates, references), atol=1e-6)


@settings(deadline=None, max_examples=200)
@given(images)
def test_bleu_is_that_of_sacrebleu(drawn):
    candidates, references = [c for c, _ in drawn], [r for _, r in drawn]
    assert bleu4(candidates, references) == pytest.approx(released_bleu(candidates, references), abs=1e-6)


def test_both_oracles_agree_on_captions_as_people_write_them():
    candidates = [
        "A dog's ball lies on the mat.",
        "Two red T-shirts, and a cat on the mat",
        "The sun!",
        "A cat sits on a mat",
    ]
    references = [
        ["The dog's ball is on the mat.", "A ball on the mat"],
        ["Two red T-shirts and a cat on the mat."],
        ["The sun and a cloud over the sea", "sun"],
        ["A cat sits on a mat", "There is a cat", "A cat that sits on a mat"],
    ]
    tokens = [" ".join(tokenize(text)) for text in candidates]
    ref_tokens = [[" ".join(tokenize(text)) for text in texts] for texts in references]
    scores = cider_d(candidates, references)
    np.testing.assert_allclose(scores, released_cider(tokens, ref_tokens), atol=1e-6)
    assert scores.min() > 0.1
    assert bleu4(candidates, references) == pytest.approx(released_bleu(tokens, ref_tokens), abs=1e-6)
    assert bleu4(candidates, references) > 0.5


def test_a_caption_equal_to_its_only_reference_scores_full_marks():
    texts = ["a red dog on the mat", "two blue cats under one tree"]
    np.testing.assert_allclose(cider_d(texts, [[text] for text in texts]), [10, 10])
    assert bleu4(texts, [[text] for text in texts]) == pytest.approx(1)


def test_an_empty_caption_scores_nothing_and_breaks_nothing():
    texts, references = ["", "a red dog sleeps"], [["a cat"], ["a red dog sleeps"]]
    assert cider_d(texts, references)[0] == 0
    assert bleu4([""], [["a cat"]]) == 0
    assert 0 < bleu4(texts, references) < 1  # the brevity penalty is all that it costs
    assert bleu4(texts, references) == pytest.approx(released_bleu(texts, references), abs=1e-6)


def test_captions_under_four_words_have_no_bleu_but_a_cider():
    texts, references = ["a dog", "a cat"], [["a dog"], ["a cat"]]
    assert bleu4(texts, references) == released_bleu(texts, references) == 0
    np.testing.assert_allclose(cider_d(texts, references), released_cider(texts, references), atol=1e-6)
    assert cider_d(texts, references).min() > 0


def test_repeating_a_rare_word_gains_nothing():
    references = [["the dog runs here"], ["the cat sleeps there"], ["the bird flies away"]]
    plain, repeated = (cider_d([text, "x", "x"], references)[0] for text in ("the dog runs", "dog dog dog"))
    assert plain > 2 * repeated


def test_no_image_is_no_score():
    assert cider_d([], []).shape == (0,)
    assert bleu4([], []) == 0
    assert f1(naming([], [])) == 0


def test_misaligned_captions_and_missing_references_are_refused():
    for score in (cider_d, bleu4):
        with pytest.raises(ValueError, match="1 predictions for 2 images"):
            score(["a"], [["a"], ["b"]])
        with pytest.raises(ValueError, match="image 1 has references"):
            score(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="2 predictions for 1 images"):
        accuracy(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The dog’s T-shirt.", ["the", "dog", "'s", "t-shirt"]),
        ('He said: "don\'t!" (at 10:30)', ["he", "said", "don't", "at", "10:30"]),
        ("3.5 metres -- o'clock, 'quoted'…", ["3.5", "metres", "o'clock", "quoted"]),
        ("  \n", []),
    ],
)
def test_words_come_without_case_and_punctuation(text, words):
    assert tokenize(text) == words


@given(st.text(alphabet="aBs1. ,'’-:!é\n", max_size=30))
def test_tokenizing_twice_changes_nothing(text):
    words = tokenize(text)
    assert tokenize(" ".join(words)) == words


def test_naming_counts_what_is_there_what_is_said_and_both():
    counts = naming(
        [frozenset({"cat", "dog"}), frozenset(), frozenset({"sun"})],
        [frozenset({"cat"}), frozenset({"tree", "car"}), frozenset({"sun"})],
    )
    assert counts.tolist() == [[1, 2, 1], [0, 0, 2], [1, 1, 1]]
    assert f1(counts) == pytest.approx(2 * 2 / (3 + 4))
    assert f1(counts[[0]]) == pytest.approx(2 / 3)


def test_answers_are_compared_without_case_articles_and_final_punctuation():
    predicted = ["A  red dog.", "Yes!", "no", "the", "2", "theatre"]
    true = ["red dog", "yes", "yes", "", "2.", "atre"]
    assert accuracy(predicted, true).tolist() == [1, 1, 0, 0, 1, 0]
    assert normalize("The A.") == "the a"  # an answer that is only articles stays one


def test_the_majority_is_the_most_frequent_and_ties_go_by_the_alphabet():
    assert majority(["yes", "no", "yes"]) == "yes"
    assert majority(["two", "one", "two", "one", "six"]) == "one"
    with pytest.raises(ValueError, match="no answers"):
        majority([])


def test_the_interval_of_a_mean_is_the_one_of_the_normal_law():
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = interval(lambda rows: float(values[rows].mean()), 400)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.03)
    assert high == pytest.approx(values.mean() + error, abs=0.03)
    assert (low, high) == interval(lambda rows: float(values[rows].mean()), 400)
    assert (low, high) != interval(lambda rows: float(values[rows].mean()), 400, seed=1)
    assert interval(lambda rows: 3.0, 1) == (3, 3)
    with pytest.raises(ValueError, match="0 images"):
        interval(lambda rows: 0.0, 0)


def test_resampling_counts_no_words_again() -> None:
    """A thousand resamples take less than counting twice; each for itself they would take a thousand times that."""
    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice(WORDS, 10)) for _ in range(3000)]
    candidates, references = sentences[:500], [sentences[500 + 5 * i : 505 + 5 * i] for i in range(500)]
    start = time.process_time()
    counts, scores = bleu_counts(candidates, references), cider_d(candidates, references)
    counted = time.process_time()
    low, high = interval(lambda rows: bleu(counts[rows]), 500)
    interval(lambda rows: float(scores[rows].mean()), 500)
    assert time.process_time() - counted < 2 * (counted - start)
    assert low < bleu(counts) < high
