"""Answers over HTTP, asked for with OpenAI's own client: the tokens of plain `generate`, streamed or not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch

from tests.evaluation.server.running import Plain, Served, serve

PROMPT = "It was a bright cold day"
TURNS: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Tell me of the sea"}]},
]
RENDERED = "[system] Be brief.\n[user] Tell me of the sea\n[assistant] "


def joined(stream: Any, *, choices: int = 1) -> tuple[list[str], list[str | None]]:
    """Texts and reasons of all choices of a stream of either kind."""
    texts, reasons = [""] * choices, [None] * choices
    for chunk in stream:
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "nothing comes after the end"
            texts[choice.index] += (choice.text if hasattr(choice, "text") else choice.delta.content) or ""
            reasons[choice.index] = choice.finish_reason
    return texts, reasons


def test_greedy_completions_of_texts_and_of_token_ids_are_plain_generate(served: Served, plain: Plain) -> None:
    prompts = [PROMPT, "The café – 13 o'clock", "x"]
    answer = served.client.completions.create(model=served.name, prompt=prompts, max_tokens=24, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == [plain.greedy(prompt, 24) for prompt in prompts]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    ids = [plain.tokenizer(prompt)["input_ids"] for prompt in prompts]
    again = served.client.completions.create(model=served.name, prompt=ids, max_tokens=24, temperature=0)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (sum(map(len, ids)), 72)
    one = served.client.completions.create(model=served.name, prompt=ids[0], temperature=0)
    assert one.choices[0].text == plain.greedy(PROMPT, 16), "16 tokens where no number is given"


@pytest.mark.parametrize("n", [1, 3])
def test_sampled_completions_are_generate_under_that_seed(served: Served, plain: Plain, n: int) -> None:
    state = torch.get_rng_state()
    answer = served.client.completions.create(
        model=served.name, prompt=PROMPT, max_tokens=20, temperature=0.7, top_p=0.9, seed=11, n=n
    )
    assert torch.equal(torch.get_rng_state(), state), "the generator of the process is left as it was"
    torch.manual_seed(11)
    expected = plain.texts(
        PROMPT, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=20, num_return_sequences=n
    )
    assert [choice.text for choice in answer.choices] == expected
    torch.manual_seed(11)
    without = plain.texts(PROMPT, do_sample=True, top_k=0, max_new_tokens=20)
    ours = served.client.completions.create(
        model=served.name, prompt=PROMPT, max_tokens=20, seed=11, extra_body={"top_k": 0}
    )
    assert [choice.text for choice in ours.choices] == without


def test_without_a_seed_answers_differ(served: Served) -> None:
    texts = {
        served.client.completions.create(model=served.name, prompt=PROMPT, max_tokens=20).choices[0].text
        for _ in range(3)
    }
    assert len(texts) > 1


def test_a_chat_is_the_models_template_and_plain_generate(served: Served, plain: Plain) -> None:
    answer = served.client.chat.completions.create(
        model=served.name, messages=TURNS, max_completion_tokens=20, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == plain.greedy(RENDERED, 20)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(plain.tokenizer(RENDERED)["input_ids"])


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.2, "seed": 5, "n": 2}])
def test_a_stream_is_the_answer_in_pieces(served: Served, options: dict[str, Any]) -> None:
    completions, chat = served.client.completions, served.client.chat.completions
    n = options.get("n", 1)
    whole = completions.create(model=served.name, prompt=[PROMPT, "So"], max_tokens=25, **options)
    stream = completions.create(model=served.name, prompt=[PROMPT, "So"], max_tokens=25, stream=True, **options)
    assert joined(stream, choices=2 * n) == (
        [choice.text for choice in whole.choices], [choice.finish_reason for choice in whole.choices]
    )  # fmt: skip
    talk = chat.create(model=served.name, messages=TURNS, max_tokens=25, **options)
    stream = chat.create(model=served.name, messages=TURNS, max_tokens=25, stream=True, **options)
    assert joined(stream, choices=n) == (
        [choice.message.content for choice in talk.choices], [choice.finish_reason for choice in talk.choices]
    )  # fmt: skip


def test_a_stream_tells_usage_at_its_end_if_asked(served: Served) -> None:
    options: dict[str, Any] = {"model": served.name, "prompt": PROMPT, "max_tokens": 5, "temperature": 0}
    *chunks, last = served.client.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    whole = served.client.completions.create(**options)
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert last.model_extra is not None
    assert last.model_extra["remoe"]["accesses"] > 0
    assert all(chunk.choices for chunk in served.client.completions.create(stream=True, **options))
    with httpx2.stream("POST", f"{served.url}/v1/completions", json={**options, "stream": True}) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.read().endswith(b"\n\ndata: [DONE]\n\n")


def test_stop_strings_end_the_text_before_them_and_do_not_leak(served: Served, plain: Plain) -> None:
    text = plain.greedy(PROMPT, 40)
    stop = text[17:22]  # over the borders of tokens
    options: dict[str, Any] = {"model": served.name, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    whole = served.client.completions.create(stop=stop, **options)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    assert whole.usage is not None
    assert whole.usage.completion_tokens < 40, "generation ended there"
    shown = ""
    for chunk in served.client.completions.create(stop=["never said", stop], stream=True, **options):
        shown += chunk.choices[0].text
        assert whole.choices[0].text.startswith(shown)
    assert shown == whole.choices[0].text
    almost = served.client.completions.create(stop=text[-2:] + "and never so", **options)
    assert (almost.choices[0].text, almost.choices[0].finish_reason) == (text, "length")


def test_the_models_end_of_text_ends_a_choice(served: Served, plain: Plain) -> None:
    """A batch goes on with the others; what it pads with is not shown."""
    options: dict[str, Any] = {"prompt": "The end", "max_tokens": 60, "temperature": 2.0, "seed": 3}
    answer = served.client.completions.create(model=served.name, n=8, extra_body={"top_k": 0}, **options)
    torch.manual_seed(3)
    rows = plain.ids(
        "The end", do_sample=True, temperature=2.0, top_k=0, max_new_tokens=60, num_return_sequences=8
    )  # fmt: skip
    expected = []
    for ids in rows:
        end = ids.index(0) if 0 in ids else None
        expected.append((plain.tokenizer.decode(ids[:end]), "length" if end is None else "stop"))
    assert {reason for _, reason in expected} == {"length", "stop"}, "some end early"
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == expected


def test_log_probabilities_are_the_models_own(served: Served, plain: Plain) -> None:
    prompt_ids = plain.tokenizer(PROMPT)["input_ids"]
    answer = served.client.completions.create(
        model=served.name, prompt=PROMPT, max_tokens=6, temperature=0.5, seed=1, logprobs=2
    )
    torch.manual_seed(1)
    ids = plain.ids(PROMPT, do_sample=True, temperature=0.5, max_new_tokens=6)[0]
    with torch.no_grad():
        logits_SV = plain.model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1].float()
    expected_SV = torch.log_softmax(logits_SV, dim=-1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [plain.tokenizer.decode([i]) for i in ids]
    chosen = [expected_SV[position, i].item() for position, i in enumerate(ids)]
    assert logprobs.token_logprobs == pytest.approx(chosen, abs=0.1)  # bfloat16, one position at a time or all at once
    assert logprobs.top_logprobs is not None
    assert all(
        2 <= len(top) <= 3 and token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
    )
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(6)]
    talk = served.client.chat.completions.create(
        model=served.name, messages=TURNS, max_tokens=4, temperature=0, logprobs=True, top_logprobs=1
    )
    assert talk.choices[0].logprobs is not None
    items = talk.choices[0].logprobs.content
    assert items is not None
    assert "".join(item.token for item in items) == talk.choices[0].message.content
    assert [item.top_logprobs[0].token for item in items] == [item.token for item in items], "greedy is the best"
    assert items[0].bytes == list(items[0].token.encode())


def test_each_answer_says_what_the_engine_did_for_it(served: Served) -> None:
    options: dict[str, Any] = {"model": served.name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    before = served.engine.stats()
    answer = served.client.completions.create(**options)
    after = served.engine.stats()
    assert answer.model_extra is not None
    remoe = answer.model_extra["remoe"]
    assert remoe["accesses"] == after.accesses - before.accesses
    assert remoe["misses"] == after.misses - before.misses > 0
    assert remoe["bytes_read"] == after.bytes_read - before.bytes_read
    assert 0 < remoe["hit_rate"]["decode"] < 1
    assert remoe["ttft_ms"] > 0
    assert remoe["tpot_ms"] > 0
    one = served.client.completions.create(**{**options, "max_tokens": 1})
    assert one.model_extra is not None
    assert one.model_extra["remoe"]["tpot_ms"] is None
    assert one.model_extra["remoe"]["hit_rate"]["decode"] is None


def test_an_answer_that_a_lever_changed_says_so(chat_model: Path, served: Served) -> None:
    options: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    exact = served.client.completions.create(model=served.name, **options)
    assert "changed_by" not in exact.model_extra["remoe"]
    with serve(chat_model, memory=("--expert-cache", "30%", "--lever", "prior:delta=0.5")) as levered:
        remoe = levered.client.completions.create(model=levered.name, **options).model_extra["remoe"]
    assert remoe["changed_by"] == "prior:delta=0.5"
    assert remoe["swapped"] > 0


def test_metrics_count_what_happened(served: Served) -> None:
    names = [
        ("remoe_requests_total", {"endpoint": "/v1/completions", "status": "200"}),
        ("remoe_requests_total", {"endpoint": "/v1/completions", "status": "400"}),
        ("remoe_requests_total", {"endpoint": "other", "status": "404"}),
        ("remoe_time_to_first_token_seconds_count", {}),
        ("remoe_inter_token_latency_seconds_count", {}),
        ("remoe_time_per_output_token_seconds_count", {}),
        ("remoe_request_queue_seconds_count", {}),
        ("remoe_generation_tokens_total", {}),
        ("remoe_prompt_tokens_total", {}),
        ("remoe_model_tokens_total", {"phase": "decode"}),
    ]
    before = [served.metric(name, **labels) for name, labels in names]
    served.client.completions.create(model=served.name, prompt=[7, 8, 9], max_tokens=5, temperature=0)
    list(served.client.completions.create(model=served.name, prompt=[7, 8], max_tokens=3, temperature=0, stream=True))
    with pytest.raises(openai.BadRequestError):
        served.client.completions.create(model=served.name, prompt=[])
    assert httpx2.get(f"{served.url}/some/secret").status_code == 404
    moved = [served.metric(name, **labels) - old for (name, labels), old in zip(names, before, strict=True)]
    assert moved == [2, 1, 1, 2, 6, 2, 2, 8, 5, 6]
    stats = served.engine.stats()
    for phase in ("prefill", "decode"):
        assert served.metric("remoe_expert_accesses_total", phase=phase) == stats.accesses_by_phase[phase] > 0
        assert served.metric("remoe_expert_misses_total", phase=phase) == stats.misses_by_phase[phase] > 0
        assert served.metric("remoe_expert_bytes_read_total", phase=phase) == stats.bytes_read_by_phase[phase] > 0
        assert served.metric("remoe_expert_stall_seconds_total", phase=phase) == stats.stall_seconds[phase] > 0
    assert served.metric("remoe_expert_cache_bytes") == served.engine.pool_bytes
    assert served.metric("remoe_num_requests_running") == served.metric("remoe_num_requests_waiting") == 0


def test_the_model_is_listed_and_the_server_is_well(served: Served) -> None:
    (model,) = served.client.models.list()
    assert (model.id, model.object) == (served.name, "model")
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 512
    assert httpx2.get(f"{served.url}/health").json() == {"status": "ok"}
    assert set(httpx2.get(f"{served.url}/openapi.json").json()["paths"]) > {"/v1/completions", "/v1/chat/completions"}


def test_labels_and_values_that_ask_for_nothing_are_accepted(served: Served) -> None:
    plainly = served.client.completions.create(model=served.name, prompt="A", max_tokens=4, temperature=0)
    adorned = served.client.completions.create(
        model=served.name, prompt="A", max_tokens=4, temperature=0, user="me", echo=False, best_of=1, suffix=None,
        frequency_penalty=0, presence_penalty=0.0, logit_bias={}, stream_options={"include_usage": False},
        extra_body={"metadata": {"a": "b"}, "top_k": -1, "repetition_penalty": 1.0, "min_p": 0},
    )  # fmt: skip
    assert adorned.choices == plainly.choices
    nearly = served.client.completions.create(model=served.name, prompt="A", max_tokens=4, temperature=1e-8)
    assert nearly.choices == plainly.choices, "clients mean greedy by that"
    two = {"model": served.name, "prompt": "A", "max_tokens": 2, "n": 2, "best_of": 2, "temperature": 1.0}
    assert len(served.client.completions.create(**two).choices) == 2
    stream = served.client.chat.completions.create(
        model=served.name, messages=TURNS, max_tokens=1, stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
    )  # fmt: skip
    assert list(stream)[-1].usage is not None
    served.client.chat.completions.create(
        model=served.name, messages=TURNS, max_tokens=1, response_format={"type": "text"}, tools=[], store=False
    )
    empty = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": []}, TURNS[0]]
    served.client.post("/chat/completions", body={"messages": empty, "max_tokens": 1}, cast_to=object)


@pytest.mark.parametrize(
    ("changed", "words", "param"),
    [
        ({"suffix": "x"}, "suffix is not supported by this server; leave it out", "suffix"),
        ({"best_of": 2}, "best_of is not supported", "best_of"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported", "frequency_penalty"),
        ({"min_p": 0.1}, "min_p is not supported", "min_p"),
        ({"promt": "x"}, "promt is not supported", "promt"),
        ({"stream": True, "stream_options": {"chunk": 1}}, "stream_options.chunk is not supported", "stream_options"),
        ({"stream_options": {"include_usage": True}}, "include_usage is only for stream=true", None),
        ({"prompt": None}, "prompt must be a text, a list of texts, a list of token ids", "prompt"),
        ({"prompt": ""}, "the prompt has no tokens", "prompt"),
        ({"prompt": ["a", ""]}, "the prompt has no tokens", "prompt"),
        ({"prompt": ["a"] * 129}, "none empty, at most 128 prompts", "prompt"),
        ({"prompt": ["a", 3]}, "prompt must be", "prompt"),
        ({"prompt": [True]}, "prompt must be", "prompt"),
        ({"prompt": [[1], []]}, "prompt must be", "prompt"),
        ({"prompt": [4096]}, "token id 4096 is not in the vocabulary of 4096", "prompt"),
        ({"prompt": [-1]}, "prompt must be", "prompt"),
        ({"prompt": [5] * 512}, r"context length is 512 tokens.*requested 514 tokens \(512 in the prompt, 2 for", "prompt"),
        ({"max_tokens": 512}, "reduce the length of the prompt or of the completion", "max_tokens"),
        ({"max_tokens": 0}, "max_tokens is 0, which makes nothing; that is only for echo=true", None),
        ({"max_tokens": -1}, "max_tokens: .* greater than or equal to 0", "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens: .* valid integer", "max_tokens"),
        ({"temperature": 2.5}, "temperature: .* less than or equal to 2", "temperature"),
        ({"temperature": 1e-3}, "temperature must be 0 .* or at least 0.01", None),
        ({"temperature": True}, "temperature: .* valid number", "temperature"),
        ({"top_p": 1.1}, "top_p: ", "top_p"),
        ({"top_k": -2}, "top_k: ", "top_k"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is not supported", "repetition_penalty"),
        ({"n": 2, "temperature": 0}, "n above 1 needs a temperature above 0", None),
        ({"n": 17}, "n: .* less than or equal to 16", "n"),
        ({"seed": 2**63}, "seed: ", "seed"),
        ({"stop": ""}, "stop must be a text or a list of at most four", "stop"),
        ({"stop": ["a"] * 5}, "stop must be", "stop"),
        ({"logprobs": 21}, "logprobs: ", "logprobs"),
        ({"stream": "yes"}, "stream: .* valid boolean", "stream"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(
    served: Served, changed: dict[str, Any], words: str, param: str | None
) -> None:
    body = {"prompt": "A", "max_tokens": 2, **changed}
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        served.client.post("/completions", body=body, cast_to=object)
    assert refused.value.type == "invalid_request_error"
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"messages": []}, "messages must be a list of objects"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages must be"),
        ({"messages": [{"role": "user"}]}, "messages must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages must be"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "chat template refuses these messages: a user speaks first"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "mean the same; send one of them"),
        ({"top_logprobs": 2}, "top_logprobs is only for logprobs=true"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ],
)  # fmt: skip
def test_chats_that_are_not_served_are_refused(served: Served, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        served.client.post("/chat/completions", body={"messages": TURNS, **changed}, cast_to=object)


OWN_ANSWERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "the official client": lambda message: message.model_dump(),
    "its raw JSON": lambda message: json.loads(message.model_dump_json(exclude_unset=True)),
    "with every null": lambda message: {
        "role": "assistant", "content": message.content, "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": None, "name": "bot",
    },
    "as parts": lambda message: {
        "role": "assistant", "content": [{"type": "text", "text": message.content, "annotations": None}], "tool_calls": [],
    },
}  # fmt: skip
"""How clients send an answer back with the next turn."""


@pytest.mark.parametrize("client", OWN_ANSWERS)
def test_three_turns_go_round_as_clients_send_them(client: str, served: Served, plain: Plain) -> None:
    turns: list[Any] = [{"role": "user", "content": "The sea was"}]
    said: list[dict[str, str]] = [{"role": "user", "content": "The sea was"}]
    for _ in range(3):
        answer = served.client.chat.completions.create(
            model=served.name, messages=turns, max_tokens=5, temperature=0
        ).choices[0].message  # fmt: skip
        text = plain.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        ids = plain.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert answer.content == plain.greedy(ids, 5)
        turns += [OWN_ANSWERS[client](answer), {"role": "user", "content": "go on", "name": None}]
        said += [{"role": "assistant", "content": str(answer.content)}, {"role": "user", "content": "go on"}]


def test_an_echo_has_the_prompts_own_log_probabilities(served: Served, plain: Plain) -> None:
    ids = plain.tokenizer("The sea was calm and")["input_ids"]
    answer = served.client.completions.create(
        model=served.name, prompt=[ids], max_tokens=2, temperature=0, logprobs=3, echo=True
    )
    (choice,) = answer.choices
    assert choice.text == plain.tokenizer.decode(ids) + plain.greedy(ids, 2)
    logprobs = choice.logprobs
    assert logprobs is not None
    with torch.no_grad():
        expected_TV = plain.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    expected = [float(expected_TV[place, token]) for place, token in enumerate(ids[1:])]
    assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    for place, top in enumerate(logprobs.top_logprobs[1 : len(ids)]):
        assert max(top.values()) == pytest.approx(float(expected_TV[place].max()), abs=1e-4)
    assert len(logprobs.tokens) == len(ids) + 2 == len(logprobs.text_offset)
    begins = logprobs.text_offset
    assert all(choice.text[begin:].startswith(token) for begin, token in zip(begins, logprobs.tokens, strict=True))


def test_an_echo_of_nothing_more_scores_the_prompt_alone(served: Served) -> None:
    body = {"model": served.name, "prompt": ["The sea", "A"], "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = served.client.completions.create(**body)
    assert [choice.text for choice in answer.choices] == ["The sea", "A"]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    streamed = served.client.completions.create(**body, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices[0].index == 0) == "The sea"


def test_the_served_model_can_be_asked_for_by_its_name(served: Served) -> None:
    assert served.client.models.retrieve(served.name).id == served.name
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here"):
        served.client.models.retrieve("gpt-4")


def test_another_models_name_and_another_path_are_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here, only") as refused:
        served.client.completions.create(model="gpt-4", prompt="x")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    assert httpx2.post(f"{served.url}/v1/embeddings", json={}).json()["error"]["message"].endswith("Not Found")
    assert httpx2.get(f"{served.url}/v1/completions").status_code == 405


def test_bodies_that_are_no_json_objects_are_named(served: Served) -> None:
    def message(content: bytes, kind: str = "application/json") -> str:
        answer = httpx2.post(f"{served.url}/v1/completions", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400
        text: str = answer.json()["error"]["message"]
        return text

    assert "the body is not JSON: " in message(b'{"prompt": ')
    assert "the body must be a JSON object" in message(b"[1]")
    assert "the body must be a JSON object" in message(b"")
    assert "the body must be a JSON object" in message(b'{"prompt": "a"}', kind="text/plain")
    assert "parsing the body" in message(b"[" * 100_000)
    assert "temperature: " in message(b'{"prompt": "a", "temperature": NaN}')
    assert "prompt is missing" in message(b"{}")
    assert "prompt must be" in message(rb'{"prompt": "half a character: \ud800"}')
    assert message(rb'{"prompt": "a", "half a name: \ud800": 1}')
