"""Next-token prediction of what the assistant says."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bridges.data.batch import Batch
from bridges.data.template import IGNORE_INDEX
from bridges.layout import predecessors
from bridges.model import BridgedModel

Objective = Callable[[BridgedModel, Batch], tuple[Tensor, int]]


def language_loss(model: BridgedModel, batch: Batch) -> tuple[Float[Tensor, ""], int]:
    """Summed negative log-likelihood of the targets (nats), and how many there are. Divide by the global count."""
    return target_nll(model, batch).sum(), batch.num_targets


def target_nll(model: BridgedModel, batch: Batch) -> Float[Tensor, "s"]:
    """Negative log-likelihood of every target, row by row in reading order; logits are computed nowhere else."""
    rows, columns = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    at = (rows, predecessors(batch.segments)[rows, columns])
    images = (batch.pixel_values, batch.features, batch.asked, batch.looks)
    logits = model(batch.input_ids, batch.segments, batch.positions, at, *images)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.labels[rows, columns], reduction="none"
    )
