"""`tcopd demo`: G-OPD and TC-OPD on the miniature, from the same start, with a report."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from tcopd_fast.commands import run_eval
from tcopd_fast.config_io import load_config
from tcopd_fast.errors import UserError
from tcopd_fast.report import format_short_table, summary_table, write_report

CONFIG = Path(__file__).parent / "miniature" / "miniature.yaml"
RUNS = {"g_opd": ["objective.lambdas.anti_expert=0"], "tc_opd": []}
BASELINES = {"expert": "miniature:expert", "anti_expert": "miniature:anti_expert"}
MARKER = ".tcopd-demo"


def run_demo(out: Path, steps: int | None) -> int:
    """Train both runs, evaluate the teachers beside them, write OUT/report.html and print the table.

    OUT is replaced when an earlier demo made it; any other non-empty folder is refused with UserError.
    Returns the exit status of the first run that failed, else 0.
    """
    from tcopd_fast.launcher import launch, read_options

    began = time.monotonic()
    shared = [f"steps={steps}"] if steps is not None else []
    config = load_config(CONFIG, shared)
    _fresh(out)
    sampling = [
        f"rollout.max_new_tokens={config.rollout.max_new_tokens}",
        f"data.max_prompt_tokens={config.data.max_prompt_tokens}",
        f"eval.samples={config.eval.samples}",
    ]
    held_out = [source.path for source in config.eval.data]
    for name, path in BASELINES.items():
        print(f"== {name}: evaluating ({path})", flush=True)
        run_eval(path, held_out, out / name, sampling, name=None, split=None)
    for name, overrides in RUNS.items():
        words = [f"run_dir={out / name}", *shared, *overrides]
        lambdas = load_config(CONFIG, words).objective.lambdas
        print(f"== {name}: training with λ = {lambdas}", flush=True)
        status = launch(read_options("", 1), ["--config", str(CONFIG), *words])
        if status:
            return status
    runs = [out / name for name in (*RUNS, *BASELINES)]
    report = write_report(runs, out / "report.html")
    print(format_short_table(summary_table(runs), teacher=next(iter(BASELINES))))
    print(f"demo finished in {(time.monotonic() - began) / 60:.1f} min; report: {report.resolve()}")
    return 0


def _fresh(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UserError(f"--out {out}: not empty and not from an earlier demo; give another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
