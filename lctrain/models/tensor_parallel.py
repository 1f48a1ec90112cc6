"""Tensor parallelism: which layer stands for a matrix that tp ranks share, and how activations enter and leave it.

With one rank these are the plain layers. With more, megatron-core's linears hold each rank's part, under the same names
(lctrain.models.megatron_layers, imported only then), and every tensor between sublayers is divided by tokens, [B, S, d] with
S = ceil(T / tp): a sublayer normalises its S tokens, gathers all T once, works on its part of the heads or of the hidden
width, and reduce-scatters the sum over ranks back to S tokens. The last ranks' padding, where tp does not divide T, ends at
the gather.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.models.layers import Linear
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import Place, own_share
from lctrain.parallel.sequence import SequenceMeta


def shard_length(length: int, tp: int) -> int:
    """Tokens of each rank between sublayers, padding included."""
    return -(-length // tp)


def column_linear(parallel: ModelParallel, d_in: int, d_out: int, bias: bool = False) -> Any:
    """Linear whose outputs are divided: [B, T, d_in], whole, -> [B, T, d_out / tp]. tp must divide d_out."""
    if parallel.tp.size == 1:
        return Linear(d_in, d_out, bias)
    from lctrain.models.megatron_layers import ColumnLinear

    return ColumnLinear(parallel.tp, d_in, d_out, bias)


def row_linear(parallel: ModelParallel, d_in: int, d_out: int, bias: bool = False) -> Any:
    """Linear into the residual stream whose inputs are divided: [B, T, d_in / tp] -> [B, S, d_out], summed over ranks.

    `finish` makes the same of a product with this rank's part of the weight that was formed elsewhere.
    """
    if parallel.tp.size == 1:
        return Linear(d_in, d_out, bias, residual=True)
    from lctrain.models.megatron_layers import RowLinear

    return RowLinear(parallel.tp, d_in, d_out, bias)


def heads_linear(parallel: ModelParallel, d_in: int, heads: int, head_dim: int, bias: bool = False) -> Any:
    """Linear to `heads` heads of which every rank gets those that its share of the query heads needs.

    Divided like column_linear where tp divides the heads. Fewer heads than ranks: the weight is whole on every rank, each forms
    one head, shared by its neighbours, and the weight's gradient is summed over ranks.
    """
    if heads % parallel.tp.size == 0:
        return column_linear(parallel, d_in, heads * head_dim, bias)
    from lctrain.models.megatron_layers import SharedHeadsLinear

    return SharedHeadsLinear(parallel.tp, d_in, heads, head_dim, bias)


def shared(parallel: ModelParallel, weight: Tensor) -> Tensor:
    """A weight that is whole on every rank and meets another part of the activations on each: its gradient is their sum."""
    if parallel.tp.size == 1:
        return weight
    from lctrain.models.megatron_layers import sum_gradient

    return sum_gradient(parallel.tp, weight)


def gather_tokens(parallel: ModelParallel, x: Tensor, seq: SequenceMeta) -> Tensor:
    """Every rank's tokens, [B, S, d] -> [B, T, d]; the gradient is summed over ranks."""
    if parallel.tp.size == 1:
        return x
    from lctrain.models.megatron_layers import gather

    return gather(parallel.tp, x, seq.positions.shape[1])


def sum_tokens(parallel: ModelParallel, x: Tensor) -> Tensor:
    """This rank's tokens of the sum over ranks, [B, T, d] -> [B, S, d]."""
    if parallel.tp.size == 1:
        return x
    from lctrain.models.megatron_layers import reduce_scatter

    return reduce_scatter(parallel.tp, x)


class Vocabulary:
    """Which token ids' rows of the embedding and of the output projection a tp rank has.

    Every rank has ceil(V / tp) of them, the last what remains: of a V that tp does not divide no row is padding, so none has to
    be kept from probabilities, gradients, norms and checkpoints.

    ids: of this rank. place: of a weight [len(ids), d].
    """

    def __init__(self, parallel: ModelParallel, size: int) -> None:
        self.ids = own_share(size, parallel.tp.size, parallel.tp.rank)
        assert self.ids, (size, parallel.tp.size)
        self.place = Place(cuts={"tp": 0}, lengths={"tp": size}) if parallel.tp.size > 1 else Place()


class OutputProjection(Linear):
    """Rows of the output projection, [len(vocabulary.ids), d]; the loss multiplies with them (lctrain.models.loss)."""

    def __init__(self, vocabulary: Vocabulary, d_in: int) -> None:
        super().__init__(d_in, len(vocabulary.ids))
        self._place = vocabulary.place

    def places(self) -> dict[str, Place]:
        """See Place."""
        return {"weight": self._place}


def embed(parallel: ModelParallel, tokens: Tensor, weight: Tensor, ids: range, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding whose vocabulary is divided: int64 [B, T] and [len(ids), d] -> [B, S, d]. ids: see Vocabulary."""
    if parallel.tp.size == 1:
        return F.embedding(tokens, weight).to(dtype)
    own = tokens - ids.start
    elsewhere = (own < 0) | (own >= len(ids))
    x = F.embedding(own.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
    return sum_tokens(parallel, x.to(dtype))
