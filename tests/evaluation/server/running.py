"""A real server on a free loopback port, in a thread of the test; and the same model resident, to compare with."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.command import parse
from evaluation.engine.engine import Engine
from evaluation.server.application import HttpServer, listener
from launch.serve import Serve, opened

THREAD_SECONDS = 60


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    client: openai.OpenAI
    engine: Engine
    name: str

    def metric(self, name: str, **labels: str) -> float:
        """One figure of `/metrics`; 0 if it is not there yet."""
        text = httpx2.get(f"{self.url}/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return 0.0


@contextmanager
def serve(folder: Path, *flags: str, memory: tuple[str, str] = ("--expert-cache", "20%")) -> Iterator[Served]:
    """The server that `remoe serve` runs, but for the process around it."""
    command = parse(Serve, ["--model", str(folder), *memory, *flags], prog="remoe serve")
    with listener("127.0.0.1", 0) as sock, opened(command) as loaded:
        sock.listen()  # who connects before the server runs, waits
        server = HttpServer(loaded)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="http")
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread.start()
        try:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                yield Served(url, client, loaded.engine, str(folder))
        finally:
            server.should_exit = True
            thread.join()


def our_threads() -> set[threading.Thread]:
    """The threads that run, but for the one that progress bars leave."""
    return {thread for thread in threading.enumerate() if "tqdm" not in thread.name}


def threads_left(before: set[threading.Thread]) -> set[threading.Thread]:
    """Those that were started since and do not end; a pool tells its threads to, and does not wait until they have."""
    for thread in our_threads() - before:
        thread.join(THREAD_SECONDS)
    return our_threads() - before


class Plain:
    """The same model resident, and transformers' own `generate`."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

    def ids(self, prompt: str | list[int], **options: Any) -> list[list[int]]:
        """New tokens of every choice."""
        prompt_ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        prompt_BT = torch.tensor([prompt_ids])
        output_BT = self.model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **options)
        return output_BT[:, len(prompt_ids) :].tolist()

    def texts(self, prompt: str | list[int], **options: Any) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.ids(prompt, **options)]

    def greedy(self, prompt: str | list[int], max_new_tokens: int) -> str:
        return self.texts(prompt, do_sample=False, max_new_tokens=max_new_tokens)[0]
