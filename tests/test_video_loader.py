"""Order, broken files, workers that die or hang, and what is left when the loader closes."""

import pytest
import torch
from video_helpers import SMALL, Misbehaving, assert_gone, make_broken, make_video

from demo.tiny import build_tiny_model
from video.formats import DataError, Sample
from video.frames import SampleError, VideoError
from video.loader import PromptLoader
from video.prompt import Prompt, PromptEncoder, PromptTooLong, Skipped


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return PromptEncoder(str(build_tiny_model(tmp_path_factory.mktemp("tiny"))), SMALL)


def samples(*texts):
    return [Sample(f"d.jsonl:{number}", text, "A", videos=(f"{number}.mp4",)) for number, text in enumerate(texts, 1)]


def test_order_is_kept_and_workers_use_one_thread():
    group = samples("slow", "", "", "slow", "", "")
    with PromptLoader(Misbehaving(), workers=2, timeout=30) as loader:
        batches = list(loader.batches([group[:3], [], group[3:]]))
        assert [[prompt.sample.key for prompt in batch] for batch in batches] == [
            [sample.key for sample in group[:3]],
            [],
            [sample.key for sample in group[3:]],
        ]
    threads, pids = zip(*(prompt.input_ids.tolist() for batch in batches for prompt in batch))
    assert set(threads) == {1}
    assert_gone(pids)


@pytest.mark.timeout(120)
def test_dead_hanging_and_raising_samples_are_skipped_and_the_rest_arrives():
    group = samples("", "die", "", "sleep", "raise", "", "die", "")
    with PromptLoader(Misbehaving(), workers=1, timeout=1.0) as loader:
        first, second = loader.batches([group, group[:1]])
    assert [type(item) for item in first] == [Prompt, Skipped, Prompt, Skipped, Skipped, Prompt, Skipped, Prompt]
    assert first[1] == Skipped("d.jsonl:2", "2.mp4", "its worker died (exit code 17)")
    assert first[3] == Skipped("d.jsonl:4", "4.mp4", "took more than 1 s (--decode_timeout)")
    assert first[4] == Skipped("d.jsonl:5", "5.mp4", "RuntimeError: broken for good")
    assert second[0].sample == group[0]
    pids = [item.input_ids[1].item() for item in first if isinstance(item, Prompt)]
    assert len(set(pids)) >= 3  # replaced after each death and each overrun
    assert_gone(pids)


@pytest.mark.parametrize("count", [0, 1])
def test_broken_files_are_skipped_with_path_and_reason(encoder, tmp_path, count):
    good = Sample("d.jsonl:0", "What?", "A", videos=(make_video(tmp_path / "good.mp4"),))
    broken = [Sample(f"d.jsonl:{name}", "What?", "A", videos=(path,)) for name, path in make_broken(tmp_path).items()]
    with PromptLoader(encoder, workers=count, timeout=30) as loader:
        (batch,) = loader.batches([[*broken, good]])
    for sample, item in zip(broken, batch):
        assert isinstance(item, Skipped) and item.key == sample.key and item.path == sample.videos[0], item
        assert item.reason and "\n" not in item.reason
    assert isinstance(batch[-1], Prompt)
    reference = encoder(good)  # a prompt crosses the process boundary unchanged
    assert torch.equal(batch[-1].pixel_values_videos, reference.pixel_values_videos)
    assert torch.equal(batch[-1].input_ids, reference.input_ids) and batch[-1].sample == good


def test_no_more_than_ahead_batches_are_taken_in_advance():
    taken = []

    def source():
        for number in range(10):
            taken.append(number)
            yield samples("")

    with PromptLoader(Misbehaving(), workers=1) as loader:
        batches = loader.batches(source())
        next(batches)
        assert len(taken) == 3  # the one asked for, and 2 ahead
        next(batches)
        assert len(taken) == 4


@pytest.mark.timeout(60)
def test_stopping_early_and_errors_leave_no_process():
    pids = []
    with pytest.raises(KeyError):
        with PromptLoader(Misbehaving(), workers=2) as loader:
            batches = loader.batches([samples(""), samples("sleep", "sleep", "sleep"), samples("sleep")])
            pids.append(next(batches)[0].input_ids[1].item())
            raise KeyError("the training step failed")
    with PromptLoader(Misbehaving(), workers=1) as loader:
        for _ in loader.batches([samples("")] * 5):
            break
        again = next(loader.batches([samples("", "")]))  # the same worker serves the next call
        assert len(again) == 2
        pids.append(again[0].input_ids[1].item())
    assert_gone(pids)


@pytest.mark.parametrize("options,flag", [({"workers": -1}, "--workers"), ({"timeout": 0}, "--decode_timeout")])
def test_options_out_of_range_name_the_flag(options, flag):
    with pytest.raises(ValueError, match=flag):
        PromptLoader(Misbehaving(), **options)


def test_a_run_in_which_nothing_can_be_read_stops_and_says_why():
    """It stops if the first samples are all skipped for one type of reason, not after a good sample or another type."""

    def run(*texts, **options):
        with PromptLoader(Misbehaving(), workers=0, give_up_after=4, **options) as loader:
            return list(loader.batches([[sample] for sample in samples(*texts)]))

    with pytest.raises(DataError, match="first 4 samples were skipped, the last .d.jsonl:4.: 4.mp4: RuntimeError"):
        run(*["raise"] * 6)
    assert len(run(*["raise"] * 3)) == 3
    assert len(run("", *["raise"] * 9)) == 10
    assert len(run("raise", "bad", *["raise"] * 8)) == 10
    with PromptLoader(Misbehaving(), workers=1, give_up_after=None) as loader:
        assert len(list(loader.batches([samples(*["raise"] * 60)]))[0]) == 60


class Refusing:
    """An encoder that raises one error for every sample."""

    def __init__(self, error):
        self.error = error

    def __call__(self, sample, control):
        raise self.error


@pytest.mark.parametrize("encoder, advice", [
    (Refusing(VideoError("1.mp4", "no such file")), "1.mp4: no such file; python -m video.scan"),
    (Refusing(PromptTooLong("1.mp4", "9000 tokens")), "1.mp4: 9000 tokens; raise --max_prompt_tokens; lower --max"),
    (Refusing(SampleError("", "the question holds <x>")), ": the question holds <x>; fix the rows"),
    (Refusing(RuntimeError("odd")), "1.mp4: RuntimeError: odd$"),
    ("sleep", "took more than 0.5 s .--decode_timeout.; raise --decode_timeout"),
    ("die", "its worker died .exit code 17.; lower --workers"),
])  # fmt: skip
def test_the_advice_fits_the_reason(encoder, advice):
    text, encoder, workers = ("", encoder, 0) if isinstance(encoder, Refusing) else (encoder, Misbehaving(), 1)
    with (
        PromptLoader(encoder, workers, timeout=0.5, give_up_after=1) as loader,
        pytest.raises(DataError, match=advice) as error,
    ):
        list(loader.batches([samples(text)]))
    assert ("--video_root" in str(error.value)) == ("--video_root" in advice)
