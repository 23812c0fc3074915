"""The judge reads the last box, agrees with algebra, and survives hostile answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcopd_fast import verify
from tcopd_fast.errors import UserError
from tcopd_fast.verify import Judge, boxed_answer


@pytest.fixture(scope="module")
def judge():
    with Judge(timeout_s=20.0) as judge:
        yield judge


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {x}", "x"),
        (r"\boxed{5} and later \boxed{6", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\\boxed{7}", "7"),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),
        (r"} } \boxed{5} } {", "5"),
        (r"\boxed{}", ""),
        (r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{1} \quad\text{or}\quad \boxed{2}", "1, 2"),
        (r"\boxed{4}, that is \boxed{4}", "4"),
        (r"\boxed{3}, no, \boxed{4}", "4"),
        (r"\boxed{3} \boxed{4}", "4"),
        ("the answer is 5", None),
        (r"\boxed", None),
        (r"\boxed{{5}", None),
        ("", None),
    ],
)
def test_last_box(text, content):
    assert boxed_answer(text) == content


@given(st.text(alphabet="a{}\\ ,$", max_size=30), st.text(alphabet="ab1 ", max_size=5))
def test_a_closed_final_box_is_always_the_answer(before, content):
    assert boxed_answer(before + "; end: \\boxed{" + content + "}") == content.strip()


@pytest.mark.timeout(60)
def test_box_scan_is_linear():
    """Quadratic work would take many minutes on these."""
    n = 200_000
    texts = ("\\boxed{" * n, "\\boxed{" + "{" * n + "}" * n, "\\boxed{x} " * n, "\\boxed" + " " * n)
    assert [boxed_answer(text) for text in texts] == [None, None, "x", None]


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        (r"\boxed{78}", "78", True),
        (r"\boxed{78}", "79", False),
        (r"\boxed{078}", "78", True),
        (r"\boxed{78.0}", "78", True),
        (r"\boxed{-0}", "0", True),
        (r"\boxed{-5}", "5", False),
        (r"\boxed{1234567890123456789}", "1234567890123456788", False),
        (r"\boxed{1,234}", "1234", True),
        (r"\boxed{\dfrac{1}{2}}", "0.5", True),
        (r"\boxed{\frac{2}{4}}", r"$\frac{1}{2}$", True),
        (r"\boxed{x=5}", "5", True),
        (r"\boxed{\text{odd}}", "odd", True),
        (r"\boxed{(1, 2)}", "(1,2)", True),
        (r"\boxed{(2, 1)}", "(1,2)", False),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", True),
        (r"\boxed{\sqrt{2}+x}", r"x+\sqrt{2}", True),
        (r"\boxed{ \left( 1 , 2 \right) }", "(1,2)", True),
        (r"\boxed{70}", r"\boxed{70}", True),
        (r"\boxed{70}", r"\(70\)", True),
        (r"\boxed{70}", r"We get $35 \cdot 2 = \boxed{70}$.", True),
        (r"\boxed{1} and \boxed{2}", "2", False),
        (r"\boxed{1} and \boxed{2}", "1, 2", True),
        (r"\boxed{5} was wrong, so \boxed{6}", "5", False),
        ("The answer is 12.", "12", True),
        ("The final answer is $\\frac{3}{4}$.", "3/4", True),
        ("It was 12. " + "x " * 1000, "12", False),
        ("no idea", "12", False),
        ("", "12", False),
        (r"\boxed{}", "12", False),
        ("12", "", False),
    ],
)
def test_verdicts(judge, response, answer, verdict):
    assert judge.many([(response, answer)]) == [verdict]


# Each of these defeats a direct call of math-verify or a naive scan: by time, memory, recursion or encoding.
HOSTILE = [
    r"\boxed{9^{9^{9^9}}}",
    "the answer is 9**9**9**9",
    r"\boxed{100000000!}",
    r"\boxed{x^{10^{10}}-1}",
    "\\boxed{" + "(" * 3000 + ")" * 3000 + "}",
    "\\boxed{" + "{" * 3000 + "5" + "}" * 3000 + "}",
    "\\boxed{" * 20_000,
    "\\boxed{" + "\\frac{1}{" * 300 + "2" + "}" * 301,
    "\\boxed{" + "1" * 1_000_000 + "}",
    "1" * 1_000_000,
    "\\boxed{" + "1+" * 500_000 + "1}",
    "\\boxed{" + "{" * 500_000 + "}" * 500_000 + "}",
    "\\boxed{" + "1" * 8000 + "^{" + "9" * 100 + "}}",
    "\\boxed{" + "\\sqrt{" * 1000 + "2" + "}" * 1001,
    "\\boxed{\\frac{1}{",
    "\\boxed{\\left(\\sqrt[}",
    "\\boxed{\x00}",
    "\x00\ud800",
    "\\boxed{\ud800\n\r\u2028}",
    "$" * 3000,
]


@pytest.mark.timeout(120)
def test_hostile_answers_are_wrong_and_bounded():
    with Judge(timeout_s=0.5) as judge:
        assert judge.many([(r"\boxed{\frac{1}{2}}", "0.5")]) == [True]
        assert judge.many([(response, "7") for response in HOSTILE]) == [False] * len(HOSTILE)
        assert judge.many([(r"\boxed{\frac{1}{4}}", "0.25")]) == [True]


def test_a_long_answer_may_still_be_literally_right(judge):
    answer = "12" * 50_000
    assert judge.many([(f"\\boxed{{{answer}}}", answer), (f"\\boxed{{{answer}3}}", answer)]) == [True, False]


HUNGRY_START = """
import sys
sys.path[:] = sys.argv[3:]
from tcopd_fast import verify_worker
agree = verify_worker._agree
verify_worker._agree = lambda prediction, *rest: (
    len(bytearray(1 << 30)) > 0 if prediction == "hungry" else agree(prediction, *rest)
)
verify_worker.main(float(sys.argv[1]), int(sys.argv[2]))
"""


def test_worker_out_of_memory_is_replaced(monkeypatch):
    monkeypatch.setattr(verify, "_START", HUNGRY_START)
    with Judge(timeout_s=20.0, memory_bytes=2 << 30) as judge:
        assert judge.many([(r"\boxed{hungry}", "1")]) == [True]
    with Judge(timeout_s=20.0, memory_bytes=1 << 30) as judge:
        assert judge.many([(r"\boxed{\frac{1}{2}}", "0.5")]) == [True]
        before = judge._workers[0]._process
        assert judge.many([(r"\boxed{hungry}", "1")]) == [False]
        assert judge.many([(r"\boxed{\frac{1}{4}}", "0.25")]) == [True]
        assert judge._workers[0]._process is not before


def test_killed_worker_costs_one_verdict():
    with Judge(timeout_s=20.0) as judge:
        assert judge.many([(r"\boxed{\frac{1}{2}}", "0.5")]) == [True]
        judge._workers[0]._process.kill()
        judge._workers[0]._process.wait()
        assert judge.many([(r"\boxed{\frac{1}{3}}", r"1/3"), (r"\boxed{\frac{1}{5}}", "1/5")]) == [False, True]


def test_order_is_kept_over_several_workers():
    pairs = [(f"\\boxed{{\\frac{{{i}}}{{7}}}}", f"{i + (i % 3 == 0)}/7") for i in range(1, 60)]
    with Judge(workers=3, timeout_s=20.0) as judge:
        assert judge.many(pairs + pairs) == [i % 3 != 0 for i in range(1, 60)] * 2


def test_repeated_questions_are_asked_once(monkeypatch):
    asked = []

    def ask(self, question):
        asked.append(question)
        return True

    monkeypatch.setattr(verify.Worker, "ask", ask)
    monkeypatch.setattr(verify, "CACHE_SIZE", 2)
    judge = Judge()
    half = (r"\boxed{\frac{1}{2}}", "0.5")
    assert judge.many([half, half]) == [True, True]
    assert judge.many([half]) == [True]
    assert len(asked) == 1
    judge.many([(f"\\boxed{{\\frac{{1}}{{{i}}}}}", "0.5") for i in (3, 4)])
    judge.many([half])
    assert len(asked) == 4


def test_integers_and_equal_text_need_no_worker():
    judge = Judge()
    pairs = [(r"\boxed{78}", "78"), (r"\boxed{79}", "78"), (r"\boxed{x + 1}", "$x+1$")] * 2000
    assert judge.many(pairs) == [True, False, True] * 2000
    assert judge._workers[0]._process is None


def test_close_ends_the_workers_and_a_later_call_starts_new_ones():
    judge = Judge(timeout_s=20.0)
    judge.many([(r"\boxed{\frac{1}{2}}", "0.5")])
    process = judge._workers[0]._process
    judge.close()
    assert process.poll() is not None
    assert judge.many([(r"\boxed{\frac{1}{3}}", "1/3")]) == [True]
    judge.close()


def test_worker_that_cannot_start_is_a_user_error(monkeypatch):
    monkeypatch.setattr(verify, "_START", "print('no module named math_verify')")
    with pytest.raises(UserError, match=r"no module named math_verify.*install math-verify"):
        Judge().many([(r"\boxed{\frac{1}{2}}", "0.5")])


MAIN_SCRIPT = """
import sys
from tcopd_fast.verify import judge
# Importing this file again in a child would run it again.
open(sys.argv[1], "a").write("started;")
print(judge(r"\\boxed{\\frac{1}{2}}", "0.5"), "torch" in sys.modules)
"""


def test_unguarded_main_script_runs_once_and_leaves_no_process(tmp_path):
    script, log = tmp_path / "main.py", tmp_path / "log"
    script.write_text(MAIN_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script), str(log)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["True", "False"], done.stderr
    assert log.read_text() == "started;"


def test_worker_dies_with_a_killed_parent():
    """A parent that gets SIGKILL while its worker computes must not leave the worker behind."""
    code = (
        "import sys, threading, time\n"
        "from tcopd_fast.verify import Judge\n"
        "judge = Judge(timeout_s=2.0)\n"
        r"judge.many([(r'\boxed{\frac{1}{2}}', '0.5')])" + "\n"
        "print(judge._workers[0]._process.pid, flush=True)\n"
        r"judge.many([(r'\boxed{100000000!}', '7')])" + "\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    time.sleep(0.5)  # let it reach the second question
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while _is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_stop_signal_to_the_whole_tree_costs_no_verdict():
    """A launcher passes SIGTERM to every process below it while the trainer still finishes its step."""
    with Judge(timeout_s=20.0) as judge:
        judge.many([(r"\boxed{\frac{1}{2}}", "0.5")])
        for number in (signal.SIGTERM, signal.SIGINT):
            judge._workers[0]._process.send_signal(number)
        assert judge.many([(r"\boxed{\frac{1}{4}}", "0.25")]) == [True]


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
