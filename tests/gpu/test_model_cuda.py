"""The model on a CUDA device against the same model on the CPU."""

import pytest
import torch

from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout, document_positions, shift_labels
from lctrain.parallel.sequence import SequenceMeta

LENGTH = 500
DOCUMENTS = ((0, 130, LENGTH), (0, 477))


def losses_and_gradients(device, dtype):
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, window=100, qk_norm=True, sinks=True)
    config = ModelConfig(pattern="*-W-", d_model=256, vocab_size=320, attention=attention, mlp=MlpConfig(d_ff=512))
    model = LanguageModel(config, dtype)
    initialise(model, seed=0)
    model.to(device)
    tokens = torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = shift_labels(tokens, DOCUMENTS, [3, None])
    positions = document_positions(DOCUMENTS, LENGTH).to(device)
    seq = SequenceMeta(SequenceLayout("zigzag", 1, LENGTH), RankGroup(), positions, DOCUMENTS)
    sums = model(tokens.to(device), labels.to(device), seq, loss_chunk=128, z_weight=1e-3)
    sums.objective.backward()
    return float(sums.cross_entropy), {name: p.grad.double().cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"])
def test_cuda_matches_cpu(dtype, bar):
    loss, grads = losses_and_gradients("cuda", dtype)
    want_loss, want = losses_and_gradients("cpu", torch.float32)
    assert abs(loss - want_loss) <= bar * abs(want_loss)
    for name, grad in grads.items():
        assert (grad - want[name]).norm() <= bar * want[name].norm(), name
