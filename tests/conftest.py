from __future__ import annotations

import json
import os

import pytest
from tiny import Tiny, make_model, make_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """Checkpoints on disk, shared by the whole session (read only)."""
    root = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    for name, seed, rows in (("student", 0, 24), ("expert", 1, 24), ("anti", 2, 24), ("padded", 1, 40)):
        make_model(seed, rows).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [
        {"id": f"p{i}", "problem": f"{i}+{i % 7}", "answer": str(i + i % 7), "domain": "odd" if i % 2 else "even"}
        for i in range(24)
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Tiny(root, root / "student", root / "expert", root / "anti", root / "padded", root / "prompts.jsonl")


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """A run of `interrupted` that nothing happened to (read only)."""
    from forked import run_forked
    from interrupted import config_of
    from running import lines

    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_forked(config_of(tiny, run_dir), run_dir.with_name("log"))
    assert [row["step"] for row in lines(run_dir / "metrics.jsonl")] == list(range(1, 41))
    return run_dir
