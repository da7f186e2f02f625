"""A family is one file: a made-up one in `grpo/families/` is found, built, scored, sampled, and tested by itself."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_shared_prompt
from conftest import load_pair

import grpo.families
from demo.tiny import build_tiny_model
from grpo.families import family_names, load_family
from grpo.families.base import Family
from video.prompt import VideoText

ROOT, FILE = Path(__file__).parent.parent, Path(__file__).parent / "made_up_vl.py"
# Tests whose families are those of the folder.
ORACLES = "shared_prompt sampler positions loading video_prompt plan lora update rollout".split()


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """What the fixture `tiny` is of other families."""
    folder = tmp_path_factory.mktemp("made_up")
    shutil.copy(FILE, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.families, "__path__", [*grpo.families.__path__, str(folder)])
        assert "made_up_vl" in family_names()
        yield load_pair(build_tiny_model(folder / "model", "made_up_vl", seed=1))


def test_one_file_is_enough_for_the_oracles_of_scorer_and_sampler(made_up):
    assert made_up[0].spec.family is load_family("made_up_vl")
    for kind in ("video", "image and video"):
        test_shared_prompt.test_packed_logprobs_equal_naive(made_up, kind, (1, 7, 3, 4))
        test_shared_prompt.test_packed_gradients_equal_naive(made_up, kind)
        test_shared_prompt.test_greedy_equals_generate(made_up, kind)
    test_shared_prompt.test_sampler_logprobs_equal_scorer(made_up, 0.7)  # gives the spec other ends


@pytest.mark.slow
def test_in_a_copy_of_the_project_with_one_file_more_its_tests_run_by_themselves(tmp_path):
    """As a user would do it: all tests that name the family are those that take families from the folder."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(FILE, tmp_path / "grpo" / "families")
    files = [f"tests/test_{name}.py" for name in ORACLES]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "made_up_vl", *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 80, done.stdout[-300:]


def test_the_page_on_families_names_every_hook():
    page = (ROOT / "docs/families.md").read_text()
    hooks = {name for cls in (Family, VideoText) for name in vars(cls) if not name.startswith("_")}
    assert [name for name in sorted(hooks) if f"`{name}`" not in page] == []
