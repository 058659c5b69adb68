"""Words for a bridge that reads them: a BERT's tokenizer, and its weights to begin with."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from bridges.towers.bundled import quiet_transformers, resolve


class Words:
    """Texts to ids, with BERT's [CLS] in front and [SEP] behind, and one token more, with which BLIP-2 begins to write.

    `size` ids in all; `start` ([CLS]), `end` ([SEP]), `write` (BLIP-2's [DEC], the last id) and `pad` are some of them.
    Raises ValueError where there is no such tokenizer, or it lacks one of the three.
    """

    def __init__(self, name_or_path: str, longest: int = 32) -> None:
        try:
            with quiet_transformers():
                self.tokenizer: Any = AutoTokenizer.from_pretrained(resolve(name_or_path))
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer in {name_or_path!r}: {str(error).strip().splitlines()[0]}") from error
        named = [self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id]
        if None in named:
            raise ValueError(f"the tokenizer of {name_or_path!r} lacks [CLS], [SEP] or [PAD]; choose a BERT's")
        self.longest = longest
        self.start, self.end, self.pad = named
        self.write: int = len(self.tokenizer)
        self.size = self.write + 1

    def __call__(self, texts: Sequence[str]) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Ids, padded on the right and cut at `longest` tokens, and where they are no padding."""
        found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        rows = [[self.start, *ids[: self.longest - 2], self.end] for ids in found]
        width = max((len(row) for row in rows), default=2)
        ids = [row + [self.pad] * (width - len(row)) for row in rows]
        real = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
        return torch.tensor(ids, dtype=torch.long).view(-1, width), torch.tensor(real, dtype=torch.bool).view(-1, width)


def read_bert(name_or_path: str) -> tuple[Any, dict[str, Tensor]]:
    """Config and weights of a BERT, its masked-language-modelling head too where it has one.

    The names are those of `BertForMaskedLM`. Raises ValueError where there is none.
    """
    where = resolve(name_or_path)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(where)
            if config.model_type != "bert":
                raise ValueError(f"it is a {config.model_type}")
            loaded: Any = AutoModelForMaskedLM.from_pretrained(where, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"no BERT in {name_or_path!r}: {str(error).strip().splitlines()[0]}") from error
    model, report = loaded
    made_up = {name for name in report["missing_keys"] if name.startswith("cls.")}
    if lacking := sorted(set(report["missing_keys"]) - made_up):
        raise ValueError(f"{name_or_path} lacks {len(lacking)} weights of a BERT, such as {lacking[0]}")
    return config, {name: tensor for name, tensor in model.state_dict().items() if name not in made_up}


def bert_names(layers: int) -> dict[str, str]:
    """Our tensors, and those of BertForMaskedLM that they begin with."""
    modules = {"norm": "bert.embeddings.LayerNorm", "heads.transform.0": "cls.predictions.transform.dense"}
    modules["heads.transform.2"] = "cls.predictions.transform.LayerNorm"
    for i in range(layers):
        ours, theirs = f"layers.{i}.", f"bert.encoder.layer.{i}."
        for part in ("query", "key", "value"):
            modules[f"{ours}attention.{part}"] = f"{theirs}attention.self.{part}"
        modules[f"{ours}attention.out"] = f"{theirs}attention.output.dense"
        modules[f"{ours}attention_norm"] = f"{theirs}attention.output.LayerNorm"
        for feed in ("feed", "text_feed"):
            modules[f"{ours}{feed}.0"] = f"{theirs}intermediate.dense"
            modules[f"{ours}{feed}.2"] = f"{theirs}output.dense"
            modules[f"{ours}{feed}_norm"] = f"{theirs}output.LayerNorm"
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}
    names["word_table.weight"] = "bert.embeddings.word_embeddings.weight"
    names["place_table.weight"] = "bert.embeddings.position_embeddings.weight"
    names["heads.bias"] = "cls.predictions.bias"
    return names
