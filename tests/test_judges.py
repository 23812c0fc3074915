"""A judge per domain; generated programs run confined, and what a program may not do fails."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import types

import pytest
import torch

from tcopd_fast import sandbox
from tcopd_fast.config_sections import JudgeConfig
from tcopd_fast.errors import UserError
from tcopd_fast.judges import CodeJudge, ExactJudge, FunctionJudge, Judges, code_tests, program_of
from tcopd_fast.types import Prompt, Rollout

LIMITS = sandbox.Limits(wall_s=10.0, cpu_s=5, memory_bytes=512 << 20)


@pytest.fixture(scope="module")
def code():
    return CodeJudge(workers=2, limits=LIMITS)


def fenced(program: str) -> str:
    return f"Here it is.\n```python\n{program}\n```\nDone."


def verdict(code, program, answer):
    return code.many([(fenced(program), answer if isinstance(answer, str) else json.dumps(answer))])[0]


STDIO = {"inputs": ["1 2\n", "5 6\n"], "outputs": ["3\n", "11"]}
FUNCTION = {"fn_name": "f", "inputs": [[1, 2], [5, 6]], "outputs": [3, 11]}


@pytest.mark.parametrize(
    ("program", "answer", "expected"),
    [
        ("print(sum(map(int, input().split())))", STDIO, True),
        ("print(3)", STDIO, False),
        ("print(sum(map(int, input().split())), 'extra')", STDIO, False),
        ("def f(a, b):\n    return a + b", FUNCTION, True),
        ("class Solution:\n    def f(self, a, b):\n        return a + b", FUNCTION, True),
        ("def f(a, b):\n    print('noise')\n    return a + b", FUNCTION, True),
        ("def f(a, b):\n    return 3", FUNCTION, False),
        ("def f(a, b):\n    return a + b", ["assert f(1, 2) == 3", "assert f(0, 0) == 0"], True),
        ("def f(a, b):\n    return a - b", ["assert f(1, 2) == 3"], False),
        ("def f(a, b):\n    return a + b", "for i in range(9):\n    assert f(i, 1) == i + 1", True),
        ("import os\nos._exit(0)", ["assert False"], False),
        ("import sys\nprint('done')\nsys.exit(0)", ["assert False"], False),
        ("this is no program", ["assert True"], False),
        ("", ["assert True"], False),
        ("while True: pass", ["assert True"], False),
    ],
)
def test_programs_against_tests(program, answer, expected):
    limits = sandbox.Limits(wall_s=2.0, cpu_s=1) if "while" in program else LIMITS
    assert verdict(CodeJudge(1, limits), program, answer) is expected


def test_the_last_block_counts_and_a_bare_program_is_one():
    assert program_of("```python\na\n```\n```\nb\n```") == "b\n"
    assert program_of("print(1)") == "print(1)"


@pytest.mark.parametrize("answer", ["[]", "{}", '{"inputs": [1], "outputs": []}', "   ", "[1, 2]"])
def test_a_reference_without_tests_is_refused(answer):
    with pytest.raises(UserError, match="has no tests"):
        code_tests(answer)


FORBIDDEN = {
    "reading a user's file": "open({secret!r}).read()",
    "listing the root": "import os; os.listdir('/')",
    "writing outside": "open({secret!r} + '.new', 'w')",
    "a hard link": "import os; os.link({secret!r}, 'x'); open('x').read()",
    "a symbolic link": "import os; os.symlink({secret!r}, 'x'); open('x').read()",
    "the environment": "import os; assert 'TCOPD_SECRET' in os.environ",
    "the parent's environment": "import os; open(f'/proc/{{os.getppid()}}/environ').read()",
    "TCP": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "UDP": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "a unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "fork": "import os; os.fork()",
    "a subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "killing the parent": "import os; os.kill(os.getppid(), 9)",
    "ptrace": "import ctypes; assert ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0",
    "memory": "bytearray(1 << 30)",
    "a huge file": "open('x', 'wb').write(bytes(64 << 20))",
    "lifting limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "root's rights": "import os; os.chown('program.py', 12345, 12345)",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_program_cannot(name, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("s")
    monkeypatch.setenv("TCOPD_SECRET", "s")
    with socket.create_server(("127.0.0.1", 0)) as server:
        reached = threading.Event()
        server.settimeout(0.05)
        port = server.getsockname()[1]
        program = FORBIDDEN[name].format(secret=str(secret), port=port, pid=os.getpid())
        outcome = sandbox.run(program + "\nprint('did it')", limits=LIMITS)
        try:
            server.accept()
            reached.set()
        except TimeoutError:
            pass
    assert outcome.status != 0 and "did it" not in outcome.stdout, outcome
    assert not reached.is_set() and secret.read_text() == "s" and list(tmp_path.iterdir()) == [secret]


def test_a_program_can_use_its_folder_threads_and_the_standard_library():
    program = """
import collections, decimal, heapq, json, re, threading
open("note", "w").write("7")
out = []
worker = threading.Thread(target=lambda: out.append(int(open("note").read())))
worker.start(); worker.join()
print(out[0] + int(input()))
"""
    outcome = sandbox.run(program, "35\n", LIMITS)
    assert (outcome.status, outcome.stdout.strip()) == (0, "42"), outcome.stderr


@pytest.mark.parametrize(("program", "status"), [("while True: pass", -9), ("import time; time.sleep(60)", None)])
def test_time_is_limited(program, status):
    assert sandbox.run(program, limits=sandbox.Limits(wall_s=4.0, cpu_s=1)).status == status


def test_a_machine_without_a_sandbox_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "_landlock_abi", lambda: -1)
    with pytest.raises(UserError, match=r"cannot be confined here: the kernel has no Landlock"):
        Judges(JudgeConfig(domains={"c": "code"})).check([rollout("c", "", '["assert True"]').prompt])


def test_exact_judge_compares_words():
    pairs = [("work\n\\boxed{a  b}", "a b"), ("so:\n a b ", "a b"), ("a b c", "a b"), ("", "a")]
    assert ExactJudge().many(pairs) == [True, True, False, False]


def same_length(response: str, answer: str) -> bool:
    if response == "break":
        raise ZeroDivisionError
    return len(response) == len(answer)


def rollout(domain: str, text: str, answer: str | None) -> Rollout:
    return Rollout(Prompt("p", domain, (1,), "", answer, ""), 0, (1,), torch.zeros(1), "stop", 0, text)


def test_every_domain_has_its_own_judge():
    config = JudgeConfig(domains={"facts": "exact", "code": "code", "mine": f"{__name__}:same_length"})
    items = [
        rollout("math", "\\boxed{0.5}", "1/2"),
        rollout("facts", "0.5", "1/2"),
        rollout("facts", "blue", "blue"),
        rollout("code", fenced("def f(): return 1"), '["assert f() == 1"]'),
        rollout("mine", "abc", "xyz"),
        rollout("math", "\\boxed{1}", None),
        rollout("mine", "break", "xyz"),
    ]
    with Judges(config) as judges, pytest.warns(UserWarning, match="ZeroDivisionError.*counted as wrong"):
        assert judges.rollouts(items) == [True, False, True, True, True, None, False]


def test_exact_judge_reads_a_megabyte():
    long = "7 " * 500_000
    pairs = [
        ("\\boxed{" + long + "}", "7"),
        (long, long),
        ("{" * 1_000_000 + "\\boxed{7}", "7"),
        ("\n" * 1_000_000, "7"),
    ]
    assert ExactJudge().many(pairs) == [False, True, True, False]


def test_a_function_is_killed_when_it_hangs_or_eats_memory():
    responses = ["8", "hang", "spin", "8", "eat", "exit", "9" * 1_000_000, "x", "8", "9"]
    judge = FunctionJudge("user_judges:hostile", workers=2, timeout_s=1.0)
    with pytest.warns(UserWarning, match=r"no verdict within judge.timeout_s=1 s and its memory limit on a response"):
        verdicts = judge.many([(response, "8") for response in responses])
    judge.close()
    assert verdicts == [True, False, False, True, False, False, False, False, True, False]


def test_a_function_that_only_the_trainer_can_import_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "only_here", types.SimpleNamespace(grade=same_length))
    judge = FunctionJudge("only_here:grade", workers=1, timeout_s=1.0)
    with pytest.raises(UserError, match=r"judge only_here:grade: its worker process does not start .*only_here"):
        judge.many([("a", "b")])


@pytest.mark.parametrize("kind", ["nonsense", "a b:c", "os.system"])
def test_unknown_judges_are_refused(kind):
    from tcopd_fast.config import _check_judges

    with pytest.raises(ValueError, match=r"judge\.domains\.x: .* is no judge"):
        _check_judges(JudgeConfig(domains={"x": kind}))
    with pytest.raises(UserError, match="cannot be imported"):
        Judges(JudgeConfig(domains={"x": "no_such_module:f"})).check([rollout("x", "", "1").prompt])


def test_answers_without_tests_are_refused_beforehand():
    judges = Judges(JudgeConfig(domains={"c": "code"}))
    judges.check([rollout("c", "", '["assert True"]').prompt, rollout("c", "", None).prompt])
    with pytest.raises(UserError, match="has no tests"):
        judges.check([rollout("c", "", "[]").prompt])


def test_limits_too_tight_for_any_program_are_refused_beforehand():
    judges = Judges(JudgeConfig(domains={"c": "code"}, code_memory_bytes=1 << 20))
    with pytest.raises(UserError, match=r"does not run within its limits .* raise judge\.code_timeout_s"):
        judges.check([rollout("c", "", '["assert True"]').prompt])
