"""A training step's first prompts and their completions, for TensorBoard."""

import html

from transformers import ProcessorMixin

from grpo.types import Rollout
from video.formats import Sample
from video.pictures import frames_of, strip
from video.prompt import Prompt

SHOWN = 2  # prompts of a step


def show_rollouts(board, step: int, prompts: list[Prompt], rollouts: list[Rollout], processor: ProcessorMixin) -> None:
    """Writes the first SHOWN prompts of a step to a TensorBoard writer: the frames as a strip, the completions as a
    table."""
    for number, (prompt, rollout) in enumerate(list(zip(prompts, rollouts))[:SHOWN]):
        for frames in frames_of(prompt, processor)[:1]:
            board.add_image(f"rollouts/{number}", strip(frames), step)
        board.add_text(f"rollouts/{number}", completions_table(prompt.sample, rollout), step)


def completions_table(sample: Sample, rollout: Rollout) -> str:
    """The group's completions, each with its reward, its advantage and the parts of its reward, as Markdown."""
    plain = lambda text: " ".join(html.escape(text).replace("|", "&#124;").split())
    names = ["reward", "advantage", *rollout.parts, "completion"]
    lines = [f"{plain(sample.problem)} (answer: {plain(sample.answer)})", ""]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for text, *values in zip(rollout.texts, rollout.rewards, rollout.advantages, *rollout.parts.values()):
        lines.append(f"| {' | '.join([*(f'{float(v):.3g}' for v in values), plain(text)])} |")
    return "\n".join(lines)
