"""Cache the keys and values of earlier tokens, so that each new token requires a forward pass over one token only."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import ModelConfig


class KeyValueCache:
    """The keys and values of a batch of texts, in memory that is allocated once.

    Each text is one row. Rows begin at slot 0 and may differ in length. The first call of ``append`` fills the cache
    with whole rows, padded on the right. Attention never reads the entries of the padding, and later tokens overwrite
    these entries. Each later call appends one token per row.

    Args:
        rows: the number of texts, B.
        capacity: the number of tokens per row, S, at most ``context_length``.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        assert capacity <= config.context_length, (capacity, config.context_length)
        shape = (config.n_layer, 2, rows, config.n_head, capacity, config.n_embd // config.n_head)
        self._memory = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * rows  # number of tokens per row
        self._new = [0] * rows  # number of tokens per row in the current call of append
        self._text_starts = torch.zeros(rows, 1, dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Remove the tokens of all rows."""
        self.lengths = [0] * len(self.lengths)
        self._text_starts.zero_()

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        self._memory = self._memory[:, :, rows]
        self._text_starts = self._text_starts[rows]
        self.lengths = [self.lengths[row] for row in rows]

    @contextmanager
    def append(self, lengths: list[int]) -> Iterator[None]:
        """Append tokens to the rows. In the block of the ``with``, every layer calls ``attend`` once with new tokens.

        Args:
            lengths: the number of new tokens per row, without padding. All numbers are 1 unless the cache is empty.
        """
        assert lengths == [1] * len(self.lengths) or not any(self.lengths), "only an empty cache takes whole rows"
        self._new = lengths
        yield
        self.lengths = [seen + new for seen, new in zip(self.lengths, lengths, strict=True)]

    def first_slots(self) -> Tensor:
        """Return the slot of each row's next token, (B, 1)."""
        return torch.tensor(self.lengths, device=self._memory.device)[:, None]

    def carry_text_starts(self, starts: Tensor) -> Tensor:
        """Return the slot at which the text of each new token starts, (B, T). A row can contain several texts.

        This call also stores where the last text of each row starts, for the tokens of later calls.

        Args:
            starts: (B, T), the slots that follow from the new tokens alone. The value is 0 if the text of a token
                starts before the new tokens.
        """
        starts = torch.maximum(starts, self._text_starts)
        last = torch.tensor(self._new, device=starts.device)[:, None] - 1
        self._text_starts = starts.gather(1, last)
        return starts

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, and return causal attention over all stored tokens, (B, H, T, C/H).

        Args:
            q, k, v: the queries, keys and values of the new tokens, (B, H, T, C/H). T is 1 unless the cache is empty.
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
