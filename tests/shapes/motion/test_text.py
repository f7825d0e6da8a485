"""The tokenizer knows every word of a caption, and training reads a prompt exactly as `WanPipeline` does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from transformers import T5Tokenizer

from safelight.shapes.motion import Clip, caption, every_clip
from safelight.shapes.motion.captions import vocabulary
from safelight.shapes.motion.train.export import pipeline
from safelight.shapes.motion.train.latents import Latents
from safelight.shapes.motion.train.model import new_model
from safelight.shapes.motion.train.text import ROLES, TEXT_TOKENS, embed, roles, tokenize, tokenizer
from safelight.shapes.motion.train.vae import new_autoencoder
from safelight.shapes.motion.train.words import teach


@pytest.fixture(scope="module")
def words() -> T5Tokenizer:
    return tokenizer()


def test_no_word_of_the_vocabulary_falls_apart(words: T5Tokenizer) -> None:
    ids = [words(word, add_special_tokens=False).input_ids for word in vocabulary()]
    assert all(len(word) == 1 for word in ids)
    assert len({word[0] for word in ids}) == len(vocabulary())


def test_the_ids_that_a_checkpoint_was_trained_with_do_not_change(words: T5Tokenizer) -> None:
    assert words(caption(Clip("red", "circle", "right", "white"))).input_ids == [3, 18, 8, 14, 19, 15, 3, 24, 5, 1]
    assert words("").input_ids == [1]
    assert len(words) == 71


def test_files_do_not_change_the_ids(words: T5Tokenizer, tmp_path: Path) -> None:
    words.save_pretrained(tmp_path)
    loaded = T5Tokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == TEXT_TOKENS
    for text in (caption(every_clip()[7]), "", "A Red CIRCLE moving!", "a zebra, 3 of them"):
        assert loaded(text).input_ids == words(text).input_ids


def test_a_full_caption_is_not_longer_than_the_shortest_padding(words: T5Tokenizer) -> None:
    assert max(len(words(caption(clip)).input_ids) for clip in every_clip()[::7]) == 10


def test_a_colours_role_follows_from_its_position(words: T5Tokenizer) -> None:
    texts = [caption(Clip("red", "star", "up", "blue")), caption(Clip("blue", "star", "up", "red")), ""]
    reported = roles(words, *tokenize(words, texts, 12))
    read = [[ROLES[role] if role >= 0 else "" for role in row] for row in reported.tolist()]
    full = ["other", "colour", "shape", "other", "direction", "other", "other", "background", "other", "other", "", ""]
    assert read == [full, full, ["other", *[""] * 11]]


def test_the_text_encoder_learns_the_words_roles_before_it_sees_clips(words: T5Tokenizer) -> None:
    model = new_model(0, layers=1, heads=2)
    guessing = 0.12  # what is left when both colours of a caption could be either
    assert teach(model, words, seed=0) < guessing / 3


@pytest.mark.parametrize("length", [16, 32, 226])
def test_training_does_not_read_a_prompt_in_another_way_than_the_pipeline(words: T5Tokenizer, length: int) -> None:
    model = new_model(0, layers=1, heads=2)
    latents = Latents((), torch.empty(0), torch.empty(0), torch.zeros(16), torch.ones(16))
    built: WanPipeline = pipeline(new_autoencoder(8), model, latents)
    texts = [caption(every_clip()[0]), caption(every_clip()[1], background=False), ""]
    with torch.no_grad():
        expected = built._get_t5_prompt_embeds(texts, max_sequence_length=length)
        found = embed(model.umt5, *tokenize(words, texts, length))
    assert torch.equal(found, expected)
    assert float(found[2, 0].abs().max()) > 0
    assert float(found[2, 1:].abs().max()) == 0
