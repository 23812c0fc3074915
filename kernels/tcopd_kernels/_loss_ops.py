"""The torch operator behind linear_tcopd_loss: loss and gradients of a linear head in one opaque call.

As in `_ops`, what depends on the values of tensors happens inside the operator. The gradients are results of the
forward; the backward scales them by the gradient of the loss.
"""

from __future__ import annotations

from typing import Any

import torch

from ._backend import load_backend, without_autocast
from ._checks import accumulation_dtype, counted_rows
from ._loss_grads import head_gradients
from ._ops import CERTIFICATE, OPTIONS_SCHEMA, HeadOptions, define_operator
from ._parallel import Shard, mass_of
from ._rows import scatter_rows, take_rows
from ._torch_compact import exact_certificate
from ._torch_grads import Grads, Needs
from ._torch_loss import Chunks, LossPass, TokenLoss, TorchChunks, half_precision_scale, scaled_by, single_pass
from .policy_loss import PolicyOptions, TokenTerms

_TOKENS = (
    "Tensor? advantage, Tensor? reward, Tensor? ref_logprob, Tensor? old_logprob, Tensor? rollout_logprob, "
    "Tensor weights"
)
_POLICY = (
    "float? clip_low, float? clip_high, float? dual_clip, float? is_cap, float? advantage_clamp, float ref_kl_coef"
)
_N_TOKENS, _N_POLICY = len(TokenTerms._fields), len(PolicyOptions._fields)


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    needs: list[bool],
    entropy: bool,
    *arguments: Any,
) -> tuple[torch.Tensor, ...]:
    """Loss, metrics in the order of `metric_names`, logprob [N], lse [N], entropy [N], and the gradients of hidden,
    weight and bias in `gradient_dtype`; [0] for what is not needed."""
    tokens, policy, head = unpack(arguments)
    n_rows, vocab = hidden.shape[0], weight.shape[0]
    shard = head.shard(vocab)
    if shard is None:
        rows = counted_rows(targets, vocab, head.ignore_index)
    else:
        rows = shard.counted_rows(targets, head.ignore_index)
    counted = tokens.map(lambda t: take_rows(t, rows))
    operands = take_rows(hidden, rows), weight, take_rows(targets, rows).long() - head.vocab_start
    with without_autocast(hidden):
        result = _loss_pass(*operands, bias, counted, policy, head, shard, Needs(*needs), entropy)
        grad_hidden = result.grads[0]
        if grad_hidden is not None:
            grad_hidden = scatter_rows(grad_hidden, rows, n_rows)
            if shard is not None and head.reduce_grad_hidden:
                grad_hidden = shard.sum(grad_hidden)
    none = result.lse.new_empty(0)
    grads = [
        none.clone() if g is None else g.to(gradient_dtype(t)).contiguous()
        for g, t in zip((grad_hidden, *result.grads[1:]), (hidden, weight, bias), strict=True)
    ]
    metrics = torch.stack([result.metrics[name] for name in metric_names(tokens, head.grad_tol)])
    vectors = [scatter_rows(t, rows, n_rows) for t in (result.logprob, result.lse)]
    token_entropy = none if result.entropy is None else scatter_rows(result.entropy, rows, n_rows)
    return result.loss, metrics, *vectors, token_entropy, *grads


def unpack(arguments: tuple[Any, ...]) -> tuple[TokenTerms, PolicyOptions, HeadOptions]:
    """The operator's arguments after `entropy`."""
    return (
        TokenTerms(*arguments[:_N_TOKENS]),
        PolicyOptions(*arguments[_N_TOKENS : _N_TOKENS + _N_POLICY]),
        HeadOptions(*arguments[_N_TOKENS + _N_POLICY :]),
    )


def metric_names(tokens: TokenTerms, grad_tol: float) -> tuple[str, ...]:
    return tokens.metric_names() + (CERTIFICATE if grad_tol else ())


def gradient_dtype(tensor: torch.Tensor | None) -> torch.dtype:
    """Of the gradient of an input. fp16 ones stay fp32, since the caller's loss scale arrives only in the backward."""
    return torch.float32 if tensor is None or tensor.dtype == torch.float16 else tensor.dtype


def _loss_pass(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: TokenTerms,
    policy: PolicyOptions,
    head: HeadOptions,
    shard: Shard | None,
    needs: Needs,
    entropy: bool,
) -> LossPass:
    """Loss of rows that all count: in a single pass, or in two for compaction and where there is no gradient."""
    options: dict[str, Any] = {"bias": bias, "temperature": head.temperature, "softcap": head.softcap}
    options["entropy"] = entropy

    def token_loss(rows: slice, logprob: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        return tokens.map(lambda t: t[rows]).loss(logprob, policy)

    if head.grad_tol or not any(needs):
        scale = half_precision_scale(hidden.dtype, tokens.weights)
        return _two_passes(hidden, weight, targets, token_loss, options, head, shard, needs, scale)
    chunks: Chunks
    if head.backend == "triton":
        from ._triton_loss import TritonChunks

        chunks = TritonChunks(hidden, weight, targets, needs=needs, sharded=shard is not None, **options)
    else:
        scale = half_precision_scale(hidden.dtype, tokens.weights)
        chunks = TorchChunks(hidden, weight, targets, needs=needs, scale=scale, **options)
    return single_pass(chunks, hidden.shape[0], token_loss, (lambda own: own) if shard is None else shard.merge)


def _two_passes(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_loss: TokenLoss,
    options: dict[str, Any],
    head: HeadOptions,
    shard: Shard | None,
    needs: Needs,
    scale: torch.Tensor | None,
) -> LossPass:
    """Forward over all rows; then, if any gradient is needed, the compact backward, which recomputes few logits."""
    kernels = load_backend(head.backend)
    bounds = kernels.new_bounds(len(hidden), weight) if any(needs) else None
    own = kernels.partials(hidden, weight, targets, bounds=bounds, **options)
    whole = own if shard is None else shard.merge(own)
    logprob, lse, token_entropy = kernels.finish(whole)
    loss, metrics, dlogprob = token_loss(slice(0, len(hidden)), logprob)
    grads: Grads = (None, None, None)
    report = exact_certificate(0, weight.shape[0], lse) if head.grad_tol else {}
    if bounds is not None:
        grads, report = head_gradients(
            kernels, hidden, weight, targets, lse, dlogprob,
            head={name: value for name, value in options.items() if name != "entropy"}, needs=needs, scale=scale,
            grad_tol=head.tolerance(shard), bounds=bounds, mass=None if shard is None else mass_of(own, whole),
        )  # fmt: skip
    return LossPass(loss, metrics | report, logprob, lse, token_entropy, grads)


def _fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    needs: list[bool],
    entropy: bool,
    *arguments: Any,
) -> tuple[torch.Tensor, ...]:
    tokens, _, head = unpack(arguments)
    acc = accumulation_dtype(hidden.dtype)

    def vector(wanted: bool) -> torch.Tensor:
        return hidden.new_empty(hidden.shape[0] if wanted else 0, dtype=acc)

    metrics = hidden.new_empty(len(metric_names(tokens, head.grad_tol)), dtype=torch.float32)
    grads = [
        t.new_empty(t.shape, dtype=gradient_dtype(t)) if need and t is not None else vector(False)
        for t, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    return hidden.new_empty((), dtype=acc), metrics, vector(True), vector(True), vector(entropy), *grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.needs, ctx.dtypes = inputs[4], [None if t is None else t.dtype for t in inputs[:3]]
    ctx.n_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[5:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    given = zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
    grads = [None if grad_loss is None or not need else scaled_by(g, grad_loss, dtype) for g, need, dtype in given]
    return *grads, *[None] * (ctx.n_inputs - len(grads))


linear_tcopd_loss_op = define_operator(
    "linear_tcopd_loss",
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, bool[] needs, bool entropy, {_TOKENS}, {_POLICY}, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
