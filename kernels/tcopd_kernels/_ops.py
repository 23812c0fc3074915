"""torch operators behind linear_logprob, so that torch.compile and torch.export see one opaque call.

What depends on the values of tensors (which rows count, whether targets are in range, what the ranks agree on)
happens inside the operators; outside of them every shape follows from the shapes of the arguments. They read such
values back to the host, which a CUDA graph cannot record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ._backend import load_backend, without_autocast
from ._checks import accumulation_dtype, counted_rows
from ._parallel import Shard, mass_of
from ._rows import rows_with_gradient, scatter_rows, take_rows
from ._torch_compact import exact_certificate
from ._torch_grads import Needs

# Copies of this package under different names register different operators.
NAMESPACE = (__package__ or "tcopd_kernels").replace(".", "_")

# Entries of a certificate in the order in which the operators pack them.
CERTIFICATE = ("dropped_mass_sum", "dropped_mass_max", "dense_row_count", "grad_row_count", "kept_column_sum")

OPTIONS_SCHEMA = (
    "str backend, float temperature, float? softcap, SymInt ignore_index, float grad_tol, "
    "SymInt vocab_start, str? group, bool reduce_grad_hidden"
)


class HeadOptions(NamedTuple):
    """The operators' arguments that are not tensors; see linear_logprob.

    group: registered name of the process group whose ranks hold the other vocabulary shards, or None.
    """

    backend: str
    temperature: float
    softcap: float | None
    ignore_index: int
    grad_tol: float
    vocab_start: int
    group: str | None
    reduce_grad_hidden: bool

    def shard(self, size: int) -> Shard | None:
        return None if self.group is None else Shard.of(self.group, self.vocab_start, size)

    def tolerance(self, shard: Shard | None) -> float:
        """Mass that the backward may leave out of each row of this shard, so that all ranks' together is grad_tol."""
        return self.grad_tol if shard is None else self.grad_tol / shard.group.size()


def define_operator(
    name: str,
    schema: str,
    *,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """The operator NAMESPACE::name, which `run` implements for all devices and `fake` for tensors without data.

    An operator that an earlier import under the same package name has registered is left as it is.
    torch.library.custom_op is not used because its first call imports the whole of torch._dynamo, and Triton with it.
    """
    namespace = getattr(torch.ops, NAMESPACE)
    if not hasattr(namespace, name):
        full_name = f"{NAMESPACE}::{name}"
        torch.library.define(full_name, schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
        torch.library.impl(full_name, "default", run)
        torch.library.register_fake(full_name, fake)
        torch.library.register_autograd(full_name, backward, setup_context=setup_context)
    return getattr(namespace, name).default


def _run_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    certificate: torch.Tensor | None,
    entropy: bool,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    """logprob [N], lse [N], entropy [N], bounds [⌈N / BOUND_ROWS⌉, V], mass [N]; [0] for what is not needed.

    bounds: column bounds of the rows that count, for grad_tol > 0.   mass: the probability of this shard's columns,
    for grad_tol > 0 with a group.   certificate: [5] that the backward overwrites, or None.
    """
    head = HeadOptions(*options)
    kernels = load_backend(head.backend)
    n_rows, vocab = hidden.shape[0], weight.shape[0]
    shard = head.shard(vocab)
    if shard is None:
        rows = counted_rows(targets, vocab, head.ignore_index)
    else:
        rows = shard.counted_rows(targets, head.ignore_index)
    h, y = take_rows(hidden, rows), take_rows(targets, rows).long() - head.vocab_start
    bounds = kernels.new_bounds(n_rows, weight) if head.grad_tol else None
    with without_autocast(hidden):
        own = kernels.partials(
            h, weight, y, bias=bias, temperature=head.temperature, softcap=head.softcap, entropy=entropy,
            bounds=None if bounds is None else bounds[: -(-len(h) // kernels.BOUND_ROWS)],
        )  # fmt: skip
        whole = own if shard is None else shard.merge(own)
        logprob, lse, token_entropy = kernels.finish(whole)
    mass = mass_of(own, whole) if shard is not None and bounds is not None else None
    none = lse.new_empty(0)
    scattered = [none.clone() if t is None else scatter_rows(t, rows, n_rows) for t in (token_entropy, mass)]
    return (
        scatter_rows(logprob, rows, n_rows), scatter_rows(lse, rows, n_rows), scattered[0],
        none if bounds is None else bounds, scattered[1],
    )  # fmt: skip


def _fake_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    certificate: torch.Tensor | None,
    entropy: bool,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    head = HeadOptions(*options)

    def vector(wanted: object) -> torch.Tensor:
        return hidden.new_empty(hidden.shape[0] if wanted else 0, dtype=accumulation_dtype(hidden.dtype))

    bounds = load_backend(head.backend).new_bounds(hidden.shape[0], weight) if head.grad_tol else vector(False)
    return vector(True), vector(True), vector(entropy), bounds, vector(head.grad_tol and head.group is not None)


def _run_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor | None,
    bounds: torch.Tensor | None,
    mass: torch.Tensor | None,
    grad_logprob: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    needs: list[bool],
    report: bool,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    """Gradients of hidden, weight and bias, and the certificate [5]; [0] for what is not needed."""
    head = HeadOptions(*options)
    kernels = load_backend(head.backend)
    n_rows, vocab = hidden.shape[0], weight.shape[0]
    shard = head.shard(vocab)
    valid = targets != head.ignore_index
    rows = rows_with_gradient(valid, [grad_logprob, grad_lse, grad_entropy])

    def active(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else take_rows(tensor, rows)

    operands = (active(hidden), weight, take_rows(targets, rows).long() - head.vocab_start, active(lse))
    shared: dict[str, Any] = {"bias": bias, "temperature": head.temperature, "softcap": head.softcap}
    wanted = Needs(*needs)
    with without_autocast(hidden):
        if bounds is not None and grad_entropy is None:
            blocks = take_rows(valid.cumsum(0) - 1, rows) // kernels.BOUND_ROWS
            grads, certificate = kernels.compact_backward(
                *operands, active(grad_logprob), active(grad_lse), needs=wanted,
                grad_tol=head.tolerance(shard), bounds=bounds, blocks=blocks, mass=active(mass), **shared,
            )  # fmt: skip
        else:
            grads = kernels.backward(
                *operands, active(entropy), active(grad_logprob), active(grad_lse), active(grad_entropy),
                need_hidden=wanted.hidden, need_weight=wanted.weight, need_bias=wanted.bias, **shared,
            )  # fmt: skip
            certificate = exact_certificate(n_rows if rows is None else len(rows), vocab, lse) if report else {}
        grad_hidden, grad_weight, grad_bias = grads
        if grad_hidden is not None:
            grad_hidden = scatter_rows(grad_hidden, rows, n_rows)
            if shard is not None and head.reduce_grad_hidden:
                grad_hidden = shard.sum(grad_hidden)
    found = [hidden.new_empty(0) if g is None else g.contiguous() for g in (grad_hidden, grad_weight, grad_bias)]
    return *found, torch.stack([certificate[name] for name in CERTIFICATE]) if report else lse.new_empty(0)


def _fake_backward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    lse, needs, report = arguments[1], arguments[8], arguments[9]
    like = zip((hidden, weight, hidden if bias is None else bias), needs, strict=True)
    grads = [t.new_empty(t.shape) if need else hidden.new_empty(0) for t, need in like]
    return *grads, lse.new_empty(len(CERTIFICATE), dtype=torch.float32) if report else lse.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, targets, ctx.certificate, ctx.entropy, *ctx.options = inputs
    head = HeadOptions(*ctx.options)
    lse, token_entropy, bounds, mass = output[1:]
    ctx.save_for_backward(
        hidden, weight, bias, targets, lse, token_entropy if ctx.entropy else None, bounds if head.grad_tol else None,
        mass if head.grad_tol and head.group is not None else None,
    )  # fmt: skip
    ctx.mark_non_differentiable(bounds, mass)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_logprob: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    *_: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    upstream = (grad_logprob, grad_lse, grad_entropy if ctx.entropy else None)
    *found, report = linear_logprob_backward_op(
        *ctx.saved_tensors, *upstream, needs, ctx.certificate is not None, *ctx.options
    )
    if ctx.certificate is not None:
        ctx.certificate.copy_(report)
    gradients = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    return *gradients, *[None] * (3 + len(ctx.options))


def _refuse_second_derivative(*_: Any) -> None:
    raise RuntimeError("linear_logprob has no second derivatives; call backward without create_graph=True")


linear_logprob_op = define_operator(
    "linear_logprob",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? certificate, bool entropy, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_forward,
    fake=_fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
linear_logprob_backward_op = define_operator(
    "linear_logprob_backward",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor lse, Tensor? entropy, Tensor? bounds, "
    "Tensor? mass, Tensor? grad_logprob, Tensor? grad_lse, Tensor? grad_entropy, bool[] needs, bool report, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    backward=_refuse_second_derivative,
)
