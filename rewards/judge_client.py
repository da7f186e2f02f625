"""The requests of `rewards.judge`, in the process of a reward file (see `rewards.user`).

By urllib of the standard library, in threads: the HTTP client that transformers brings is another one in each version.
"""

import asyncio
import functools
import hashlib
import http.client
import json
import os
import random
import re
import urllib.error
import urllib.request
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rewards.judge import KEY, Judge
from video.files import write_bytes

# A request that fails is made again twice. Of the time limit, a request has 0.25, the first wait is 1/60, the second
# 2/60, each up to half as long again, by chance: so even three that stall end within the limit.
RETRIES, REQUEST, WAIT = 2, 0.25, 1 / 60
LARGEST = 2**20  # bytes of a reply
# "Score: 0.5", "**Score:** 1."; not "Score: 7/10", "1 out of 5", "0,5" or "1e-3", of which the first digits say another
_SCORE = re.compile(r"\bscore\s*\**\s*[:=][\s*]{0,5}(\d*\.?\d+)(?!\w|[.,]\d|\s*[/%]|\s+out of (?!1\b))", re.IGNORECASE)
_BARE = re.compile(r"\d*\.?\d+")

_threads = functools.cache(ThreadPoolExecutor)  # for each limit on requests at once; called in the event loop alone


async def grade(prompt: str, judge: Judge) -> float:
    """The score that the judge gives, in [0, 1]. Raises OSError if the server fails, ValueError if the reply has no
    score."""
    entry = judge.cache and Path(judge.cache, hashlib.sha256(repr((judge.model, prompt)).encode()).hexdigest()[:32])
    if entry and (reply := load(entry)) is not None:
        return score_of(reply)
    reply = await ask(prompt, judge)
    score = score_of(reply)
    if entry:
        store(entry, reply)
    return score


async def ask(prompt: str, judge: Judge) -> str:
    """The judge's reply. What may pass is tried again: a lost or late connection, HTTP 408, 429 and 5xx, bad JSON."""
    loop = asyncio.get_running_loop()
    for attempt in range(RETRIES + 1):
        try:
            return await loop.run_in_executor(_threads(judge.concurrency), post, prompt, judge)
        except (OSError, ValueError, http.client.HTTPException) as error:
            lasts = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429)
            if lasts or attempt == RETRIES:
                late = f" after {REQUEST * judge.seconds:.3g} s; raise --reward_timeout" * ("timed out" in str(error))
                raise ConnectionError(f"{judge.url}: {str(error) or type(error).__name__}{late}") from error
        await asyncio.sleep(WAIT * judge.seconds * 2**attempt * random.uniform(1, 1.5))


def post(prompt: str, judge: Judge) -> str:
    """One request. Raises OSError, http.client.HTTPException, or ValueError for a reply of another form."""
    body = {"model": judge.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    request = urllib.request.Request(
        f"{judge.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    if key := os.environ.get(KEY, "").strip():
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # goes to no other server
    try:
        with urllib.request.urlopen(request, timeout=REQUEST * judge.seconds) as response:
            content = response.read(LARGEST)
    except urllib.error.HTTPError as error:
        error.msg = f"{error.msg} {error.read(200).decode(errors='replace')}"  # the server's own reason
        raise
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"the reply is no chat completion: {content[:100]!r}")
    return text


def score_of(reply: str) -> float:
    """The last "Score: X" of a reply, its thought aside, or the number that it is. Raises ValueError."""
    text = reply.rpartition("</think>")[2].partition("<think>")[0].strip()  # also a thought that is cut short
    found = _SCORE.findall(text) or ([text] if _BARE.fullmatch(text) else [])
    if not found or not float(found[-1]) <= 1:
        raise ValueError(f"the judge's reply has no score from 0 to 1: {text!r:.100}")
    return float(found[-1])


def load(entry: Path) -> str | None:
    """The reply that is kept; None if there is none, or a damaged one."""
    try:
        reply = json.loads(entry.read_bytes())
    except (OSError, ValueError):
        return None
    return reply if isinstance(reply, str) else None


def store(entry: Path, reply: str) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(entry, json.dumps(reply).encode(), aside=entry.with_name(f"{uuid.uuid4().hex}.tmp"), sync=False)
    except OSError as error:  # a full disk costs time, not scores
        warnings.warn(f"--judge_cache {entry.parent}: {error.strerror}; replies are not kept", stacklevel=2)
