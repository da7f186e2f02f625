"""What the scripts do at a terminal: quick answers, Ctrl-C while they import, a reader of their output who leaves."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import command

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
from video.terminal import prepare_terminal
prepare_terminal()
for number in range(3000):
    print(number, chr(0xDCE9) * 20)
print("still there", file=sys.stderr)
open(sys.argv[1], "w").write("ended")
"""


def run(shell, file):
    return subprocess.run(
        ["bash", "-c", shell, sys.executable, PROGRAM, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )  # fmt: skip


@pytest.mark.parametrize("sink", ["| head -2", "2>&1 | head -2", ">/dev/full 2>/dev/full", ">&- 2>&-"])
def test_a_program_outlives_the_reader_of_its_output(tmp_path, sink):
    done = run(f'"$0" -c "$1" "$2" {sink}; exit ${{PIPESTATUS[0]}}', tmp_path / "file")
    assert done.returncode == 0 and "rror" not in done.stderr
    assert (tmp_path / "file").read_text() == "ended"


def test_a_character_that_the_terminal_cannot_show_is_escaped(tmp_path):
    done = run('PYTHONIOENCODING=ascii:strict "$0" -c "$1" "$2"', tmp_path / "file")
    assert done.stdout.splitlines()[7] == "7 " + r"\udce9" * 20
    assert done.stderr == "still there\n"


ANSWERS = {
    "train.py --help": (0, "usage: train.py"),
    "train.py --plan 4 --help": (0, "usage: train.py"),
    "train.py --grup_size 4": (
        2, "train.py: error: unrecognized arguments: --grup_size 4 (did you mean --group_size?)\n"
    ),
    "train.py --clip_low 0.1": (
        2, "train.py: error: unrecognized arguments: --clip_low 0.1 (did you mean --clip_eps_low?)\n"
    ),
    "train.py --grup_size 4 --learning_rat 1": (2, "(did you mean --group_size --learning_rate?)\n"),
    "train.py --zzz 4": (2, "train.py: error: unrecognized arguments: --zzz 4 (see --help)\n"),
    "train.py --steps ten": (2, "train.py: error: argument --steps: invalid int value: 'ten' (see --help)\n"),
    "train.py --group_size 1": (2, "train.py: error: --group_size 1: must be at least 2\n"),
    "eval.py --help": (0, "usage: eval.py"),
    "eval.py --ckpt x --smaples 3": (
        2, "eval.py: error: unrecognized arguments: --smaples 3 (did you mean --samples?)\n"
    ),
    "eval.py --samples 3": (2, "eval.py: error: the following arguments are required: --ckpt (see --help)\n"),
    "eval.py --ckpt x --samples 0": (2, "eval.py: error: --samples 0: must be at least 1, and finite\n"),
    "eval.py --ckpt x --temperature nan": (
        2, "eval.py: error: --temperature nan: must be at least 0.0, and finite\n"
    ),
    "-m evaluation.filter --ckpt x --data y --output z --group_sise 8": (
        2, "evaluation.filter: error: unrecognized arguments: --group_sise 8 (did you mean --group_size?)\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", ANSWERS)
def test_help_and_a_wrong_flag_are_answered_without_the_slow_imports(line):
    """A typo must not cost the half minute in which torch and transformers load from a cold disk."""
    code, words = ANSWERS[line]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", *line.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = done.stderr.splitlines(keepends=True)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    error = "".join(line for line in lines if not line.startswith("import time:"))
    assert done.returncode == code and "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers", "torchvision", "av", "numpy", "matplotlib"})
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2, "seconds of a processor"
    if code:
        assert error.endswith(words) and error.count("\n") == 1 and done.stdout == ""
    else:
        assert done.stdout.startswith(words) and error == ""


@pytest.mark.slow
@pytest.mark.parametrize("script", [["train.py"], ["eval.py"], ["-m", "video.scan"]])
def test_ctrl_c_while_a_script_imports_leaves_no_traceback(script):
    for seconds in (0.5, 1.5, 3.0):
        process = subprocess.Popen([sys.executable, *script, "--help"], cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)  # fmt: skip
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert "Traceback" not in error and process.returncode in (0, -signal.SIGINT)


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_trains_to_its_end(world, tmp_path):
    shell = 'set -o pipefail; "$@" 2>&1 | head -1'
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", shell, "-", *command(1, tmp_path, world)], env=environment, timeout=150)
    assert done.returncode == 0 and (tmp_path / "summary.json").exists()
