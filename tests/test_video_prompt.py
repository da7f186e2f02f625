"""Prompts against the model's own processor called in full; length limits, controls, hostile question texts."""

import functools
import pickle
from fractions import Fraction

import pytest
import torch
from conftest import FAMILIES
from PIL import Image
from transformers import AutoProcessor, Qwen3VLProcessor
from video_helpers import SMALL, encode, make_video, numbered

import video.frames
import video.prompt
from grpo.families import load_family
from rewards.problem_types import ACCURACY
from video.dataset import Sample
from video.formats import Clip
from video.frames import SampleError, VideoSettings, read_image, read_video
from video.prompt import FRAME_CONTROLS, PromptEncoder, PromptTooLong, shuffle_frames, shuffled_order
from video.settings import FORMS, parse_forms

WHOLE_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return load_family(request.param)


@pytest.fixture(scope="module")
def folder(family, checkpoints):
    return str(checkpoints[family.model_class.config_class.model_type])


@pytest.fixture(scope="module")
def make_encoder(folder, family):
    return functools.partial(PromptEncoder, folder, video_text=family)


@pytest.fixture(scope="module")
def encoder(make_encoder):
    return make_encoder(SMALL)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two videos and two images of different sizes."""
    where = tmp_path_factory.mktemp("media")
    videos = (make_video(where / "a.mp4"), make_video(where / "b.mp4", frames=40, height=64, width=96, fps=10, seed=1))
    images = (str(where / "a.png"), str(where / "b.png"))
    for path, size in zip(images, ((60, 40), (200, 90))):
        Image.effect_noise(size, 60).convert("RGB").save(path)
    return videos, images


CASES = {"video": (1, 0), "image": (0, 1), "two videos": (2, 0), "two images": (0, 2), "all": (2, 2), "text": (0, 0)}


@pytest.mark.parametrize("case", CASES)
def test_prompt_equals_the_processor_called_in_full(encoder, folder, media, case):
    n_videos, n_images = CASES[case]
    sample = Sample(
        "d.jsonl:1", "What is <video>seen?\nA. x\nB. y", "A", videos=media[0][:n_videos], images=media[1][:n_images]
    )
    prompt, processor = encoder(sample), AutoProcessor.from_pretrained(folder)
    videos = [read_video(path, SMALL, encoder.factor) for path in sample.videos]
    images = [read_image(path, SMALL, encoder.factor) for path in sample.images]
    told = [
        {"fps": picked.fps, "frames_indices": picked.numbers, "total_num_frames": 99, "height": 9, "width": 9}
        for _, picked in videos
    ]
    text = encoder.text(sample)
    if isinstance(processor, Qwen3VLProcessor):
        text = text.replace(WHOLE_VIDEO, "<|video_pad|>")  # or transformers 5 leaves these marks around each video
    expected = processor(
        text=[text],
        images=images or None,
        videos=[frames for frames, _ in videos] or None,
        video_metadata=told or None,
        do_resize=False,
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        ours = getattr(prompt, name)
        assert (ours is None) == (name not in expected), name
        if ours is not None:
            assert torch.equal(ours, expected[name]) and ours.dtype == expected[name].dtype, name
    assert len(prompt.seconds_per_grid) == n_videos


def test_text_is_the_chat_with_vision_first_and_the_default_system_prompt(encoder, media):
    sample = Sample("d.jsonl:1", "Why?", "A", videos=media[0][:1])
    assert encoder.text(sample) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|video_pad|><|vision_end|>Why?\n\nThink first, inside <think> </think>, then give the final "
        "answer (the option) inside <answer> </answer>.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_frames_are_neither_resized_nor_sampled_again(encoder, media):
    """The processor would enlarge 28x28 to its own minimum, and could drop frames: 8 frames stay 4 steps of 2x2."""
    prompt = encoder(Sample("d.jsonl:1", "What?", "A", videos=media[0][:1]))
    processor = encoder.video_processor
    size = processor.patch_size
    assert prompt.video_grid_thw.tolist() == [[4, 2, 2]] and prompt.pixel_values_videos.shape == (16, 6 * size**2)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    patches = prompt.pixel_values_videos.view(4, 2, 2, 3, 2, size, size)  # step, row, column, colour, frame, y, x
    frames = patches.permute(0, 4, 3, 1, 5, 2, 6).reshape(8, 3, 2 * size, 2 * size)
    frames = frames * std.view(3, 1, 1) + mean.view(3, 1, 1)
    raw, _ = read_video(media[0][0], SMALL, encoder.factor)
    assert torch.equal((frames * 255).round().to(torch.uint8), raw)


def test_seconds_per_grid_is_two_sampled_frames(make_encoder, media):
    """b.mp4 has 40 frames at 10 a second. 8 of them: one each 0.5 s, so 1 s a step; 16: 0.5 s; 4: 2 s."""
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0][1:])
    for nframes, seconds in ((8, 1.0), (16, 0.5), (4, 2.0)):
        settings = VideoSettings(nframes=nframes, min_pixels=784, max_pixels=784)
        assert make_encoder(settings)(sample).seconds_per_grid == pytest.approx([seconds])


def test_too_long_is_refused_from_metadata_alone(make_encoder, media, monkeypatch):
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0], images=media[1])
    length = len(make_encoder(SMALL)(sample).input_ids)
    assert len(make_encoder(SMALL, max_prompt_tokens=length)(sample).input_ids) == length  # never cut

    def decoded(*_):
        raise AssertionError("a frame was decoded")

    monkeypatch.setattr(video.prompt, "read_video", decoded)
    monkeypatch.setattr(video.prompt, "read_image", decoded)
    with pytest.raises(
        PromptTooLong, match=f"prompt of {length} tokens is over --max_prompt_tokens {length - 1}"
    ) as caught:
        make_encoder(SMALL, max_prompt_tokens=length - 1)(sample)
    assert caught.value.path == media[0][0]
    text = Sample("d.jsonl:2", "word " * 50, "A")
    with pytest.raises(PromptTooLong):
        make_encoder(SMALL, max_prompt_tokens=40)(text)


def test_a_header_that_lies_about_length_is_found_after_decoding(make_encoder, media, monkeypatch):
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0][1:])
    settings = VideoSettings(fps=10, max_frames=16, min_pixels=784, max_pixels=784)
    limit = len(make_encoder(settings)(sample).input_ids) - 1
    monkeypatch.setattr(video.frames, "probe", lambda path, clip: (4, 10.0, 64, 96))
    with pytest.raises(PromptTooLong):
        make_encoder(settings, max_prompt_tokens=limit)(sample)


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"])
def test_special_tokens_in_a_question_are_refused(encoder, token):
    with pytest.raises(SampleError) as caught:
        encoder(Sample("d.jsonl:9", f"What is {token}?", "A"))
    assert caught.value.reason == f"the question holds the special token {token}; remove it from d.jsonl:9"


def test_marks_are_stripped_and_braces_kept(encoder):
    text = encoder.text(Sample("d.jsonl:1", "<video>\n<image>Solve \\frac{1}{problem} {x}", "A"))
    assert "Solve \\frac{1}{problem} {x}\n\nThink" in text and "<video>" not in text and "<image>" not in text


def test_templates_are_checked(make_encoder):
    text = make_encoder(SMALL, "Q: {problem}").text(Sample("k", "why", "A"))
    assert text.count("user\nQ: why<|im_end|>") == 1
    with pytest.raises(ValueError, match="must not hold <.video_pad.>"):
        make_encoder(SMALL, "<|video_pad|>{problem}")


def test_a_template_asks_for_the_form_of_each_type_of_answer(make_encoder):
    asked = lambda encoder, **fields: encoder.text(Sample("k", "Why {answer_form}?", "A", **fields))
    plain = make_encoder(SMALL)
    wanted = {  # the prompt of a choice is that of Open-R1-Video, to the letter
        "multiple choice": "then give the final answer (the option) inside <answer> </answer>.",
        "numerical": "answer (a number, such as 42 or 3.14) inside",
        "temporal grounding": "answer (the start and the end in seconds, such as 12.5 to 17.8) inside",
        "my own type": "answer (the answer alone) inside",
    }
    for problem_type, words in wanted.items():
        text = asked(plain, problem_type=problem_type)
        assert words in text and "Why {answer_form}?" in text, "a question is no template"
    row = {"problem_type": "tracking", "meta": {"answer_form": "a list of eight boxes"}}
    assert "answer (a list of eight boxes) inside" in asked(plain, **row), "the row's own form comes first"

    forms = parse_forms(["temporal grounding=from = to"])
    own = make_encoder(SMALL, "{problem}|{answer_form}|{answer_form}", forms=forms)
    assert "|from = to|from = to<" in asked(own, problem_type="temporal grounding")
    assert "|a number, such as 42 or 3.14|" in asked(own, problem_type="mra")
    assert pickle.loads(pickle.dumps(own)).forms == forms
    with pytest.raises(ValueError, match="--answer_form must not hold <.im_end.>"):
        make_encoder(SMALL, forms={"math": "<|im_end|>"})
    with pytest.raises(SampleError, match="the question holds the special token <.im_end.>"):
        asked(plain, meta={"answer_form": "<|im_end|>"})


def test_every_type_of_problem_has_a_form_of_its_answer():
    assert {*FORMS} == {*ACCURACY}


def test_controls_change_frames_as_named():
    frames = torch.arange(8 * 3 * 2 * 2, dtype=torch.uint8).view(8, 3, 2, 2)
    kept = frames.clone()
    order = shuffled_order(8, "d.jsonl:1/0")
    assert torch.equal(FRAME_CONTROLS["shuffled"](frames, "d.jsonl:1/0"), frames[order])
    assert FRAME_CONTROLS["reversed"](frames, "")[:, 0, 0, 0].tolist() == [84, 72, 60, 48, 36, 24, 12, 0]
    assert FRAME_CONTROLS["blank"](frames, "").unique().tolist() == [128]
    assert torch.equal(frames, kept)


def test_shuffles_are_permutations_fixed_by_the_key_and_never_the_identity():
    orders = [shuffled_order(4, f"k{number}") for number in range(300)]
    assert all(sorted(order) == [0, 1, 2, 3] and order != [0, 1, 2, 3] for order in orders)
    assert len(set(map(tuple, orders))) == 23  # all others occur
    assert shuffled_order(4, "k7") == orders[7] and shuffled_order(1, "k") == [0]
    assert {tuple(shuffled_order(2, f"k{number}")) for number in range(20)} == {(1, 0)}


def test_controls_reach_the_patches_and_leave_the_text(encoder, media):
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0][:1], images=media[1][:1])
    plain = encoder(sample)
    for control in FRAME_CONTROLS:
        changed = encoder(sample, control)
        assert torch.equal(changed.input_ids, plain.input_ids)
        assert not torch.equal(changed.pixel_values_videos, plain.pixel_values_videos), control
        assert torch.equal(changed.pixel_values, plain.pixel_values) == (control != "blank")
        assert torch.equal(changed.pixel_values_videos, encoder(sample, control).pixel_values_videos), control


@pytest.mark.parametrize("case", ["video", "two videos", "all"])
def test_shuffling_patches_equals_shuffling_frames_before_they_are_cut(encoder, media, case):
    n_videos, n_images = CASES[case]
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0][:n_videos], images=media[1][:n_images])
    prompt = encoder(sample)
    shuffled, expected = shuffle_frames(prompt, sample.key), encoder(sample, "shuffled")
    assert torch.equal(shuffled.pixel_values_videos, expected.pixel_values_videos)
    assert not torch.equal(shuffled.pixel_values_videos, prompt.pixel_values_videos)
    assert shuffled.pixel_values is prompt.pixel_values and shuffled.input_ids is prompt.input_ids


def test_encoder_and_prompt_survive_pickling(encoder, media):
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0][:1])
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(encoder))(sample)))
    plain = encoder(sample)
    assert again.sample == sample and again.pixel_values is None and again.seconds_per_grid == plain.seconds_per_grid
    assert torch.equal(again.pixel_values_videos, plain.pixel_values_videos)
    assert torch.equal(again.input_ids, plain.input_ids) and again.input_ids.dtype == torch.int64


@pytest.fixture(scope="module")
def qwen3(checkpoints):
    return functools.partial(PromptEncoder, str(checkpoints["qwen3_vl"]), video_text=load_family("qwen3_vl"))


# (frames of the video, its rate, the clip asked about, frames taken): the times in the prompt. A time is the mean of
# two frames', each its number / rate: 60 frames at 30 per second are numbers 0 20 39 59, so (0 + 20) / 2 / 30 = 0.33 s.
STAMPS = {
    "a whole number of frames a second": (60, 30, Clip(), 4, ["0.3", "1.6"]),
    "NTSC's 24000 / 1001": (48, Fraction(24000, 1001), Clip(), 4, ["0.3", "1.6"]),
    "2 a second, all taken": (8, 2, Clip(), 8, ["0.2", "1.2", "2.2", "3.2"]),
    "a clip that starts late": (60, 10, Clip(2.5, 4.0), 4, ["2.8", "3.8"]),
}


@pytest.mark.parametrize("case", STAMPS)
def test_qwen3_tells_the_time_of_each_pair_of_frames(qwen3, tmp_path, case):
    frames, rate, clip, count, seconds = STAMPS[case]
    path = encode(tmp_path / "v.mp4", numbered(frames), rate=rate)
    settings = VideoSettings(nframes=count, min_pixels=784, max_pixels=784)
    encoder = qwen3(settings, "{problem}")
    prompt = encoder(Sample("d.jsonl:1", "What?", "A", videos=(path,), clips=(clip,)))
    steps = "".join(f"<{time} seconds>{WHOLE_VIDEO}" for time in seconds)
    assert encoder.processor.tokenizer.decode(prompt.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{steps}What?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen3_has_no_marks_around_a_video_as_the_weights_know_it(qwen3, media):
    """transformers 4.57 and vLLM put the steps in the place of the chat template's marks; transformers 5 between them.
    If this fails because the two are equal, transformers has what the weights know again."""
    encoder = qwen3(SMALL, "{problem}")
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0][:1])
    frames, picked = read_video(media[0][0], SMALL, encoder.factor)
    told = {"fps": picked.fps, "frames_indices": picked.numbers, "total_num_frames": 8}
    theirs = encoder.processor(
        text=[encoder.text(sample)], videos=[frames], video_metadata=[told], do_resize=False, do_sample_frames=False
    )["input_ids"][0]
    start, end = encoder.processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    ours = encoder(sample).input_ids.tolist()
    assert theirs != ours
    theirs.remove(start)  # the first of them
    last = len(theirs) - 1 - theirs[::-1].index(end)
    assert theirs[:last] + theirs[last + 1 :] == ours


def test_qwen3_counts_the_tokens_of_times_before_it_decodes(qwen3, media, monkeypatch):
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0])
    length = len(qwen3(SMALL)(sample).input_ids)
    monkeypatch.setattr(video.prompt, "read_video", lambda *_: pytest.fail("a frame was decoded"))
    with pytest.raises(PromptTooLong, match=f"prompt of {length} tokens is over"):
        qwen3(SMALL, max_prompt_tokens=length - 1)(sample)


def test_qwen3_tells_the_times_of_the_frames_that_there_are_not_of_those_planned(qwen3, media, monkeypatch):
    """b.mp4 has 40 frames at 10 a second; its header is made to say 20."""
    sample = Sample("d.jsonl:1", "What?", "A", videos=media[0][1:])
    expected = qwen3(SMALL)(sample)
    monkeypatch.setattr(video.frames, "probe", lambda path, clip: (20, 10.0, 64, 96))
    prompt = qwen3(SMALL)(sample)
    assert torch.equal(prompt.input_ids, expected.input_ids) and prompt.frame_times[0][-1] == 3.9


def test_qwen3_keeps_the_times_of_shuffled_frames(qwen3, media):
    """T-GRPO and the controls move frames, not the clock."""
    encoder, sample = qwen3(SMALL), Sample("d.jsonl:1", "What?", "A", videos=media[0])
    plain = encoder(sample)
    for changed in (encoder(sample, "shuffled"), encoder(sample, "reversed"), shuffle_frames(plain, "k")):
        assert torch.equal(changed.input_ids, plain.input_ids) and changed.frame_times == plain.frame_times
