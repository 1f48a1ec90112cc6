"""What `lctrain plan` knows of a device besides its attention kernel: `cluster.device`."""

from __future__ import annotations

from lctrain.config.strict import NonNegativeFloat, PositiveFloat, Strict


class ProductRates(Strict):
    """Matrix products, in 1e12 FLOP/s that large ones really reach."""

    bf16: PositiveFloat
    """Inputs in bf16."""
    fp32: PositiveFloat
    """Inputs in fp32."""


class DeviceConfig(Strict):
    """One device (on CPU: one core and its share of the memory)."""

    memory_gb: PositiveFloat
    """Memory in 1e9 bytes."""
    gb_per_s: PositiveFloat
    """Bandwidth of that memory in 1e9 bytes/s, reading and writing together."""
    product_tflops: ProductRates
    """Matrix products."""
    operation_us: NonNegativeFloat = 0.0
    """Microseconds that any operation takes besides; 0 where the host works ahead of the device."""
    published: str | None = None
    """Device whose published peak counts as 100 % MFU, as in lctrain.devices (H200, A100); null: product_tflops do."""
