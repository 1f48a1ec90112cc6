"""Every setting of `lctrain train`, as frozen typed objects with their meaning and unit.

Hydra composes YAML and overrides into a plain tree; `lctrain.config.decode` turns that tree into these objects and refuses
whatever does not fit. Only checks that need nothing but the config live here; what needs the data is checked by the loader.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from lctrain.config.cluster import ClusterConfig
from lctrain.config.deepspeed import check_deepspeed
from lctrain.config.launcher import LauncherConfig
from lctrain.config.mamba import check_layout
from lctrain.config.model import ModelConfig
from lctrain.config.model_parallel import check_model_parallel
from lctrain.config.optim import OptimConfig
from lctrain.config.probe import ProbeConfig
from lctrain.config.strict import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Strict
from lctrain.config.tracking import TrackingConfig

if TYPE_CHECKING:
    from lctrain.parallel.mesh import ProcessMesh

NonEmpty = Annotated[str, Field(min_length=1)]
LayoutKind = Literal["contiguous", "zigzag", "striped", "balanced"]
Ring = Literal["ring", "bidirectional_ring", "double_ring", "token_ring", "all_gather"]
Strategy = Literal["ring", "bidirectional_ring", "double_ring", "token_ring", "all_gather", "ulysses", "usp"]
StrategyOrAuto = Literal["ring", "bidirectional_ring", "double_ring", "token_ring", "all_gather", "ulysses", "usp", "auto"]


class CorpusConfig(Strict):
    """One prepared corpus: the files <prefix>.bin, <prefix>.idx and <prefix>.json."""

    prefix: NonEmpty
    """Path without ending, as given to `lctrain data prepare output=`."""
    weight: PositiveFloat = 1.0
    """Share of the samples drawn from this corpus, relative to the other corpora's weights."""
    source: tuple[str, ...] | None = None
    """Files, folders or globs to prepare the corpus from if it does not exist yet; `python:` is the Python installation's own
    sources and documentation. Null: the corpus must exist."""


class DataConfig(Strict):
    """What is read, and how documents become samples."""

    corpora: Annotated[tuple[CorpusConfig, ...], Field(min_length=1)]
    """Corpora to blend."""
    tokenizer: str = "bytes"
    """`bytes`, `dna` or the path of a Hugging Face tokenizer.json; must be the one the corpora were prepared with."""
    split_documents: bool = True
    """True: samples are cut from the stream of shuffled documents, so a document may continue in the next sample. False: whole
    documents are packed into samples (padded where none fits); only those longer than a sample are split."""
    valid_fraction: Fraction = 0.02
    """Share of the documents held out for evaluation, chosen by a hash of the document's number."""
    shuffle_window: Positive = 1024
    """Samples are shuffled within windows of this many, so that parts of one long document do not follow each other."""
    prefetch: Positive = 2
    """Global batches prepared ahead of the step, with the schedules of attention over their documents."""
    workers: Positive = 1
    """Threads per process that prepare batches; results do not depend on it."""


class ParallelConfig(Strict):
    """How the work is cut over processes."""

    cp: Positive | None = 1
    """Context-parallel size: processes that share one sequence; null: launcher.processes / (dp x tp x pp)."""
    dp: Positive | None = None
    """Data-parallel size; null: launcher.processes / (cp x tp x pp); if that is null too, 1 or as many as ep x etp needs."""
    tp: Positive = 1
    """Tensor-parallel size: processes that share every matrix (engine.name=megatron or deepspeed)."""
    pp: Positive = 1
    """Pipeline-parallel size: processes that hold consecutive layers (engine.name=megatron or deepspeed)."""
    virtual_stages: Positive = 1
    """megatron: pieces of the model per pipeline stage; with more than 1 the schedule is interleaved, with smaller bubbles and
    more messages."""
    ep: Positive = 1
    """Expert-parallel size: processes that divide the experts of a mixture among them; folded from the dp x cp x tp processes
    of a pipeline stage, neighbours first."""
    etp: Positive = 1
    """Processes that share the matrices of one expert; ep x etp must divide dp x cp x tp."""
    layout: LayoutKind = "zigzag"
    """Which tokens each context-parallel rank owns. zigzag evens out the work of one long document; balanced deals blocks anew
    for the packed documents of every micro-batch; striped is even for any, but every rank then needs all keys."""
    attention: StrategyOrAuto = "ring"
    """How attention works over the ranks of a sequence. ring, bidirectional_ring, double_ring: keys and values go round;
    token_ring: queries do; all_gather: keys and values are gathered at once; ulysses: heads for sequence; usp: ulysses in
    groups and a ring between them; auto: for each kind of attention layer what the simulator finds fastest on `cluster`,
    degrees included."""
    ulysses: Positive | None = None
    """usp: ranks per group that exchange heads for sequence, a divisor of cp; null: the largest below cp that divides the KV
    heads."""
    ring: Ring = "ring"
    """usp: strategy between the groups."""
    nesting: Literal["inner", "outer"] = "inner"
    """usp: inner puts neighbouring ranks (one node) into a group, outer ranks that lie far apart."""
    node_size: Positive | None = None
    """double_ring: ranks per inner ring, a divisor of cp; null: the largest up to the square root of cp."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        used = {self.attention, self.ring} if self.attention == "usp" else {self.attention}
        for name, user in (("ulysses", "usp"), ("ring", "usp"), ("nesting", "usp"), ("node_size", "double_ring")):
            value = getattr(self, name)
            if value == ParallelConfig.model_fields[name].default or user in used:
                continue
            if self.attention == "auto":
                raise ValueError(
                    f"parallel.attention=auto chooses its own degrees: drop parallel.{name}={value}, or name a strategy"
                )
            raise ValueError(
                f"parallel.{name}={value} is for parallel.attention={user}, but parallel.attention={self.attention};"
                " drop one of them"
            )
        return self


class EngineConfig(Strict):
    """Who owns gradients and the optimizer step."""

    name: Literal["torch", "megatron", "deepspeed"] = "torch"
    """torch: one process, DDP or FSDP2. megatron: megatron-core's tensor and pipeline parallelism, DDP and optimizer.
    deepspeed: ZeRO, tensor parallelism, and pipeline stages with ZeRO 0 and 1."""
    data_parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process holds all weights. fsdp: weights, gradients and optimizer state are sharded over dp x cp."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the layers; weights, gradients, optimizer state, norms' statistics and the loss stay fp32."""
    distributed_optimizer: bool = True
    """megatron: fp32 main weights and moments are divided over dp x cp; false: every data-parallel copy has all of them."""
    zero: Literal[0, 1, 2, 3] | None = None
    """deepspeed: what is divided over dp x cp: 1 optimizer state, 2 gradients too, 3 weights too, 0 nothing; null: what
    deepspeed_config says, or 1."""
    deepspeed_config: str | dict[str, Any] | None = None
    """deepspeed: path of a JSON or YAML file of DeepSpeed's, or a mapping like one (offloading, buckets, profilers). What it
    says of batch sizes, clipping, optimizer and dtype must agree with ours."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    activation_checkpointing: Literal["none", "layer"] = "none"
    """layer: keep only each sublayer's input and recompute the rest in backward."""

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.name == "megatron" and self.data_parallel == "fsdp":
            raise ValueError(
                "engine.data_parallel=fsdp is for engine.name=torch; with engine.name=megatron,"
                " engine.distributed_optimizer=true divides optimizer state, and parallel.tp and parallel.pp divide weights"
            )
        if self.name != "megatron" and not self.distributed_optimizer:
            raise ValueError(
                f"engine.distributed_optimizer=false is for engine.name=megatron, but engine.name={self.name}; drop one of them"
            )
        return self


class StageConfig(Strict):
    """One stage of sequence-length warm-up."""

    steps: Positive
    """Optimizer steps of this stage."""
    seq_len: Positive
    """Tokens per sample in this stage."""


class TrainerConfig(Strict):
    """The loop."""

    steps: Positive = 100
    """Optimizer steps of the whole run."""
    seq_len: Positive = 1024
    """Tokens per sample (after the stages)."""
    stages: tuple[StageConfig, ...] = ()
    """Sequence-length warm-up: stages run first, in order; the rest of the run uses seq_len."""
    global_batch: Positive = 4
    """Samples per optimizer step over all processes."""
    micro_batch: Positive = 1
    """Samples per forward pass and data-parallel rank; what remains of global_batch is accumulated."""
    seed: NonNegative = 0
    """Seed of initial weights and of data order."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the mean squared log-partition of the logits, added to the loss."""
    loss_chunk: Positive = 1024
    """Tokens whose logits exist at once in the loss."""
    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do when loss or gradient norm is not finite, or the loss is a spike: stop the run; skip the step's update; or go
    back to the checkpoint before it and leave its batch out, now and after every resume."""
    max_skips: NonNegative = 10
    """non_finite=skip: stop after this many skipped steps in a row."""
    max_rollbacks: NonNegative = 10
    """non_finite=rollback: stop instead of going back more often than this over the whole run."""
    rollback_batches: Positive = 1
    """non_finite=rollback: batches to leave out, that of the bad step and those before it, back to the checkpoint at most."""
    spike: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """A loss above this many times the median of recent steps is treated like one that is not finite; null: none is."""
    spike_window: Positive = 50
    """Steps that the median is taken over (a spike needs 10 before it, or as many as this if that is fewer)."""
    replica_check_every: NonNegative = 0
    """Steps between comparisons of all copies of the weights, bit by bit; one that differs stops the run and names its rank; 0:
    never."""
    eval_every: NonNegative = 0
    """Steps between evaluations on the held-out documents; 0: never."""
    eval_batches: Positive = 4
    """Global batches per evaluation."""


class CheckpointConfig(Strict):
    """When checkpoints are written and which are kept."""

    every: NonNegative = 100
    """Steps between checkpoints; 0: only at the end of the run or when it is interrupted."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_every: Positive | None = None
    """Checkpoints at multiples of this many steps are kept for good."""
    asynchronous: bool = False
    """Write checkpoints beside the steps: the next update waits only for a copy to host memory, which needs room for the state
    once more."""


class TrainConfig(Strict):
    """All of `lctrain train`."""

    run_dir: NonEmpty
    """Folder of the run: config, metrics, checkpoints, plots, log."""
    resume: NonEmpty = "auto"
    """auto: newest verified checkpoint of run_dir if there is one; never: refuse a run_dir that has one; or the path of a
    checkpoint folder to start from."""
    init_from: NonEmpty | None = None
    """Weights that a new run starts from: a model folder of `lctrain convert`, a run, one of its checkpoints, or a Hugging Face
    model. `model` must describe them; rotary embedding, windows and a larger vocabulary may differ. Null: random ones."""
    model: ModelConfig
    """The network."""
    data: DataConfig
    """The text."""
    parallel: ParallelConfig = ParallelConfig()
    """How the work is cut over processes."""
    cluster: ClusterConfig | None = None
    """What parallel.attention=auto assumes about devices and links; null: the preset for the device that the run has."""
    engine: EngineConfig = EngineConfig()
    """Who owns gradients and the optimizer step."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    trainer: TrainerConfig = TrainerConfig()
    """The loop."""
    probe: ProbeConfig = ProbeConfig()
    """Recall of a passage seen far back, measured during the run."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    launcher: LauncherConfig = LauncherConfig()
    """Processes."""
    tracking: TrackingConfig = TrackingConfig()
    """Metrics."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        self._settle_grid()
        if "E" in self.model.pattern:  # before the processes, whose number may follow from ep
            self.model.moe.check_run(self.parallel.ep, self.parallel.etp, len(self.data.corpora))
        elif self.parallel.ep > 1:
            raise ValueError(f"parallel.ep={self.parallel.ep} has no experts to divide: model.pattern has no E")
        self._check_processes()
        check_layout(set(self.model.pattern), self.parallel.layout, self.cp)
        if "L" in self.model.pattern:
            self.model.linear_attention.check_run(self.parallel.tp)
        staged = sum(stage.steps for stage in self.trainer.stages)
        if staged >= self.trainer.steps and self.trainer.stages:
            raise ValueError(
                f"trainer.stages cover {staged} steps of trainer.steps={self.trainer.steps}: leave one or more for seq_len"
            )
        self.probe.check_run(self.trainer.seq_len)
        return self

    @property
    def processes(self) -> int:
        """Processes of the run."""
        assert self.launcher.processes is not None, "settled by the check"
        return self.launcher.processes

    @property
    def cp(self) -> int:
        """Context-parallel size."""
        assert self.parallel.cp is not None, "settled by the check"
        return self.parallel.cp

    @property
    def grid(self) -> dict[str, int]:
        """Size of every dimension of the grid: pp, dp, cp, tp."""
        pp, cp, tp = self.parallel.pp, self.cp, self.parallel.tp
        return {"pp": pp, "dp": self.processes // (pp * cp * tp), "cp": cp, "tp": tp}

    def _settle_grid(self) -> None:
        """Put numbers where launcher.processes or parallel.cp is null: from here on both are known, also to config.yaml."""
        parallel, processes = self.parallel, self.launcher.processes
        if parallel.cp is None:
            others = (parallel.dp or 1) * parallel.tp * parallel.pp
            cp = max(1, (processes or 1) // others)  # where this does not divide, check_layout says so
            self.__dict__["parallel"] = parallel.model_copy(update={"cp": cp})
        if processes is None:
            experts = parallel.ep * parallel.etp
            dp = parallel.dp or experts // math.gcd(experts, self.cp * parallel.tp)
            grid = dp * self.cp * parallel.tp * parallel.pp
            self.__dict__["launcher"] = self.launcher.model_copy(update={"processes": grid})

    def _check_processes(self) -> None:
        launcher = self.launcher
        try:
            self.check_layout(self.processes)
        except ValueError as error:
            if launcher.is_slurm:
                counted = f"launcher.nodes={launcher.nodes} x launcher.processes_per_node={launcher.processes_per_node}"
                raise ValueError(f"{error} (launcher.processes is {counted})") from None
            raise

    def mesh(self, rank: int, processes: int) -> ProcessMesh:
        """The grid of `processes` processes, seen from `rank`; ValueError if the layout does not divide."""
        from lctrain.parallel.mesh import ProcessMesh

        layout = self.parallel
        return ProcessMesh(rank, self.check_layout(processes), self.cp, layout.tp, layout.pp, layout.ep, layout.etp)

    def check_layout(self, processes: int) -> int:
        """Data-parallel size for `processes` processes; ValueError with the fix if the layout does not divide."""
        parallel = self.parallel
        cp, dp, tp, pp = self.cp, parallel.dp, parallel.tp, parallel.pp
        if self.engine.name == "torch":
            for name in ("tp", "pp", "etp"):
                if getattr(parallel, name) > 1:
                    raise ValueError(
                        f"parallel.{name}={getattr(parallel, name)} needs engine.name=megatron or deepspeed:"
                        " engine.name=torch has data, context and expert parallelism"
                    )
        model = cp * tp * pp
        product = " x ".join(
            f"parallel.{name}={getattr(parallel, name)}"
            for name in ("cp", "tp", "pp")
            if name == "cp" or getattr(parallel, name) > 1
        )
        if processes % model:
            fits = [n for n in range(1, processes + 1) if processes % (n * tp * pp) == 0]
            can = f", or with {processes} processes parallel.cp to {', '.join(map(str, fits))}" if fits else ""
            raise ValueError(
                f"launcher.processes={processes} is not a multiple of {product};"
                f" set launcher.processes to a multiple of {model}{can}"
            )
        if dp is not None and dp * model != processes:
            raise ValueError(
                f"parallel.dp={dp} x {product} is {dp * model}, but launcher.processes={processes}: leave one of them out"
            )
        stage = processes // pp
        if stage % (parallel.ep * parallel.etp):
            fits = [n for n in range(1, stage + 1) if stage % (n * parallel.etp) == 0]
            can = ", ".join(map(str, fits)) if fits else f"nothing with parallel.etp={parallel.etp}"
            raise ValueError(
                f"parallel.ep={parallel.ep} x parallel.etp={parallel.etp} does not divide the {stage} processes that share a"
                f" pipeline stage; parallel.ep can be {can}"
            )
        for name in ("ulysses", "node_size"):
            degree = getattr(self.parallel, name)
            if degree is not None and cp % degree:
                fits = [n for n in range(1, cp + 1) if cp % n == 0]
                raise ValueError(
                    f"parallel.{name}={degree} does not divide parallel.cp={cp}; it can be {', '.join(map(str, fits))}"
                )
        dp = processes // model
        check_model_parallel(self, dp)
        per_pass = dp * self.trainer.micro_batch
        if self.trainer.global_batch % per_pass:
            raise ValueError(
                f"trainer.global_batch={self.trainer.global_batch} is not a multiple of data-parallel size {dp}"
                f" x trainer.micro_batch={self.trainer.micro_batch}; nearest that fits:"
                f" {max(1, round(self.trainer.global_batch / per_pass)) * per_pass}"
            )
        check_deepspeed(self, dp)
        return dp
