"""The judge of every domain: math-verify, exact match, tests in a sandbox, or a function of the user's own."""

from __future__ import annotations

import importlib
import json
import re
import secrets
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from tcopd_fast import sandbox
from tcopd_fast.config_sections import JudgeConfig
from tcopd_fast.errors import UserError
from tcopd_fast.types import Prompt, Rollout
from tcopd_fast.verify import MEMORY_BYTES, Judge, Worker, ask_all, boxed_answer

_FENCE = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


class DomainJudge(Protocol):
    """Verdicts for (response, reference answer) pairs, in order."""

    def many(self, pairs: Sequence[tuple[str, str]]) -> list[bool]: ...

    def close(self) -> None: ...


class Judges:
    """One judge per kind in use, each started when the first sample needs it."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self._judges: dict[str, DomainJudge] = {}

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raises UserError when a judge that these prompts need cannot work here, or has no use for their answers."""
        for prompt in prompts:
            if prompt.answer is not None:
                kind = self.kind(prompt.domain)
                self._judge(kind)
                if kind == "code":
                    code_tests(prompt.answer)

    def kind(self, domain: str) -> str:
        """math, exact, code, or MODULE:FUNCTION."""
        return self.config.domains.get(domain, self.config.default)

    def rollouts(self, rollouts: Sequence[Rollout]) -> list[bool | None]:
        """The verdict on each rollout by its domain's judge; None where the prompt has no reference answer."""
        verdicts: list[bool | None] = [None] * len(rollouts)
        by_kind: dict[str, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            if rollout.prompt.answer is not None:
                by_kind.setdefault(self.kind(rollout.prompt.domain), []).append(i)
        for kind, indices in by_kind.items():
            pairs = [(rollouts[i].text, rollouts[i].prompt.answer or "") for i in indices]
            for i, verdict in zip(indices, self._judge(kind).many(pairs), strict=True):
                verdicts[i] = verdict
        return verdicts

    def close(self) -> None:
        """End worker processes; a later call starts new ones."""
        for judge in self._judges.values():
            judge.close()

    def __enter__(self) -> Judges:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _judge(self, kind: str) -> DomainJudge:
        if kind not in self._judges:
            self._judges[kind] = _make(kind, self.config)
        return self._judges[kind]


def _make(kind: str, config: JudgeConfig) -> DomainJudge:
    if kind == "math":
        return Judge(workers=config.workers, timeout_s=config.timeout_s)
    if kind == "exact":
        return ExactJudge()
    if kind == "code":
        limits = sandbox.Limits(config.code_timeout_s, max(1, round(config.code_timeout_s)), config.code_memory_bytes)
        return CodeJudge(config.workers, limits)
    return FunctionJudge(kind, config.workers, config.timeout_s)


class ExactJudge:
    r"""Equal text, but for surrounding and repeated blanks: the last \boxed{…} of the response, else its last line."""

    def many(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [_words(_final(response)) == _words(boxed_answer(answer) or answer) for response, answer in pairs]

    def close(self) -> None:
        """Nothing is held."""


def _final(response: str) -> str:
    boxed = boxed_answer(response)
    if boxed is not None:
        return boxed
    lines = response.strip().splitlines()
    return lines[-1] if lines else ""


def _words(text: str) -> list[str]:
    return text.split()


class FunctionJudge:
    """A user's function (response, answer) -> bool, by import path `package.module:function`.

    It runs in `workers` processes of its own, each verdict within timeout_s seconds and memory_bytes beyond what its
    module takes. A response on which it raises an exception, or breaks a limit, counts as wrong; the first is reported.
    """

    def __init__(self, path: str, workers: int, timeout_s: float, memory_bytes: int = MEMORY_BYTES) -> None:
        module, _, name = path.partition(":")
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"judge {path}: cannot be imported ({error}); give MODULE:FUNCTION of a module on the Python path"
            ) from error
        self._path, self._timeout_s, self._warned = path, timeout_s, False
        self._workers = [Worker(timeout_s, memory_bytes, path) for _ in range(workers)]

    def many(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        replies = ask_all(self._workers, Worker.reply, pairs)
        troubles = [self._trouble(reply) for reply in replies if reply not in ("0", "1")]
        if troubles and not self._warned:
            warnings.warn(f"judge {self._path}: {troubles[0]} on a response, counted as wrong", stacklevel=2)
            self._warned = True
        return [reply == "1" for reply in replies]

    def _trouble(self, reply: str | None) -> str:
        if reply is None:
            return f"no verdict within judge.timeout_s={self._timeout_s:g} s and its memory limit"
        return reply.removeprefix("0 ")

    def close(self) -> None:
        """End the worker processes; a later call starts new ones."""
        for worker in self._workers:
            worker.stop()


class CodeJudge:
    """Runs the response's program against tests, each in a sandbox of its own (`tcopd_fast.sandbox`).

    The program is the last ``` block of the response, else all of it. The reference answer is JSON:

        {"inputs": […], "outputs": […]}                     standard input -> expected standard output
        {"fn_name": "f", "inputs": [[…], …], "outputs": […]}  arguments -> expected return value
        ["assert f(1) == 2", …]                             statements to run after the program

    or, if it is no JSON, Python source to run after the program. All tests must pass.
    """

    def __init__(self, workers: int, limits: sandbox.Limits) -> None:
        if reason := sandbox.obstacle():
            raise UserError(
                f"judge code: generated programs cannot be confined here: {reason}; use another machine or judge"
            )
        try:
            trial = sandbox.run("print(1)", limits=limits)
        except RuntimeError as error:
            raise UserError(f"judge code: generated programs cannot be confined here: {error}") from error
        if trial.stdout != "1\n":
            raise UserError(
                f"judge code: a program that prints 1 does not run within its limits ({trial.stderr.strip()[-200:]}); "
                "raise judge.code_timeout_s or judge.code_memory_bytes"
            )
        self._limits, self._workers = limits, workers

    def many(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        if len(pairs) <= 1 or self._workers == 1:
            return [self._one(*pair) for pair in pairs]
        with ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(lambda pair: self._one(*pair), pairs))

    def _one(self, response: str, answer: str) -> bool:
        program = program_of(response)
        return bool(program.strip()) and all(self._passes(program, test) for test in code_tests(answer))

    def _passes(self, program: str, test: CodeTest) -> bool:
        # What follows the program ends in a word that the program cannot foresee: leaving early is not passing.
        word = secrets.token_hex(16)
        outcome = sandbox.run(f"{program}\n{test.epilogue}\nprint('\\n{word}')\n", test.stdin, self._limits)
        printed, reached, _ = outcome.stdout.rpartition(word)
        if outcome.status != 0 or not reached:
            return False
        if test.value is not None:
            return _json(printed.strip().rpartition("\n")[2]) == test.value
        return test.stdout is None or _lines(printed) == _lines(test.stdout)

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class CodeTest:
    """One run of a program: source to run after it, its standard input, and what must come out.

    stdout: expected standard output, or None for any. value: [v] with the JSON value that the epilogue must print
    last, or None for none.
    """

    epilogue: str
    stdin: str
    stdout: str | None
    value: list[Any] | None


def program_of(response: str) -> str:
    """The last fenced block of a response, or all of it."""
    blocks = _FENCE.findall(response)
    return blocks[-1] if blocks else response


def code_tests(answer: str) -> list[CodeTest]:
    """The tests that a reference answer describes (see CodeJudge). Raises UserError when it describes none."""
    spec = _json(answer)
    if isinstance(spec, list) and spec and all(isinstance(line, str) for line in spec):
        return [CodeTest("\n".join(spec), "", None, None)]
    if isinstance(spec, dict) and len(spec.get("inputs", ())) == len(spec.get("outputs", ())) > 0:
        cases = list(zip(spec["inputs"], spec["outputs"], strict=True))
        if name := spec.get("fn_name"):
            # Competitive programming sites define the function in a class of this name.
            find = f"_f = Solution().{name} if 'Solution' in dir() else {name}\nimport json as _json\n"
            return [
                CodeTest(
                    f"{find}print('\\n' + _json.dumps([_f(*_json.loads({json.dumps(args)!r}))]))", "", None, [value]
                )
                for args, value in cases
            ]
        return [CodeTest("", str(given), str(expected), None) for given, expected in cases]
    if spec is None and answer.strip():
        return [CodeTest(answer, "", None, None)]
    raise UserError(
        f"judge code: the reference answer {answer[:80]!r} has no tests; give inputs and outputs of equal number, "
        "a list of assert statements, or Python source"
    )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]
