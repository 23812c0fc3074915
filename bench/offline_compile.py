"""Compile every Triton kernel variant without a GPU and report registers, spills, shared memory and instructions.

    PYTHONPATH=kernels python bench/offline_compile.py [--json OUT] [--archs 80 90 gfx942] [--only SUBSTRING]
        [--hot] [--jobs 2]

The variants come from the `specs` of each offline_<family>.py beside this file. Registers and spills come from the
ptxas log of the compile itself, on AMD from the metadata of the assembly, shared memory from Triton's metadata, the
instructions in use from the PTX or the assembly. Exits with status 1 if a hot variant (the ones that a default call
may run) spills registers, or any variant needs more shared memory than a block may have on its architecture.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import io
import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import triton
from offline_spec import Spec
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

Arch = int | str
SHARED_LIMIT_BYTES: dict[Arch, int] = {
    80: 163 << 10, 90: 227 << 10, 100: 227 << 10, "gfx90a": 64 << 10, "gfx942": 64 << 10,
}  # fmt: skip
NOT_FAMILIES = ("offline_compile", "offline_spec")


@cache
def all_specs(archs: tuple[Arch, ...]) -> dict[str, Spec]:
    """name -> variant, of all families. Raises ValueError for a name that occurs twice."""
    specs: dict[str, Spec] = {}
    for path in sorted(Path(__file__).parent.glob("offline_*.py")):
        if path.stem in NOT_FAMILIES:
            continue
        for spec in importlib.import_module(path.stem).specs(list(archs)):
            if spec.name in specs:
                raise ValueError(f"{path.name}: two variants are called {spec.name!r}")
            specs[spec.name] = spec
    return specs


def compile_and_inspect(spec: Spec) -> dict[str, Any]:
    """Registers per thread, spilled bytes per thread, bytes of shared memory and the matrix instructions in use."""
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    divisible = {(index,): [["tt.divisibility", 16]] for index in divisible_arguments(spec)}
    ast = ASTSource(fn=spec.kernel, signature=spec.signature, constexprs=spec.constants, attrs=divisible)
    amd = isinstance(spec.arch, str)
    target = GPUTarget("hip", spec.arch, 64) if amd else GPUTarget("cuda", spec.arch, 32)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(ast, target=target, options=spec.options)
    found = inspect_amdgcn(compiled.asm["amdgcn"]) if amd else inspect_ptx(compiled.asm["ptx"], log.getvalue())
    return found | {"shared_bytes": compiled.metadata.shared}


def divisible_arguments(spec: Spec) -> Iterator[int]:
    """Arguments that are multiples of 16 in an aligned call: pointers, D and the row strides."""
    for index, name in enumerate(spec.kernel.arg_names):
        kind = spec.signature[name]
        aligned_number = name == "D" or name.endswith(("_D", "_stride"))
        if kind.startswith("*") or (aligned_number and kind in ("i32", "i64")):
            yield index


def inspect_ptx(ptx: str, ptxas_log: str) -> dict[str, Any]:
    registers = re.search(r"Used (\d+) registers", ptxas_log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_log)
    if registers is None or spills is None:
        raise RuntimeError(f"no register counts in the ptxas log of triton {triton.__version__}:\n{ptxas_log}")
    wgmma = re.search(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", ptx)
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", ptx)
    return {
        "registers": int(registers[1]),
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "wgmma": wgmma[1] if wgmma else None,
        # Groups of products still under way when the loop goes on: 0 means that loads and products take turns.
        "wgmma_in_flight": max(map(int, waits), default=None) if wgmma else None,
        "tcgen05": "tcgen05.mma" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        "mma_sync": "mma.sync" in ptx,
        "mfma": False,
    }


def inspect_amdgcn(asm: str) -> dict[str, Any]:
    counts = {name: re.search(rf"\.{name}: +(\d+)", asm) for name in ("vgpr_count", "vgpr_spill_count")}
    if not all(counts.values()):
        raise RuntimeError(f"no register counts in the assembly of triton {triton.__version__}")
    vgprs, spilled = (int(match[1]) for match in counts.values() if match)
    none_of = {"wgmma": None, "wgmma_in_flight": None, "tcgen05": False, "tma": False, "mma_sync": False}
    return {"registers": vgprs, "spill_bytes": 4 * spilled, **none_of, "mfma": "v_mfma" in asm}


def faults_of(spec: Spec, found: dict[str, Any]) -> list[str]:
    faults = ["spills"] if spec.hot and found["spill_bytes"] else []
    return faults + ["shared memory"] * (found["shared_bytes"] > SHARED_LIMIT_BYTES[spec.arch])


def table_row(spec: Spec, found: dict[str, Any]) -> dict[str, Any]:
    faults = faults_of(spec, found)
    used = [key for key in ("tcgen05", "tma", "mma_sync", "mfma") if found[key]]
    used = [f"wgmma {found['wgmma']}"] * bool(found["wgmma"]) + used
    print(
        f"{spec.name:66} {'hot' if spec.hot else '':3} {found['registers']:4} {found['spill_bytes']:7} "
        f"{found['shared_bytes'] / 1024:8.1f}  {', '.join(used)}{'  FAULT: ' + ', '.join(faults) if faults else ''}",
        flush=True,
    )
    constants = {name: value for name, value in spec.constants.items() if value is not None}
    variant = {"kernel": spec.kernel.__name__, "options": spec.options, "constants": constants}
    return {"name": spec.name, "arch": spec.arch, "hot": spec.hot, **found, "faults": faults, "variant": variant}


def run(archs: list[Arch], only: str, hot: bool, jobs: int) -> list[dict[str, Any]]:
    specs = [spec for spec in all_specs(tuple(archs)).values() if only in spec.name and spec.hot >= hot]
    print(f"{'variant':66} {'':3} {'regs':>4} {'spill B':>7} {'smem KiB':>8}  instructions")
    return [table_row(spec, found) for spec, found in zip(specs, _inspected(specs, archs, jobs), strict=True)]


def _inspected(specs: list[Spec], archs: list[Arch], jobs: int) -> Iterable[dict[str, Any]]:
    if jobs == 1:
        yield from map(compile_and_inspect, specs)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_inspect_by_name, [tuple(archs)] * len(specs), [spec.name for spec in specs])


def _inspect_by_name(archs: tuple[Arch, ...], name: str) -> dict[str, Any]:
    """In a worker: Triton's functions do not travel between processes."""
    return compile_and_inspect(all_specs(archs)[name])


def arch_of(text: str) -> Arch:
    return int(text) if text.isdecimal() else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the table as JSON")
    known = list(SHARED_LIMIT_BYTES)
    parser.add_argument("--archs", type=arch_of, nargs="+", default=known, choices=known)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only variants whose name contains it")
    parser.add_argument("--hot", action="store_true", help="only the variants that a default call runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile side by side (default 1)")
    args = parser.parse_args()
    rows = run(args.archs, args.only, args.hot, args.jobs)
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
        args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
