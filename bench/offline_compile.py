"""Compile every Triton kernel variant for sm_80, sm_90 and sm_100 without a GPU and report what ptxas says.

    PYTHONPATH=kernels python bench/offline_compile.py [--json OUT] [--archs 80 90 100] [--only SUBSTRING]

Registers and spills come from the ptxas log of the compile itself, shared memory from Triton's metadata, the
instructions in use from the PTX. Exits with status 1 if a hot variant (the ones that a default call runs)
spills registers, or any variant needs more shared memory than a block may have on its architecture.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from tcopd_kernels._triton_backward import dlogits_kernel
from tcopd_kernels._triton_common import Tile, candidate_tiles, compile_options, launch_options
from tcopd_kernels._triton_forward import combine_kernel, forward_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
ROWS = {"N<=16": 16, "N<=64": 64, "N>64": 8192}
FP32_VECTORS = ("lse", "g", "c_1", "c_2", "bias_parts", "split_max", "split_sum", "split_dot", "target_logit")
FP32_SCALARS = ("inv_temperature", "softcap", "scale")
FEATURES = {  # name: (entropy, bias and softcap, bias gradient)
    "plain": (False, False, False),
    "entropy": (True, False, False),
    "full": (True, True, True),
}


@dataclass(frozen=True)
class Variant:
    kernel: str
    arch: int
    dtype: str
    rows: str
    features: str
    tma: bool
    tile: Tile

    @property
    def hot(self) -> bool:
        """What a default call on this architecture runs; fp32 is a correctness path."""
        return self.dtype != "fp32" and self.features != "full" and self.tma == (self.arch >= 90)

    @property
    def name(self) -> str:
        shape = f"{self.tile.block_m}x{self.tile.block_n}x{self.tile.block_k}"
        options = f"w{self.tile.num_warps}s{self.tile.num_stages}"
        path = "tma" if self.tma else "ptr"
        return f"sm_{self.arch}/{self.kernel}/{self.dtype}/{self.features}/{path}/{shape}/{options}"


def variants(archs: list[int]) -> Iterator[Variant]:
    """Every bf16 tile, with and without entropy, on its architecture's path; the rest on default tiles."""
    for arch, kernel in itertools.product(archs, ("forward", "dlogits")):
        own_path = arch >= 90
        for (rows, N), features in itertools.product(ROWS.items(), ("plain", "entropy")):
            for tile in candidate_tiles(arch, 2, N, features == "entropy"):
                yield Variant(kernel, arch, "bf16", rows, features, own_path, tile)
        default = candidate_tiles(arch, 2, ROWS["N>64"], True)[0]
        yield Variant(kernel, arch, "bf16", "N>64", "full", own_path, default)
        yield Variant(kernel, arch, "fp16", "N>64", "plain", own_path, default)
        if own_path:
            yield Variant(kernel, arch, "bf16", "N>64", "plain", False, default)
        for tile in candidate_tiles(arch, 4, ROWS["N>64"], False):
            yield Variant(kernel, arch, "fp32", "N>64", "plain", own_path, tile)


def source(variant: Variant) -> tuple[ASTSource, dict[str, Any]]:
    """Triton source and compile options of a variant, specialised for 16-byte aligned arguments."""
    kernel = {"forward": forward_kernel, "dlogits": dlogits_kernel}[variant.kernel]
    entropy, bias_and_softcap, bias_grad = FEATURES[variant.features]
    options = compile_options(variant.tile.num_warps, variant.tile.num_stages)
    constants: dict[str, Any] = launch_options(variant.tile) | {
        "HAS_BIAS": bias_and_softcap,
        "HAS_SOFTCAP": bias_and_softcap,
        "HAS_ENTROPY": entropy,
        "BIAS_GRAD": bias_grad,
        "USE_TMA": variant.tma,
        "PRECISION": "ieee",
    }
    absent = {"bias": bias_and_softcap, "bias_parts": bias_grad, "c_2": entropy, "split_dot": entropy}
    constants |= {name: None for name, present in absent.items() if not present}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else _argument_type(name, variant) for name in kernel.arg_names
    }
    return _ast_source(kernel, signature, constants), options


def _argument_type(name: str, variant: Variant) -> str:
    tile = variant.tile
    if name in ("hidden", "weight") and variant.tma:
        block = tile.block_m if name == "hidden" else tile.block_n
        return f"tensordesc<{variant.dtype}[{block}, {tile.block_k}]>"
    if name in ("hidden", "weight", "bias", "dlogits"):
        return f"*{variant.dtype}"
    if name == "targets":
        return "*i64"
    if name in FP32_VECTORS:
        return "*fp32"
    return "fp32" if name in FP32_SCALARS else "i32"


def _ast_source(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    aligned = ("D", "hidden_stride", "weight_stride", "dlogits_stride")
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name in aligned and signature[name] == "i32")
    }
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)


def combine_source() -> ASTSource:
    constants = {"HAS_ENTROPY": True, "BLOCK": 128}
    integers = {"N": "i32", "num_splits": "i32"}
    signature = {
        name: "constexpr" if name in constants else integers.get(name, "*fp32")
        for name in combine_kernel.arg_names
    }
    return _ast_source(combine_kernel, signature, constants)


def compile_and_inspect(ast: ASTSource, arch: int, options: dict[str, Any]) -> dict[str, Any]:
    """Compile for `arch`; registers per thread, spilled bytes, shared memory in bytes and instruction use."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    if registers is None or spills is None:
        raise RuntimeError(
            f"no register counts in the ptxas log of triton {triton.__version__}:\n{log.getvalue()}"
        )
    ptx = compiled.asm["ptx"]
    wgmma = re.search(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", ptx)
    return {
        "registers": int(registers[1]),
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": wgmma[1] if wgmma else None,
        "tcgen05": "tcgen05.mma" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        "mma_sync": "mma.sync" in ptx,
    }


def run(archs: list[int], only: str) -> list[dict[str, Any]]:
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    rows = []
    print(f"{'variant':62} {'regs':>4} {'spill B':>7} {'smem KiB':>8}  instructions")
    for variant in variants(archs):
        if only in variant.name:
            ast, options = source(variant)
            rows.append(
                _row(variant.name, variant.arch, variant.hot, compile_and_inspect(ast, variant.arch, options))
            )
            rows[-1]["variant"] = asdict(variant)
    for arch in archs:
        name = f"sm_{arch}/combine"
        if only in name:
            rows.append(
                _row(name, arch, True, compile_and_inspect(combine_source(), arch, compile_options(4, 1)))
            )
    return rows


def _row(name: str, arch: int, hot: bool, found: dict[str, Any]) -> dict[str, Any]:
    faults = []
    if hot and found["spill_bytes"]:
        faults.append("spills")
    if found["shared_bytes"] > SHARED_LIMIT_BYTES[arch]:
        faults.append("shared memory")
    used = [key for key in ("tcgen05", "tma", "mma_sync") if found[key]]
    used = [f"wgmma {found['wgmma']}"] * bool(found["wgmma"]) + used
    print(
        f"{name:62} {found['registers']:4} {found['spill_bytes']:7} {found['shared_bytes'] / 1024:8.1f}  "
        f"{', '.join(used)}{'  FAULT: ' + ', '.join(faults) if faults else ''}",
        flush=True,
    )
    return {"name": name, "arch": arch, "hot": hot, **found, "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the table as JSON")
    parser.add_argument(
        "--archs", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_LIMIT_BYTES)
    )
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="only variants whose name contains it"
    )
    args = parser.parse_args()
    rows = run(args.archs, args.only)
    if not rows:
        parser.error(f"--only {args.only!r} matches no variant")
    if args.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
        report = {
            "device": "offline compile, no GPU",
            "triton": triton.__version__,
            "commit": commit,
            "command": " ".join(["python", "bench/offline_compile.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
