"""Packed sequences: laid end to end, no padding, attention kept inside each sequence.

`packed_sdpa` is an attention function for transformers models. It is right for any causal model whose layers
take (query, key, value) of a packed row plus `cu_seq_lens_q`; every other layer is token-wise anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from tcopd_fast.types import PackedTokens

PACKED_SDPA = "packed_sdpa"


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> PackedTokens:
    """Lay prompt+response pairs end to end (`PackedTokens`, on the CPU).

    Hidden state t predicts token t+1, so the L response tokens of a sequence whose prompt has P tokens are
    predicted at offsets P-1 … P+L-2; the last token needs no forward and is left out of the packed row.
    Raises ValueError for an empty prompt, which leaves the first response token without a prediction.
    """
    ids: list[int] = []
    positions: list[int] = []
    predict_at: list[int] = []
    targets: list[int] = []
    starts = [0]
    for prompt, response in zip(prompts, responses, strict=True):
        if not prompt:
            raise ValueError("pack: empty prompt; give at least one token (for example BOS) before the response")
        row = [*prompt, *response[:-1]]
        first = len(ids) + len(prompt) - 1
        predict_at.extend(range(first, first + len(response)))
        targets.extend(response)
        positions.extend(range(len(row)))
        ids.extend(row)
        starts.append(len(ids))
    lengths = [b - a for a, b in pairwise(starts)]
    return PackedTokens(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        position_ids=torch.tensor(positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        predict_at=torch.tensor(predict_at, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        max_seqlen=max(lengths, default=0),
    )


def split_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequence indices so that each group's lengths sum to at most `budget` tokens.

    Longest first, next-fit: neighbours in length share a group, which also keeps the padding inside
    attention small. One sequence longer than the budget forms its own group. The groups partition the indices.
    """
    groups: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > room or not groups:
            groups.append([])
            room = budget
        groups[-1].append(index)
        room -= lengths[index]
    return groups


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row.

    query [1, Hq, T, d], key and value [1, Hkv, T, d] -> [1, T, Hq, d]. The row is unpacked to right-padded
    [B, H, max_length, d] for this one operation: under a causal mask no real token sees the padding behind it,
    so no mask tensor is needed and the fast SDPA kernels apply.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("packed_sdpa: cu_seq_lens_q and max_length_q are required; call through PackedCausalLM")
    starts = cu_seq_lens_q[:-1].long()
    lengths_B = cu_seq_lens_q.diff().long()
    columns = torch.arange(max_length_q, device=query.device)
    real_BL = columns[None] < lengths_B[:, None]
    source_BL = torch.where(real_BL, starts[:, None] + columns[None], 0)

    def unpack(x: Tensor) -> Tensor:
        return x[0].index_select(1, source_BL.reshape(-1)).unflatten(1, source_BL.shape).transpose(0, 1)

    groups = query.shape[1] // key.shape[1]
    key_B, value_B = unpack(key), unpack(value)
    if groups > 1:
        key_B = key_B.repeat_interleave(groups, dim=1)
        value_B = value_B.repeat_interleave(groups, dim=1)
    window = None
    if sliding_window is not None and sliding_window < max_length_q:
        distance = columns[:, None] - columns[None]
        window = (distance >= 0) & (distance < sliding_window)
    out = F.scaled_dot_product_attention(
        unpack(query), key_B, value_B, attn_mask=window, dropout_p=dropout, scale=scaling, is_causal=window is None
    )
    return out.transpose(1, 2)[real_BL].unsqueeze(0), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
