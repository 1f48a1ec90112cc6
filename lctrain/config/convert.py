"""Settings of `lctrain convert`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, create_model

from lctrain.config.strict import Positive, PositiveFloat, Strict

Format = Literal["hf", "lctrain", "megatron", "deepspeed"]

_FROM = Field("auto", description="What the input is. auto: told from the files that it has.")
_Base = create_model("_Base", __base__=Strict, **{"from": (Literal["auto", *Format.__args__], _FROM)})  # type: ignore[call-overload, attr-defined]


class ConvertConfig(_Base):  # type: ignore[misc, valid-type]
    """`lctrain convert`: weights from one program's files to another's."""

    to: Format
    """What to write. hf: a Hugging Face model. lctrain: a model folder for init_from= and sample. megatron: a megatron-core
    distributed checkpoint. deepspeed: a DeepSpeed universal checkpoint."""
    input: str
    """Folder to read: a Hugging Face model, a model folder, a run directory or one of its checkpoints, a megatron-core
    distributed checkpoint, or a DeepSpeed checkpoint."""
    output: str | None = None
    """Folder to write; it must not exist, or overwrite=true."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """What numbers are stored in; constants of recurrences and routers' biases keep theirs."""
    family: str | None = None
    """to=hf: model_type to write; null: that of the model it once was, else the first that can express it."""
    config: str | None = None
    """YAML file of model settings, or of a run, for an input that does not say what model it is."""
    vocab_multiple: Positive = 1
    """Pad the vocabulary with zero rows to a multiple of this; to=hf takes the padding off again."""
    vocab_size: Positive | None = None
    """to=hf: rows of the vocabulary to keep; null: as many as there were before padding."""
    accept: tuple[str, ...] = ()
    """Keys of config.json that the family's table does not know and that you know to change nothing; to=megatron: limits of
    Mamba-2's steps, which megatron-core lacks (mamba.dt_limit_min, mamba.dt_limit_max)."""
    unmatched: Literal["error", "drop"] = "error"
    """What to do about tensors of the input that no rule knows."""
    dry_run: bool = False
    """List the settings and which tensor becomes which, and every unmatched name; write nothing."""
    verify: bool = True
    """Load both sides afterwards and compare logits on random tokens."""
    verify_tokens: Positive = 64
    """Random tokens to compare on."""
    overwrite: bool = False
    """Replace an existing output folder, once the new one is complete."""
    shard_gb: PositiveFloat = 5.0
    """Largest size of one safetensors file, 10^9 bytes; a larger single tensor has its own file."""


class ConvertBenchConfig(Strict):
    """`lctrain bench convert`: a made-up model converted, beside a plain copy of its files."""

    gb: PositiveFloat = 3.0
    """Size of the model's files, 10^9 bytes, about."""
    family: Literal["llama", "mixtral"] = "llama"
    """Its shape: dense, or with eight experts in every layer, which are put together into one tensor."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """What its numbers are stored in."""
    repeats: Positive = 3
    """Conversions and copies of each kind, in turns of changing order; the fastest counts."""
    folder: str | None = None
    """Where to write, on the disk to be measured; about four times `gb` must be free. Null: a temporary folder."""
    output: str | None = None
    """JSON file for the results and a description of this machine."""
