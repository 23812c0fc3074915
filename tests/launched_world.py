"""A program for launchers to start: every rank writes what it knows of the others to RANK.json in a folder.

The last rank to leave writes late; each writes to RANK.left what it found when it had left.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from tcopd_fast.dist import init_world

if __name__ == "__main__":
    world = init_world(60)
    seen = {"ranks": world.gather(world.rank), "ranks_here": world.ranks_here, "local_rank": os.environ["LOCAL_RANK"]}
    folder = Path(sys.argv[-1])
    time.sleep(1.0 if world.rank == world.size - 1 else 0.0)
    (folder / f"{world.rank}.json").write_text(json.dumps(seen))
    world.leave()
    (folder / f"{world.rank}.left").write_text(f"{len(list(folder.glob('*.json')))} {dist.is_initialized()}")
