"""Where a streamed model's weights come from: a checkpoint on disk, pinned host memory, or a resident model.

A source hands out named tensors for one group (a decoder layer, the embedding, the head) at a time; whoever asked
drops them before asking for more, so that the memory in use is that of a group or two, not of the model.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tcopd_fast.errors import UserError
from tcopd_fast.models import ADAPTER_CONFIG, resolve_path


class WeightSource(Protocol):
    """Named tensors of one checkpoint, on the scoring device, in the compute dtype."""

    def names(self) -> frozenset[str]:
        """Every tensor name of the checkpoint."""
        ...

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        """These tensors, for the caller to drop when it is done with them."""
        ...

    def prefetch(self, names: Sequence[str]) -> None:
        """Says what the next `load` will ask for, so that copies can run beside the computation."""
        ...

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows [n, D] of a matrix: what an embedding needs of its table."""
        ...


class CheckpointFolder:
    """The safetensors files of a folder, as they are stored. Tensors are mapped, not read: a page of the file
    enters memory when it is first used and leaves with the tensor.

    file: read this one alone (None: the ones that transformers loads).
    """

    def __init__(self, folder: str | Path, file: str | None = None) -> None:
        self.folder = Path(folder)
        self._file_of: dict[str, Path] = {}
        files = weight_files(folder) if file is None else (self.folder / file,)
        if not files:
            raise UserError(f"model {self.folder}: no .safetensors file; give a folder with safetensors weights")
        for path in files:
            try:
                with safe_open(path, "pt") as opened:
                    self._file_of |= dict.fromkeys(opened.keys(), path)
            except (OSError, SafetensorError) as error:
                raise UserError(f"model {self.folder}: {path.name} cannot be read ({error}); fetch it again") from error

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

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names}

    def prefetch(self, names: Sequence[str]) -> None:
        """Nothing to fetch."""

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self.tensors[name].index_select(0, index)


class PinnedWeights:
    """A checkpoint in pinned host memory, copied to a GPU group by group on a stream of its own.

    While one group computes, the next one is copied. Each lives in fresh memory of the computing stream, which takes it
    back in order: a group that was dropped after its computation had been launched makes room for the next but one.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype, device: torch.device) -> None:
        files = CheckpointFolder(folder)
        self.host = {name: files.tensors([name])[name].to(dtype).pin_memory() for name in sorted(files.names())}
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.ahead: dict[str, Tensor] = {}

    def names(self) -> frozenset[str]:
        return frozenset(self.host)

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        if list(self.ahead) != list(names):
            self.prefetch(names)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        taken, self.ahead = self.ahead, {}
        return taken

    def prefetch(self, names: Sequence[str]) -> None:
        computing = torch.cuda.current_stream(self.device)
        # A group that was announced and never asked for goes back to the computing stream here, filled or not.
        computing.wait_stream(self.stream)
        self.ahead = {name: torch.empty_like(self.host[name], device=self.device) for name in names}
        # This memory may have held a group whose computation is launched but not done.
        self.stream.wait_stream(computing)
        with torch.cuda.stream(self.stream):
            for name, copy in self.ahead.items():
                copy.copy_(self.host[name], non_blocking=True)

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self.host[name].index_select(0, index.cpu()).to(self.device)


def pinned_bytes(files: CheckpointFolder, dtype: torch.dtype) -> int:
    """Host memory that `PinnedWeights` takes: torch rounds every pinned tensor up to a power of two."""
    tensors = files.tensors(sorted(files.names())).values()
    return sum(1 << max(0, t.numel() * dtype.itemsize - 1).bit_length() for t in tensors)


def weight_files(path: str | Path) -> tuple[Path, ...]:
    """The weight files that transformers loads, in order of their names, links resolved; empty for a hub id."""
    folder = Path(resolve_path(str(path)))
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        found = [folder / "model.safetensors"]
    elif index.is_file():
        found = [folder / name for name in set(json.loads(index.read_text())["weight_map"].values())]
    else:
        found = list(folder.glob("*.safetensors"))
    return tuple(file.resolve() for file in sorted(found))


def same_checkpoint(a: str, b: str) -> bool:
    """True when two paths name the same weights: one path, the same files, or files and config of equal content.

    Fine-tunes of one base differ in their first pages, so comparing them reads little.
    """
    if a == b:
        return True
    files_a, files_b = weight_files(a), weight_files(b)
    if not files_a or len(files_a) != len(files_b):
        return False
    if files_a == files_b:
        return True
    pairs = [*zip(files_a, files_b, strict=True)]
    for name in ("config.json", ADAPTER_CONFIG):
        x, y = (Path(resolve_path(path)) / name for path in (a, b))
        if x.is_file() != y.is_file():
            return False
        pairs += [(x, y)] if x.is_file() else []
    return all(filecmp.cmp(x, y, shallow=False) for x, y in pairs)
