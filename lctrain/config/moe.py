"""Settings of mixtures: experts (`E`) and routed attention heads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lctrain.config.strict import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Strict


class RouterConfig(Strict):
    """Which experts a token goes to, and with what weights. Logits are fp32."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """softmax over all experts (Mixtral, Qwen3-MoE); sigmoid of each (DeepSeek-V3)."""
    renormalise: bool = True
    """Divide the weights of the chosen experts by their sum. Mixtral, Qwen3-MoE and DeepSeek-V3 do, Qwen2-MoE and OLMoE do
    not: it is another function. Without it, the weights are the scores themselves."""
    scale: PositiveFloat = 1.0
    """Factor of the weights, after renormalisation (DeepSeek-V3: 2.5)."""
    groups: Positive = 1
    """Experts are in this many groups of neighbours, of which a token may use `top_groups`."""
    top_groups: Positive = 1
    """Groups that a token may use; of one group this is 1."""
    group_score: Literal["top2_sum", "top_k_over_groups", "max"] = "top2_sum"
    """What ranks the groups: the sum of a group's two best scores (DeepSeek-V3 as in transformers), of its best
    top_k / top_groups (megatron-core), or its best (DeepSeek-V2). A third of the tokens differ between the first two."""
    tasks: Positive = 1
    """Gates; a token uses the one of its corpus' place in data.corpora (a router per task, M3ViT)."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In training, the router's input is multiplied by factors drawn from [1 - jitter, 1 + jitter] (Switch Transformer)."""
    choice: Literal["token", "expert"] = "token"
    """Tokens choose experts. `expert` (experts choose tokens) is refused: see the message."""

    @model_validator(mode="after")
    def _check(self) -> RouterConfig:
        if self.choice == "expert":
            raise ValueError(
                "model.moe.router.choice=expert lets an expert compare a token with later ones, so a decoder would look at the"
                " future; use token"
            )
        if self.top_groups > self.groups:
            raise ValueError(f"model.moe.router.top_groups={self.top_groups} exceeds model.moe.router.groups={self.groups}")
        return self


class BalanceConfig(Strict):
    """What keeps experts evenly used. Losses add to the gradient, not to the reported loss; see docs/moe.md for formulas."""

    switch: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss, shares counted over the micro-batch (Switch Transformer)."""
    sequence: NonNegativeFloat = 0.0
    """Weight of the same loss with shares counted in every packed document by itself (DeepSeek-V2)."""
    global_batch: NonNegativeFloat = 0.0
    """Weight of the same loss with shares counted over the micro-batches of all data-parallel ranks (Qwen3)."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the mean squared log-sum-exp of the router's logits (ST-MoE)."""
    bias_rate: NonNegativeFloat = 0.0
    """Step by which every optimizer step moves an expert's selection bias towards even use (loss-free balancing, DeepSeek-V3);
    0: no bias."""


class MoeConfig(Strict):
    """Mixture of experts, the symbol `E`."""

    n_experts: Positive = 8
    """Routed experts; parallel.ep must divide them."""
    top_k: Positive = 2
    """Experts per token."""
    d_ff: Positive = 512
    """Hidden width of a routed expert."""
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    """swiglu has a gate (three matrices per expert); gelu (tanh form) and relu2 (squared ReLU) have two."""
    shared_d_ff: NonNegative = 0
    """Hidden width of the part that every token uses (all shared experts together); 0: none."""
    shared_gate: bool = False
    """Multiply the shared part by the sigmoid of a learned score (Qwen2-MoE)."""
    capacity_factor: PositiveFloat | None = None
    """Null: every choice is served. Otherwise an expert serves the first ceil(capacity_factor x top_k x tokens / n_experts)
    choices of every document, and later ones are dropped: a token's fate depends on no other document and no later token."""
    router: RouterConfig = RouterConfig()
    """Which experts a token goes to."""
    balance: BalanceConfig = BalanceConfig()
    """What keeps experts evenly used."""

    @model_validator(mode="after")
    def _check(self) -> MoeConfig:
        router = self.router
        if self.n_experts % router.groups:
            raise ValueError(
                f"model.moe.n_experts={self.n_experts} is not a multiple of model.moe.router.groups={router.groups}"
            )
        reachable = self.n_experts // router.groups * router.top_groups
        if self.top_k > reachable:
            raise ValueError(
                f"model.moe.top_k={self.top_k} exceeds the {reachable} experts that a token can reach"
                + (" with model.moe.router.top_groups groups" if router.groups > 1 else " (model.moe.n_experts)")
            )
        if router.groups > 1 and router.group_score == "top2_sum" and self.n_experts // router.groups < 2:
            raise ValueError(
                f"model.moe.router.group_score=top2_sum needs two experts in a group, got model.moe.n_experts={self.n_experts}"
                f" in model.moe.router.groups={router.groups}; use max"
            )
        if router.groups > 1 and router.group_score == "top_k_over_groups" and self.top_k % router.top_groups:
            raise ValueError(
                f"model.moe.router.group_score=top_k_over_groups: model.moe.top_k={self.top_k} is not a multiple of"
                f" model.moe.router.top_groups={router.top_groups}"
            )
        if self.shared_gate and not self.shared_d_ff:
            raise ValueError("model.moe.shared_gate=true has nothing to gate: set model.moe.shared_d_ff")
        return self

    def check_run(self, ep: int, etp: int, corpora: int) -> None:
        """ValueError with the fix if experts cannot be cut over `ep` ranks, each over `etp`, or if corpora lack a gate."""
        if self.n_experts % ep:
            fits = ", ".join(str(n) for n in range(1, self.n_experts + 1) if self.n_experts % n == 0)
            raise ValueError(f"model.moe.n_experts={self.n_experts} is not a multiple of parallel.ep={ep}; ep can be {fits}")
        if self.d_ff % etp:
            raise ValueError(f"model.moe.d_ff={self.d_ff} is not a multiple of parallel.etp={etp}")
        if 1 < self.router.tasks < corpora:
            raise ValueError(
                f"model.moe.router.tasks={self.router.tasks} gates are too few for {corpora} corpora:"
                f" set it to {corpora}, or to 1"
            )


class RoutedHeadsConfig(Strict):
    """Mixture-of-heads attention (MoH): some query heads serve every token, of the others each token uses its best."""

    shared: NonNegative
    """The first query heads, which every token uses."""
    top_k: Positive
    """Of the other query heads, how many each token uses."""
    balance: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss over the routed heads."""
