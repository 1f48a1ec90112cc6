"""config.json as a family reads it: every key is accounted for, none that changes what the model computes is passed over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lctrain.errors import UserError

NAME = "config.json"

HARMLESS = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id"),
        *("id2label", "initializer_range", "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type"),
        *("num_logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id"),
        *("pretraining_tp", "problem_type", "rescale_prenorm_residual", "residual_in_fp32", "return_dict"),
        *("router_aux_loss_coef", "tokenizer_class", "torch_dtype", "transformers_version", "unsloth_fixed"),
        *("unsloth_version", "use_cache"),
    )
)
"""Names, ids, first values, losses of training, and how results are returned: nothing that logits depend on."""

OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})
"""An unknown key with such a value asks for nothing."""


class Keys(Mapping[str, Any]):
    """Values by key, `assumed` where config.json is silent; remembers which keys were asked for.

    UserError for a key that neither has.
    """

    def __init__(self, values: Mapping[str, Any], assumed: Mapping[str, Any]) -> None:
        self._values = {key: _decoded(value) for key, value in values.items()}
        self._assumed = assumed
        self._used: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._used.add(key)
        if key in self._values:
            return self._values[key]
        if key in self._assumed:
            return self._assumed[key]
        raise UserError(f"{NAME} has no {key}, which this family needs")

    def __iter__(self) -> Any:
        return iter({**self._assumed, **self._values})

    def __len__(self) -> int:
        return len({**self._assumed, **self._values})

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def optional(self, key: str) -> Any:
        """The value, or None."""
        self._used.add(key)
        return self._values.get(key, self._assumed.get(key))

    def require(self, key: str, *allowed: Any) -> None:
        """UserError that names the key if its value, where it has one, is not one under which our blocks compute the same."""
        value = self.optional(key)
        if value not in allowed:
            wanted = " or ".join(json.dumps(item) for item in allowed)
            raise UserError(f"{NAME} has {key}={_short(value)}, which our blocks lack: they compute {key}={wanted} only")

    def check_rest(self, family: str, harmless: Sequence[str], accepted: Sequence[str]) -> list[str]:
        """Keys that nobody asked for and that are switched off; UserError for any other, unless the user has accepted it."""
        listed: list[str] = []
        refused: list[str] = []
        for key, value in self._values.items():
            if key in self._used or key in HARMLESS or key in harmless:
                continue
            (listed if key in accepted or value in OFF else refused).append(f"{key}={_short(value)}")
        if refused:
            names = ",".join(text.partition("=")[0] for text in refused)
            raise UserError(
                f"{NAME} has {', '.join(refused)}, which the table of {family} does not know and which may change what the"
                f" model computes; if you know that it does not: accept={names}"
            )
        return listed


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json; UserError if there is none."""
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a Hugging Face model: it has no {NAME}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _decoded(value: Any) -> Any:
    """transformers writes infinity as {"__float__": "Infinity"}, since JSON has none."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
