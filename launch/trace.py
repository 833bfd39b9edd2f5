"""`remoe trace`: the teacher-forced routing trace of a model on a text.

One forward pass over the whole text, no sampling: the trace says what the routers choose for this text, every token a
decode step of its own. Requests are pieces of `max_length` tokens, so that a replay starts cold as often as in use.
Letters: B batch, S sequence, T tokens, L layers, K chosen.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from configs.command import run
from configs.files import prepare
from data.batches import tokenize
from data.sources import read_text
from evaluation.engine.cache.reuse import routing_summary
from evaluation.engine.cache.trace_formats import EXTENSIONS, check_extension, write_trace
from evaluation.engine.device import find_device
from evaluation.tracing import teacher_forced_trace
from training.model.loading import load_pretrained, load_tokenizer, local_folder
from training.run_folder import router_delta

EXAMPLE = """examples:
  remoe trace --model data/embedded/model --text-file README.md --output runs/readme.safetensors
  remoe replay runs/readme.safetensors --slots 4,6,8,12
  remoe trace --model data/embedded/model --text-file README.md --output runs/readme.csv   # request,call,phase,token,...
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="remoe trace", description="Write which experts every token of a text chooses in every layer.", epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="folder or hub name of the model")
    parser.add_argument("--router-delta", metavar="DIR", help="use the routers of this delta")
    parser.add_argument("--text-file", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--output", required=True, metavar="FILE", help=f"the trace: {', '.join(EXTENSIONS)}")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a request (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32 or bfloat16")
    parser.add_argument("--device", default="auto", help="auto (the accelerator if there is one), cpu or cuda")
    args = parser.parse_args(argv)
    output, text = prepare(args.output), read_text(args.text_file)
    check_extension(output)
    model = load_pretrained(args.model, dtype=args.dtype, device=find_device(args.device))
    if args.router_delta is not None:
        router_delta.apply(model, router_delta.load_for(local_folder(args.model), args.router_delta))
    documents = tokenize([text], load_tokenizer(args.model))
    trace, nll = teacher_forced_trace(model, documents, max_length=args.max_length, progress="trace")
    write_trace(trace, output)
    summary = routing_summary(trace)
    print(json.dumps({"trace": str(output), "nll": nll, **summary}, indent=2))


if __name__ == "__main__":
    sys.exit(run(main))
