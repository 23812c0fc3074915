"""A head that a data-parallel wrapper shards (FSDP2, FSDP1, DeepSpeed ZeRO-3), on two ranks with a batch each."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from oracle import make_problem
from ranks import run_ranks
from tcopd_kernels import linear_logprob
from torch import nn

N, VOCAB, DIM, RANKS = 24, 203, 16, 2


class Model(nn.Module):
    """A body, and a head that is used inside the model's forward as its weight alone."""

    def __init__(self, grad_tol=0.0, vocab_size=None):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.body = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, VOCAB)
        self.options = {"grad_tol": grad_tol, "vocab_size": vocab_size, "backend": "torch"}
        for parameter in self.parameters():
            parameter.data.normal_(std=0.4, generator=generator)

    def forward(self, hidden, targets):
        hidden = torch.tanh(self.body(hidden))
        out = linear_logprob(hidden, self.head.weight, targets, bias=self.head.bias, entropy=True, **self.options)
        return -(out.logprob + 0.1 * out.entropy + 0.01 * out.lse.square()).mean()


def batch(rank):
    hidden, _, _, targets = make_problem(N, VOCAB, DIM, seed=rank)
    return hidden, targets


def whole(parameter_or_grad):
    full = getattr(parameter_or_grad, "full_tensor", None)
    return (full() if full else parameter_or_grad).detach().clone()


def expected_gradients(dtype=torch.float64):
    """Mean over the ranks' batches of the gradients of the same model in one process."""
    model = Model().to(dtype)
    loss = sum(model(hidden.to(dtype), targets) for hidden, targets in map(batch, range(RANKS))) / RANKS
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def run_fsdp2():
    from torch.distributed.fsdp import fully_shard

    def gradients(root_only, **options):
        model = Model(**options)
        if not root_only:
            # The head is not called itself, so its parameters must belong to the group of the calling module.
            fully_shard(model.body)
        fully_shard(model)
        model(*batch(dist.get_rank())).backward()
        return {name: whole(p.grad) for name, p in model.named_parameters()}

    model = Model()
    fully_shard(model)
    hidden, targets = batch(dist.get_rank())
    with pytest.raises(TypeError) as refused:
        linear_logprob(hidden, model.head.weight, targets)
    found = {"root": gradients(True), "nested": gradients(False), "padded": gradients(True, vocab_size=VOCAB)}
    return found | {"tolerance": gradients(True, grad_tol=1e-12), "refused": str(refused.value)}


def run_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Model(), use_orig_params=True, device_id=torch.device("cpu"))
    model(*batch(dist.get_rank())).backward()
    gradients = {}
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        for name, parameter in model.named_parameters():
            gradients[name.replace("_fsdp_wrapped_module.", "")] = parameter.grad.detach().clone()
    return gradients


def run_fsdp():
    return run_fsdp2() | {"fsdp1": run_fsdp1()}


def run_zero3():
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config = {
        "train_micro_batch_size_per_gpu": N,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
        "bf16": {"enabled": False},
    }
    model = Model()
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    hidden, targets = batch(dist.get_rank())
    with pytest.raises(ValueError) as refused:
        linear_logprob(hidden, engine.module.head.weight, targets)
    engine.backward(engine(hidden, targets))
    gradients = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
    return {"root": gradients, "refused": str(refused.value)}


def assert_exact(ranks, case):
    truth = expected_gradients()
    for rank in ranks:
        assert rank[case].keys() == truth.keys()
        for name, grad in rank[case].items():
            torch.testing.assert_close(grad.double(), truth[name], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return run_ranks(run_fsdp, RANKS, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("case", ["root", "nested", "padded", "tolerance", "fsdp1"])
def test_fsdp_gathers_the_head_of_the_module_that_calls(fsdp, case):
    assert_exact(fsdp, case)


def test_a_dtensor_from_outside_is_refused(fsdp):
    for rank in fsdp:
        assert rank["refused"].startswith("weight is a DTensor; under FSDP call this inside the forward")


@pytest.mark.slow
def test_zero3(tmp_path):
    ranks = run_ranks(run_zero3, RANKS, tmp_path, DS_ACCELERATOR="cpu")
    assert_exact(ranks, "root")
    for rank in ranks:
        assert rank["refused"].startswith("weight has shape [0]: it is a partitioned ZeRO-3 parameter")
