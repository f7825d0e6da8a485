"""Small tokenizers of the kinds that diffusers pipelines use, made without any download.

Each has a few hundred whole words (`vocabulary.WORDS`); everything else is spelled in bytes (CLIP, Qwen2,
Llama, Gemma) or characters (T5), so different texts have different ids.
"""

from collections.abc import Iterable

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer, T5Tokenizer

from .vocabulary import LEADING_WORDS, WORDS

Merge = tuple[str, str]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part.get('text', '') }}{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as Qwen models use it; a message's content is a string or a list of parts with `text`."""

QWEN_SPECIAL_TOKENS: tuple[str, ...] = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

LLAMA_SPECIAL_TOKENS: tuple[str, ...] = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, in a fixed order ("!" first)."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _characters() -> list[str]:
    """Printable Latin characters, for tokenizers that spell in characters and not in bytes."""
    return [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x180)) if chr(code) != "\u00ad"]


def _byte_tokens() -> list[str]:
    """The tokens that byte fallback spells unknown characters with."""
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _merges(words: Iterable[str], first: str = "", last: str = "") -> list[Merge]:
    """BPE merges that build each word from left to right.

    Args:
        words: words in order of priority.
        first: symbol before a word (the mark of a space), or nothing.
        last: suffix of a word's last symbol, or nothing.
    """
    merges: dict[Merge, None] = {}
    for word in words:
        symbols = [*first, *word[:-1], word[-1] + last]
        left = symbols[0]
        for right in symbols[1:]:
            merges[left, right] = None
            left += right
    return list(merges)


def _numbered(tokens: Iterable[str], merges: Iterable[Merge] = ()) -> dict[str, int]:
    """Ids for the tokens, then for what the merges produce, each once."""
    unique = dict.fromkeys([*tokens, *(left + right for left, right in merges)])
    return {token: number for number, token in enumerate(unique)}


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer of length 77. The end token has the highest id, as in CLIP.

    Args:
        pad_token: `<|endoftext|>`, or `!` (id 0) as the second tokenizer of SDXL and SD3 has it.
    """
    merges = _merges(WORDS, last="</w>")
    symbols = _byte_symbols()
    alphabet = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    words = list(_numbered(alphabet, merges))
    vocab = _numbered([*words, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def t5_tokenizer(model_max_length: int = 512) -> T5Tokenizer:
    """A T5 tokenizer (also for UMT5): words score above the characters that could spell them."""
    characters = [("▁", -4.0), *((character, -8.0) for character in _characters())]
    words = [(f"▁{word}", -5.0) for word in WORDS]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*specials, *characters, *words], extra_ids=0, model_max_length=model_max_length)


def qwen2_tokenizer(padding_side: str = "right") -> Qwen2Tokenizer:
    """A Qwen2 tokenizer (also for Qwen2.5-VL and Qwen3) with ChatML and the vision tokens."""
    merges = _merges(WORDS, first="Ġ") + _merges(LEADING_WORDS)
    words = list(_numbered(_byte_symbols(), merges))
    vocab = _numbered([*words, "<|endoftext|>", *QWEN_SPECIAL_TOKENS])
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=list(QWEN_SPECIAL_TOKENS),
        model_specific_special_tokens={"image_token": "<|image_pad|>"},
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        padding_side=padding_side,
    )


def llama_tokenizer(padding_side: str = "right") -> LlamaTokenizer:
    """A Llama tokenizer that adds `<s>`, with bytes for unknown characters and Llama 3's chat tokens."""
    merges = _merges(WORDS, first="▁")
    alphabet = ["<unk>", "<s>", "</s>", "<pad>", *_byte_tokens(), "▁", *_characters()]
    return LlamaTokenizer(
        vocab=_numbered([*_numbered(alphabet, merges), *LLAMA_SPECIAL_TOKENS]),
        merges=merges,
        pad_token="<pad>",
        extra_special_tokens=list(LLAMA_SPECIAL_TOKENS),
        add_bos_token=True,
        model_max_length=4096,
        padding_side=padding_side,
    )


def gemma_tokenizer(padding_side: str = "right") -> GemmaTokenizer:
    """A Gemma tokenizer that adds `<bos>`, with bytes for unknown characters."""
    merges = _merges(WORDS, first="▁")
    alphabet = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *_byte_tokens(), "▁", *_characters()]
    return GemmaTokenizer(
        vocab=_numbered(alphabet, merges),
        merges=merges,
        add_bos_token=True,
        model_max_length=4096,
        padding_side=padding_side,
    )
