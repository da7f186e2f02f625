"""Published benchmarks as lists of samples: which files hold the questions, how these are grouped, how totals are made.

Rows are read, videos found and answers scored by the same code as all other data (video.formats, rewards). Where a
benchmark asks a language model to judge free text (MMVU's open-ended questions; Video-MMMU looks for the answer in the
text), ROUGE stands in: only the multiple-choice part of those two compares with published numbers.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from grpo.engine.evaluate import mean
from video.dataset import DataError, read_samples


@dataclass(frozen=True)
class Benchmark:
    """source: hub name. files: alternatives, each globs (without suffix) of annotation files that belong together.
    kind: the field that groups questions, or "file", "folder" or "type" (of problem). macro: its total is the mean over
    groups, not over questions."""

    source: str
    files: tuple
    kind: str
    macro: bool = False


BENCHMARKS = {
    "mvbench": Benchmark("OpenGVLab/MVBench", (("json/*",),), "file", macro=True),
    "videomme": Benchmark("lmms-lab/Video-MME", (("videomme/test*",), ("test*",)), "duration"),
    "tempcompass": Benchmark("lmms-lab/TempCompass", (("multi-choice/*", "yes_no/*", "caption_matching/*"),), "dim"),
    "mmvu": Benchmark("yale-nlp/MMVU", (("validation*",),), "type"),
    "vsibench": Benchmark("nyu-visionx/VSI-Bench", (("test",), ("test-*",)), "question_type", macro=True),
    "longvideobench": Benchmark("longvideobench/LongVideoBench", (("lvb_val",), ("validation-*",)), "duration_group"),
    "videommmu": Benchmark("lmms-lab/VideoMMMU", (("Perception/*", "Comprehension/*", "Adaptation/*"),), "folder"),
}
SUFFIXES = (".jsonl", ".json", ".parquet")


def read_benchmark(name, folder):
    """The samples of a benchmark in its published layout; `meta["category"]` is the group that each is counted in.

    Raises DataError where the annotation files are missing.
    """
    benchmark, folder = BENCHMARKS[name], Path(folder)
    paths = next((found for globs in benchmark.files if (found := _annotations(folder, globs))), None)
    if paths is None:
        wanted = " or ".join(f"{glob}{{{','.join(SUFFIXES)}}}" for globs in benchmark.files for glob in globs)
        raise DataError(
            f"--benchmark_dir {folder}: has no {wanted}; give the folder of `hf download {benchmark.source}`"
        )
    samples = []
    for path in paths:
        for sample in read_samples(path, folder, path.relative_to(folder).as_posix()):
            samples.append(replace(sample, meta={**sample.meta, "category": _kind(benchmark.kind, sample, path)}))
    return samples


def _annotations(folder, globs):
    """The annotation files of all globs; where one is there in several formats, in the first of SUFFIXES."""
    found = []
    for glob in globs:
        found += next((paths for suffix in SUFFIXES if (paths := sorted(folder.glob(glob + suffix)))), [])
    return found


def _kind(kind, sample, path):
    own = {"file": path.stem, "folder": path.parent.name, "type": sample.problem_type}
    return own[kind] if kind in own else str(sample.meta.get(kind, "other"))


def benchmark_score(name, summary):
    """The benchmark's own total of a `evaluation.evaluate.summarise`, in [0, 1].

    MVBench: the mean over its subtasks. VSI-Bench: the mean over its question types, the three difficulties of relative
    direction being one. The others: the mean over questions.
    """
    if not BENCHMARKS[name].macro:
        return summary["overall"]
    families = defaultdict(list)
    for kind, share in summary["kinds"].items():
        families["object_rel_direction" if kind.startswith("object_rel_direction") else kind].append(share)
    return mean([mean(shares) for shares in families.values()])
