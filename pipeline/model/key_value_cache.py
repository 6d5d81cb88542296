"""Store the keys and values of earlier tokens. A forward pass then processes only the new tokens."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import ModelConfig


class KeyValueCache:
    """The keys and values of a batch of texts. The memory is allocated once.

    Each text is one row with one slot per token. Rows can have different lengths. The first call of ``append`` adds
    whole texts, padded on the right. Each later call adds one token per row, in place of padding. Attention ignores
    padding.

    Args:
        rows: the number B of texts.
        capacity: the largest number of tokens per row, at most ``context_length``.
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
        self._keys: tuple[Tensor, ...] = ()  # per layer, up to the last new token
        self._values: tuple[Tensor, ...] = ()
        self._mask: Tensor | None = None  # needed if the rows have different lengths
        self._scattered: tuple[Tensor, Tensor] | None = None  # the index of the new token's slot in each row

    def clear(self) -> None:
        self.lengths = [0] * len(self.lengths)
        self._text_starts.zero_()

    def keep(self, rows: list[int]) -> None:
        """Keep only the rows with the given indices, in the given order."""
        self._memory = self._memory[:, :, rows]
        self._text_starts = self._text_starts[rows]
        self.lengths = [self.lengths[row] for row in rows]

    @contextmanager
    def append(self, lengths: list[int]) -> Iterator[None]:
        """Return a context manager that appends tokens. In its block, every layer must call ``attend`` once.

        Args:
            lengths: the number of new tokens per row, without padding. If the cache is not empty, all must be 1.
        """
        assert lengths == [1] * len(self.lengths) or not any(self.lengths), "only an empty cache takes whole rows"
        self._new = lengths
        self._open(max(lengths))
        yield
        self.lengths = [seen + new for seen, new in zip(self.lengths, lengths, strict=True)]

    def _open(self, count: int) -> None:
        first, end = max(self.lengths), max(self.lengths) + count
        seen = self._memory[..., :end, :]
        self._keys, self._values = seen[:, 0].unbind(), seen[:, 1].unbind()  # per layer, (B, H, end, C/H) each
        self._mask = self._scattered = None
        if count == 1 and min(self.lengths) < first:
            slots = self.first_slots()
            self._mask = (torch.arange(end, device=slots.device) <= slots)[:, None, None]  # (B, 1, 1, end)
            self._scattered = torch.arange(len(self.lengths), device=slots.device), slots[:, 0]

    def first_slots(self) -> Tensor:
        """Return the first free slot of each row, shape (B, 1)."""
        return torch.tensor(self.lengths, device=self._memory.device)[:, None]

    def carry_text_starts(self, starts: Tensor) -> Tensor:
        """Return the slot where the document of each new token begins, shape (B, T).

        The position of a token is its slot minus this slot.

        Args:
            starts: the slot where the document of each new token begins, shape (B, T). It is 0 if the document began
                in an earlier call.
        """
        starts = torch.maximum(starts, self._text_starts)
        last = torch.tensor(self._new, device=starts.device)[:, None] - 1
        self._text_starts = starts.gather(1, last)
        return starts

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values. Return causal attention over all stored tokens, shape (B, H, T, C/H).

        Args:
            q, k, v: for the new tokens, each of shape (B, H, T, C/H). If the cache is not empty, T must be 1.
        """
        keys, values = self._keys[layer], self._values[layer]
        T = q.shape[2]
        if self._scattered is None:
            keys[:, :, -T:].copy_(k)
            values[:, :, -T:].copy_(v)
        else:
            rows, slots = self._scattered
            keys[rows, :, slots] = k[:, :, 0]
            values[rows, :, slots] = v[:, :, 0]
        if T > 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask)
