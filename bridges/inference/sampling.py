"""Drawing tokens: temperature, and which tokens are left to draw from."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.inference.decoding import Choose, greedy
from bridges.inference.settings import Settings


def sampler(
    temperature: float,
    top_p: float = 1.0,
    seed: int = 0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Choose:
    """For one answer (or one a row): what each setting means says `Settings`; temperature 0 is greedy.

    The penalty is CTRL's (arXiv 1909.05858, section 4.1): a logit of what was said is divided by it, or multiplied
    where it is below 0. Raises ValueError for a value that means nothing.
    """
    Settings(temperature, top_p, top_k, min_p, repetition_penalty)  # checks them
    generator = torch.Generator().manual_seed(seed % 2**63)
    said: list[Tensor] = []

    def draw(logits: Float[Tensor, "b vocab"]) -> Int[Tensor, "b"]:
        if temperature == 0:
            return greedy(logits)
        ordered, ids = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
        out = (ordered.cumsum(-1) - ordered >= top_p) | (ordered < min_p * ordered[:, :1])
        if top_k:
            out[:, top_k:] = True
        drawn = torch.multinomial(ordered.masked_fill(out, 0).cpu(), 1, generator=generator).to(ids.device)
        return ids.gather(-1, drawn)[:, 0]

    def choose(logits: Float[Tensor, "b vocab"]) -> Int[Tensor, "b"]:
        if said and repetition_penalty != 1:
            before = torch.stack(said, dim=1)
            score = logits.gather(1, before)
            score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
            logits = logits.scatter(1, before, score)
        said.append(draw(logits))
        return said[-1]

    return greedy if temperature == 0 and repetition_penalty == 1 else choose
