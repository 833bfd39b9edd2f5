"""`remoe trace`: the teacher-forced routing trace of a model on a text.

One forward pass over the whole text, no sampling: the trace says what the routers choose for this text, every token a
decode step of its own. Requests are pieces of `max_length` tokens, so that a replay starts cold as often as in use.
Letters: B batch, S sequence, T tokens, L layers, K chosen.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from configs.command import run
from configs.load import UserError
from data.batches import IGNORE_LABEL, tokenize
from data.sources import read_text
from evaluation.engine.device import find_device
from evaluation.engine.output import prepare
from evaluation.engine.route_trace import RouteTrace
from evaluation.engine.trace_formats import EXTENSIONS, check_extension, write_trace
from evaluation.reuse import routing_summary
from training import router_delta
from training.model import load_pretrained, load_tokenizer, local_folder
from training.routers import RouterObserver
from training.token_loss import token_sums

EXAMPLE = """examples:
  remoe trace --model data/embedded/model --text-file README.md --output runs/readme.safetensors
  remoe replay runs/readme.safetensors --slots 4,6,8,12
  remoe trace --model data/embedded/model --text-file README.md --output runs/readme.csv   # request,call,phase,token,...
"""


@torch.no_grad()
def teacher_forced_trace(
    model: PreTrainedModel, documents: Sequence[np.ndarray], *, max_length: int, batch_size: int = 8,
    expert_bytes: int | None = None, progress: str | None = None,
) -> tuple[RouteTrace, float]:  # fmt: skip
    """Routing of every token of `documents` (token ids), each cut into requests of at most `max_length` tokens.

    Returns:
        The trace, and the mean cross entropy in nats per predicted token.

    Raises:
        UserError: no document has two tokens.
    """
    requests = [d[i : i + max_length] for d in documents for i in range(0, len(d), max_length)]
    requests = [request for request in requests if len(request) >= 2]
    if not requests:
        raise UserError(
            f"no text of two tokens to trace among {len(documents)}; give more text or a larger --max-length"
        )
    observer = RouterObserver(model)
    chosen_TLK, nll, predicted = [], 0.0, 0
    for start in tqdm(range(0, len(requests), batch_size), desc=progress, disable=progress is None, unit="batch"):
        batch = requests[start : start + batch_size]
        length = max(map(len, batch))
        ids_BS = torch.zeros(len(batch), length, dtype=torch.long)
        labels_BS = torch.full((len(batch), length), IGNORE_LABEL)
        for row, request in enumerate(batch):  # padding on the right is invisible to causal attention
            ids_BS[row, : len(request)] = torch.from_numpy(request.astype(np.int64))
            labels_BS[row, : len(request) - 1] = ids_BS[row, 1 : len(request)]
        with observer.recording(len(batch), length) as routings:
            logits_BSV = model(input_ids=ids_BS.to(model.device), use_cache=False).logits
        nll += float(token_sums(logits_BSV, labels_BS.to(model.device)).cross_entropy)
        predicted += int((labels_BS != IGNORE_LABEL).sum())
        ids_BSLK = torch.stack([routing.ids_BSK for routing in routings], dim=2).to("cpu", torch.int16).numpy()
        chosen_TLK += [ids_BSLK[row, : len(request)] for row, request in enumerate(batch)]
    observer.close()
    expert_ids = np.concatenate(chosen_TLK)
    trace = RouteTrace(
        expert_ids=expert_ids,
        phase=np.ones(len(expert_ids), dtype=np.uint8),
        request_id=np.repeat(np.arange(len(requests)), [len(request) for request in requests]),
        call=np.arange(len(expert_ids)),
        num_experts=routings[0].logits_BSE.shape[-1],
        layer_ids=tuple(_layer_number(name) for name in observer.names),
        expert_bytes=expert_bytes,
        model=str(model.name_or_path),
    )
    return trace, nll / predicted


def _layer_number(router_name: str) -> int:
    """`model.layers.3.mlp.gate` -> 3."""
    return next(int(part) for part in router_name.split(".") if part.isdigit())


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
