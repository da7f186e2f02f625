"""A sample as the tensors that the model reads: placeholders expanded, pixels cut into patches.

The model's own processor does no more here than normalise and cut (do_resize=False, do_sample_frames=False): frames
are picked and resized once, in frames.py.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from transformers import AutoProcessor, ProcessorMixin

from video.cache import FrameCache
from video.formats import MARKS, WHOLE, Clip, Sample
from video.frames import FRAME_FACTOR, Picked, SampleError, VideoError, image_size, plan_frames, read_image, read_video
from video.settings import FORMS, TEMPLATE, VideoSettings, answer_form

GREY = 128  # a blank frame: the middle of the range, so near the mean after normalising


WHOLE_PROMPT = (0, 1)  # the share of one process that shares its prompts with no other


def encoders(grids: list[list[int]], count: int) -> tuple[torch.Tensor, ...]:
    """For each [t, h, w] grid, in patches, of one prompt's media a (t,) tensor: which of `count` processes that share
    the prompt encodes each time step. They take neighbouring steps, of as many patches each as whole steps allow.

    A video of 4 steps of 6 x 6 patches and an image of 4 x 4, for 2 processes: [0 0 1 1] and [1].
    """
    patches = torch.tensor([h * w for t, h, w in grids for _ in range(t)])
    ranks = (2 * patches.cumsum(0) - patches) * count // (2 * patches.sum())  # of a step's middle
    return ranks.split([t for t, _, _ in grids])


def own_steps(
    images: torch.Tensor | None, videos: torch.Tensor | None, share: tuple[int, int]
) -> tuple[list[range], list[range]]:
    """The time steps that the process of a `share` encodes of each image and of each video; images, videos: their
    grids (n, 3)."""
    grids = [[] if grid is None else grid.tolist() for grid in (images, videos)]
    every, (rank, count) = sum(grids, []), share
    ranks = encoders(every, count) if every else ()
    steps = [range(int((own < rank).sum()), int((own <= rank).sum())) for own in ranks]
    return steps[: len(grids[0])], steps[len(grids[0]) :]


class PromptTooLong(SampleError):
    """A prompt above the limit. It is refused whole: cutting it would cut vision tokens off their features."""


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out, and never replaced by another."""

    key: str  # of its row
    path: str  # the file at fault, "" if the text is at fault
    reason: str
    reason_type: str = field(default="", compare=False)  # the type of the exception, "timeout" or "worker died"


@dataclass
class Prompt:
    """What the model reads for one sample. A patch is flattened to V values: 1176 = 3 colours x 2 frames
    x 14 x 14 pixels; with the patches of Qwen3-VL, 16 x 16, 1536."""

    sample: Sample
    input_ids: torch.Tensor  # (P,) int64; one placeholder token for each merged patch
    pixel_values: torch.Tensor | None  # (patches of all images, V) float32
    image_grid_thw: torch.Tensor | None  # (images, 3) int64: time, rows, columns, in patches
    pixel_values_videos: torch.Tensor | None  # (patches of all videos, V) float32
    video_grid_thw: torch.Tensor | None  # (videos, 3) int64
    seconds_per_grid: list[float]  # one a video: seconds between two time steps; Qwen2.5-VL's time scale
    frame_times: list[list[float]] = field(default_factory=list)  # of each video, its frames' seconds; Qwen3-VL's text
    share: tuple[int, int] = WHOLE_PROMPT  # (rank, S): the pixels are those alone that one of S processes encodes

    @property
    def shape(self) -> tuple:
        """(grids of images and videos, times of frames): alike in all processes that share the prompt."""
        grids = [None if grid is None else grid.tolist() for grid in (self.image_grid_thw, self.video_grid_thw)]
        return *grids, self.frame_times

    # Tensors go from process to process as numpy arrays, by value: torch would share memory through file descriptors,
    # which run out, and which die with a worker that is killed.
    def __getstate__(self) -> dict:
        return {name: value.numpy() if torch.is_tensor(value) else value for name, value in vars(self).items()}

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


def shuffled_order(count: int, key: str) -> list[int]:
    """A permutation of range(count), fixed by `key`. It is never the identity if count > 1."""
    generator = np.random.default_rng(zlib.crc32(key.encode()))
    order = list(range(count))
    while count > 1 and order == list(range(count)):
        order = generator.permutation(count).tolist()
    return order


# What a control makes of a video's frames (T, 3, H, W), to test what the model uses: their order, the direction of
# time, any pixel. Whole frames are shuffled, which also breaks the pairs that share a temporal patch.
FRAME_CONTROLS: dict[str, Callable[[torch.Tensor, str], torch.Tensor]] = {
    "shuffled": lambda frames, key: frames[shuffled_order(len(frames), key)],
    "reversed": lambda frames, key: frames.flip(0),
    "blank": lambda frames, key: torch.full_like(frames, GREY),
}


def shuffle_frames(prompt: Prompt, key: str) -> Prompt:
    """`prompt` with the frames of each of its videos permuted: what the control "shuffled" gives for a sample of `key`.

    Nothing is decoded: a patch (3 colours, 2 frames, 14 x 14 pixels) is taken apart, and put together of other frames.
    """
    videos = prompt.pixel_values_videos.split(prompt.video_grid_thw.prod(dim=1).tolist())
    shuffled = []
    for number, (patches, steps) in enumerate(zip(videos, prompt.video_grid_thw[:, 0].tolist())):
        cut = patches.unflatten(1, (3, FRAME_FACTOR, -1)).unflatten(0, (steps, -1))  # step, place, colour, frame, pixel
        frames = cut.movedim(3, 1).flatten(0, 1)[shuffled_order(steps * FRAME_FACTOR, f"{key}/{number}")]
        shuffled.append(frames.unflatten(0, (steps, FRAME_FACTOR)).movedim(1, 3).reshape(patches.shape))
    return replace(prompt, pixel_values_videos=torch.cat(shuffled))


class VideoText:
    """How a prompt holds a video. Here as Qwen2-VL has it: one run of placeholders for the whole video.

    `grpo.families.base.Family` is one, so that a family of another form is handed in, not imported.
    """

    def mark_videos(self, text: str, times: list[list[float]]) -> str:
        """`text` of `chat_text` with one placeholder for each run of each video; times: of each video the seconds at
        which its frames are shown."""
        return text

    def span_grids(self, grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        """The grid of each run of a video: time, rows, columns, in patches, as `grid` of the whole video."""
        return [grid]


def with_clips(sample: Sample) -> list[tuple[str, Clip]]:
    """(path, the part asked about) of each of its videos."""
    return list(zip(sample.videos, sample.clips or [WHOLE] * len(sample.videos), strict=True))


def load_processor(path: str) -> ProcessorMixin:
    """The processor of a folder or hub name; code that comes with it is never run.

    Raises ValueError if its chat template cannot ask about an image and a video, and what transformers raises on
    damaged files.
    """
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    question = "What is shown?"
    try:
        text = chat_text(processor, question, images=1, videos=1)
    except Exception as error:  # whatever the template does
        raise ValueError(f"its chat template fails: {error}") from error
    for part in (processor.image_token, processor.video_token, question):
        if text.count(part) != 1:
            raise ValueError(f"its chat template writes {part} {text.count(part)} times, and must do so once")
    return processor


def chat_text(processor: ProcessorMixin, question: str, images: int, videos: int) -> str:
    """The chat text of a question after so many images and videos, a placeholder for each, ready to be completed.

    The system prompt is the default of the model's own chat template.
    """
    content = [{"type": "image"}] * images + [{"type": "video"}] * videos
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@dataclass(eq=False)
class PromptEncoder:
    """Turns a Sample into a Prompt when called, or raises SampleError with the file and the reason.

    It is pickled into worker processes, and each of them loads the processor again.
    """

    processor_path: str  # a folder or hub name
    settings: VideoSettings
    template: str = TEMPLATE  # "{problem}" becomes the question, "{answer_form}" that of the question's type in `forms`
    max_prompt_tokens: int = 8192
    cache: FrameCache | None = None  # keeps the frames of videos on disk
    forms: dict[str, str] = field(default_factory=lambda: FORMS)
    video_text: VideoText = VideoText()  # how the model's family writes a video into the prompt
    share: tuple[int, int] = WHOLE_PROMPT  # (rank, S): it reads what one of S processes encodes; see `own_steps`

    def __post_init__(self):
        self.read_video = self.cache.read if self.cache else read_video
        self.processor = load_processor(str(self.processor_path))
        self.video_processor = self.processor.video_processor
        if hasattr(self.video_processor, "cap_pixels_per_frame"):
            self.video_processor.cap_pixels_per_frame = False  # it concerns resizing alone; unset, it warns
        self.factor = self.video_processor.patch_size * self.video_processor.merge_size
        added = self.processor.tokenizer.added_tokens_decoder.values()
        self.special_tokens = sorted({token.content for token in added if token.special})
        for token in self.special_tokens:
            if any(token in text for text in (self.template, *self.forms.values())):
                flags = "--prompt_template and --answer_form"
                raise ValueError(f"{flags} must not hold {token}: the chat template adds special tokens")

    def __reduce__(self) -> tuple:
        return type(self), tuple(getattr(self, item.name) for item in fields(self))

    def __call__(self, sample: Sample, control: str | None = None) -> Prompt:
        """The prompt of `sample`; `control` names a change of its frames (FRAME_CONTROLS; "blank" greys images too).

        Raises VideoError for a file that cannot be read, PromptTooLong (found before any frame is decoded) and
        SampleError for a question that holds the model's special tokens.
        """
        # 1) The length, from file headers
        text = self.text(sample)
        image_grid, video_grid, times = self.plan(sample)
        self.expand(sample, self.text_ids(text, times), image_grid, video_grid)
        # 2) Pixels
        of_images, of_videos = own_steps(image_grid, video_grid, self.share)
        images = [read_image(path, self.settings, self.factor) for path, own in zip(sample.images, of_images) if own]
        if control == "blank":
            images = [torch.full_like(image, GREY) for image in images]
        videos, picked = [], []
        for number, own in enumerate(of_videos):
            frames, taken = self.read_frames(sample, number, own, control)
            picked.append(taken)
            sides = [side // self.video_processor.patch_size for side in frames.shape[-2:]]
            video_grid[number] = torch.tensor([len(taken.numbers) // FRAME_FACTOR, *sides])
            if own:
                videos.append(frames)
        # 3) Patches
        inputs, same = {}, {"do_resize": False, "return_tensors": "pt"}
        if images:
            inputs |= self.processor.image_processor(images=images, **same)
        if videos:
            inputs |= self.video_processor(videos=videos, do_sample_frames=False, **same)
        times = [own.times for own in picked]  # a header may lie about the frames, so the planned ones do not do
        return Prompt(
            sample=sample,
            input_ids=self.expand(sample, self.text_ids(text, times), image_grid, video_grid),
            pixel_values=inputs.get("pixel_values"),
            image_grid_thw=image_grid,
            pixel_values_videos=inputs.get("pixel_values_videos"),
            video_grid_thw=video_grid,
            seconds_per_grid=[self.video_processor.temporal_patch_size / own.rate for own in picked],
            frame_times=times,
            share=self.share,
        )

    def read_frames(
        self, sample: Sample, number: int, steps: range, control: str | None
    ) -> tuple[torch.Tensor, Picked]:
        """(frames of the time steps `steps` of a video of `sample`, which of its frames are picked in all). Without a
        step it reads the first one, whose size is that of all.

        Raises VideoError, also if there are more or fewer than planned and other processes read the rest.
        """
        path, clip = with_clips(sample)[number]
        given, steps, shared = (path, self.settings, self.factor, clip), steps or range(1), self.share != WHOLE_PROMPT
        part = slice(FRAME_FACTOR * steps.start, FRAME_FACTOR * steps.stop) if shared else slice(None)
        frames, picked = self.read_video(*given) if control else self.read_video(*given, part)
        planned, _ = plan_frames(*given)
        if shared and len(picked.numbers) != len(planned.numbers):
            raise VideoError(path, "has other frames than its header tells of; --sequence_parallel cannot share it")
        if control:
            frames = FRAME_CONTROLS[control](frames, f"{sample.key}/{number}")[part]
        return frames, picked

    def text_ids(self, text: str, times: list[list[float]]) -> list[int]:
        """The token ids of a `text`: one placeholder for each image and each run of a video. times: see `VideoText`."""
        marked = self.video_text.mark_videos(text, times)
        return self.processor.tokenizer(marked, add_special_tokens=False)["input_ids"]

    def expand(
        self, sample: Sample, ids: list[int], image_grid: torch.Tensor | None, video_grid: torch.Tensor | None
    ) -> torch.Tensor:
        """(P,) int64: `ids` of `text_ids`, with each placeholder repeated for each merged patch of its image or run.

        in: ids [5, video, 7], a video_grid of one video of 1 x 4 x 4 patches, of which 2 x 2 are merged
        out: [5, video, video, video, video, 7]

        Raises PromptTooLong.
        """
        processor, tokens = self.processor, torch.tensor(ids)
        repeats = torch.ones_like(tokens)
        if video_grid is not None:
            video_grid = torch.tensor([run for grid in video_grid.tolist() for run in self.video_text.span_grids(grid)])
        for token, grid, cut in (
            (processor.image_token, image_grid, processor.image_processor),
            (processor.video_token, video_grid, processor.video_processor),
        ):
            if grid is not None:
                places = tokens == processor.tokenizer.convert_tokens_to_ids(token)
                repeats[places] = grid.prod(dim=1) // cut.merge_size**2
        if (length := int(repeats.sum())) > self.max_prompt_tokens:  # also after planning: a header may lie
            limit = f"--max_prompt_tokens {self.max_prompt_tokens}"
            raise PromptTooLong(next(iter(sample.media), ""), f"prompt of {length} tokens is over {limit}")
        return tokens.repeat_interleave(repeats)

    def text(self, sample: Sample) -> str:
        """The `chat_text` of `sample`: its question in the template. Raises SampleError."""
        problem, form = MARKS.sub("", sample.problem).strip(), answer_form(sample, self.forms)
        for token in self.special_tokens:
            if token in problem or token in form:
                raise SampleError("", f"the question holds the special token {token}; remove it from {sample.key}")
        question = self.template.replace("{answer_form}", form).replace("{problem}", problem)
        return chat_text(self.processor, question, len(sample.images), len(sample.videos))

    def plan(self, sample: Sample) -> tuple[torch.Tensor | None, torch.Tensor | None, list[list[float]]]:
        """(grids of the images, grids of the videos, times of each video's frames) by arithmetic on file headers: no
        frame is decoded."""
        patch, steps_of = self.video_processor.patch_size, self.video_processor.temporal_patch_size
        images = [(1, *image_size(path, self.settings, self.factor)) for path in sample.images]
        plans = [plan_frames(path, self.settings, self.factor, clip) for path, clip in with_clips(sample)]
        videos = [(-(-len(picked.numbers) // steps_of), *size) for picked, size in plans]
        grid = lambda shapes: torch.tensor([(t, h // patch, w // patch) for t, h, w in shapes]) if shapes else None
        return grid(images), grid(videos), [picked.times for picked, _ in plans]

    def planned_tokens(self, sample: Sample) -> int:
        """Vision tokens of `sample` by arithmetic on file headers."""
        grids = [grid for grid in self.plan(sample)[:2] if grid is not None]
        return sum(int(grid.prod(dim=1).sum()) for grid in grids) // self.video_processor.merge_size**2
