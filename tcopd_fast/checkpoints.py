"""Checkpoints: written whole or not at all, checked before use, the last and the best of them kept.

RUN/checkpoints/step_000040/deepspeed/*   model, optimizer and counters, each file written by one rank
RUN/checkpoints/step_000040/manifest.json what belongs to it, with size and SHA-256 of every file; written last
RUN/checkpoints/step_000040.partial       being written or deleted, or left so by a crash; never read
RUN/checkpoints/step_000040.damaged       did not agree with its manifest when a run resumed
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from tcopd_fast.config import Config, nearest
from tcopd_fast.config_sections import CheckpointConfig
from tcopd_fast.dist import World
from tcopd_fast.errors import UserError
from tcopd_fast.types import Prompt

MANIFEST = "manifest.json"
FILES = "deepspeed"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Origin:
    """What a run's checkpoints need beside themselves, by fingerprint.

    prompts: the training prompts. base: the weights below a LoRA student's adapter, None without one.
    """

    prompts: str = ""
    base: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    score: of the evaluation at its step, None without one. prompts, base: its `Origin` (no base: also when written
    by a version that recorded none). files: path within the checkpoint -> what was written there.
    """

    step: int
    world_size: int
    score: float | None
    prompts: str
    files: Mapping[str, FileSum]
    base: str | None = None


def checkpoint_dir(run_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return Path(run_dir) / "checkpoints" / f"step_{step:06d}"


def checkpoint_steps(run_dir: str | Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return [step for step in _folders(run_dir) if (checkpoint_dir(run_dir, step) / MANIFEST).is_file()]


def best_step(run_dir: str | Path) -> int | None:
    """Step of the checkpoint with the best evaluation, the earliest of equals; None when none was evaluated."""
    scores = _scores(run_dir)
    return max(scores, key=lambda step: (scores[step], -step)) if scores else None


def check(config: CheckpointConfig, eval_sets: Collection[str]) -> None:
    """Refuse keys that name no evaluation set. Raises UserError."""
    if config.best_of is not None and config.best_of not in eval_sets:
        raise UserError(
            f"checkpoint.best_of={config.best_of}: no such evaluation set; there are {', '.join(eval_sets) or 'none'}"
            f"{nearest(config.best_of, eval_sets)}"
        )
    if config.keep_best and not eval_sets:
        raise UserError(f"checkpoint.keep_best={config.keep_best}: nothing is evaluated; set eval.data and eval.every")


def score_of(config: Config, means: Mapping[str, float]) -> float | None:
    """What decides which checkpoint is best: mean@k of checkpoint.best_of, else its mean over the sets, if any."""
    if not means:
        return None
    return means[config.checkpoint.best_of] if config.checkpoint.best_of else sum(means.values()) / len(means)


def is_among_best(config: Config, score: float | None) -> bool:
    """Whether checkpoint.keep_best would keep a checkpoint of this score; one that equals an earlier one is not."""
    best = sorted(_scores(config.run_dir).values(), reverse=True)[: config.checkpoint.keep_best]
    return (
        score is not None
        and config.checkpoint.keep_best > 0
        and (len(best) < config.checkpoint.keep_best or score > best[-1])
    )


def save_checkpoint(
    config: Config,
    world: World,
    step: int,
    write: Callable[[Path], Mapping[str, FileSum]],
    score: float | None = None,
    origin: Origin = Origin(),
) -> str | None:
    """Save a checkpoint and delete those not to be kept; None, or why it could not be saved. A collective.

    write(folder): writes this rank's files, gives their sums by path within the folder, and raises OSError on failure;
    called on every rank. Until the new checkpoint is complete, on disk and read back, nothing older is touched.
    """
    final = checkpoint_dir(config.run_dir, step)
    partial = final.with_name(final.name + ".partial")
    problem: str | None = world.on_main(lambda: _problem_of(lambda: _make_empty(partial)))
    if problem is None:
        files: dict[str, FileSum] = {}
        problems: list[str] = []
        for own, own_problem in world.gather(_write_and_read_back(write, partial)):
            files.update(own)
            problems += [own_problem] if own_problem else []
        manifest = Manifest(step, world.size, score, origin.prompts, files, origin.base)
        problem = (
            problems[0] if problems else world.on_main(lambda: _problem_of(lambda: _complete(partial, final, manifest)))
        )
    if problem is not None:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        world.barrier()
        return f"checkpoint {final}: not saved: {problem}"
    if world.is_main:
        _prune(config)
    world.barrier()
    return None


def record_score(run_dir: str | Path, step: int, score: float | None) -> None:
    """Give a checkpoint the score of an evaluation that was made after it was saved."""
    folder = checkpoint_dir(run_dir, step)
    manifest = _read_manifest(folder)
    if isinstance(manifest, Manifest):
        _write_manifest(folder / (MANIFEST + ".partial"), replace(manifest, score=score))
        os.replace(folder / (MANIFEST + ".partial"), folder / MANIFEST)
        _sync_folder(folder)


class Saver:
    """Saves a run's checkpoints, told what every one of them needs.

    failed: saves that failed since the last one that did not.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        write: Callable[[Path], Mapping[str, FileSum]],
        origin: Origin,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._world, self._write, self._origin, self._say = config, world, write, origin, say
        self.failed = 0

    def save(self, step: int, score: float | None = None, must: bool = False) -> None:
        """Save a checkpoint. A failure is told and counted, or if it `must` be saved a UserError. A collective."""
        problem = save_checkpoint(self._config, self._world, step, self._write, score, self._origin)
        if problem is None:
            self.failed = 0
        elif must:
            goes_on = f"make room, then `tcopd train --resume {self._config.run_dir}` goes on from the newest one"
            raise self._world.agreed(f"{problem}; {goes_on}")
        else:
            self.failed += 1
            self._say(f"WARNING: {problem}; training goes on, the next save tries again")


def resume_from(config: Config, world: World, origin: Origin, say: Callable[[str], None]) -> int:
    """Step of the newest checkpoint whose files agree with its manifest; 0 when there is none. A collective.

    Newer ones that do not agree are renamed and named through `say`. Raises UserError when no checkpoint is good, and
    for a checkpoint written with another number of ranks, other training prompts or another base.
    """
    damaged: dict[int, str] = {}
    for step in reversed(world.on_main(lambda: _folders(config.run_dir))):
        folder = checkpoint_dir(config.run_dir, step)
        manifest = world.on_main(lambda folder=folder: _read_manifest(folder))  # type: ignore[misc]
        if isinstance(manifest, str):
            damaged[step] = manifest
            continue
        if manifest.world_size != world.size:
            raise world.agreed(
                f"{folder}: written by {manifest.world_size} ranks, resumed with {world.size}; "
                f"start {manifest.world_size} ranks"
            )
        names = sorted(manifest.files)[world.rank :: world.size]
        found = [_difference(folder / name, manifest.files[name]) for name in names]
        problems = [problem for share in world.gather(found) for problem in share if problem]
        if problems:
            damaged[step] = problems[0]
            continue
        if manifest.prompts != origin.prompts:
            raise world.agreed(
                f"{folder}: the training prompts are not those that the run began with, so its data order cannot be "
                "continued; restore the files of data.train, or begin a new run from `tcopd export`"
            )
        if problem := other_base(folder, origin.base, config.model.path):
            raise world.agreed(problem)
        world.on_main(lambda: _set_aside(config.run_dir, damaged, say))
        return step
    if damaged:
        raise world.agreed(
            f"{Path(config.run_dir) / 'checkpoints'}: no checkpoint is good "
            f"({'; '.join(f'step {step}: {problem}' for step, problem in damaged.items())}); "
            "delete that folder to begin again from step 0"
        )
    world.on_main(lambda: _set_aside(config.run_dir, {}, say))
    return 0


def other_base(folder: Path, base: str | None, model_path: str) -> str | None:
    """Why a checkpoint's adapter does not belong on `model_path`, of fingerprint `base`; None when it does."""
    manifest = _read_manifest(folder)
    recorded = manifest.base if isinstance(manifest, Manifest) else None
    if recorded is None or base is None or recorded == base:
        return None
    return (
        f"{folder}: holds a LoRA adapter alone, trained on weights of SHA-256 {recorded[:12]}…, but "
        f"model.path {model_path} holds {base[:12]}…; restore those weights, or resume with model.path=THEIR_FOLDER"
    )


def write_file(path: Path, dump: Callable[[Any], None]) -> FileSum:
    """Write a file through `dump(stream)`, force it to disk, and sum what was written. Raises OSError."""
    with path.open("wb") as file:
        summed = _Summed(file)
        try:
            dump(summed)
        except RuntimeError as error:
            # torch.save answers a write that failed with an error of its own.
            raise summed.error or error from error
        file.flush()
        os.fsync(file.fileno())
    return FileSum(summed.bytes, summed.sha256.hexdigest())


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """SHA-256 over the ids, domains and token ids of prompts in order: equal for equal training data."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id}\n{prompt.domain}\n{len(prompt.token_ids)}\n".encode("utf-8", "replace"))
        digest.update(array("q", prompt.token_ids).tobytes())
    return digest.hexdigest()


class _Summed:
    """A binary stream that sums what passes through it. error: the last write's, if it failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _folders(run_dir: str | Path) -> list[int]:
    matches = [re.fullmatch(r"step_(\d+)", path.name) for path in (Path(run_dir) / "checkpoints").glob("step_*")]
    return sorted(int(match[1]) for match in matches if match)


def _problem_of(work: Callable[[], None]) -> str | None:
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / FILES).mkdir(parents=True)


def _write_and_read_back(
    write: Callable[[Path], Mapping[str, FileSum]], folder: Path
) -> tuple[Mapping[str, FileSum], str | None]:
    """This rank's sums and, when it failed, why."""
    try:
        sums = write(folder)
    except OSError as error:
        return {}, error.strerror or str(error)
    problems = [problem for name, expected in sums.items() if (problem := _difference(folder / name, expected))]
    return sums, problems[0] if problems else None


def _complete(partial: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest and give the checkpoint its name, each step on disk before the next."""
    _write_manifest(partial / MANIFEST, manifest)
    for folder in {partial, *((partial / name).parent for name in manifest.files)}:
        _sync_folder(folder)
    os.replace(partial, final)
    _sync_folder(final.parent)


def _write_manifest(path: Path, manifest: Manifest) -> None:
    text = json.dumps(asdict(manifest), indent=1) + "\n"
    write_file(path, lambda stream: stream.write(text.encode()))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(folder: Path) -> Manifest | str:
    """The manifest, or what is wrong with it."""
    try:
        tree = json.loads((folder / MANIFEST).read_bytes())
        return Manifest(**{**tree, "files": {name: FileSum(**entry) for name, entry in tree["files"].items()}})
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} cannot be read"


def _difference(path: Path, expected: FileSum) -> str | None:
    """What is wrong with a file, or None."""
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return f"{path.name} has {size} bytes instead of {expected.bytes}"
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None if digest.hexdigest() == expected.sha256 else f"{path.name} has not the SHA-256 it was written with"


def _set_aside(run_dir: str, damaged: Mapping[int, str], say: Callable[[str], None]) -> None:
    """Rename damaged checkpoints, and delete what a crash left half-written or half-deleted."""
    for step, problem in damaged.items():
        folder = checkpoint_dir(run_dir, step)
        aside = folder.with_name(folder.name + ".damaged")
        number = 2
        while aside.exists():
            aside = folder.with_name(f"{folder.name}.damaged{number}")
            number += 1
        os.replace(folder, aside)
        say(f"checkpoint {folder} is damaged: {problem}; set aside as {aside.name}, going on from the one before")
    for left in (Path(run_dir) / "checkpoints").glob("step_*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _scores(run_dir: str | Path) -> dict[int, float]:
    manifests = [_read_manifest(checkpoint_dir(run_dir, step)) for step in checkpoint_steps(run_dir)]
    return {m.step: m.score for m in manifests if isinstance(m, Manifest) and m.score is not None}


def _prune(config: Config) -> None:
    """Delete the checkpoints that neither keep_last nor keep_best keeps."""
    scores = _scores(config.run_dir)
    best = sorted(scores, key=lambda step: (-scores[step], step))[: config.checkpoint.keep_best]
    for step in checkpoint_steps(config.run_dir)[: -config.checkpoint.keep_last]:
        if step not in best:
            folder = checkpoint_dir(config.run_dir, step)
            # Renamed first: what is half-deleted must not look like a checkpoint.
            going = folder.with_name(folder.name + ".partial")
            os.replace(folder, going)
            shutil.rmtree(going, ignore_errors=True)
