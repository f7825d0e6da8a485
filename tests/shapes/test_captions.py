"""Captions say what the scene holds, in words that both tokenizers know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from safelight.shapes import Scene, caption, describe, sample_scenes
from safelight.shapes.captions import EMPTY_SHARE, PARTIAL_SHARE, sample_caption, vocabulary
from safelight.shapes.scene import COLOURS, POSITIONS, SHAPES, SIZES
from safelight.shapes.train.text import TEXT_TOKENS, clip_tokenizer, t5_tokenizer

STAR = Scene("yellow", "star", "small", "top left", "black")
SQUARE = Scene("orange", "square", "large", "center", "blue")


def parse(text: str) -> Scene:
    """Reads a full caption back, word by word."""
    head, background = text.removesuffix(" background").rsplit(" on a", 1)
    place = next(name for name in POSITIONS if head.endswith(name))
    words = head.split()
    assert words[1] in SIZES
    assert words[3] in SHAPES
    return Scene(words[2], words[3], words[1], place, background.removeprefix("n").strip())


def test_no_full_caption_loses_or_changes_an_attribute() -> None:
    scenes = sample_scenes(300, torch.Generator().manual_seed(0))
    assert [parse(caption(scene)) for scene in scenes] == scenes


def test_captions_read_as_documented() -> None:
    assert caption(STAR) == "a small yellow star at the top left on a black background"
    assert describe(STAR) == "a yellow star"
    assert describe(SQUARE) == "an orange square"
    assert describe(SQUARE, size=True, background=True) == "a large orange square on a blue background"
    assert describe(SQUARE, position=True) == "an orange square in the center"


def test_training_does_not_starve_a_kind_of_caption() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [sample_caption(STAR, generator).text for _ in range(4000)]
    empty, full = texts.count("") / 4000, texts.count(caption(STAR)) / 4000
    assert empty == pytest.approx(EMPTY_SHARE, abs=0.015)
    assert full == pytest.approx(1 - EMPTY_SHARE - PARTIAL_SHARE * 7 / 8, abs=0.025)
    assert len(set(texts)) == 9  # empty, and each of eight ways to leave things out


def test_a_caption_that_leaves_place_or_size_open_does_not_claim_to_fix_them() -> None:
    generator = torch.Generator().manual_seed(0)
    for drawn in (sample_caption(STAR, generator) for _ in range(300)):
        assert drawn.places == ("small" in drawn.text and "top left" in drawn.text)


@pytest.fixture(scope="module", params=["clip", "t5"])
def tokenizer(request: pytest.FixtureRequest) -> CLIPTokenizer | T5Tokenizer:
    return clip_tokenizer() if request.param == "clip" else t5_tokenizer()


def test_no_word_of_the_vocabulary_falls_apart(tokenizer: CLIPTokenizer | T5Tokenizer) -> None:
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in vocabulary()]
    assert all(len(word) == 1 for word in ids)
    assert len({word[0] for word in ids}) == len(vocabulary())
    assert {*COLOURS, *SHAPES, *SIZES} <= set(vocabulary())


def test_files_do_not_change_the_ids(tokenizer: CLIPTokenizer | T5Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.model_max_length == TEXT_TOKENS
    for text in (caption(STAR), "", "A Small yellow STAR!", "a zebra, 3 of them"):
        assert loaded(text).input_ids == tokenizer(text).input_ids


def test_building_a_tokenizer_again_does_not_change_the_ids(tokenizer: CLIPTokenizer | T5Tokenizer) -> None:
    again = clip_tokenizer() if isinstance(tokenizer, CLIPTokenizer) else t5_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab()


def test_capitals_do_not_make_other_words(tokenizer: CLIPTokenizer | T5Tokenizer) -> None:
    assert tokenizer("A Small Yellow Star").input_ids == tokenizer("a small yellow star").input_ids


def test_an_unknown_word_is_spelled_and_not_dropped(tokenizer: CLIPTokenizer | T5Tokenizer) -> None:
    ids = tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(ids) >= 2
    assert tokenizer.unk_token_id not in ids


def test_a_full_caption_is_never_truncated(tokenizer: CLIPTokenizer | T5Tokenizer) -> None:
    scenes = sample_scenes(200, torch.Generator().manual_seed(1))
    assert max(len(tokenizer(caption(scene)).input_ids) for scene in scenes) <= 16
