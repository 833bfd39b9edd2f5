"""The `remoe` command: one sub-command a module, nothing of its own."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from configs.command import run
from configs.load import UserError

GROUPS = {
    "train": {
        "train": ("training.train", "fine-tune the routers of a model"),
        "run": ("launch.run", "the whole loop: train the arms, evaluate them and the base, write a report"),
    },
    "evaluate": {
        "evaluate": ("launch.evaluate", "quality, routing, cache replay and decode of a model and a router delta"),
        "lm-eval": ("launch.lm_eval", "lm-evaluation-harness's own command, with experts paged from disk"),
        "trace": ("launch.trace", "which experts every token of a text chooses"),
        "replay": ("launch.replay", "what a cache of each size and policy would miss on a trace"),
        "report": ("launch.report", "the report of a results.json again"),
        "frontier": ("launch.frontier", "quality against expert loads: routers, levers, cache sizes, policies"),
        "search": ("launch.search", "trainings and levers that save most at each price, found by optuna"),
        "compare": ("launch.compare", "one report of several evaluations of a model"),
    },
    "use": {
        "generate": ("launch.generate", "text, with experts paged from disk under a byte budget"),
        "serve": ("launch.serve", "the same behind OpenAI's HTTP API, with metrics"),
        "plan": ("launch.plan", "what a memory budget is divided into, and what it buys"),
    },
    "artefacts": {
        "export": ("launch.export", "tuned routers for others: a Hugging Face folder, or a patched GGUF"),
        "pack": ("launch.pack", "a copy of a checkpoint that is read faster: experts in whole pages"),
        "make-model": ("launch.make_model", "a checkpoint with realistic routing, to measure paging with"),
    },
    "benchmarks": {
        "bench": ("launch.bench", "decode, quality, memory, sessions, curve, policies, families, training or scaling"),
    },
}  # fmt: skip
COMMANDS = {name: module for group in GROUPS.values() for name, (module, _) in group.items()}


def usage() -> str:
    """What `remoe --help` shows: every command in its group."""
    groups = [
        f"{title}:\n" + "\n".join(f"  {name:<12}{meaning}" for name, (_, meaning) in group.items())
        for title, group in GROUPS.items()
    ]
    return (
        "usage: remoe COMMAND [arguments]\n\n"
        "Fine-tune mixture-of-experts routers for expert reuse; measure quality and cache behaviour of the same model.\n\n"
        + "\n\n".join(groups)
        + "\n\n`remoe COMMAND --help` shows its arguments and an example."
    )


def wait_briefly() -> None:
    """
    Let OpenMP's threads sleep soon where they wait for each other; called before torch is loaded, which reads it then.

    As it comes, GNU's OpenMP spins 300,000 times at the end of every product. Beside other processes that compute, a thread
    that spins keeps away the one that it waits for: on two cores beside two such processes, decoding the shipped model took 8
    to 30 times as long per token as with 10,000, and on idle cores as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def dispatch(argv: Sequence[str] | None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] not in COMMANDS:
        raise UserError(f"unknown command {arguments[0]!r}; write one of {', '.join(COMMANDS)}")
    wait_briefly()
    import_module(COMMANDS[arguments[0]]).main(arguments[1:])


def main(argv: Sequence[str] | None = None) -> int:
    return run(dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
