"""A language model as a judge of free text, on a server that this file starts: it may fail, and costs zeros alone."""

import gc
import json
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from evaluation.predictions import Predictions
from grpo.config import parse_config
from grpo.engine.evaluate import _records, summarise
from grpo.errors import ConfigError
from rewards import parse_rewards, score_groups
from rewards.judge import Judge
from rewards.judge_client import score_of
from video.formats import Sample

SAMPLE = Sample("k:1", "What is it?", "a cat", problem_type="free-form")


class Handler(BaseHTTPRequestHandler):
    """Does what the answer to grade says: "score 0.5" is a score, "500" a code, ..."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        said = text.partition("grade: ")[2].partition("\n")[0]
        with self.server.lock:
            self.server.asked[said] += 1
            self.server.requests.append((self.path, self.headers["Authorization"], body))
        self.server.think()
        if said == "stalls":
            self.server.closing.wait(20)
        if said in ("stalls", "closes"):
            return self.close()
        code = int(said) if said.isdigit() else 503 if said == "fails once" and self.server.asked[said] == 1 else 200
        content = {"rubbish": "It is a nice cat.", "ten": "Score: 7/10"}.get(said, "Well.\nScore: 1")
        content = f"**Score:** {said[6:]}" if said.startswith("score ") else content
        reply = json.dumps({"choices": [{"message": {"content": content}}]})
        self.answer(
            code, {"bad json": reply[:-2], "no choices": "{}"}.get(said, reply if code == 200 else "no such model")
        )

    def answer(self, code, text):
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def close(self):
        self.close_connection = True

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size, daemon_threads = 512, True

    def think(self):
        time.sleep(self.latency)

    def handle_error(self, *_):  # the client has gone
        pass


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.asked, server.requests, server.lock = Counter(), [], threading.Lock()
    server.latency, server.closing = 0, threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def judge_of(server, **changes):
    flags = {"judge_prompt": None, "judge_cache": None, "judge_concurrency": 256, "reward_timeout": 20.0}
    return Judge.of(SimpleNamespace(judge_url=server.url, judge_model="m", **{**flags, **changes}))


def score(judge, *groups):
    rewards = parse_rewards(["accuracy:2"], judge)
    texts = [[f"<answer>{text}</answer>" for text in group] for group in groups]
    return score_groups(rewards, texts, [SAMPLE] * len(groups))


def test_free_text_is_scored_by_the_judge_and_nothing_else(server, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-1")
    judge, choice = judge_of(server), replace(SAMPLE, answer="B", problem_type="multiple choice")
    texts = [["<answer>score 0.5</answer>", "no tag", "<answer>score 0.5</answer>"], ["<answer>B</answer>"]]
    free, letter = score_groups(parse_rewards(["accuracy:2"], judge), texts, [SAMPLE, choice])
    assert free.parts == {"accuracy": [0.5, 0.0, 0.5]} and free.totals == [1.0, 0.0, 1.0]
    assert letter.parts == {"accuracy": [1.0]} and free.failures == letter.failures == {}
    ((path, _, body),) = server.requests  # equal questions are asked once
    assert path == "/v1/chat/completions" and (body["model"], body["temperature"]) == ("m", 0)
    assert (
        "Question: What is it?\nReference answer: a cat\nAnswer to grade: score 0.5\n" in body["messages"][0]["content"]
    )


def test_what_the_server_does_wrong_costs_zeros_and_is_counted(server):
    """All at once; a request that may succeed is made three times, another once."""
    wrong = ["500", "stalls", "bad json", "no choices", "closes", "rubbish", "ten", "404", "score 2"]
    (scores,) = score(judge_of(server, reward_timeout=8.0), ["score 1", *wrong, "fails once"])
    assert scores.parts["accuracy"] == [1.0] + [0.0] * len(wrong) + [1.0]
    messages = dict(zip(wrong, scores.failures["accuracy"], strict=True))
    for said, words in {
        "500": f"ConnectionError: {server.url}: HTTP Error 500: Internal Server Error no such model",
        "stalls": f"ConnectionError: {server.url}: timed out after 2 s; raise --reward_timeout",
        "bad json": f'ConnectionError: {server.url}: the reply is no chat completion: b\'{{"choices"',
        "no choices": f"ConnectionError: {server.url}: the reply is no chat completion: b'{{}}'",
        "closes": f"ConnectionError: {server.url}: Remote end closed connection without response",
        "rubbish": "ValueError: the judge's reply has no score from 0 to 1: 'It is a nice cat.'",
        "ten": "ValueError: the judge's reply has no score from 0 to 1: 'Score: 7/10'",
        "404": f"ConnectionError: {server.url}: HTTP Error 404: Not Found no such model",
        "score 2": "ValueError: the judge's reply has no score from 0 to 1: '**Score:** 2'",
    }.items():
        assert messages[said].startswith(words), (said, messages[said])
    tries = {said: 3 for said in ("500", "stalls", "bad json", "no choices", "closes")}
    assert server.asked == {"score 1": 1, "fails once": 2, "rubbish": 1, "ten": 1, "404": 1, "score 2": 1, **tries}


def test_a_server_that_is_not_there_costs_zeros(server):
    (scores,) = score(judge_of(server, reward_timeout=2.0), ["score 1"])
    assert scores.totals == [2.0]
    gone = replace(judge_of(server, reward_timeout=2.0), url="http://127.0.0.1:9/v1")
    (scores,) = score(gone, ["a", "b"])
    assert scores.totals == [0.0, 0.0] and len(scores.failures["accuracy"]) == 2
    assert "Connection refused" in scores.failures["accuracy"][0]


def test_replies_are_kept_whole(server, tmp_path):
    """By later processes, too; a damaged entry is asked again, a reply without a score is never kept."""
    judge = judge_of(server, judge_cache=str(tmp_path / "new" / "cache"))
    for _ in range(2):
        assert score(judge, ["score 0.25", "rubbish"])[0].parts["accuracy"] == [0.25, 0.0]
    assert server.asked == {"score 0.25": 1, "rubbish": 2}
    (entry,) = Path(judge.cache).iterdir()
    assert json.loads(entry.read_text()) == "**Score:** 0.25"
    for damage in (b"", b'"**Score', b"\0\0", b"{}"):
        entry.write_bytes(damage)
        assert score(judge, ["score 0.25"])[0].parts["accuracy"] == [0.25]
    assert server.asked["score 0.25"] == 5 and json.loads(entry.read_text()) == "**Score:** 0.25"
    (tmp_path / "file").write_text("")
    assert score(judge_of(server, judge_cache=str(tmp_path / "file")), ["score 0.25"])[0].totals == [0.5], "not kept"


def test_a_prompt_of_ones_own_is_filled_once(server, tmp_path):
    """An answer that names the place of the ground truth is not given it."""
    path = tmp_path / "prompt.txt"
    path.write_text("{problem} {prediction} {answer} {x}")
    judge = judge_of(server, judge_prompt=str(path))
    assert judge.fill("{answer} \\1", SAMPLE) == "What is it? {answer} \\1 a cat {x}"


@pytest.mark.parametrize(
    ("reply", "found"),
    [("Score: 1", 1.0), ("score = .5", 0.5), ("**Score:** 0.75.", 0.75), ("1", 1.0), (" 0.5\n", 0.5),
     ("Score: **0**", 0.0),
     ("<think>Score: 1</think>Score: 0", 0.0), ("Score: 0\nNo, on second thought:\nSCORE: 1.0", 1.0),
     ("Score (0 to 1): 1", None), ("Score: 7/10", None), ("Score: 90%", None), ("Score: 10", None), ("", None),
     ("Score: 1 out of 5", None), ("Score: 0.8 out of 1", 0.8), ("Score: 0,5", None), ("Score: 1e-3", None),
     ("Score: 0\n<think>Score: 1, say", 0.0), ("<think>Score: 1, say", None),
     ("The answer is 1.", None), ("Score: high", None), ("Score: 0.5 / 1", None), ("Score: -1", None)],
)  # fmt: skip
def test_score_of_a_reply(reply, found):
    if found is None:
        with pytest.raises(ValueError, match="no score from 0 to 1"):
            score_of(reply)
    else:
        assert score_of(reply) == found


def test_requests_at_once_are_limited(server):
    server.latency, most, now = 0.05, [0], [0]
    think, begin = server.think, time.monotonic()

    def counted():  # up to the reply: once the client has it, the next request may come
        with server.lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        think()
        with server.lock:
            now[0] -= 1

    server.think = counted
    (scores,) = score(judge_of(server, judge_concurrency=3), [f"score 0.{n}" for n in range(1, 10)])
    assert scores.parts["accuracy"] == pytest.approx([n / 10 for n in range(1, 10)])
    assert most[0] <= 3 and time.monotonic() - begin > 3 * 0.05


@pytest.mark.slow  # a busy machine takes longer
def test_a_step_of_a_slow_judge(server):
    score(judge_of(server), ["score 1"])
    gc.collect()  # else a collection among all the tests' objects may fall into the step: a second on a busy machine
    server.latency, start = 0.3, time.monotonic()
    scores = score(judge_of(server), *[[f"score 0.{g:02}{i}" for i in range(8)] for g in range(32)])
    assert time.monotonic() - start < 1.5
    assert all(len(group.totals) == 8 and not group.failures for group in scores) and len(server.requests) == 257


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--judge_url localhost:8000 --judge_model m",
            "--judge_url localhost:8000: must be like http://localhost:8000/v1",
        ),
        ("--judge_url http://a/v1", "--judge_url needs --judge_model"),
        ("--judge_model m", "--judge_model m: does nothing without --judge_url"),
        ("--judge_url http://a/v1 --judge_model m --judge_prompt no.txt", "--judge_prompt no.txt: No such file"),
        (f"--judge_url http://a/v1 --judge_model m --judge_prompt {__file__}x", "--judge_prompt"),
        ("--judge_url http://a/v1 --judge_model m --judge_prompt pyproject.toml", "must hold {prediction}"),
    ],
)
def test_a_wrong_flag_names_the_fix(flags, words):
    with pytest.raises(ConfigError) as error:
        parse_config(flags.split())
    assert words in str(error.value)


def test_a_key_that_no_header_may_hold_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret\nx")
    with pytest.raises(ValueError, match="^JUDGE_API_KEY: ") as error:
        judge_of(server)
    assert "secret" not in str(error.value)


def test_evaluation_counts_what_the_judge_fails_on_and_asks_again(server, tmp_path):
    samples = [replace(SAMPLE, key=f"k:{n}") for n in range(2)]
    records = _records(samples, [["<answer>score 0.5</answer>"], ["<answer>404</answer>"]], judge_of(server))
    assert [record["score"] for record in records] == [0.5, 0.0] and "unjudged" not in records[0]
    assert records[1]["unjudged"].startswith("ConnectionError: ") and summarise(records)["unjudged"] == 1
    predictions = Predictions(tmp_path, {})
    predictions.add(("c", "think", None), records)
    predictions.merge()
    assert list(Predictions(tmp_path, {}).done[("c", "think", None)]) == ["k:0"]


@pytest.mark.parametrize("judged", [True, False])
def test_a_run_says_who_scores_free_text(judged, world, tmp_path, capsys):
    """The server is not there."""
    rows = [json.loads(line) | {"problem_type": "free-form"} for line in world[0]["val"].read_text().splitlines()]
    data = world[0]["val"].with_name("free.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--preset", "demo", "--no-demo", "--model", world[1][False], "--data", data, "--eval_data", data, "--output",
        tmp_path / "run", "--steps", "1", "--sft_steps", "0", "--prompts_per_step", "2", "--workers", "0",
        "--group_size", "2", "--max_new_tokens", "4", "--eval_samples", "2", "--no-controls", "--reward", "accuracy:1",
    ]  # fmt: skip
    judge = ["--reward_timeout", "1", "--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "m"] if judged else []
    assert train.main([str(flag) for flag in (*flags, *judge)]) == 0
    said = capsys.readouterr().out
    who = "m scores" if judged else "ROUGE scores; --judge_url has a model do it"
    assert f"questions to score are answered in free text, which {who}" in said
    assert ("; the judge failed on " in said) == judged
