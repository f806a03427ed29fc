"""Where tokens and their heads lie: in one line, and in padded rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a micro-batch lie."""

    places: Tensor
    """Place of each token of the line among all places of the padded rows, shape (tokens,)."""
    there: Tensor
    """Which places hold a token, shape (rows, width)."""
    _heads: dict[tuple[int, int, torch.dtype], Heads] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, attention_mask: Tensor, *, like_sizes: bool = False) -> Rows:
        """The rows that a mask of shape (rows, width) describes.

        With `like_sizes` some padding comes along behind the tokens, up to a size that many micro-batches share;
        nothing attends to it.
        """
        there = attention_mask.bool()
        places = there.flatten().nonzero()[:, 0]
        if like_sizes:
            padding = (~there).flatten().nonzero()[: missing(len(places)), 0]
            places = torch.cat([places, padding])
        return cls(places, there)

    def positions(self) -> Tensor:
        """Position of each token, as in padded rows, shape (1, tokens); 0 for padding, which is a row of its own then.

        So whoever tells rows by positions that begin again finds the same ones, where they are padded behind.
        """
        return (self.places % self.there.shape[1] * self.there.flatten()[self.places])[None]

    def flat(self, padded: Tensor) -> Tensor:
        """What belongs to tokens, of (rows, width, ...) shape (1, tokens, ...)."""
        return padded.flatten(0, 1).index_select(0, self.places)[None]

    def heads(self, queries: int, keys: int, dtype: torch.dtype) -> Heads:
        """Where they lie head by head; all layers of a model ask for the same, which is worked out once."""
        key = queries, keys, dtype
        if key not in self._heads:
            self._heads[key] = Heads.of(self, *key)
        return self._heads[key]


def missing(count: int) -> int:
    """How many rows a matrix of `count` lacks to a size that others share: steps of 3 to 6 % of it, of 8 at least."""
    return -count % (1 << max(3, (count // 16).bit_length() - 1))


@dataclass(frozen=True)
class Heads:
    """Where each head of each token lies, among those of all tokens and in padded rows.

    A line is (tokens x heads, size), a block (rows x key heads, places, size), where the places of the query heads
    that share a key lie below each other.
    """

    tokens: int
    """In the line."""
    keys: int
    """Key heads."""
    into_queries: Tensor
    """For each place of a block of queries, which row of the line it is; where there is no token, any."""
    into_keys: Tensor
    """The same for keys and values."""
    out_of_queries: Tensor
    """For each row of the line, which place of the block it is."""
    out_of_keys: Tensor
    """The same for keys and values."""
    empty: Tensor
    """Places of a block of queries that no token has, shape (n,)."""
    bias: Tensor
    """0 where a query may look at a key, else far below 0; shape (rows x key heads, query places, key places)."""

    @classmethod
    def of(cls, rows: Rows, queries: int, keys: int, dtype: torch.dtype) -> Heads:
        """For `queries` heads of which each `queries / keys` share a key."""
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
        # half of the least number: with a score added it is still one, and not infinite
        bias = bias.masked_fill_(~allowed, torch.finfo(dtype).min / 2).expand(-1, keys, queries // keys, -1, -1)
        bias = bias.reshape(count * keys, queries // keys * width, width)
        empty_places = empty.flatten().nonzero()[:, 0]
        lines = into(queries), into(keys), out_of(queries), out_of(keys)
        return cls(len(places), keys, *lines, empty_places, bias)

    def block(self, line: Tensor) -> Tensor:
        """Heads of tokens, shape (1, heads, tokens, size), as a block in the type of the bias."""
        _, heads, tokens, size = line.shape
        flat = line[0].transpose(0, 1).to(self.bias.dtype).reshape(tokens * heads, size)
        into = self.into_keys if heads == self.keys else self.into_queries
        return flat.index_select(0, into).view(len(self.bias), -1, size)

    def line(self, block: Tensor, dtype: torch.dtype) -> Tensor:
        """A block as heads of tokens, shape (1, heads, tokens, size) and in `dtype`."""
        places = block.view(-1, block.shape[-1])
        out_of = self.out_of_keys if len(places) == len(self.into_keys) else self.out_of_queries
        flat = places.index_select(0, out_of).to(dtype)
        return flat.view(self.tokens, -1, block.shape[-1]).transpose(0, 1)[None]
