"""A decode step in static memory: inputs, logits and tokens of each bucket size, and the work that a graph captures."""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.engine.device.layout import DecodeLayout
from trtkit.engine.device.model import Parts, forward, logits
from trtkit.kernels.sampling import greedy, workspace_size

_REHEARSED_LENGTH = 1024
"""Live slots of a typical request (assumed)."""


class LastTokens:
    """The newest token of every running sequence, on the device; one place more, the last, takes what is not wanted."""

    def __init__(self, places: int, device: torch.device) -> None:
        """Places for `places` sequences."""
        self.dump = places
        self.tokens_P: Tensor = torch.zeros(places + 1, dtype=torch.int32, device=device)

    def pick(self, token_ids_T: Tensor, sources_T: Tensor) -> Tensor:
        """Tokens to feed, int32 [T]: from here where `sources_T` is a place, else as given."""
        known = self.tokens_P.index_select(0, sources_T.clamp(min=0))
        return torch.where(sources_T >= 0, known, token_ids_T)

    def store(self, tokens_R: Tensor, places_R: Tensor) -> None:
        """Remember tokens."""
        self.tokens_P.index_copy_(0, places_R.to(torch.int64), tokens_R)


class DecodeBuffers:
    """Static memory of decode steps up to `most_rows` rows, shared by all bucket sizes."""

    def __init__(self, parts: Parts, most_rows: int, table_columns: int, last: LastTokens) -> None:
        """Reserve logits and tokens for the largest step."""
        weights, device = parts.weights, parts.cache.device
        vocab = weights.model.vocab_size
        self._parts, self._last, self._columns = parts, last, table_columns
        words = DecodeLayout.words(most_rows, table_columns)
        self._memory = torch.zeros(words, dtype=torch.int32, device=device)
        self._layouts: dict[int, DecodeLayout] = {}
        self.logits_BV: Tensor = torch.zeros(most_rows, vocab, dtype=weights.dtype, device=device)
        self.tokens_B: Tensor = torch.zeros(most_rows, dtype=torch.int32, device=device)
        scratch = workspace_size(most_rows, vocab)
        self._scratch: Tensor = torch.zeros(scratch, dtype=torch.int64, device=device)

    def layout(self, size: int) -> DecodeLayout:
        """The layout of a bucket size, all of its rows padding until a step is sent."""
        if size not in self._layouts:
            self._layouts[size] = DecodeLayout(size, self._columns, self._memory)
        return self._layouts[size]

    def clear(self, size: int) -> None:
        """Make every row of a bucket size padding."""
        self.layout(size).clear(self._last.dump)

    def rehearse(self, size: int) -> None:
        """Rows that read as many keys as usual and write nothing that anybody reads: what a capture warms up on."""
        cache = self._parts.cache
        longest = min(_REHEARSED_LENGTH, self._columns * cache.tokens_per_block)
        self.layout(size).clear(self._last.dump, length=longest, num_blocks=cache.num_blocks)

    def work(self, size: int) -> None:
        """The whole step: from the memory's indices to tokens in `tokens_B` and in the last tokens."""
        layout = self.layout(size)
        step = layout.step
        residual_BE, delta_BE = forward(self._parts, step, self._last.pick(step.token_ids_T, step.sources_T))
        logits_BV = logits(self._parts.weights, residual_BE, delta_BE, out=self.logits_BV[:size])
        tokens_B = greedy(logits_BV, out=self.tokens_B[:size], workspace=self._scratch)
        self._last.store(tokens_B, layout.targets)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        held = (self._memory, self.logits_BV, self.tokens_B, self._scratch)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
