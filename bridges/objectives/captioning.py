"""Writing the caption, each word from the queries and the words before it, by the Q-Former itself."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.layers import KeysValues, writing
from bridges.qformer import QFormer

SMOOTHING = 0.1


def captioning_loss(
    bridge: QFormer, kept: list[KeysValues], ids: Int[Tensor, "b t"], real: Bool[Tensor, "b t"], smoothing: float
) -> tuple[Float[Tensor, ""], int]:
    """Summed cross-entropy of every token after the first (nats), and how many they are.

    `kept` are keys and values of the queries, which see no text: they are those of any pass over the pictures.
    """
    logits, rows, columns = written(bridge, kept, ids, real)
    targets = ids[rows, columns + 1]
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing), len(targets)


def written(
    bridge: QFormer, kept: list[KeysValues], ids: Int[Tensor, "b t"], real: Bool[Tensor, "b t"]
) -> tuple[Float[Tensor, "s vocabulary"], Int[Tensor, "s"], Int[Tensor, "s"]]:
    """Logits after every token that has one behind it, and the rows and columns of these tokens."""
    queries, width = bridge.num_slots, ids.shape[1]
    begun = torch.cat([torch.full_like(ids[:, :1], bridge.words.write), ids[:, 1:]], dim=1)
    past = [(keys[:, :, :queries], values[:, :, :queries]) for keys, values in kept]
    hidden, _ = bridge.run(None, begun, writing(queries, real)[:, :, queries:], past)
    rows, columns = real[:, 1:].nonzero(as_tuple=True)
    assert hidden.shape[1] == width
    return write_logits(bridge, hidden[rows, columns]), rows, columns


def write_logits(bridge: QFormer, hidden: Float[Tensor, "s w"]) -> Float[Tensor, "s vocabulary"]:
    """BERT's own head, tied to the table of words."""
    heads = bridge.heads
    return F.linear(heads.transform(hidden), bridge.word_table.weight, heads.bias).float()
