"""Processes that share a prompt read their share of its frames: what each hands to the model is what it would cut out
of the whole."""

import functools

import pytest
import torch
from conftest import FAMILIES, config_of
from PIL import Image
from video_helpers import SMALL, make_video, rotated

import video.frames
import video.prompt
from grpo import sequence
from grpo.batch import pack
from grpo.engine.model import ModelSpec
from grpo.families import load_family
from video.cache import FrameCache
from video.dataset import Sample
from video.frames import VideoError, VideoSettings, read_video
from video.pictures import frames_of
from video.prompt import Prompt, PromptEncoder, Skipped, own_steps


@pytest.fixture(scope="module", params=FAMILIES)
def make_encoder(request, checkpoints):
    return functools.partial(PromptEncoder, str(checkpoints[request.param]), video_text=load_family(request.param))


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Videos of 8 frames, one of them turned by its header, and two images."""
    where = tmp_path_factory.mktemp("media")
    turned = where / "turned.mp4"
    turned.write_bytes(rotated(open(make_video(where / "b.mp4", frames=40, height=64, width=96), "rb").read(), 90))
    images = (str(where / "a.png"), str(where / "b.png"))
    for path, size in zip(images, ((60, 40), (200, 90))):
        Image.effect_noise(size, 60).convert("RGB").save(path)
    return (make_video(where / "a.mp4"), str(turned)), images


SAMPLES = {"video": (1, 0), "image": (0, 1), "all": (2, 2), "text": (0, 0)}


@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("kind", SAMPLES)
def test_shares_are_parts_of_the_whole(make_encoder, media, monkeypatch, kind, count):
    """Also with more processes than time steps."""
    videos, images = SAMPLES[kind]
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0][:videos], images=media[1][:images])
    encoder = make_encoder(SMALL)
    whole, spec = encoder(sample), ModelSpec.of(config_of(encoder.processor_path), [0], None)
    monkeypatch.setattr(sequence, "size", lambda: count)
    for rank in range(count):
        monkeypatch.setattr(sequence, "rank", lambda: rank)
        share = make_encoder(SMALL, share=(rank, count))(sample)
        ours, theirs = pack([share], [[]], spec), pack([whole], [[]], spec)
        assert share.shape == whole.shape and torch.equal(share.input_ids, whole.input_ids)
        for name in ("placeholders", "encoders", "pixels", "grids", "position_ids"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert mine is other is None or torch.equal(mine, other), (rank, name)


@pytest.mark.parametrize("control", ["shuffled", "reversed", "blank"])
def test_a_control_changes_the_whole_video_before_it_is_shared(make_encoder, media, control):
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0][:1])
    whole = make_encoder(SMALL)(sample, control).pixel_values_videos
    shares = [make_encoder(SMALL, share=(rank, 2))(sample, control).pixel_values_videos for rank in range(2)]
    assert torch.equal(torch.cat(shares), whole)


def test_each_process_decodes_its_frames_alone(checkpoints, tmp_path, monkeypatch):
    """And its cache keeps them alone."""
    path, decoded, real = make_video(tmp_path / "a.mp4", frames=48), [], video.frames._decode_needed
    monkeypatch.setattr(
        video.frames,
        "_decode_needed",
        lambda path, packets, wanted: decoded.append(wanted) or real(path, packets, wanted),
    )
    monkeypatch.setattr(video.frames, "_decode_all", lambda _: pytest.fail("all was decoded"))
    settings, cache = VideoSettings(nframes=16, min_pixels=784, max_pixels=784), FrameCache(tmp_path / "kept")
    for rank in (0, 1, 0, 1):
        encoder = PromptEncoder(str(checkpoints["qwen2_vl"]), settings, cache=cache, share=(rank, 2))
        assert len(encoder(Sample("d:1", "What?", "A", videos=(path,))).pixel_values_videos) == 4 * 4, "of 8 time steps"
    whole = read_video(path, settings, 28)[1].numbers
    assert decoded[:2] == [whole[:8], whole[8:]] and len(decoded) == 3


def test_a_part_of_a_folder_and_of_a_file_without_times(tmp_path):
    (tmp_path / "f").mkdir()
    for number in range(8):
        Image.new("RGB", (40, 40), (9 * number, 0, 0)).save(tmp_path / f"f/{number}.png")
    for path in (str(tmp_path / "f"), make_video(tmp_path / "v.avi", frames=12)):
        whole, picked = read_video(path, SMALL, 28)
        for part in (slice(0, 2), slice(2, 6), slice(6, 8)):
            frames, told = read_video(path, SMALL, 28, part=part)
            assert torch.equal(frames, whole[part]) and told == picked


def test_a_header_that_lies_is_refused(make_encoder, media, monkeypatch):
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0][1:])
    monkeypatch.setattr(video.frames, "probe", lambda path, clip: (20, 2.0, 64, 96))
    settings = VideoSettings(fps=1.0, min_pixels=784, max_pixels=784)
    assert make_encoder(settings)(sample).video_grid_thw[0, 0] == 8, "16 of 40 frames"
    with pytest.raises(VideoError, match="other frames than its header tells of; --sequence_parallel cannot share it"):
        make_encoder(settings, share=(0, 2))(sample)


def test_what_processes_read_otherwise_is_skipped_on_all(monkeypatch):
    grid, sample = torch.tensor([[4, 2, 2]]), Sample("d:1", "What?", "A", videos=("a.mp4",))
    prompt = lambda last: Prompt(sample, grid, None, None, None, grid, [1.0], [[0.0, last]])
    for other, expected in ((prompt(1.0), None), (prompt(2.0), "read other frames"), (Skipped("d:1", "", "no"), "no")):
        told = other if isinstance(other, Skipped) else other.shape
        monkeypatch.setattr(sequence, "gather_items", lambda own: [own, [told]])
        (agreed,) = sequence.agreed([prompt(1.0)])
        assert isinstance(agreed, Prompt) if expected is None else expected in agreed.reason


def test_pictures_are_those_of_the_share(checkpoints, media):
    make = functools.partial(PromptEncoder, str(checkpoints["qwen2_vl"]), SMALL)
    sample = Sample("d:1", "What?", "A", videos=media[0], images=media[1])
    whole = frames_of(make()(sample), make().processor)
    assert [len(frames) for frames in whole] == [8, 8, 1, 1]
    prompts = [make(share=(rank, 3))(sample) for rank in range(3)]
    shares = [frames_of(prompt, make().processor) for prompt in prompts]
    assert sum(len(frames) for share in shares for frames in share) == 18
    steps = [own_steps(prompt.image_grid_thw, prompt.video_grid_thw, prompt.share)[1] for prompt in prompts]
    first = [share[0] for share, (own, _) in zip(shares, steps) if own]
    assert torch.equal(torch.cat(first), whole[0])
