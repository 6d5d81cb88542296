"""Keys and values of tokens that the model has seen, so that one more token costs one token's work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import ModelConfig


class KeyValueCache:
    """Room for a batch of texts, allocated once. Rows begin at slot 0 and may differ in length.

    It is filled once with whole rows, padded on the right: what the padding left behind is never seen, and is
    overwritten by the tokens that follow. After that it takes one token a row at a time.

    Args:
        config: of the model.
        rows: texts side by side, B.
        capacity: tokens a row, S; at most ``context_length``.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        assert capacity <= config.context_length, (capacity, config.context_length)
        shape = (config.n_layer, 2, rows, config.n_head, capacity, config.n_embd // config.n_head)
        self._memory = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * rows  # tokens that are remembered of each row
        self._expected = [0] * rows
        self._text_starts = torch.zeros(rows, 1, dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Forget all rows."""
        self.lengths = [0] * len(self.lengths)
        self._text_starts.zero_()

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these, which move together."""
        self._memory = self._memory[:, :, rows]
        self._text_starts = self._text_starts[rows]
        self.lengths = [self.lengths[row] for row in rows]

    def first_slots(self) -> Tensor:
        """Where the next token of each row goes, (B, 1)."""
        return torch.tensor(self.lengths, device=self._memory.device)[:, None]

    def expect(self, lengths: list[int]) -> None:
        """Announce how many tokens of each row come next, padding left out."""
        assert lengths == [1] * len(self.lengths) or not any(self.lengths), "only an empty cache takes whole rows"
        self._expected = lengths

    def carry_text_starts(self, starts: Tensor) -> Tensor:
        """Slots where the texts of the new tokens start, (B, T), if need be before these; the last are kept."""
        starts = torch.maximum(starts, self._text_starts)
        last = torch.tensor(self._expected, device=starts.device)[:, None] - 1
        self._text_starts = starts.gather(1, last)
        return starts

    def advance(self) -> None:
        """All layers have seen the expected tokens."""
        self.lengths = [seen + new for seen, new in zip(self.lengths, self._expected, strict=True)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of new tokens over themselves and what is remembered; remembers their keys and values.

        Args:
            q, k, v: (B, H, T, C/H); T is 1 unless the cache is empty.

        Returns:
            (B, H, T, C/H).
        """
        keys, values = self._memory[layer]  # (B, H, S, C/H) each
        if q.shape[2] > 1:
            keys[:, :, : q.shape[2]] = k
            values[:, :, : q.shape[2]] = v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        longest = max(self.lengths)
        mask = None
        if min(self.lengths) == longest:
            keys[:, :, longest] = k[:, :, 0]
            values[:, :, longest] = v[:, :, 0]
        else:
            slots, rows = self.first_slots(), torch.arange(len(self.lengths), device=q.device)
            keys[rows, :, slots[:, 0]] = k[:, :, 0]
            values[rows, :, slots[:, 0]] = v[:, :, 0]
            mask = (torch.arange(longest + 1, device=q.device) <= slots)[:, None, None]  # (B, 1, 1, longest + 1)
        keys, values = keys[:, :, : longest + 1], values[:, :, : longest + 1]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
