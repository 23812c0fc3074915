"""Tables in kernels/README.md and README.md and the plots, from what kernel_bench.py wrote.

    python bench/kernel_report.py [--json FILE…] [--check]        (default: bench/results/kernels_{gpu,cpu}.json)

The blocks stand between the markers kernels:begin and kernels:end. --check only compares: status 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kernel_suite.report import BEGIN, END, Run, insert, kernels_block, readme_block

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def measured_files() -> list[Path]:
    return [file for file in (RESULTS / "kernels_gpu.json", RESULTS / "kernels_cpu.json") if file.is_file()]


def read(file: Path) -> Run:
    return Run(json.loads(file.read_text(encoding="utf-8")))


def blocks(files: Sequence[Path]) -> dict[Path, str]:
    """The block of each README for the JSON files, which lie in the source tree."""
    found: dict[Path, list[str]] = {ROOT / "kernels" / "README.md": [], ROOT / "README.md": []}
    for file in files:
        run, place = read(file), file.resolve().relative_to(ROOT)
        figures = [str(place.with_name(f"{place.stem}_{plot}.svg")) for plot in ("time", "memory")]
        inner = [f"../{name}" for name in (str(place), *figures)]
        long, short = found.values()
        long.append(kernels_block(run, inner[0], inner[1:]))
        short.append(readme_block(run, str(place), figures))
    return {readme: "\n\n".join(parts) for readme, parts in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, nargs="+", default=measured_files(), metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a README is out of date")
    args = parser.parse_args()
    for file in args.json:
        if not file.is_file():
            parser.error(f"--json {file}: no such file; write it with bench/kernel_bench.py")
    if not args.json:
        parser.error("bench/results has no kernels_*.json; write one with bench/kernel_bench.py")
    found = blocks(args.json)
    if args.check:
        stale = [file for file, block in found.items() if f"{BEGIN}\n{block}\n{END}" not in file.read_text("utf-8")]
        for file in stale:
            print(f"error: {file.relative_to(ROOT)} is out of date; run python bench/kernel_report.py", file=sys.stderr)
        return int(bool(stale))
    from kernel_suite.plots import draw_memory, draw_time

    for file in args.json:
        draw_time(read(file), file.with_name(f"{file.stem}_time.svg"))
        draw_memory(read(file), file.with_name(f"{file.stem}_memory.svg"))
    for readme, block in found.items():
        insert(readme, block)
    return 0


if __name__ == "__main__":
    sys.exit(main())
