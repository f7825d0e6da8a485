"""Each tiny family is a checkpoint that plain diffusers loads and that a prompt and a seed steer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from safelight.tests.effort import NIGHTLY
from safelight.tests.tiny import FAMILIES, save, tokenizers

Picture = npt.NDArray[np.float32]

SLOW = {"qwenimage_edit", "hunyuan_video15", "lumina2"}
"""Families that the nightly set alone draws here."""

STAR = "a small yellow star at the top left"
CAT = "a large blue cat that runs, quickly, through Xanadu"

TOKENIZERS: tuple[Callable[[], PreTrainedTokenizerBase], ...] = (
    tokenizers.clip_tokenizer,
    tokenizers.t5_tokenizer,
    tokenizers.qwen2_tokenizer,
    tokenizers.llama_tokenizer,
    tokenizers.gemma_tokenizer,
)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def load(checkpoint: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, name: str, prompt: str, seed: int) -> Picture:
    """Two steps of the family's quick call: one picture or video, values in [0, 1]."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    options = family.call | {"num_inference_steps": 2}
    result = pipeline(prompt=prompt, generator=generator, output_type="np", **options)
    picture = np.asarray(result.images if family.kind == "image" else result.frames)
    assert picture.shape[0] == 1
    assert picture.shape[-1] == 3
    return picture


def visibly_different(first: Picture, second: Picture) -> bool:
    """True if two pictures differ by more than four grey levels of 256 on average."""
    return bool(np.abs(first - second).mean() > 4 / 256)


@pytest.mark.parametrize("name", [name for name in FAMILIES if NIGHTLY or name not in SLOW])
def test_prompt_and_seed_decide_the_picture(name: str, checkpoints: Path) -> None:
    pipeline = load(save(name, checkpoints))
    picture = paint(pipeline, name, STAR, seed=1)
    assert np.isfinite(picture).all()
    assert picture.std() > 0.02
    assert np.array_equal(picture, paint(pipeline, name, STAR, seed=1))
    assert visibly_different(picture, paint(pipeline, name, CAT, seed=1))
    assert visibly_different(picture, paint(pipeline, name, STAR, seed=2))


@pytest.mark.parametrize("name", FAMILIES if NIGHTLY else ("flux", "sd15", "wan", "qwenimage"))
def test_build_makes_the_saved_weights_whatever_the_random_state(name: str, checkpoints: Path) -> None:
    saved = load(save(name, checkpoints))
    torch.manual_seed(77)
    built = FAMILIES[name].build()
    for key, component in built.components.items():
        if isinstance(component, torch.nn.Module):
            assert_same_tensors(component, saved.components[key])


def assert_same_tensors(first: torch.nn.Module, second: torch.nn.Module) -> None:
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert different == []


def test_save_leaves_a_complete_checkpoint_alone(tmp_path: Path) -> None:
    index = save("pixart", tmp_path) / "model_index.json"
    written = index.stat().st_mtime_ns
    assert save("pixart", tmp_path) == index.parent
    assert index.stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["pixart"]


@pytest.mark.parametrize("build", TOKENIZERS)
def test_tokenizer_keeps_texts_apart_and_survives_saving(
    build: Callable[[], PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    tokenizer = build()
    tokenizer.save_pretrained(tmp_path)
    texts = [STAR, CAT, "", "quux", "quuy", "3 ÄPFEL", "3 äpfel!"]
    ids = [tokenizer(text).input_ids for text in texts]
    assert len({tuple(row) for row in ids}) == len(texts)
    assert max(map(max, filter(None, ids))) < len(tokenizer)
    for loaded in (type(tokenizer).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert [loaded(text).input_ids for text in texts] == ids
