"""Which Triton kernels the package has, which of them a call launches, and with what: tile, grid, registers."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import pkgutil
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import tcopd_kernels
import torch
from tcopd_kernels import _triton_tiles
from tcopd_kernels._triton_forward import forward_kernel
from tcopd_kernels._triton_tiles import Tile
from triton.runtime.jit import KernelInterface

TILE_FIELDS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One launch. kernel: as kernel_id. programs: of its grid. options: its keyword arguments, which hold the tile.

    compiled: Triton's compiled kernel; None in the interpreter.
    """

    kernel: str
    programs: int
    options: Mapping[str, Any]
    compiled: Any


def kernel_id(kernel: Any) -> str:
    """ "_triton_forward.forward_kernel": names alone occur twice."""
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def function_name(kernel: str) -> str:
    """The name that a GPU's tools see, from a kernel_id."""
    return kernel.rpartition(".")[2]


def jit_functions() -> dict[str, Any]:
    """kernel_id -> every function of the package that Triton compiles, helpers included."""
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(tcopd_kernels.__path__):
        if not info.ispkg:
            module = importlib.import_module(f"{tcopd_kernels.__name__}.{info.name}")
            own = [value for value in vars(module).values() if isinstance(value, KernelInterface)]
            found |= {kernel_id(value): value for value in own}
    return found


def entry_kernels() -> list[str]:
    """kernel_ids of those that no other one calls: what the host launches."""
    functions = jit_functions()
    called = set()
    for function in functions.values():
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
        names = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "id")}
        values = [function.fn.__globals__.get(name) for name in names]
        called |= {kernel_id(value) for value in values if isinstance(value, KernelInterface)}
    return sorted(set(functions) - called)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """The Triton launches of the context, in order. In the interpreter each is a range of torch's profiler as well.

    Candidate tiles that are being timed are launches like all others: call once before, and record the second call.
    """
    launches: list[Launch] = []
    kind = type(forward_kernel)
    run = kind.run

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        interpreted = _triton_tiles.INTERPRETED
        with torch.profiler.record_function(self.fn.__name__) if interpreted else nullcontext():
            compiled = run(self, *args, grid=grid, warmup=warmup, **options)
        launches.append(Launch(kernel_id(self), math.prod(grid), options, compiled))
        return compiled

    with mock.patch.object(kind, "run", recorded):
        yield launches


def tile_label(options: Mapping[str, Any]) -> str | None:
    """ "128x128x64/w8s4", with what is not default after it; None for a kernel without a tile of its own."""
    if "BLOCK_K" not in options:
        return None
    m, n, k, warps, stages = (options.get(name) for name in TILE_FIELDS)
    named = f"{m}x{n}x{k}" if warps is None else f"{m}x{n}x{k}/w{warps}s{stages}"
    return named + " flat" * options.get("FLATTEN", False) + " specialised" * options.get("WARP_SPECIALIZE", False)


def compiled_facts(compiled: Any) -> dict[str, Any]:
    """Of a kernel on a GPU: registers and spilled bytes per thread, shared memory, and the instructions it uses."""
    ptx = compiled.asm["ptx"]
    wgmma = re.search(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", ptx)
    return {
        "registers": compiled.n_regs,
        "spill_bytes": 4 * compiled.n_spills,  # Triton counts spilled words
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "wgmma": wgmma[1] if wgmma else None,
        "mma_sync": "mma.sync" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
    }


@dataclass
class TileChoice:
    """A choice among candidate tiles: the cache's key and the milliseconds of each that ran."""

    key: tuple[Any, ...]
    times_ms: dict[Tile, float]


@contextmanager
def record_tile_choices() -> Iterator[list[TileChoice]]:
    """What is timed in the context to choose tiles; nothing for tiles that the process or the cache knows."""
    choices: list[TileChoice] = []
    choose, measure = _triton_tiles.choose_tile, _triton_tiles.measure_ms

    def choose_recorded(key: tuple[Any, ...], *args: Any, **options: Any) -> Tile:
        choices.append(TileChoice(key, {}))
        tile = choose(key, *args, **options)
        if not choices[-1].times_ms:
            choices.pop()
        return tile

    def measure_recorded(run: Any) -> float:
        tile = run.args[-1]  # `run` is a partial of the launch with it
        choices[-1].times_ms[tile] = measure(run)
        return choices[-1].times_ms[tile]

    with (
        mock.patch.object(_triton_tiles, "choose_tile", choose_recorded),
        mock.patch.object(_triton_tiles, "measure_ms", measure_recorded),
    ):
        yield choices
