"""Tokenizers and processors by the class that a pipeline asks for, made without any download."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from diffusers.pipelines.kolors import ChatGLMTokenizer
from transformers import PreTrainedTokenizerBase

from safelight.tests.tiny import tokenizers
from safelight.tests.tiny.vocabulary import WORDS

Tokenizer = Callable[[], PreTrainedTokenizerBase]


def _bert() -> PreTrainedTokenizerBase:
    letters = [chr(code) for code in range(0x21, 0x7F)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *WORDS]
    vocabulary = {token.lower() if token in WORDS else token: number for number, token in enumerate(tokens)}
    return transformers.BertTokenizer(vocab=vocabulary, model_max_length=77)


def _xlm_roberta() -> PreTrainedTokenizerBase:
    pieces = [("▁", -4.0), *((chr(code), -8.0) for code in range(0x21, 0x7F)), *((f"▁{word}", -5.0) for word in WORDS)]
    specials = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocab=[*specials, *pieces, ("<mask>", 0.0)], model_max_length=77)


def _chat_glm() -> PreTrainedTokenizerBase:
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_writer=pieces, vocab_size=400, model_type="bpe", byte_fallback=True
    )
    file = Path(tempfile.gettempdir()) / "safelight-coverage-chatglm.model"  # read again when the tokenizer is saved
    file.write_bytes(pieces.getvalue())
    return ChatGLMTokenizer(str(file))


TOKENIZERS: dict[str, Tokenizer] = {
    "BertTokenizer": _bert,
    "ByT5Tokenizer": transformers.ByT5Tokenizer,
    "CLIPTokenizer": tokenizers.clip_tokenizer,
    "ChatGLMTokenizer": _chat_glm,
    "GemmaTokenizer": tokenizers.gemma_tokenizer,
    "LlamaTokenizer": tokenizers.llama_tokenizer,
    "Qwen2Tokenizer": tokenizers.qwen2_tokenizer,
    "T5Tokenizer": tokenizers.t5_tokenizer,
    "T5TokenizerFast": tokenizers.t5_tokenizer,
    "TokenizersBackend": tokenizers.llama_tokenizer,
    "XLMRobertaTokenizer": _xlm_roberta,
}
"""Keyed by class name."""

OF_ENCODER: dict[str, str] = {
    "Gemma": "GemmaTokenizer",
    "Llama": "LlamaTokenizer",
    "T5Gemma": "GemmaTokenizer",
    "T5": "T5Tokenizer",
    "UMT5": "T5Tokenizer",
    "CLIP": "CLIPTokenizer",
    "Bert": "BertTokenizer",
    "Glm": "LlamaTokenizer",
}
"""For pipelines that take any tokenizer: the one that goes with a text encoder whose class begins so, or Qwen2's."""


def tokenizer_for(asked: str, encoder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of class ``asked``, or the one for the text encoder class ``encoder``."""
    beginnings = sorted((start for start in OF_ENCODER if encoder.startswith(start)), key=len)
    fitting = OF_ENCODER[beginnings[-1]] if beginnings else "Qwen2Tokenizer"
    return TOKENIZERS[asked if asked in TOKENIZERS else fitting]()


def clip_pictures() -> Any:
    """A CLIP image processor for pictures of 32 pixels."""
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def siglip_pictures() -> Any:
    """A SigLIP image processor for pictures of 32 pixels."""
    return transformers.SiglipImageProcessor(size={"height": 32, "width": 32})


def _seeing(name: str, **pixels: int) -> Callable[[PreTrainedTokenizerBase], Any]:
    """A processor of texts, pictures and clips; its part for clips needs torchvision."""

    def make(tokenizer: PreTrainedTokenizerBase) -> Any:
        pictures = transformers.Qwen2VLImageProcessor(**pixels)
        clips = name.replace("2_5_", "2").replace("Processor", "VideoProcessor")
        return getattr(transformers, name)(pictures, tokenizer, getattr(transformers, clips)(), chat_template=QWEN_CHAT)

    return make


QWEN_CHAT = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with a place for each picture."""

PROCESSORS: dict[str, Callable[[PreTrainedTokenizerBase], Any]] = {
    "Qwen2VLProcessor": _seeing("Qwen2VLProcessor", min_pixels=28 * 28, max_pixels=56 * 56),
    "Qwen2_5_VLProcessor": _seeing("Qwen2_5_VLProcessor", min_pixels=28 * 28, max_pixels=56 * 56),
    "Qwen3VLProcessor": _seeing("Qwen3VLProcessor", patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64),
}
"""Processors of texts and pictures, by class."""

PICTURES: dict[str, Callable[[], Any]] = {
    "CLIPImageProcessor": clip_pictures,
    "CLIPImageProcessorPil": clip_pictures,
    "SiglipImageProcessor": siglip_pictures,
    "SiglipImageProcessorPil": siglip_pictures,
    "Siglip2ImageProcessorPil": lambda: transformers.Siglip2ImageProcessor(max_num_patches=16),
}
"""Processors of pictures alone, by class."""
