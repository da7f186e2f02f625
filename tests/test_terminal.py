"""What the scripts do at a terminal: Ctrl-C while they import, a reader of their output who leaves."""

import os
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
