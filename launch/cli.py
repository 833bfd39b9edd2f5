"""The `remoe` command: one sub-command per module, nothing of its own."""

import sys
from collections.abc import Sequence
from importlib import import_module

from configs.command import run
from configs.load import UserError

COMMANDS = {
    "run": ("launch.run", "the whole loop: train the arms, evaluate them and the base, write a report"),
    "train": ("training.train", "fine-tune the routers of a model"),
    "bench-train": ("evaluation.benchmark.training", "speed and memory of that beside transformers' own Trainer"),
    "evaluate": ("evaluation.evaluate", "quality, routing, cache replay and decode of a model and a router delta"),
    "trace": ("launch.trace", "which experts every token of a text chooses"),
    "replay": ("launch.replay", "what a cache of each size and policy would miss on a trace"),
    "generate": ("launch.generate", "decode with experts paged from disk under a byte budget"),
    "plan": ("launch.plan", "what a memory budget is divided into, and what it buys"),
    "serve": ("evaluation.server.application", "the same behind OpenAI's HTTP API, with metrics"),
    "make-model": ("launch.make_model", "a mid-sized checkpoint with realistic routing, to measure paging with"),
    "pack": ("launch.pack", "a copy of a checkpoint that is read faster: experts in whole pages"),
    "bench": (
        "evaluation.benchmark.decode",
        "decode speed beside peers at equal memory, and beside the machine's bound",
    ),
    "export": ("evaluation.export.hf_folder", "tuned routers for others: a Hugging Face folder, or a patched GGUF"),
    "report": ("evaluation.report.markdown", "write the report of a results.json again"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: remoe COMMAND [arguments]\n\n"
        "Fine-tune mixture-of-experts routers for expert reuse; measure quality and cache of the same model.\n\n"
        f"{rows}\n\n`remoe COMMAND --help` shows the arguments and an example; `python -m MODULE` does the same:\n  "
        + ", ".join(module for module, _ in COMMANDS.values())
    )


def dispatch(argv: Sequence[str] | None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] not in COMMANDS:
        raise UserError(f"unknown command {arguments[0]!r}; write one of {', '.join(COMMANDS)}")
    import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])


def main(argv: Sequence[str] | None = None) -> int:
    return run(dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
