"""`remoe bench SUBJECT`: one thing measured beside its peers, or beside what the machine can do."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tyro

from configs.command import parse
from configs.load import UserError
from evaluation.benchmark import (
    curve,
    decode,
    families,
    formats,
    memory,
    policies,
    quality,
    scaling,
    sessions,
    training,
)


@dataclass(frozen=True)
class Training(training.TrainingBenchmark):
    __doc__ = training.TrainingBenchmark.__doc__
    config: tyro.conf.Positional[str]  # a YAML as for remoe train; configs/train/bench.yaml is made for this
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()  # key=value: overrides a key of the config


@dataclass(frozen=True)
class Scaling(scaling.ScalingBenchmark):
    __doc__ = scaling.ScalingBenchmark.__doc__
    config: tyro.conf.Positional[str]  # a YAML as for remoe train; its batch is the one process's
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()  # key=value: overrides a key of the config


class Subject(NamedTuple):
    """What its flags are, and who does it."""

    options: type[Any]
    benchmark: Callable[[Any], None]
    meaning: str


SUBJECTS = {
    "decode": Subject(decode.DecodeBenchmark, decode.benchmark, "decoding beside peers at equal memory"),
    "memory": Subject(memory.MemoryBenchmark, memory.benchmark, "whether memory budgets are kept"),
    "sessions": Subject(
        sessions.SessionsBenchmark, sessions.benchmark, "the plan and the controller of a server's memory"
    ),
    "curve": Subject(curve.CurveBenchmark, curve.benchmark, "how fast misses at all sizes are counted"),
    "policies": Subject(policies.PoliciesBenchmark, policies.benchmark, "cache policies beside the optimum"),
    "formats": Subject(formats.FormatsBenchmark, formats.benchmark, "quantised experts beside 16 bits, in one budget"),
    "families": Subject(families.FamiliesBenchmark, families.benchmark, "what works with which family of models"),
    "quality": Subject(quality.QualityBenchmark, quality.benchmark, "tasks on the engine beside the model in memory"),
    "training": Subject(Training, training.benchmark, "training beside transformers' own Trainer"),
    "scaling": Subject(Scaling, scaling.benchmark, "several training processes beside one"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:<10}{subject.meaning}" for name, subject in SUBJECTS.items())
    return (
        f"usage: remoe bench SUBJECT [arguments]\n\nsubjects:\n{rows}\n\nexample:\n  remoe bench curve --repeats 7\n\n"
        "`remoe bench SUBJECT --help` shows its arguments and an example."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the subject that the first word names; a `UserError` if there is none of that name."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    if words[0] not in SUBJECTS:
        raise UserError(f"unknown subject {words[0]!r}; write one of {', '.join(SUBJECTS)}")
    subject = SUBJECTS[words[0]]
    subject.benchmark(parse(subject.options, words[1:], prog=f"remoe bench {words[0]}"))
