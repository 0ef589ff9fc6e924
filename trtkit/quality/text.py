"""What quality needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TextCodec(Protocol):
    """Text to token ids and back."""

    @property
    def bos_id(self) -> int | None:
        """The token before a text, where there is one."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, where there is one."""

    @property
    def chat_template(self) -> str | None:
        """The model's chat format, where it has one."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of `text`, with or without the tokenizer's own special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""

    def render_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """A conversation as the model expects it."""
