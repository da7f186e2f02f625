"""Published benchmarks as lists of samples. benchmarks.yaml lists them; this reads their files, and makes their totals.

The same code as for all other data (video.formats, rewards) reads the rows, finds the videos and scores the answers.
Charades-STA, ActivityNet-Captions (its val_2.json, which Time-R1 and VideoChat-R1 also test on) and TVGBench total the
mean overlap in time; R@0.3, R@0.5 and R@0.7 are in the table and in results.json.
MMVU lets a language model judge answers in free text, Video-MMMU looks for the right answer in them; here both are
scored by the judge of --judge_url, asked in other words than MMVU's, or else by ROUGE. So only the multiple-choice part
of those two compares with published numbers.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from video.dataset import read_samples
from video.formats import DataError, Sample


@dataclass(frozen=True)
class Benchmark:
    """An entry of benchmarks.yaml, which says what its fields hold."""

    source: str
    files: list[list[str]]
    category: str
    macro: bool = False


ENTRIES = yaml.safe_load(Path(__file__).with_name("benchmarks.yaml").read_text(encoding="utf-8"))
BENCHMARKS = {name: Benchmark(**fields) for name, fields in ENTRIES.items()}
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")


def read_benchmark(name: str, folder: str | Path) -> list[Sample]:
    """The samples of a benchmark in its published layout; `meta["category"]` is the category that each is counted in.

    Raises DataError if the annotation files are missing.
    """
    benchmark, folder = BENCHMARKS[name], Path(folder)
    paths = next(filter(None, (_annotations(folder, globs) for globs in benchmark.files)), None)
    if paths is None:
        wanted = " or ".join(f"{glob}{{{','.join(SUFFIXES)}}}" for globs in benchmark.files for glob in globs)
        source = benchmark.source if "://" in benchmark.source else f"`hf download {benchmark.source}`"
        raise DataError(f"--benchmark_dir {folder}: has no {wanted}; give the folder of {source}")
    samples = []
    for path in paths:
        for sample in read_samples(path, folder, path.relative_to(folder).as_posix()):
            names = {**sample.meta, "file": path.stem, "folder": path.parent.name, "type": sample.problem_type}
            category = str(names.get(benchmark.category, "other"))
            samples.append(replace(sample, meta={**sample.meta, "category": category}))
    return samples


def _annotations(folder: Path, globs: list[str]) -> list[Path]:
    """The annotation files of all globs; if a glob has files in several formats, those of the first of SUFFIXES."""
    found = []
    for glob in globs:
        found += next((paths for suffix in SUFFIXES if (paths := sorted(folder.glob(glob + suffix)))), [])
    return found


def benchmark_score(name: str, summary: dict) -> float:
    """The benchmark's own total, in [0, 1], from what `grpo.engine.evaluate.summarise` returns.

    MVBench: the mean over its subtasks. VSI-Bench: the mean over its question types, of which the three difficulties of
    relative direction are one. The others: the mean over questions.
    """
    if not BENCHMARKS[name].macro:
        return summary["overall"]
    families = defaultdict(list)
    for category, share in summary["categories"].items():
        family = "object_rel_direction" if category.startswith("object_rel_direction") else category
        families[family].append(share)
    means = [sum(shares) / len(shares) for shares in families.values()]
    return sum(means) / len(means) if means else 0.0
