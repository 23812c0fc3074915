"""Where a streamed model's weights come from: a checkpoint on disk, pinned host memory, or a base plus a difference.

A source hands out named tensors for one group (a decoder layer, the embedding, the head) at a time; whoever asked
drops them before asking for more, so that the memory in use is that of a group or two, not of the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tcopd_fast.errors import UserError


class WeightSource(Protocol):
    """Named tensors of one checkpoint, on the scoring device, in the compute dtype."""

    def names(self) -> frozenset[str]:
        """Every tensor name of the checkpoint."""
        ...

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        """These tensors, valid until the second next call of `load`."""
        ...

    def prefetch(self, names: Sequence[str]) -> None:
        """Says what the next `load` will ask for, so that copies can run beside the computation."""
        ...

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows [n, D] of a matrix: what an embedding needs of its table."""
        ...


class CheckpointFolder:
    """The safetensors files of a folder, as they are stored. Tensors are mapped, not read: a page of the file
    enters memory when it is first used and leaves with the tensor."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file_of = self._index()

    def _index(self) -> dict[str, Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            mapping = json.loads(index.read_text())["weight_map"]
            return {name: self.folder / file for name, file in mapping.items()}
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"model {self.folder}: no .safetensors file; give a folder with safetensors weights")
        found: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    found |= dict.fromkeys(opened.keys(), file)
            except SafetensorError as error:
                raise UserError(f"model {self.folder}: {file.name} cannot be read ({error}); fetch it again") from error
        return found

    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def dtypes(self) -> frozenset[torch.dtype]:
        """Every dtype that some tensor is stored in."""
        return frozenset(t.dtype for t in self.tensors(sorted(self.names())).values())

    def weights(self) -> int:
        """Number of weights, from the files' headers."""
        return sum(t.numel() for t in self.tensors(sorted(self.names())).values())

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """CPU tensors in their stored dtype; each file is opened once."""
        out: dict[str, Tensor] = {}
        for file in sorted({self._file_of[name] for name in names}):
            with safe_open(file, "pt") as opened:
                out |= {name: opened.get_tensor(name) for name in names if self._file_of[name] == file}
        return out


class MappedWeights:
    """A checkpoint streamed from its files: on a CPU the mapped pages themselves, on a GPU copies of them."""

    def __init__(self, folder: str | Path, dtype: torch.dtype | None, device: torch.device) -> None:
        """dtype: None keeps the stored one."""
        self.files = CheckpointFolder(folder)
        self.dtype, self.device = dtype, device

    def names(self) -> frozenset[str]:
        return self.files.names()

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: t.to(self.device, self.dtype or t.dtype) for name, t in self.files.tensors(names).items()}

    def prefetch(self, names: Sequence[str]) -> None:
        """Nothing: the operating system reads ahead."""

    def rows(self, name: str, index: Tensor) -> Tensor:
        table = self.files.tensors([name])[name]
        return table.index_select(0, index.cpu()).to(self.device, self.dtype or table.dtype)


class ResidentWeights:
    """The tensors of a model that is on the device anyway."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = model.state_dict()

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names}

    def prefetch(self, names: Sequence[str]) -> None:
        """Nothing to fetch."""

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self.tensors[name].index_select(0, index)


class PinnedWeights:
    """A checkpoint in pinned host memory, copied to a GPU through two slots on a stream of its own.

    While the layer in one slot computes, the next one is copied into the other. Each slot is one flat buffer of the
    largest group; a group is laid out in it tensor by tensor.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype, slots: RingSlots) -> None:
        files = CheckpointFolder(folder)
        self.host = {name: files.tensors([name])[name].to(dtype).pin_memory() for name in sorted(files.names())}
        self.slots = slots

    def names(self) -> frozenset[str]:
        return frozenset(self.host)

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        return self.slots.take({name: self.host[name] for name in names})

    def prefetch(self, names: Sequence[str]) -> None:
        self.slots.start({name: self.host[name] for name in names})

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self.host[name].index_select(0, index.cpu()).to(self.slots.device)


class RingSlots:
    """Two flat device buffers that all streamed models of a scorer share, filled on a side stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.buffers = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2)]
        self.turn = 0
        self.pending: tuple[tuple[int, ...], dict[str, Tensor]] | None = None

    def start(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin copying a group into the slot whose last group is no longer computed with."""
        slot = self.turn
        self.turn = 1 - slot
        total = sum(_aligned(t.nbytes) for t in tensors.values())
        if self.buffers[slot].numel() < total:
            torch.cuda.current_stream(self.device).synchronize()
            self.stream.synchronize()  # a copy that nobody asked for may still be filling the old buffer
            self.buffers[slot] = torch.empty(total, dtype=torch.uint8, device=self.device)
        views: dict[str, Tensor] = {}
        offset = 0
        # Whatever computes with this slot's last group has been launched by now; the other slot's layer has not.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for name, tensor in tensors.items():
                part = self.buffers[slot][offset : offset + tensor.nbytes]
                views[name] = part.view(tensor.dtype).view(tensor.shape)
                views[name].copy_(tensor, non_blocking=True)
                offset += _aligned(tensor.nbytes)
        self.pending = (tuple(id(t) for t in tensors.values()), views)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The group on the device: the one being copied if it was announced, else copied now."""
        wanted = tuple(id(t) for t in tensors.values())
        if self.pending is None or self.pending[0] != wanted:
            self.start(tensors)
        assert self.pending is not None
        views = self.pending[1]
        self.pending = None
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return views


def _aligned(nbytes: int) -> int:
    """nbytes rounded up so that the next tensor starts on a 256-byte border, as GEMM kernels like it."""
    return -(-nbytes // 256) * 256
