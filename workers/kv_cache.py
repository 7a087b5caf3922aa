"""The paged KV pool of one rank: blocks of ``block_size`` tokens, one flat pool per layer.

Slot s is row s of every layer's pool; block b holds slots [b x block_size, (b + 1) x block_size). One block more than
the coordinator knows of is scratch: padding rows write there. What a layer keeps per token (keys and values, or MLA's
latents) is whatever its own code hands to ``update``, so its shapes are learned from one probing forward.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from .rows import PackedRows


class PagedKVCache(Cache):
    """A transformers cache whose ``update`` writes the step's rows and returns the context that they read."""

    def __init__(self, block_size: int) -> None:
        super().__init__(layers=[])
        self.block_size = block_size
        self.num_blocks = 0
        self.rows: PackedRows | None = None
        self._token_shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
        self._dtype = torch.float32
        self._pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._latents: dict[int, torch.Tensor] = {}
        """Of latent attention, each layer's pool [slots, 1, D] whose two parts are the layer's in `_pools`."""
        self._probed: list[weakref.ref[torch.Tensor]] = []
        self.most_attended_numbers = 0
        """Numbers of a token's keys and values, of the layer with most, if every head of queries has its own."""
        self.most_heads = 0
        """Of queries, of the layer with most."""
        self.holds_scores = False
        """Some layer's attention holds all scores of the rows that it computes at once."""
        self.widens = False
        """Where torch does, beside keys and values in float32."""
        self.attends_to_what_it_keeps = True
        """Layers attend to what `update` returns as it is, which latent attention does not."""
        self.tables: dict[int, np.ndarray] = {}
        """KV blocks of each request, int64."""

    @property
    def most_kept_numbers(self) -> int:
        """Numbers that the layer which keeps most of a token keeps of it."""
        return max(k[0] * k[1] + v[0] * v[1] for k, v in self._token_shapes.values())

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        numbers = sum(k[0] * k[1] + v[0] * v[1] for k, v in self._token_shapes.values())
        return self.block_size * numbers * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self._dtype.itemsize

    @property
    def scratch_slot(self) -> int:
        """A slot that belongs to no request."""
        return self.num_blocks * self.block_size

    @property
    def keeps_latents(self) -> bool:
        """A token is kept as a latent and a part with its position, of which layers make all heads' keys and values."""
        heads = {states[0] for both in self._token_shapes.values() for states in both}
        return not self.attends_to_what_it_keeps and heads == {1}

    @property
    def pools(self) -> list[torch.Tensor]:
        """All layers' pools [slots, heads, D], keys and values in turn, or latents with their positions' parts.

        Where they lie is where they stay.
        """
        return list(self._latents.values()) or [pool for both in self._pools.values() for pool in both]

    @property
    def widths(self) -> list[tuple[int, int]]:
        """Numbers of a head's key and value in each layer, as attention in place reads them."""
        widths = [(key[1], value[1]) for key, value in self._token_shapes.values()]
        return [(latent + position, latent) for latent, position in widths] if self.keeps_latents else widths

    def allocate(self, num_bytes: int, device: torch.device) -> None:
        """Take as many blocks as fit in ``num_bytes``, scratch included, after the probing forward."""
        assert self._token_shapes, "shapes are learned by a probing forward first"
        self.num_blocks = max(0, num_bytes // self.block_bytes - 1)
        num_slots = (self.num_blocks + 1) * self.block_size
        empty = partial(torch.zeros, dtype=self._dtype, device=device)
        if self.keeps_latents:
            widths = {layer: (key[1], value[1]) for layer, (key, value) in self._token_shapes.items()}
            self._latents = {layer: empty(num_slots, 1, sum(both)) for layer, both in widths.items()}
            self._pools = {layer: self._latents[layer].split(both, dim=-1) for layer, both in widths.items()}
        else:
            self._pools = {
                layer: (empty(num_slots, *key), empty(num_slots, *value))
                for layer, (key, value) in self._token_shapes.items()
            }
        self._probed.clear()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows' keys and values [1, heads, T, D]; return what they read [1, heads, slots, D].

        That is the groups' context, or all of the pool where blocks are read in place. Latents are read there as one
        head's keys, which end in the part with the position, and as its values, which do not.
        """
        if not self._pools:
            self._token_shapes[layer_idx] = (
                (key_states.shape[1], key_states.shape[3]),
                (value_states.shape[1], value_states.shape[3]),
            )
            self._dtype = key_states.dtype
            self._probed += [weakref.ref(key_states), weakref.ref(value_states)]
            return key_states, value_states
        assert self.rows is not None
        keys, values = self._pools[layer_idx]
        keys.index_copy_(0, self.rows.write_slots, key_states[0].transpose(0, 1))
        values.index_copy_(0, self.rows.write_slots, value_states[0].transpose(0, 1))
        if self.rows.pages is not None and self._latents:
            keys, values = self._latents[layer_idx], keys
        return self._context(keys).transpose(0, 1)[None], self._context(values).transpose(0, 1)[None]

    @property
    def is_probing(self) -> bool:
        """There is no pool yet."""
        return not self._pools

    def note_attended(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        holds_scores: bool = False,
        widens: bool = False,
    ) -> None:
        """Learn from the probing forward whether ``key`` and ``value`` are what `update` returned, and how large.

        ``holds_scores``, ``widens``: of attention to them.
        """
        width = key.shape[-1] + value.shape[-1]
        self.most_attended_numbers = max(self.most_attended_numbers, query.shape[1] * width)
        self.most_heads = max(self.most_heads, query.shape[1])
        self.holds_scores, self.widens = self.holds_scores or holds_scores, self.widens or widens
        known = [reference() for reference in self._probed]
        is_kept = all(any(states is one for one in known) for states in (key, value))
        self.attends_to_what_it_keeps = self.attends_to_what_it_keeps and is_kept

    def _context(self, pool: torch.Tensor) -> torch.Tensor:
        """Return the slots the rows read [slots, heads, D], as a view where they lie together."""
        assert self.rows is not None
        if self.rows.pages is not None:
            return pool
        span = self.rows.gather_span
        return pool.index_select(0, self.rows.gather_slots) if span is None else pool[span]

    def set_blocks(self, request_id: int, first_block: int, new_blocks: list[int]) -> None:
        """Cut the request's table at ``first_block`` and append; repeating it changes nothing."""
        table = self.tables.get(request_id)
        if table is None:
            assert first_block == 0, "a request's first plan in a generation carries its whole table"
            self.tables[request_id] = np.asarray(new_blocks, dtype=np.int64)
        elif new_blocks or first_block != len(table):
            self.tables[request_id] = np.concatenate([table[:first_block], np.asarray(new_blocks, dtype=np.int64)])

    def compact(self, request_id: int, committed_len: int, path: list[int]) -> None:
        """Move the KV of an accepted path of rows to the slots right after the committed tokens.

        A no-op when the path is the first rows in order, as in a chain.
        """
        if path == list(range(len(path))):
            return
        table = self.tables[request_id]
        where = committed_len + np.asarray(path)
        device = next(iter(self._pools.values()))[0].device
        source = torch.from_numpy(table[where // self.block_size] * self.block_size + where % self.block_size).to(
            device
        )
        where = committed_len + np.arange(len(path))
        target = torch.from_numpy(table[where // self.block_size] * self.block_size + where % self.block_size).to(
            device
        )
        for keys, values in self._pools.values():
            keys.index_copy_(0, target, keys.index_select(0, source))
            values.index_copy_(0, target, values.index_select(0, source))

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        """Return 0: positions come from the plan, never from the cache."""
        return 0
