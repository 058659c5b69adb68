"""The frozen language model: any causal LLM of transformers, fed with embeddings, asked for a few logits."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedTokenizerBase

from bridges.sight import Sight
from bridges.towers.attention import is_plain, take_short
from bridges.towers.beginning import Followers, KeysValues, read_apart
from bridges.towers.bundled import quiet_transformers, resolve
from bridges.towers.frozen import fingerprint, wake
from bridges.towers.precision import fastest_dtype
from bridges.towers.quantized import Bits, quantize


class LanguageTower(nn.Module):
    """A causal language model, frozen for ever: no gradient in its weights, no dropout, whatever `train()` says.

    `dim` is the width of its embeddings, `num_layers` how many layers it has, `context` how many positions it knows,
    `window` how far its shortest-sighted layer looks back (None: everywhere). Its linear layers may be `quantized`.
    `adapters` are peft's layers within it, which train; mostly there are none.
    Raises ValueError where there is no such model, or no causal LM in it.
    """

    auto: Any = AutoModelForCausalLM
    kind = "causal language model"
    has_encoder = False
    """Whether an encoder reads what stands before an answer, in both directions: none of it is kept for the next."""

    def __init__(
        self,
        name_or_path: str,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        quantized: Bits | None = None,
    ) -> None:
        super().__init__()
        self.name, path = name_or_path, str(resolve(name_or_path))
        with explained(f"no {self.kind} in {name_or_path!r}"):
            config = AutoConfig.from_pretrained(path, revision=revision)
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, revision=revision)
            loaded: Any = self.auto.from_pretrained(
                path, config=config, revision=revision, dtype=dtype or self.default_dtype(), output_loading_info=True
            )
        self.model, report = loaded
        if missing := sorted(report["missing_keys"]):  # transformers would make them up
            raise ValueError(f"{name_or_path} lacks {len(missing)} weights of the language model, such as {missing[0]}")
        take_short(self.model)
        self.requires_grad_(False)
        self.mark()
        self.quantized = quantize(self.model, quantized) if quantized else []
        self.adapters: list[Any] = []
        self.train(False)
        text = self.model.config.get_text_config()
        self.num_layers: int = text.num_hidden_layers
        self.dim: int = self.model.get_input_embeddings().weight.shape[1]
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        self.window: int | None = getattr(text, "sliding_window", None)
        # Families with ALiBi have no positions to restart, so their rows cannot share a prefix; Falcon comes both ways.
        known = "position_ids" in inspect.signature(self.model.forward).parameters
        self.takes_positions = known and not getattr(text, "alibi", False)
        self.end_ids = end_ids(self.tokenizer, self.model.generation_config)
        self._rows: tuple[Tensor, Tensor] | None = None
        self.model.get_output_embeddings().register_forward_pre_hook(self._select_rows)
        self._sight: Sight | None = None
        self.gradient_checkpointing = False
        self.layers = decoder_layers(self.model, self.num_layers)
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
        last: Any = getattr(self.layers[-1], "mlp", None) if self.layers else None
        if last is not None and len(inspect.signature(last.forward).parameters) == 1:
            last.forward = partial(self._of_few, last.forward)

    def checkpoint_gradients(self) -> None:
        """From now on the layers, and the blocks before them, are computed again in the backward pass.

        Transformers' own switch needs layers in training mode, whose dropout would wake. ValueError for an encoder.
        """
        if self.has_encoder:
            raise ValueError(f"train.gradient_checkpointing is for causal language models, {self.name} has an encoder")
        self.gradient_checkpointing = True
        for layer in self.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def train(self, mode: bool = True) -> "LanguageTower":
        """Frozen is frozen: dropout stays asleep, but for that of the adapter."""
        super().train(False)
        for layer in self.quantized:
            layer.training = True  # asleep, bitsandbytes packs it for some CPUs in a way that passes no gradient
        wake(self.adapters, mode)
        return self

    def default_dtype(self) -> torch.dtype:
        """What this machine runs fastest."""
        return fastest_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def shares(self, longest: int) -> bool:
        """Whether texts of at most `longest` tokens can share a row and its beginning, each as if it stood alone.

        That takes positions that restart, and no layer with a shorter window: windows count columns, not positions.
        """
        return self.takes_positions and (self.window is None or longest <= self.window)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def embed(self, input_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """The model's own token embeddings, with the scale that it gives them."""
        return self.model.get_input_embeddings()(input_ids)

    @torch.no_grad()
    def embedding_rms(self) -> float:
        """Root mean square of the token embeddings: the size of input that the model is used to."""
        ids = torch.arange(0, self.model.get_input_embeddings().weight.shape[0], 7, device=self.device)
        return self.embed(ids[None]).float().pow(2).mean().sqrt().item()

    def forward(
        self,
        embeds: Float[Tensor, "b t d"],
        attention_mask: Tensor,
        positions: Int[Tensor, "b t"],
        at: tuple[Int[Tensor, "s"], Int[Tensor, "s"]],
        cache: Cache | None = None,
        sight: Sight | None = None,
    ) -> Float[Tensor, "s vocab"]:
        """Logits after the positions `at` (row indices, column indices), and nowhere else.

        The mask is `b all` (1 = token, 0 = padding) or additive `b 1 t all`; `all` counts the cached positions too.
        The head sees the chosen rows only; what a family does to logits afterwards (soft cap, scale) is elementwise.
        With `sight` its blocks run before their layers.
        """
        arguments: dict[str, Any] = {"inputs_embeds": embeds.to(self.dtype), "attention_mask": attention_mask}
        if self.takes_positions:
            arguments["position_ids"] = positions
        with self._head_sees(at, sight), read_apart(self.model.config, cache):
            output = self.model(**arguments, past_key_values=cache, use_cache=cache is not None)
        return output.logits[0]

    @contextmanager
    def _head_sees(self, at: tuple[Tensor, Tensor], sight: Sight | None = None):
        self._rows, self._sight = at, sight
        try:
            yield
        finally:
            self._rows = self._sight = None

    def _select_rows(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:  # noqa: ARG002
        return None if self._rows is None else (args[0][self._rows][None],)

    def _of_few(self, mlp: Callable[[Tensor], Any], hidden: Float[Tensor, "b t d"]) -> Any:
        """The last layer's own work on each position, at those alone whose logits are wanted: the others' go nowhere.

        Zero at the others. All is computed where it is computed again in the backward pass, and of experts.
        """
        if self._rows is None or not len(self._rows[0]) or self.gradient_checkpointing:
            return mlp(hidden)
        wanted = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        wanted[self._rows] = True  # each once: texts that share a beginning all begin after the same position
        found = mlp(hidden[wanted][None])
        if not torch.is_tensor(found):
            return mlp(hidden)
        return found.new_zeros(hidden.shape).masked_scatter(wanted[..., None], found)

    def _before_layer(self, index: int, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the block that stands before a layer change what enters it. Families pass it by place or by name."""
        if self._sight is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.gradient_checkpointing:
            changed: Any = checkpoint(self._sight.before, index, hidden, use_reentrant=False)
        else:
            changed = self._sight.before(index, hidden)
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    def empty_cache(self) -> Cache:
        return DynamicCache(config=self.model.config)

    def cache_after(self, before: Sequence[KeysValues]) -> Cache:
        """For rows that follow what has been read, keys and values by layer, which nobody copies or changes."""
        return Followers(before, is_plain(self.model))

    def mark(self) -> None:
        """From now on the weights as they are tell this model from others."""
        self._fingerprint = fingerprint(self.model)

    def fingerprint(self) -> str:
        """Twelve hex digits that tell this model's weights from another's: a strided sample of every tensor.

        Compared as bfloat16, because a model trained beside in bf16 may be talked to in fp32; and as they were read
        (or marked), before they were quantized or had an adapter.
        """
        return self._fingerprint

    def decode(self, ids: Sequence[int]) -> str:
        """The words of some ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def decoder_layers(model: nn.Module, number: int) -> list[nn.Module]:
    """The layers of a language model: the outermost list of as many modules as it has layers; empty where none is."""
    lists = [(name.count("."), m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return next((list(m) for _, m in sorted(lists, key=lambda found: found[0]) if len(m) == number), [])


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever transformers has to complain of becomes one line."""
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{what}: {str(error).strip().splitlines()[0]}") from error


def end_ids(tokenizer: PreTrainedTokenizerBase, generation: Any) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's end of sequence, and those that the model's own settings name."""
    named = getattr(generation, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in [tokenizer.eos_token_id, *ids] if i is not None)
