"""Text to token ids and back, from the tokenizer files of a local directory. Never downloads, never runs its code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trtkit.spec.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these holds the vocabulary: fast tokenizers, SentencePiece, and GPT-2 style BPE."""


class Tokenizer(Protocol):
    """What trtkit needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids it can produce, added tokens included."""

    @property
    def bos_id(self) -> int | None:
        """Begin-of-text id, None without one."""

    @property
    def eos_id(self) -> int | None:
        """End-of-text id, None without one."""

    @property
    def chat_template(self) -> str | None:
        """The model's chat format (Jinja), None without one."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with the model's own BOS in front unless `add_special_tokens` is False."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Text of a conversation of {"role", "content"} messages, its special tokens spelled out."""

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation, ready for the assistant's answer."""


class HFTokenizer:
    """A transformers tokenizer behind `Tokenizer`."""

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 - transformers is untyped here
        self._inner = inner

    @property
    def vocab_size(self) -> int:
        """Ids it can produce, added tokens included."""
        return len(self._inner)

    @property
    def bos_id(self) -> int | None:
        """Begin-of-text id, None without one."""
        return _optional_id(self._inner.bos_token_id)

    @property
    def eos_id(self) -> int | None:
        """End-of-text id, None without one."""
        return _optional_id(self._inner.eos_token_id)

    @property
    def chat_template(self) -> str | None:
        """The model's chat format (Jinja), None without one."""
        template = self._inner.chat_template
        return str(template) if template else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with the model's own BOS in front unless `add_special_tokens` is False."""
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        text = self._inner.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return str(text)

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Text of a conversation; without a template the contents follow each other, one a line.

        Raises:
            InputError: the model's template refuses these messages or is broken.
        """
        if self.chat_template is None:
            return "".join(f"{message['content']}\n" for message in messages)
        from jinja2.exceptions import TemplateError

        plain = [dict(message) for message in messages]
        try:
            text = self._inner.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the model's chat template refused the conversation: {_one_line(error)}") from None
        return str(text)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation, ready for the assistant's answer; a template spells its own special tokens."""
        return self.encode(self.render_chat(messages), add_special_tokens=self.chat_template is None)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Open the tokenizer of a model directory or of a bundle's `tokenizer/`.

    Raises:
        InputError: the directory has no tokenizer, or its files are corrupt.
    """
    directory = Path(directory)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"{directory}: no tokenizer (one of {', '.join(TOKENIZER_FILES)} is needed); "
            "give token ids instead of text, or copy the model's tokenizer files there"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (directory / "tokenizer_config.json").is_file() or not (directory / "tokenizer.json").is_file():
            inner = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        else:
            inner = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        inner.encode("a")
    except Exception as error:  # noqa: BLE001 - the Rust side raises bare Exception on a corrupt tokenizer.json
        raise InputError(f"{directory}: the tokenizer cannot be read: {_one_line(error)}") from None
    return HFTokenizer(inner)


def _optional_id(value: int | None) -> int | None:
    return None if value is None else int(value)


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
