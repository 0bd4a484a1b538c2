"""Byte-level tokenizers (one token a byte, so that tokens can be counted by hand) and chat templates of every awkward sort."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from alignkit.data.codec import DEFAULT_CHAT_TEMPLATE, TemplateCodec
from alignkit.models.tiny import byte_tokenizer
from alignkit.types import Message, Prompt, TokenRow

BOS, STOP = 1, 3  # <|end|>, which plays the beginning of text here, and <|im_end|>

HEADER = "{{ '<|im_start|>' + m.role + '\\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
END = "{{ '<|im_end|>\\n' }}"
EACH = "{% for m in messages %}" + HEADER
GENERATION = EACH + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
TEMPLATES = {
    "chatml": DEFAULT_CHAT_TEMPLATE,
    "generation": GENERATION + "{% else %}{{ m.content }}" + END + "{% endif %}{% endfor %}" + ASK,
    "generation, tight tags": GENERATION.replace("{% generation %}", "{%- generation -%}")
    + "{% else %}{{ m.content }}"
    + END
    + "{% endif %}{% endfor %}"
    + ASK,
    "generation with the newline": EACH
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}{% else %}{{ m.content }}"
    + END
    + "{% endif %}{% endfor %}"
    + ASK,
    "generation without the end": EACH
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    + END
    + "{% endfor %}"
    + ASK,
    "default system turn": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    + EACH
    + "{{ m.content }}"
    + END
    + "{% endfor %}"
    + ASK,
    "bos in the text": "{{ '<|end|>' }}" + EACH + "{{ m.content }}" + END + "{% endfor %}" + ASK,
    "earlier turns differ": EACH
    + "{{ m.content if m.role == 'user' or loop.last else m.content | replace('<think>hm</think>', '') }}"
    + END
    + "{% endfor %}"
    + ASK,
}
STRICT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('system turns are not supported') }}{% endif %}"
STRICT += "{{ m.content + '<|im_end|>' }}{% endfor %}"
ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def codec(template: str | dict[str, str] | None = DEFAULT_CHAT_TEMPLATE, *, before: str = "", after: str = "", pad: str = "<|pad|>") -> Any:
    """A byte-level codec. The tokenizer puts the special tokens ``before`` and ``after`` around every text."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = pad
    tokenizer.chat_template = template
    if before or after:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=[("<|end|>", BOS), ("<|im_end|>", STOP)]
        )
    return TemplateCodec(tokenizer, (STOP,))


def merging_codec() -> TemplateCodec:
    """A codec with merges: 300 tokens, learned from a few words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|stop|>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["the theme of the theatre is the thing; then they gather there, rather than further"] * 20, trainer)
    return TemplateCodec(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|stop|>"), (0,))


def turns(*texts: str, first: str = "user") -> tuple[Message, ...]:
    """Messages that alternate between user and assistant."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))


def ask(text: str, name: str = "p") -> Prompt:
    return Prompt(name, (Message("user", text),))


def plain(text: str, name: str = "p") -> Prompt:
    return Prompt(name, (Message("user", text),), plain=True)


def trained(codec: TemplateCodec, row: TokenRow) -> list[str]:
    """The text of each stretch of trained tokens."""
    stretches: list[list[int]] = []
    for i, counts in enumerate(row.loss_mask):
        if counts and (i == 0 or not row.loss_mask[i - 1]):
            stretches.append([])
        if counts:
            stretches[-1].append(row.ids[i])
    return [codec.shown(ids) for ids in stretches]
