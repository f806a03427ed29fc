"""The two layouts of tokens and their heads: unpadded, and in padded rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a micro-batch lie in its padded rows."""

    places: Tensor
    """Index of each unpadded token into the flattened padded rows, shape (tokens,)."""
    there: Tensor
    """Which places of the padded rows hold a token, bool, shape (rows, width)."""
    _heads: dict[tuple[int, int, torch.dtype], Heads] = field(default_factory=dict, repr=False)
    """What `heads` has worked out, by its arguments."""

    @classmethod
    def of(cls, attention_mask: Tensor, *, bucketed: bool = False) -> Rows:
        """Return the rows that a mask of shape (rows, width) describes.

        With `bucketed`, some padding follows the tokens, up to a size that many micro-batches share; no token attends
        to it.
        """
        there = attention_mask.bool()
        places = there.flatten().nonzero()[:, 0]
        if bucketed:
            padding = (~there).flatten().nonzero()[: bucket_padding(len(places)), 0]
            places = torch.cat([places, padding])
        return cls(places, there)

    def positions(self) -> Tensor:
        """Return the position of each token in its row, shape (1, tokens); 0 for padding.

        Code that finds rows by positions that start again finds the same ones as in rows padded on the right.
        """
        return (self.places % self.there.shape[1] * self.there.flatten()[self.places])[None]

    def flat(self, padded: Tensor) -> Tensor:
        """Return what belongs to the tokens: from shape (rows, width, ...) to (1, tokens, ...)."""
        return padded.flatten(0, 1).index_select(0, self.places)[None]

    def heads(self, queries: int, keys: int, dtype: torch.dtype) -> Heads:
        """Return the layout head by head; computed once, since all layers of a model ask for the same."""
        key = queries, keys, dtype
        if key not in self._heads:
            self._heads[key] = Heads.of(self, *key)
        return self._heads[key]


def bucket_padding(count: int) -> int:
    """Return how many rows `count` lacks to the next bucket; buckets are 3 to 6 % apart, and at least 8 rows."""
    return -count % (1 << max(3, (count // 16).bit_length() - 1))


@dataclass(frozen=True)
class Heads:
    """Where each head of each token lies in the flat layout and in the block layout.

    Flat is (tokens x heads, size). A block is (rows x key heads, places, size), where the places of the query heads
    that share a key head follow each other.
    """

    tokens: int
    """Number of unpadded tokens."""
    keys: int
    """Number of key heads."""
    into_queries: Tensor
    """For each place of a block of queries, its index in the flat layout; arbitrary where there is no token."""
    into_keys: Tensor
    """The same for keys and values."""
    out_of_queries: Tensor
    """For each query of the flat layout, its index in the block."""
    out_of_keys: Tensor
    """The same for keys and values."""
    empty: Tensor
    """Places of a block of queries that hold no token, shape (n,)."""
    bias: Tensor
    """0 where a query may attend to a key, else far below 0; shape (rows x key heads, query places, key places)."""

    @classmethod
    def of(cls, rows: Rows, queries: int, keys: int, dtype: torch.dtype) -> Heads:
        """Return the layout for `queries` query heads, of which each `queries / keys` share a key head."""
        count, width = rows.there.shape
        places, device = rows.places, rows.places.device
        token = torch.zeros(count * width, dtype=torch.long, device=device)
        token[places] = torch.arange(len(places), device=device)
        row, column = places // width, places % width

        def into(heads: int) -> Tensor:
            head = torch.arange(heads, device=device)
            return (token.view(count, 1, width) * heads + head[:, None]).flatten()

        def out_of(heads: int) -> Tensor:
            head = torch.arange(heads, device=device)
            return ((row[:, None] * heads + head) * width + column[:, None]).flatten()

        empty = ~rows.there[:, None].expand(count, queries, width)
        allowed = torch.ones(width, width, dtype=torch.bool, device=device).tril() & rows.there[:, None, None, None]
        bias = torch.zeros(allowed.shape, dtype=dtype, device=device)
        # half of the lowest number: adding a score does not make it infinite
        bias = bias.masked_fill_(~allowed, torch.finfo(dtype).min / 2).expand(-1, keys, queries // keys, -1, -1)
        bias = bias.reshape(count * keys, queries // keys * width, width)
        empty_places = empty.flatten().nonzero()[:, 0]
        indices = into(queries), into(keys), out_of(queries), out_of(keys)
        return cls(len(places), keys, *indices, empty_places, bias)

    def block(self, x: Tensor) -> Tensor:
        """Return heads of tokens, shape (1, heads, tokens, size), as a block in the dtype of the bias."""
        _, heads, tokens, size = x.shape
        flat = x[0].transpose(0, 1).to(self.bias.dtype).reshape(tokens * heads, size)
        into = self.into_keys if heads == self.keys else self.into_queries
        return flat.index_select(0, into).view(len(self.bias), -1, size)

    def flat(self, block: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a block as heads of tokens, shape (1, heads, tokens, size), in `dtype`."""
        places = block.view(-1, block.shape[-1])
        out_of = self.out_of_keys if len(places) == len(self.into_keys) else self.out_of_queries
        flat = places.index_select(0, out_of).to(dtype)
        return flat.view(self.tokens, -1, block.shape[-1]).transpose(0, 1)[None]
