"""Vocabulary shards of a head over the ranks of a process group (tensor parallelism).

Each rank holds the rows [start, start + size) of the head; hidden states and targets are the same on all ranks. What
has to travel is one vector of integers per call, the partial softmax statistics (12 or 16 bytes per token and rank)
and the sum of the gradients of the hidden states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ._checks import accumulation_dtype, target_facts
from .types import Partials


class Shard(NamedTuple):
    """Rows [start, start + size) of a head whose other rows are on the other ranks of the group."""

    start: int
    size: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, group_name: Any, start: int, size: int) -> Shard:
        """group_name: as registered, which is how an operator refers to a process group."""
        return cls(start, size, dist.distributed_c10d._resolve_process_group(group_name))

    def counted_rows(self, targets: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
        """Row indices of the tokens that count, or None when all do, after all ranks have compared what they hold.

        Costs one small all-gather and one device synchronisation. What is wrong on one rank raises the same
        ValueError on all of them.
        """
        n_rows = len(targets)
        valid, facts = target_facts(targets, ignore_index)
        checksum = (targets.long() * torch.arange(1, n_rows + 1, device=targets.device)).sum()
        own = torch.cat([facts.new_tensor([self.start, self.size, n_rows]), checksum.unsqueeze(0), facts])
        ranks = _all_gather(own, self.group).tolist()
        total = _total_vocab([(start, size) for start, size, *_ in ranks])
        lengths, checksums = [rank[2] for rank in ranks], {rank[3] for rank in ranks}
        if len(set(lengths)) > 1:
            raise ValueError(f"hidden and targets must be the same on all ranks of process_group, got N={lengths}")
        if len(checksums) > 1:
            raise ValueError("targets must be the same ids of the whole vocabulary on all ranks of process_group")
        count, low, high = ranks[0][4:]
        if low < 0 or high >= total:
            raise ValueError(
                f"targets holds {low if low < 0 else high}, which no rank of process_group owns: together they hold "
                f"the ids [0, {total}), and ignore_index={ignore_index}"
            )
        return None if count == n_rows else valid.nonzero().squeeze(1)

    def merge(self, partials: Partials) -> Partials:
        return merge_partials(partials, self.group)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, accumulated in fp32 or wider."""
        total = tensor.to(accumulation_dtype(tensor.dtype)).contiguous()
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.dtype)


def group_name(process_group: object, vocab_start: object) -> str | None:
    """Registered name of the group, by which operators find it; checks both arguments."""
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int):
        raise TypeError(f"vocab_start must be an int, got {vocab_start!r}")
    if vocab_start < 0:
        raise ValueError(f"vocab_start must be the id of the first row of weight, at least 0, got {vocab_start}")
    if process_group is None:
        if vocab_start:
            raise ValueError(
                f"vocab_start={vocab_start} says that weight is a shard; pass the process_group that holds the others"
            )
        return None
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or None, got {type(process_group).__name__}; "
            "of a device mesh pass mesh.get_group()"
        )
    return process_group.group_name


def local_vocab_size(vocab_size: int | None, vocab_start: int, n_rows: int) -> int | None:
    """How many of a shard's n_rows count when vocab_size counts the rows of the whole head."""
    if not isinstance(vocab_size, int):
        return vocab_size
    if vocab_size <= vocab_start:
        raise ValueError(
            f"vocab_size={vocab_size} leaves nothing of the shard that begins at vocab_start={vocab_start}; "
            "shard the head so that every rank owns at least one token"
        )
    return min(vocab_size - vocab_start, n_rows)


def _total_vocab(shards: list[tuple[int, int]]) -> int:
    """Size of the vocabulary that (start, size) of all ranks make up together without a gap or an overlap."""
    end = 0
    for start, size in sorted(shards):
        if start != end:
            held = ", ".join(f"[{first}, {first + n})" for first, n in shards)
            raise ValueError(
                f"vocab_start and the rows of weight must partition the vocabulary, but the ranks of process_group "
                f"hold {held}: {'nobody holds' if start > end else 'more than one holds'} {min(start, end)}"
            )
        end = start + size
    return end


def merge_partials(partials: Partials, group: dist.ProcessGroup) -> Partials:
    """Statistics of all ranks' columns together; bitwise the same on every rank."""
    present = [part for part in partials if part is not None]
    top, total, *dot, target_logit = _all_gather(torch.stack(present), group).unbind(1)
    new_max = top.amax(0)
    step = top - new_max
    decay = step.exp()
    grown = decay * total
    # grown is 0 where step is the lowest finite number, so that their product is 0 as well.
    merged_dot = (decay * dot[0] + step * grown).sum(0) if dot else None
    return Partials(new_max, grown.sum(0), merged_dot, target_logit.sum(0))


def mass_of(part: Partials, whole: Partials) -> torch.Tensor:
    """Probability [N] of the columns of `part` under the softmax of `whole`."""
    return (part.max - whole.max).exp_().mul_(part.sum).div_(whole.sum)


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[…] of every rank -> [ranks, …]."""
    out = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    # The gather into one tensor has another name since torch 2.13.
    dist.all_gather(list(out.unbind()), tensor.contiguous(), group=group)
    return out
