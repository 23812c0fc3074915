"""A teacher as a lossless difference to a base checkpoint that is there anyway.

Reinforcement learning in bfloat16 changes few weights: an update far below a weight's rounding step leaves it as it
was. Per tensor the difference is stored in whichever form is smallest:

    same      nothing
    mask      one bit per weight, and the changed weights' new values
    index     the changed weights' positions (int32) and new values
    full      the tensor itself: most of it changed, or the base has no tensor of this name, shape and dtype

A folder holds delta.safetensors, config.json and the tokenizer, so that it stands wherever a model path does. Names,
forms, and SHA-256 digests of base and result are in the file's metadata; a base with other weights is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tcopd_fast.errors import UserError
from tcopd_fast.models import is_adapter, local_folder, resolve_path
from tcopd_fast.scoring.weights import CheckpointFolder, WeightSource

DELTA_FILE = "delta.safetensors"
FORMAT = "tcopd-delta-1"
# Parts of a checkpoint folder that a delta folder carries along.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
# What each form stores.
PARTS = {"same": (), "mask": ("mask", "values"), "index": ("index", "values"), "full": ("full",)}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Report:
    """Sizes in bytes, tensors by form, and weights in all and changed."""

    base_bytes: int
    delta_bytes: int
    forms: Mapping[str, int]
    weights: int
    changed: int


def is_delta(path: str) -> bool:
    """Whether a model path is a folder made by `make`; asks no hub."""
    return (Path(resolve_path(path)) / DELTA_FILE).is_file()


def digest(tensors: Callable[[str], Tensor], names: Sequence[str]) -> str:
    """SHA-256 over name, dtype, shape and bytes of the tensors, in order of their names."""
    total = hashlib.sha256()
    for name in sorted(names):
        tensor = tensors(name).contiguous()
        total.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def checkpoint_digest(path: str) -> str:
    """`digest` of a whole checkpoint."""
    files = CheckpointFolder(local_folder(path))
    return digest(lambda name: files.tensors([name])[name], sorted(files.names()))


def tensor_digests(path: str, share: int = 0, shares: int = 1) -> dict[str, str]:
    """`digest` of every tensor of a checkpoint by itself, or of one of so many shares of them."""
    files = CheckpointFolder(local_folder(path))
    return {n: digest(lambda name: files.tensors([name])[name], [n]) for n in sorted(files.names())[share::shares]}


def make(base: str, teacher: str, out: str | Path) -> Report:
    """Write the difference of the checkpoint `teacher` to `base` into the folder `out`.

    Raises UserError when `out` exists, or a path is no whole checkpoint.
    """
    target = Path(out)
    for path in (base, teacher):
        if is_adapter(path):
            raise UserError(f"{path}: is a LoRA adapter, which is small as it is; give it as a teacher's path")
        if is_delta(path):
            raise UserError(f"{path}: is a delta already; give whole checkpoints")
    if target.is_file() or (target.exists() and any(target.iterdir())):
        raise UserError(f"{target}: exists and is not empty; give a new folder")
    base_files = CheckpointFolder(local_folder(base))
    source = Path(local_folder(teacher))
    stored: dict[str, Tensor] = {}
    forms: dict[str, str] = {}
    changed = weights = 0
    teacher_files = CheckpointFolder(source)
    names = teacher_files.names()
    for name in sorted(names):
        new = teacher_files.tensors([name])[name]
        form, parts, count = _smallest(_stored(base_files, name), new)
        forms[name] = form
        stored |= {f"{name}:{part}": tensor for part, tensor in parts.items()}
        changed += count
        weights += new.numel()
    rebuilt = Rebuilder(stored, forms)
    metadata = {
        "format": FORMAT,
        "base_sha256": checkpoint_digest(base),
        "result_sha256": digest(lambda name: rebuilt.tensor(name, _stored(base_files, name)), sorted(names)),
        "forms": json.dumps(forms),
    }
    target.mkdir(parents=True, exist_ok=True)
    for folder in (Path(local_folder(base)), source):
        for file in COMPANIONS:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, target / file)
    partial = target / f"{DELTA_FILE}.part"
    save_file(stored, partial, metadata=metadata)
    partial.rename(target / DELTA_FILE)
    base_bytes = sum(base_files.tensors([name])[name].nbytes for name in base_files.names())
    counts = {form: sum(1 for f in forms.values() if f == form) for form in sorted(set(forms.values()))}
    return Report(base_bytes, (target / DELTA_FILE).stat().st_size, counts, weights, changed)


def _stored(files: CheckpointFolder, name: str) -> Tensor | None:
    return files.tensors([name])[name] if name in files.names() else None


def _smallest(old: Tensor | None, new: Tensor) -> tuple[str, dict[str, Tensor], int]:
    """(form, what it stores, changed weights) of the smallest lossless form. Bits are compared, so −0 and NaN count."""
    if old is None or old.shape != new.shape or old.dtype != new.dtype:
        return "full", {"full": new.contiguous()}, new.numel()
    bits = BITS[new.element_size()]
    new_bits, old_bits = (t.contiguous().reshape(-1).view(bits) for t in (new, old))
    where = (new_bits != old_bits).nonzero().squeeze(1)
    if len(where) == 0:
        return "same", {}, 0
    values = new.reshape(-1)[where]
    sizes = {
        "mask": -(-new.numel() // 8) + values.nbytes,
        "index": 4 * len(where) + values.nbytes if new.numel() < 2**31 else new.nbytes + 1,
        "full": new.nbytes,
    }
    form = min(sizes, key=lambda name: sizes[name])
    if form == "mask":
        return form, {"mask": _pack(where, new.numel()), "values": values}, len(where)
    if form == "index":
        return form, {"index": where.to(torch.int32), "values": values}, len(where)
    return form, {"full": new.contiguous()}, len(where)


def _pack(where: Tensor, count: int) -> Tensor:
    """Bit i of byte i // 8, counted from the lowest, is set for every i in `where`; uint8 [⌈count / 8⌉]."""
    bits = torch.zeros(-(-count // 8) * 8, dtype=torch.uint8)
    bits[where] = 1
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack(mask: Tensor, count: int) -> Tensor:
    """bool [count] of a packed mask."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask.unsqueeze(1) >> places) & 1).view(-1)[:count].bool()


class Rebuilder:
    """Turns a base tensor into the teacher's, bit for bit."""

    def __init__(self, stored: Mapping[str, Tensor], forms: Mapping[str, str]) -> None:
        self.stored, self.forms = stored, forms

    def tensor(self, name: str, base: Tensor | None) -> Tensor:
        """The teacher's tensor; `base` (unchanged) is the base's of the same name in its stored dtype."""
        form = self.forms[name]
        if form == "full":
            return self.stored[f"{name}:full"]
        assert base is not None  # `make` stores what the base lacks in full
        if form == "same":
            return base
        values = self.stored[f"{name}:values"].to(base.device)
        out = base.clone(memory_format=torch.contiguous_format)
        flat = out.view(-1)
        if form == "index":
            flat[self.stored[f"{name}:index"].to(base.device).long()] = values
        else:
            flat[_unpack(self.stored[f"{name}:mask"].to(base.device), flat.numel())] = values
        return out


class DeltaFolder:
    """A delta on disk: mapped like a checkpoint, its metadata read and checked once."""

    def __init__(self, path: str) -> None:
        self.path = path
        file = Path(local_folder(path)) / DELTA_FILE
        if not file.is_file():
            raise UserError(f"{path}: no {DELTA_FILE} there; make one with `tcopd delta make BASE TEACHER OUT`")
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
        except SafetensorError as error:
            raise UserError(f"{file}: cannot be read ({error}); make it again") from error
        if metadata.get("format") != FORMAT:
            raise UserError(f"{file}: format {metadata.get('format')!r}, expected {FORMAT!r}; make it again")
        self.base_sha256, self.result_sha256 = metadata["base_sha256"], metadata["result_sha256"]
        self.forms: dict[str, str] = json.loads(metadata["forms"])
        if other := sorted({*self.forms.values()} - {*PARTS}):
            raise UserError(f"{file}: holds tensors of the form {other[0]!r}, which is not known here; make it again")
        self.parts = CheckpointFolder(file.parent, DELTA_FILE)

    def rebuilder(self, names: Sequence[str]) -> Rebuilder:
        """A rebuilder holding what the delta stores of these tensors."""
        wanted = {f"{name}:{part}" for name in names for part in PARTS[self.forms[name]]}
        return Rebuilder(self.parts.tensors(sorted(wanted)), self.forms)

    def require_base(self, base: str, found: str) -> None:
        """Raises UserError unless `base`, of digest `found`, holds exactly the weights this delta was made from."""
        if found != self.base_sha256:
            raise UserError(
                f"delta {self.path}: made from a base with SHA-256 {self.base_sha256[:12]}…, but {base} has "
                f"{found[:12]}…; give the checkpoint it was made from"
            )


def check(path: str, base: str) -> None:
    """Rebuild every tensor from `base` and compare digests. Raises UserError when base or result differ."""
    delta = DeltaFolder(path)
    delta.require_base(base, checkpoint_digest(base))
    files = CheckpointFolder(local_folder(base))
    found = digest(lambda name: delta.rebuilder([name]).tensor(name, _stored(files, name)), sorted(delta.forms))
    if found != delta.result_sha256:
        raise UserError(
            f"delta {path}: rebuilds to SHA-256 {found[:12]}…, expected {delta.result_sha256[:12]}…; "
            "the file is damaged, make it again"
        )


class DeltaWeights:
    """Weights of a delta teacher: each group is rebuilt from the base's tensors when it is asked for.

    base: a source of the base's tensors in their stored dtype on the scoring device. One group of rebuilt tensors
    exists at a time; what the delta stores of it is copied from the mapped file.
    """

    def __init__(self, delta: DeltaFolder, base: WeightSource, dtype: torch.dtype) -> None:
        self.delta, self.base, self.dtype = delta, base, dtype

    def names(self) -> frozenset[str]:
        return frozenset(self.delta.forms)

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        known = self.base.names()
        old = self.base.load([name for name in names if name in known])
        rebuilder = self.delta.rebuilder(names)
        return {name: rebuilder.tensor(name, old.get(name)).to(self.dtype) for name in names}

    def prefetch(self, names: Sequence[str]) -> None:
        known = self.base.names()
        self.base.prefetch([name for name in names if name in known])

    def rows(self, name: str, index: Tensor) -> Tensor:
        if self.delta.forms.get(name, "same") == "same":
            return self.base.rows(name, index).to(self.dtype)
        table = self.load([name])[name]
        return table.index_select(0, index.to(table.device))
