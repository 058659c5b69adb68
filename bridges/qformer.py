"""Q-Former: learned queries that look at the picture, and may read text beside it.

BLIP-2 (arXiv 2301.12597, section 3.1) and InstructBLIP (2305.06500, section 2.3). A BERT with post-norm layers in which
queries and text share the self-attention; every `cross_every`-th layer lets the queries look at the picture; queries
and text have feed-forwards of their own.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bridges.base import Bridge, Visual
from bridges.layers import Attention, FeedForward, KeysValues, joined, together
from bridges.pairs import PairHeads
from bridges.text import Words, bert_names, read_bert

EPS = 1e-12  # BERT's
LONGEST = 512  # text positions
Memory = list[KeysValues | None]


class QFormer(Bridge):
    """`queries` slots from `layers` layers of `width`, with `heads` heads and `inner` (4 x width) in the feed-forwards.

    reads:  `nothing`       BLIP-2's second stage: queries only
            `instructions`  InstructBLIP: what is asked about the picture goes beside the queries
            `pairs`         BLIP-2's first stage, without a language model: captions go beside the queries
    bert:   name or folder of a BERT to begin with (`bundled:minilm`); the feed-forward of the queries begins as a copy
            of the text's. Without it all weights are random.
    words:  whose tokenizer reads the text; by default that of `bert`.
    frozen: only the projection trains, as in MiniGPT-4.
    Raises ValueError where text is read and there is no tokenizer, or sizes do not fit each other.
    """

    def __init__(
        self,
        vision_dim: int,
        num_patches: int,  # noqa: ARG002  the contract's; any number of patches can be looked at
        language_dim: int,
        num_layers: int,  # noqa: ARG002  the contract's; it does not reach into the language model
        *,
        queries: int = 32,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
        inner: int | None = None,
        cross_every: int = 2,
        dropout: float = 0.1,
        reads: Literal["nothing", "instructions", "pairs"] = "nothing",
        bert: str | None = None,
        words: str | None = None,
        frozen: bool = False,
        instruction_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in {"queries": queries, "layers": layers, "cross_every": cross_every}.items():
            if value < 1:
                raise ValueError(f"{name} {value} of the qformer: it needs at least one")
        self.num_slots, self.bert, self.frozen, self.reads = queries, bert, frozen, reads
        self.reads_instructions = reads == "instructions"
        self.instruction_dropout = instruction_dropout
        text = reads != "nothing"
        self.vision_norm = nn.LayerNorm(vision_dim)
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.norm, self.dropout = nn.LayerNorm(width, eps=EPS), nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(width, heads, inner or 4 * width, vision_dim if i % cross_every == 0 else None, text, dropout)
            for i in range(layers)
        )
        if text:
            name = words or bert
            if name is None:
                raise ValueError(f"a qformer that reads {reads} needs a tokenizer: give it bert or words")
            self.words = Words(name, longest=32 if reads == "pairs" else 128)
            self.word_table = nn.Embedding(self.words.size, width)
            self.place_table = nn.Embedding(LONGEST, width)
        self.apply(small)
        if reads == "pairs":
            self.heads = PairHeads(width, self.words.size)
        else:
            self.projection = nn.Linear(width, language_dim)
        if reads == "instructions":  # what the last layer makes of the text, nobody reads
            self.layers[-1].text_feed.requires_grad_(False)
            self.layers[-1].text_feed_norm.requires_grad_(False)
        if frozen:
            self.requires_grad_(False)
            self.projection.requires_grad_(True)

    def train(self, mode: bool = True) -> "QFormer":
        """A frozen one has no dropout either."""
        return super().train(mode and not self.frozen)

    def begin(self) -> None:
        """Take over the weights of `bert`, where one is given."""
        if self.bert is None:
            return
        config, weights = read_bert(self.bert)
        have, layers = self.queries.shape[1], len(self.layers)
        first: Any = self.layers[0]
        heads, inner = first.attention.heads, first.feed[0].out_features
        if (config.hidden_size, config.num_attention_heads) != (have, heads):
            raise ValueError(
                f"{self.bert} has width {config.hidden_size} and {config.num_attention_heads} heads, the qformer "
                f"{have} and {heads}; make them equal, or leave bert out"
            )
        if config.num_hidden_layers < layers or config.intermediate_size != inner:
            raise ValueError(
                f"{self.bert} has {config.num_hidden_layers} layers with feed-forwards of {config.intermediate_size}, "
                f"the qformer {layers} with {inner}; give it no more layers, and inner {config.intermediate_size}"
            )
        mine = self.state_dict()
        taken = {}
        for ours, theirs in bert_names(layers).items():
            if ours in mine and theirs in weights:
                tensor = weights[theirs]
                short = mine[ours].shape[0] - tensor.shape[0]  # BLIP-2's one token more
                taken[ours] = torch.cat([tensor, mine[ours][-short:]]) if short > 0 else tensor[: mine[ours].shape[0]]
        self.load_state_dict(mine | taken)

    def match_scale(self, embedding_rms: float) -> None:
        """What leaves the last layer norm has RMS 1."""
        nn.init.normal_(self.projection.weight, std=embedding_rms * self.projection.in_features**-0.5)
        nn.init.zeros_(self.projection.bias)

    def adopt(self, weights: dict[str, Tensor]) -> None:
        """Begin with a Q-Former of another stage: the heads of the first are left, the projection may be new.

        Raises ValueError where anything else is missing or left over, or sizes differ.
        """
        mine = self.state_dict()
        text = tuple(name for name in mine if "text_feed" in name or "_table" in name) if self.bert else ()
        left = [
            n for n in weights.keys() - mine.keys() if not (n.startswith("heads.") or "text_feed" in n or "_table" in n)
        ]
        missing = [n for n in mine.keys() - weights.keys() if not n.startswith("projection.") and n not in text]
        unlike = [n for n in mine.keys() & weights.keys() if mine[n].shape != weights[n].shape]
        if wrong := sorted(left + missing + unlike):
            raise ValueError(f"is a Q-Former of other sizes: {len(wrong)} tensors do not fit, such as {wrong[0]}")
        self.load_state_dict(mine | {name: tensor for name, tensor in weights.items() if name in mine})

    def forward(self, features: Float[Tensor, "n p v"], instructions: Sequence[str] | None = None) -> Visual:
        """`instructions`, one for each picture, where it reads them."""
        memory = self.look(features)
        if not self.reads_instructions:
            return Visual(self.projection(self.run(memory)[0]))
        assert instructions is not None, "an instruction-aware Q-Former needs one for each picture"
        drop = torch.rand(len(instructions)) < (self.instruction_dropout if self.training else 0)
        ids, real = self.words(["" if out else said for out, said in zip(drop, instructions, strict=True)])
        ids, real = ids.to(features.device), real.to(features.device)
        hidden, _ = self.run(memory, ids, together(self.num_slots, real))
        return Visual(self.projection(hidden[:, : self.num_slots]))

    def look(self, features: Float[Tensor, "n p v"]) -> Memory:
        """Keys and values of the pictures for every layer that looks at them: made once, for any number of texts."""
        seen = self.vision_norm(features)
        layers: Any = self.layers
        return [layer.cross.keys_values(seen) if layer.cross is not None else None for layer in layers]

    def run(
        self,
        memory: Memory | None,
        ids: Int[Tensor, "b t"] | None = None,
        mask: Bool[Tensor, "#b 1 #q s"] | None = None,
        past: list[KeysValues] | None = None,
    ) -> tuple[Float[Tensor, "b l w"], list[KeysValues]]:
        """Queries (unless `memory` is None), then text (unless `ids` is None), through all layers.

        `past` stands before them in every self-attention. Returns the last hidden states, and what each self-attention
        would need as `past`.
        """
        queries = 0 if memory is None else self.num_slots
        parts = []
        if memory is not None:
            assert memory[0] is not None, "the first layer looks at the picture"
            parts.append(repeat(self.queries, "k w -> b k w", b=len(memory[0][0])))
        if ids is not None:
            parts.append(self.word_table(ids) + self.place_table.weight[: ids.shape[1]])
        hidden = self.dropout(self.norm(torch.cat(parts, dim=1)))
        kept = []
        for index, layer in enumerate(self.layers):
            seen = memory[index] if memory is not None else None
            hidden, own = layer(hidden, queries, seen, mask, past[index] if past else None)
            kept.append(own)
        return hidden, kept


class Layer(nn.Module):
    """Self-attention of all, cross-attention of the queries (with `vision_dim`), and a feed-forward for each kind."""

    def __init__(self, width: int, heads: int, inner: int, vision_dim: int | None, text: bool, dropout: float) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads, dropout=dropout), nn.LayerNorm(width, eps=EPS)
        self.cross = Attention(width, heads, vision_dim, dropout) if vision_dim is not None else None
        if vision_dim is not None:
            self.cross_norm = nn.LayerNorm(width, eps=EPS)
        self.feed, self.feed_norm = FeedForward(width, inner), nn.LayerNorm(width, eps=EPS)
        if text:
            self.text_feed, self.text_feed_norm = FeedForward(width, inner), nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Float[Tensor, "b l w"],
        queries: int,
        memory: KeysValues | None,
        mask: Bool[Tensor, "#b 1 #q s"] | None,
        past: KeysValues | None,
    ) -> tuple[Float[Tensor, "b l w"], KeysValues]:
        """The first `queries` positions are queries. Also gives the keys and values of these positions."""
        own = self.attention.keys_values(hidden)
        seen = joined(past, own) if past else own
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, seen, mask)))
        query, text = hidden[:, :queries], hidden[:, queries:]
        if queries:
            if self.cross is not None and memory is not None:
                query = self.cross_norm(query + self.dropout(self.cross(query, memory)))
            query = self.feed_norm(query + self.dropout(self.feed(query)))
        if text.shape[1]:
            text = self.text_feed_norm(text + self.dropout(self.text_feed(text)))
        return torch.cat([query, text], dim=1), own


def small(module: nn.Module) -> None:
    """BERT's own first weights."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
