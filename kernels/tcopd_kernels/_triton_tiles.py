"""Tile shapes of the large kernels and the choice among them.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from . import _tile_cache
from ._backend import amd_arch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
AMD_SHARED_BYTES = 64 << 10  # of gfx90a and gfx942


@dataclass(frozen=True)
class Tile:
    """Block shape (block_m tokens, block_n vocabulary, block_k hidden) and launch options of a variant.

    flatten: the loops over vocabulary tiles and hidden size are pipelined as one.
    warp_specialize: loads and products run in warps of their own.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    flatten: bool = False
    warp_specialize: bool = False

    def shared_bytes(self, itemsize: int) -> int:
        """Bytes of shared memory that the software pipeline's operand buffers take."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize


INTERPRETER_TILE = Tile(16, 32, 32, 4, 1)

# The first entry of each tuple is used where nothing may be timed. bench/offline_compile.py checks that the
# fp16 and bf16 entries spill no registers on the architectures that use them.
_FP32_TILES = (Tile(64, 64, 32, 8, 2), Tile(64, 64, 16, 8, 3))
_SMALL_N_TILES = (Tile(16, 128, 128, 4, 3), Tile(16, 64, 128, 4, 4))
_MEDIUM_N_TILES = (Tile(64, 128, 64, 4, 4), Tile(64, 256, 64, 8, 3))
_AMPERE_MEDIUM_N_TILES = (Tile(64, 128, 64, 8, 3), Tile(64, 256, 64, 8, 3))  # four warps spill, with Triton 3.6
_AMPERE_TILES = (Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 4))
_HOPPER_TILES = (Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3))
_TALL_TILE = Tile(256, 128, 64, 8, 3)
_LEAST_SHARED_TILE = _AMPERE_TILES[1]  # fits the 99 KiB of consumer GPUs
# AMD: waves of 64 lanes, so four warps are 256 lanes; two stages fill the 64 KiB that a block has.
_AMD_FP32_TILES = (Tile(64, 64, 32, 4, 2),)
_AMD_TILES = {16: (Tile(16, 128, 128, 4, 2),), 64: (Tile(64, 128, 64, 4, 2),)}
_AMD_LARGE_TILES = (Tile(128, 128, 64, 8, 2), Tile(128, 128, 32, 4, 2))


def candidate_tiles(arch: int | str, itemsize: int, N: int, entropy: bool) -> tuple[Tile, ...]:
    """Tiles worth timing for N rows on `arch` (80, 90, … or "gfx942"); the first is the default.

    entropy: whether the kernel carries the entropy terms, which on sm_100 spill at 256 columns.

    The AMD tiles are known to compile without spills and no more: they have not been run.
    """
    if isinstance(arch, str):
        if itemsize == 4:
            return _AMD_FP32_TILES
        return next((tiles for most, tiles in _AMD_TILES.items() if most >= N), _AMD_LARGE_TILES)
    if itemsize == 4:
        return _FP32_TILES
    if N <= 16:
        return _SMALL_N_TILES
    if N <= 64:
        return _MEDIUM_N_TILES if arch >= 90 else _AMPERE_MEDIUM_N_TILES
    if arch >= 100 and entropy:
        return _HOPPER_TILES[:1]
    return _HOPPER_TILES if arch >= 90 else _AMPERE_TILES


def forward_tiles(arch: int | str, itemsize: int, N: int, entropy: bool, bounds: bool) -> tuple[Tile, ...]:
    """Tiles of the forward; with column bounds 256 columns spill."""
    tiles = candidate_tiles(arch, itemsize, N, entropy)
    if isinstance(arch, str) or itemsize == 4 or N <= 64:
        return tiles
    flat = replace(tiles[0], flatten=True)
    if arch < 90:
        return *tiles, flat
    if arch < 100:
        return (tiles[0], flat) if bounds else (*tiles, _TALL_TILE, flat)
    specialised = Tile(128, 128, 64, 8, 3, flatten=True, warp_specialize=True)
    return *(tiles[:1] if bounds else tiles), flat, specialised


def dlogits_tiles(arch: int | str, itemsize: int, N: int, entropy: bool, row_mass: bool) -> tuple[Tile, ...]:
    """Tiles of the dlogits kernel; with the row sums of p 32768 elements spill, with the entropy 256 rows do."""
    tiles = candidate_tiles(arch, itemsize, N, entropy)
    if isinstance(arch, str) or itemsize == 4 or N <= 64 or arch < 90:
        return tiles
    if row_mass:
        return tiles[:1]
    return tiles if entropy else (*tiles, _TALL_TILE)


@cache
def device_limits(device: torch.device) -> tuple[int | str, int, int]:
    """(architecture as 80, 90, … or "gfx942"; multiprocessors; bytes of shared memory a block may take)."""
    if device.type != "cuda":
        return 80, 8, 1 << 30
    properties: Any = torch.cuda.get_device_properties(device)  # the stub lacks the last field
    processors = properties.multi_processor_count
    if torch.version.hip:
        return amd_arch(device), processors, AMD_SHARED_BYTES
    return properties.major * 10 + properties.minor, processors, properties.shared_memory_per_block_optin


Key = tuple[object, ...]
_chosen: dict[Key, Tile] = {}
_failed: set[tuple[Key, Tile]] = set()


def pick_tile(
    kernel: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    entropy: bool,
    launch: Callable[[Tile], Any],
    *,
    tiles: Callable[[int | str, int, int, bool], tuple[Tile, ...]] = candidate_tiles,
    vocab: int | None = None,
    outputs: Sequence[torch.Tensor] = (),
) -> Tile:
    """The tile for this kernel and problem, timed once per GPU model, dtype, N bucket, V, D and entropy.

    The choice is kept on disk (see _tile_cache). Under the interpreter, inside a CUDA graph capture, and with
    `torch.use_deterministic_algorithms(True)` nothing is timed and the default tile is taken, so that in the last
    case a result depends on the input and the GPU model alone.

    Args:
        launch: runs the kernel with a tile; idempotent.
        tiles: the candidates, called as candidate_tiles.
        vocab: V of the problem where `weight` holds some of its rows.
        outputs: what `launch` writes; needed where a tile is flattened or specialised (see choose_tile).
    """
    if INTERPRETED:
        return INTERPRETER_TILE
    N, D = hidden.shape
    arch, _, shared_limit = device_limits(hidden.device)

    def fits(tile: Tile) -> bool:
        # The tiles for AMD are few, and compiled offline for the only size of shared memory that there is.
        return isinstance(arch, str) or tile.shared_bytes(hidden.itemsize) <= shared_limit - 4096

    candidates = list(filter(fits, tiles(arch, hidden.itemsize, N, entropy))) or [_LEAST_SHARED_TILE]
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    name = torch.cuda.get_device_name(hidden.device)
    bucket = triton.next_power_of_2(N)
    key = (name, triton.__version__, kernel, hidden.dtype, bucket, vocab or weight.shape[0], D, entropy)
    if key not in _chosen and torch.cuda.is_current_stream_capturing():
        return candidates[0]
    return choose_tile(key, candidates, launch, outputs)


def choose_tile(
    key: Key, tiles: Sequence[Tile], launch: Callable[[Tile], Any], outputs: Sequence[torch.Tensor] = ()
) -> Tile:
    """The tile known for `key`, in this process or on disk, if it is one of `tiles`; else the fastest of them.

    A tile that does not compile is never tried again for this key, and neither is a flattened or specialised one
    whose outputs are not those of the first tile: the compiler passes behind these are young. Raises RuntimeError
    when no tile is left.
    """
    if key in _chosen:
        return _chosen[key]
    text = " | ".join(map(str, key))
    stored = _tile_cache.load().get(text)
    known = next((tile for tile in tiles if asdict(tile) == stored), None)
    if known is None:
        known = _fastest(key, tiles, launch, outputs)
        _tile_cache.save(text, asdict(known))
    _chosen[key] = known
    return known


def _fastest(key: Key, tiles: Sequence[Tile], launch: Callable[[Tile], Any], outputs: Sequence[torch.Tensor]) -> Tile:
    times_ms: dict[Tile, float] = {}
    trouble: Exception | None = None
    expected: list[torch.Tensor] = []
    for tile in tiles:
        if (key, tile) in _failed:
            continue
        try:
            launch(tile)
        except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
            # MLIR passes report their failure as a plain RuntimeError.
            if isinstance(error, RuntimeError) and "PassManager::run failed" not in str(error):
                raise
            _failed.add((key, tile))
            trouble = error
            continue
        expected = expected or [output.clone() for output in outputs]
        if (tile.flatten or tile.warp_specialize) and not _agree(expected, outputs):
            _failed.add((key, tile))
            continue
        times_ms[tile] = measure_ms(partial(launch, tile))
    if not times_ms:
        raise RuntimeError(f"no tile of the kernel {key[2]!r} compiles on {key[0]}") from trouble
    return min(times_ms, key=times_ms.__getitem__)


def _agree(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> bool:
    pairs = zip(expected, found, strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True) for a, b in pairs)


def measure_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds of `run` on the GPU."""
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
