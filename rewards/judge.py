"""A language model that scores answers in free text, on any server with OpenAI's chat completions.

The requests are made in a process of their own (`rewards.judge_client`), all at once, within one time limit.
"""

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rewards.user import Outcome, reward_file
from video.formats import Sample

JUDGED = ("free-form", "open-ended")  # the problem types whose answers a judge scores, in place of ROUGE
KEY = "JUDGE_API_KEY"  # the environment variable
PROMPT = """You grade an answer to a question about a video that you cannot see. The answer is right if it means the \
same as the reference answer, in whatever words.

Question: {problem}
Reference answer: {answer}
Answer to grade: {prediction}

End your reply with the line "Score: X", where X is a number from 0 (wrong) to 1 (right)."""


@dataclass(frozen=True)
class Judge:
    """Whom to ask, and how."""

    url: str  # of the API, such as http://localhost:8000/v1
    model: str
    prompt: str  # {problem}, {answer} and {prediction} are replaced
    cache: str | None  # a folder that keeps replies; None: nothing is kept
    concurrency: int  # most requests at once, of this process
    seconds: float  # the time limit of all requests of a call

    @classmethod
    def of(cls, config) -> "Judge | None":
        """The judge that the flags of a command line name; None without --judge_url. Raises ValueError, which names the
        flag."""
        if not config.judge_url:
            return None
        if not re.match(r"https?://[\w\[]", config.judge_url):
            raise ValueError(f"--judge_url {config.judge_url}: must be like http://localhost:8000/v1")
        if not config.judge_model:
            raise ValueError("--judge_url needs --judge_model, the name of a model that the server has")
        if not re.fullmatch(r"[!-~]*", os.environ.get(KEY, "").strip()):
            raise ValueError(f"{KEY}: the environment variable holds a character that no key has")
        prompt = _read_prompt(config.judge_prompt) if config.judge_prompt else PROMPT
        return cls(
            config.judge_url.rstrip("/"), config.judge_model, prompt, config.judge_cache, config.judge_concurrency,
            config.reward_timeout,
        )  # fmt: skip

    def outcomes(self, predictions: Sequence[str], samples: Sequence[Sample]) -> list[Outcome]:
        """The outcome of predictions[i], an answer to samples[i]. Equal questions are asked once."""
        texts = [self.fill(*pair) for pair in zip(predictions, samples)]
        file, asked = reward_file(str(Path(__file__).with_name("judge_client.py"))), list(dict.fromkeys(texts))
        results = file.call([("grade", (text, self)) for text in asked], self.seconds)
        found = {text: outcome for text, (outcome,) in zip(asked, results)}
        return [found[text] for text in texts]

    def fill(self, prediction: str, sample: Sample) -> str:
        """The prompt. Each place is filled once: a prediction that reads "{answer}" stays what it is."""
        values = {"{problem}": sample.problem, "{answer}": sample.answer, "{prediction}": prediction}
        return re.sub("|".join(map(re.escape, values)), lambda place: values[place[0]], self.prompt)


@functools.cache  # a run keeps the prompt that it began with
def _read_prompt(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--judge_prompt {path}: {getattr(error, 'strerror', None) or error}") from error
    if "{prediction}" not in text:
        raise ValueError(f"--judge_prompt {path}: must hold {{prediction}}, where the answer to grade goes")
    return text
