"""What a cluster can do, as far as simulator and plan need to know: the group `cluster=`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from lctrain.config.device import DeviceConfig
from lctrain.config.strict import NonNegativeFloat, Positive, PositiveFloat, Strict

if TYPE_CHECKING:
    from lctrain.parallel.device import Rates
    from lctrain.parallel.simulator import Cluster
    from lctrain.parallel.topology import Link

Sizes = Annotated[tuple[Positive, ...], Field(min_length=1)]


class LinkConfig(Strict):
    """A port through which messages go."""

    gb_per_s: PositiveFloat
    """Bandwidth in 1e9 bytes/s: in each direction if full duplex, of both together if half."""
    latency_us: NonNegativeFloat
    """Microseconds from both sides being ready to the first byte."""
    duplex: Literal["full", "half"] = "full"
    """Whether both directions can be used at once."""
    message_gb_per_s: PositiveFloat | None = None
    """Most that a single message gets, however free the port; null: all of it."""
    collective_gb_per_s: PositiveFloat | None = None
    """What a rank sends in a second of a large collective (all-gather, reduce-scatter, all-reduce, all-to-all), where that is
    less than the port allows; null: what it allows."""

    def build(self) -> Link:
        """In bytes and seconds."""
        from lctrain.parallel.topology import Link

        alone = None if self.message_gb_per_s is None else self.message_gb_per_s * 1e9
        return Link(self.gb_per_s * 1e9, self.latency_us * 1e-6, self.duplex, alone)


class RatesConfig(Strict):
    """How fast the attention kernel is, by size of the call."""

    rows: Sizes
    """Queries of a call, rising."""
    columns: Sizes
    """Keys of a call, rising; one alone stands for any number."""
    tflops: Annotated[tuple[tuple[PositiveFloat, ...], ...], Field(min_length=1)]
    """1e12 FLOP/s on live score entries: a line for each of `rows`, a number for each of `columns`."""

    @model_validator(mode="after")
    def _check(self) -> RatesConfig:
        for name in ("rows", "columns"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)):
                raise ValueError(f"{name}={list(sizes)} must rise")
        if [len(line) for line in self.tflops] != [len(self.columns)] * len(self.rows):
            raise ValueError(f"tflops needs {len(self.rows)} lines (rows) of {len(self.columns)} numbers (columns)")
        return self

    def build(self) -> Rates:
        """In FLOP/s."""
        from lctrain.parallel.device import Rates

        return Rates(self.rows, self.columns, tuple(tuple(rate * 1e12 for rate in line) for line in self.tflops))


class KernelConfig(Strict):
    """The attention kernel on one device (on CPU: one core)."""

    forward: RatesConfig
    """Forward, every query sees every key."""
    backward: RatesConfig
    """Backward, every query sees every key."""
    causal_forward: RatesConfig
    """Forward, causal, by the side of the square."""
    causal_backward: RatesConfig
    """Backward, causal, by the side of the square."""
    call_us: NonNegativeFloat
    """Microseconds that any call takes besides."""
    pass_us: NonNegativeFloat = 0.0
    """Microseconds that one direction of a layer takes besides, however many calls it makes; 0 where the host works ahead."""
    pass_s_per_gb: NonNegativeFloat = 0.0
    """Seconds that one direction takes besides for 1e9 bytes of a device's queries: making room, adding up, converting."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic that these rates are for; a plan takes that of the run for as much slower or faster as products are."""


class ClusterConfig(Strict):
    """Devices, and what lies between them."""

    name: str = "custom"
    """Name of the preset, for people."""
    kernel: KernelConfig
    """The devices' attention kernel."""
    device: DeviceConfig | None = None
    """All else that `lctrain plan` must know of a device; null: nothing, and it will ask."""
    ranks_per_node: Positive
    """Devices of a node."""
    inside: LinkConfig
    """Each device's port to the others of its node."""
    between: LinkConfig
    """Each network card."""
    cards: Positive
    """Network cards of a node, shared out evenly to its devices."""
    cpu_s_per_gb: NonNegativeFloat = 0.0
    """Core-seconds that each end of a transfer spends on 1e9 bytes; 0 where network cards and copy engines do it."""
    cpu_us_per_message: NonNegativeFloat = 0.0
    """Microseconds for which each end's computation stops for a tensor of any size; 0 where the host works ahead."""
    cpu_us_per_exchange: NonNegativeFloat = 0.0
    """Microseconds for which a device's computation stops for all that it posts together; 0 where the host works ahead."""
    cores: PositiveFloat | None = None
    """Cores of a node that computing and communicating share, if cpu_s_per_gb is not 0; null: one for each of its ranks."""

    def build(self) -> Cluster:
        """What the simulator takes."""
        from lctrain.parallel.device import Device
        from lctrain.parallel.simulator import Cluster
        from lctrain.parallel.topology import Topology

        kernel = self.kernel
        full, causal = (kernel.forward, kernel.backward), (kernel.causal_forward, kernel.causal_backward)
        forward, backward, causal_forward, causal_backward = (rates.build() for rates in (*full, *causal))
        fixed = kernel.call_us * 1e-6, kernel.pass_us * 1e-6, kernel.pass_s_per_gb * 1e-9
        device = Device(forward, backward, causal_forward, causal_backward, *fixed)
        inside, between = self.inside.build(), self.between.build()
        host = self.cpu_us_per_message * 1e-6, self.cpu_us_per_exchange * 1e-6
        topology = Topology(self.ranks_per_node, inside, between, self.cards, self.cpu_s_per_gb * 1e-9, self.cores, *host)
        return Cluster(self.name, device, topology)
