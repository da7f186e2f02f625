"""--tracker: what wandb and swanlab are handed, and that their offline modes write."""

import importlib.util
import json
import sys
import time
from contextlib import closing
from importlib.machinery import PathFinder

import pytest

import train
from grpo.config import Config, parse_config
from grpo.errors import RunError
from grpo.run.log import RunLog

STAND_IN = """
calls = []

class Run:
    def __getattr__(self, name):
        return lambda *given, **named: calls.append((name, *given, named))

def init(**named):
    calls.append(("init", named))
    return Run()
"""


@pytest.fixture(params=["wandb", "swanlab"])
def stand_in(request, tmp_path, monkeypatch):
    """(name of a tracker, its calls): a module of this name that notes them."""
    name = request.param
    (tmp_path / f"{name}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield name, lambda: sys.modules[name].calls
    sys.modules.pop(name, None)


def write(folder, name, keep, *lines):
    config = parse_config(["--tracker", name, "--output", str(folder)])
    with closing(RunLog(folder, keep)) as log:
        log.describe(config, {})
        for phase, step, metrics in lines:
            log.write(phase, step, metrics)
    return config


def test_a_tracker_gets_each_line_and_a_run_that_goes_on_is_the_same_run(stand_in, tmp_path):
    name, calls = stand_in
    folder, first = tmp_path / "run-a", lambda phase, step: step < 1
    config = write(folder, name, first, ("warmup", 0, {"loss": 2.0}), ("train", 0, {"kl": 0.5, "note": "text"}),
                   ("train", 1, {"kl": 0.25}))  # fmt: skip
    (_, begun), *logged, end = calls()
    assert begun["config"]["group_size"] == config.group_size and begun["resume"] == "allow"
    assert begun["id"] == json.loads((folder / "tracker.json").read_text())["id"] and len(begun["id"]) == 21
    assert end == ("finish", {})
    if name == "wandb":
        assert (begun["dir"], begun["name"]) == (folder, "run-a")
        assert logged[:3] == [
            ("define_metric", f"{p}/*", {"step_metric": f"{p}/step"}) for p in ("warmup", "train", "eval")
        ]
        expected = [
            ("log", {"warmup/step": 0, "warmup/loss": 2.0}, {"step": 0}),
            ("log", {"train/step": 0, "train/kl": 0.5}, {"step": 1}),
            ("log", {"train/step": 1, "train/kl": 0.25}, {"step": 2}),
        ]
    else:
        assert (begun["logdir"], begun["experiment_name"]) == (str(folder / "swanlog"), "run-a")
        expected = [
            ("log", {"warmup/loss": 2.0}, {"step": 0}),
            ("log", {"train/kl": 0.5}, {"step": 0}),
            ("log", {"train/kl": 0.25}, {"step": 1}),
        ]
    assert logged[-3:] == expected
    calls().clear()
    write(folder, name, first, ("train", 1, {"kl": 0.25}))
    (_, again), *logged, _ = calls()
    assert again["id"] == begun["id"] and logged[-1] == expected[-1], "the same number: it is dropped, not doubled"


def test_a_tracker_that_does_not_start_is_one_line(stand_in, tmp_path):
    name, _ = stand_in
    (tmp_path / f"{name}.py").write_text("def init(**_):\n    raise ValueError('no API key')\n")
    with pytest.raises(RunError, match=f"--tracker {name}: no API key; {name.upper()}_MODE=offline writes"):
        write(tmp_path / "run", name, lambda *_: True)


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_missing_package_is_one_line_before_anything_loads(name, tmp_path, monkeypatch, capsys):
    """Also if the working folder has a folder of its name, as wandb leaves one."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: PathFinder.find_spec(module, [str(tmp_path)]))
    assert train.main(["--tracker", name, "--output", str(tmp_path / "run")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(f"--tracker {name} needs the package {name}: pip install {name}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, files", [("wandb", "wandb/offline-run-*/*.wandb"), ("swanlab", "swanlog/run-*/*.swanlab")]
)
def test_the_offline_mode_of_the_real_package_writes(name, files, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv(f"{name.upper()}_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path / "run", name, lambda *_: True, ("train", 0, {"kl": 0.5}), ("train", 1, {"kl": 0.25}))
    size, deadline = lambda: sum(path.stat().st_size for path in (tmp_path / "run").glob(files)), time.monotonic() + 30
    while size() < 1000 and time.monotonic() < deadline:  # a process of wandb's own writes
        time.sleep(0.1)
    assert size() >= 1000


def test_no_tracker_is_the_default(tmp_path):
    assert Config().tracker == "none"
    write(tmp_path / "run", "none", lambda *_: True, ("train", 0, {"kl": 0.5}))
    assert not (tmp_path / "run/tracker.json").exists()
