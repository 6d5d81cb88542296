"""Store the keys and values of earlier tokens. A forward pass then processes only the new tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import ModelConfig
from pipeline.model.attention import Attend, causal_attention


class KeyValueCache:
    """The keys and values of a batch of texts. The memory is allocated once and never moves.

    Each text is one row with one slot per token. Rows can have different lengths: the slots after a row's last token
    contain old values, and attention ignores them.

    Args:
        rows: the largest number of texts.
        capacity: the largest number of tokens per row, at most ``context_length``.
        dtype: the dtype of the memory, and of the attention of single tokens.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        assert capacity <= config.context_length, (capacity, config.context_length)
        self.rows = rows
        self.capacity = capacity
        shape = (config.n_layer, 2, rows, config.n_head, capacity, config.n_embd // config.n_head)
        self._memory = torch.zeros(shape, device=device, dtype=dtype)
        #: The slot where the newest document of each row begins, shape (rows, 1).
        self._starts = torch.zeros(rows, 1, dtype=torch.int64, device=device)

    def text_starts(self, rows: int) -> Tensor:
        """Return the slot where the newest document of each of the first rows begins, shape (rows, 1)."""
        return self._starts[:rows]

    def keep(self, rows: list[int]) -> None:
        """Move the rows with the given indices to the front, in the given order. The other rows are lost."""
        count = len(rows)
        self._memory[:, :, :count] = self._memory[:, :, rows]
        self._starts[:count] = self._starts[rows]

    def attend_to_rows(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the keys and values of whole rows. Return causal attention within each row, shape (B, H, T, C/H).

        Args:
            q, k, v: for the first T slots of the first B rows, each of shape (B, H, T, C/H).
        """
        B, _, T, _ = k.shape
        self._memory[layer, 0, :B, :, :T] = k
        self._memory[layer, 1, :B, :, :T] = v
        return causal_attention(q, k, v)

    def attend_to_slots(self, slots: Tensor, seen: int) -> Attend:
        """Return an attention function for one new token per row.

        The function stores the new keys and values. The new token attends to all slots up to its own slot.

        Args:
            slots: the slot of each row's new token, int64 of shape (B, 1).
            seen: the number of slots that attention reads. It is larger than all ``slots``.
        """
        B = len(slots)
        memory = self._memory[:, :, :B, :, :seen]
        keys, values = memory[:, 0].unbind(), memory[:, 1].unbind()  # per layer, (B, H, seen, C/H) each
        H, D = keys[0].shape[1], keys[0].shape[3]
        index = slots[:, :, None, None].expand(B, H, 1, D)
        later = torch.arange(seen, device=slots.device) > slots  # (B, seen)
        mask = memory.new_zeros(B, seen).masked_fill(later, -math.inf)[:, None, None]  # (B, 1, 1, seen)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys[layer].scatter_(2, index, k.to(memory.dtype))
            values[layer].scatter_(2, index, v.to(memory.dtype))
            y = F.scaled_dot_product_attention(q.to(memory.dtype), keys[layer], values[layer], attn_mask=mask)
            return y.to(q.dtype)

        return attend
