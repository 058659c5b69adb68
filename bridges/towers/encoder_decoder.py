"""Language models of two halves, like T5 and Flan-T5: an encoder reads, a decoder says what is not in the text yet."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache

from bridges.towers.bundled import resolve
from bridges.towers.language import LanguageTower, explained
from bridges.towers.quantized import Bits


def language_tower(
    name_or_path: str, revision: str | None = None, dtype: torch.dtype | None = None, quantized: Bits | None = None
) -> LanguageTower:
    """The tower that fits the model: of one half, or of two. Raises ValueError where there is no language model."""
    path = resolve(name_or_path)
    with explained(f"no language model in {name_or_path!r}"):
        config = AutoConfig.from_pretrained(path, revision=revision)
    kind = EncoderDecoderTower if config.is_encoder_decoder else LanguageTower
    return kind(name_or_path, revision, dtype, quantized)


class Heard(EncoderDecoderCache):
    """The decoder's keys and values, and what the encoder has made of the text before the answer."""

    def __init__(self, config: Any) -> None:
        super().__init__(DynamicCache(config=config), DynamicCache(config=config))
        self.encoded: Any = None
        self.mask: Any = None


class EncoderDecoderTower(LanguageTower):
    """A frozen T5, used like a causal model: it is given the whole row and asked for the logits of the answers.

    `num_layers` are the encoder's. Raises ValueError for what is not built like T5, with one table of embeddings for
    both halves and relative positions, so that padding may stand on the left.
    """

    auto = AutoModelForSeq2SeqLM
    kind = "encoder-decoder language model"
    has_encoder = True

    def __init__(
        self,
        name_or_path: str,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        quantized: Bits | None = None,
    ) -> None:
        super().__init__(name_or_path, revision, dtype, quantized)
        if getattr(self.model.config, "relative_attention_num_buckets", None) is None:
            raise ValueError(
                f"{name_or_path} is a {self.model.config.model_type}; of encoder-decoders only those built like T5 are "
                "known (T5, Flan-T5, mT5, UL2)"
            )
        self.start_id: int = self.model.generation_config.decoder_start_token_id

    def default_dtype(self) -> torch.dtype:
        """Never float16, which T5 overflows: it was trained in bfloat16."""
        fastest = super().default_dtype()
        return torch.float32 if fastest is torch.float16 else fastest

    def forward(
        self,
        embeds: Float[Tensor, "b t d"],
        attention_mask: Int[Tensor, "b all"],
        positions: Int[Tensor, "b t"],  # noqa: ARG002 - T5 has relative ones
        at: tuple[Int[Tensor, "s"], Int[Tensor, "s"]],
        cache: Any = None,
        sight: Any = None,  # noqa: ARG002 - blocks go into decoder-only models
    ) -> Float[Tensor, "s vocab"]:
        """Logits after the positions `at`, each run of neighbours among them being one answer.

            row       Is it a cat? </s> Yes . </s> Sure? </s> No  .  </s>
            at                     x    x   x            x    x   x

            encoder   Is it a cat? </s>   |  Is it a cat? </s> Yes . </s> Sure? </s>
            decoder   start Yes .         |  start No .
            logits    Yes   .   </s>      |  No    .  </s>

        A cache that has heard a text goes on with its answer: `embeds` are then the tokens just said.
        """
        embeds = embeds.to(self.dtype)
        if cache is not None and cache.encoded is not None:
            return self._answer(embeds, cache.encoded, cache.mask, at, cache)
        if not len(at[0]):
            return embeds.new_zeros(0, self.model.config.vocab_size)
        whose, last, answer, place = runs(at)
        mask = attention_mask[whose, : int(last.max()) + 1].clone()
        mask[torch.arange(mask.shape[1], device=mask.device) > last[:, None]] = 0
        encoded = self.model.get_encoder()(inputs_embeds=embeds[whose, : mask.shape[1]], attention_mask=mask)
        if cache is not None:
            cache.encoded, cache.mask = encoded, mask
        # What a short answer gets from beyond its end, no logit of it sees.
        ahead = last[:, None] + torch.arange(int(place.max()) + 1, device=last.device)
        said = embeds[whose[:, None], ahead.clamp(max=embeds.shape[1] - 1)]
        said[:, 0] = self.embed(torch.full_like(last[:, None], self.start_id))[:, 0]
        return self._answer(said, encoded, mask, (answer, place), cache)

    def _answer(
        self, said: Float[Tensor, "r w d"], encoded: Any, mask: Tensor, at: tuple[Tensor, Tensor], cache: Heard | None
    ) -> Float[Tensor, "s vocab"]:
        """Logits of the decoder, which has `said` so much of each answer since it began, or since the last call."""
        with self._head_sees(at):
            return self.model(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_inputs_embeds=said,
                past_key_values=cache,
                use_cache=cache is not None,
            ).logits[0]

    def empty_cache(self) -> Heard:
        return Heard(self.model.get_decoder().config)


def runs(at: tuple[Int[Tensor, "s"], Int[Tensor, "s"]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and first column of each run of neighbouring columns; and for every position its run, and its place there."""
    rows, columns = at
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1] + 1)
    run = first.cumsum(0) - 1
    return rows[first], columns[first], run, columns - columns[first][run]
