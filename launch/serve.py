"""`remoe serve`: a checkpoint whose experts stay on disk behind OpenAI's HTTP API, with metrics."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from configs.command import parse
from evaluation.server.app import Backend
from evaluation.server.application import ServerOptions, application, listener, serve
from launch.engine_flags import EngineFlags, router_weights
from training.model.loading import local_folder


@dataclass(frozen=True)
class Serve:
    """Serve a mixture-of-experts checkpoint whose experts stay on disk over OpenAI's HTTP API: the tokens of plain
    transformers, within the memory that you give.

    Served are POST /v1/completions and /v1/chat/completions (both also with "stream": true), GET /v1/models, /health and
    /metrics.

    example:
      remoe serve --model data/embedded/model --expert-cache 3MiB --port 8000
      curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
          -d '{"prompt": "The sea was", "max_tokens": 40, "temperature": 0}'
    """

    model: str  # folder with safetensors weights, or hub name
    engine: EngineFlags
    server: ServerOptions = field(default_factory=ServerOptions)
    router_delta: str | None = None  # folder with tuned routers for exactly this model


def main(argv: Sequence[str] | None = None) -> None:
    """Take the port, load, serve until SIGINT or SIGTERM."""
    command = parse(Serve, argv, prog="remoe serve")
    with listener(command.server.host, command.server.port) as sock, opened(command) as loaded:
        serve(sock, loaded, command.server)


def opened(command: Serve) -> AbstractContextManager[Backend]:
    """The application that the flags ask for."""
    model_dir = local_folder(command.model)
    name, routers = command.server.served_model_name or command.model, router_weights(model_dir, command.router_delta)
    return application(model_dir, command.engine, command.server, name=name, router_delta=routers)
