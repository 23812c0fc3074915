"""Predictions for Qwen3-4B with 1 to 8 teachers on 8 GPUs of 80 GB, from configs/qwen3_4b_math.yaml. Nothing is run.

    python bench/plan_qwen3_4b.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from plan_report import QWEN_JSON, ROOT, write_blocks

from tcopd_fast.config_io import load_config
from tcopd_fast.plan.build import Plan, make_plan
from tcopd_fast.plan.devices import GB, GPUS, Cluster
from tcopd_fast.plan.report import plan_json
from tcopd_fast.rundir import environment

CONFIG, SHAPE, GPU = "configs/qwen3_4b_math.yaml", "bench/shapes/qwen3_4b", "h100"
RANKS, MEMORY, PROMPT, RESPONSE = 8, 80 * GB, 256.0, 4096.0
TEACHERS = (1, 2, 4, 8)
PLACEMENTS = ("auto", "resident", "sharded", "offload")


def predict(teachers: int, placement: str) -> Plan:
    """auto: as `tcopd plan` recommends."""
    config = load_config(ROOT / CONFIG, [f"scoring.placement={placement}"], installed=False)
    return make_plan(
        config,
        Cluster(RANKS, MEMORY),
        GPUS[GPU],
        folders={"": str(ROOT / SHAPE)},
        teachers=teachers,
        prompt=PROMPT,
        response=RESPONSE,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=QWEN_JSON, metavar="FILE")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = [
        {"teachers": count, "asked": placement, **plan_json(predict(count, placement), CONFIG, GPU)}
        for count in TEACHERS
        for placement in PLACEMENTS
    ]
    about = environment()
    about |= {"command": f"python bench/{about['command']}"}
    result = {"prediction": True, "environment": about, "shape": SHAPE, "rows": rows}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {arguments.json}")
    if arguments.json == QWEN_JSON:
        write_blocks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
