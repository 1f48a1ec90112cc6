"""<prefix>.json: what lctrain knows of a corpus beyond Megatron's two files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from lctrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """tokenizer: as given to prepare; fingerprint: what identifies it wherever its file lies; eod: the id that ends every
    document; max_id: largest id in the corpus, -1 if empty; sha256: of the .bin; skipped: empty documents left out."""

    tokenizer: str
    fingerprint: str
    eod: int
    vocab_size: int
    documents: int
    tokens: int
    max_id: int
    skipped: int
    sha256: str
    sources: tuple[str, ...]
    lctrain: str

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_sidecar(prefix: str) -> Sidecar | None:
    """The sidecar of a corpus; None if there is none, as for a corpus that Megatron's own tools wrote."""
    path = Path(f"{prefix}.json")
    try:
        values = json.loads(path.read_text())
        return Sidecar(**{**values, "sources": tuple(values["sources"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} does not describe a corpus of lctrain ({error}): remove it, or prepare the corpus again"
        ) from None
