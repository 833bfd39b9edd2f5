"""The requests that clients may send: the part of OpenAI's API that is served, checked strictly.

Every parameter is used, is listed as harmless, or is refused by name; none is dropped in silence. Names and meanings:
https://platform.openai.com/docs/api-reference; `top_k` is an extension under the name vLLM gives it.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

HARMLESS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Labels for whoever runs the server: accepted, and nothing follows from them."""
NEUTRAL: dict[str, list[Any]] = {
    **{key: [] for key in ("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options")},
    **{key: [False] for key in ("store", "ignore_eos", "use_beam_search")},
    **{key: [0] for key in ("frequency_penalty", "presence_penalty")},
    **{key: [[]] for key in ("functions", "tools")},
    **{key: [1] for key in ("repetition_penalty", "length_penalty")},
    **{"min_p": [0], "min_tokens": [0], "skip_special_tokens": [True], "spaces_between_special_tokens": [True]},
    **{"logit_bias": [{}], "parallel_tool_calls": [True, False], "suffix": [""]},
    **{"function_call": ["none"], "tool_choice": ["none", "auto"], "service_tier": ["auto", "default"]},
    **{"modalities": [["text"]], "response_format": [{"type": "text"}]},
}
"""Parameters that are not supported, with the values that ask for nothing; so does null. Others are refused."""
MOST_CHOICES, MOST_PROMPTS, MOST_LOGPROBS = 16, 128, 20
COOLEST = 0.01
"""Temperatures above 0 and below this would overflow the scores they divide ..."""
GREEDY_BELOW = 1e-5
"""... but for those below this, by which clients mean greedy, as vLLM has it."""


def _whole_characters(text: str) -> str:
    text.encode("utf-8")  # raises what is a ValueError where JSON escaped only half of a character
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
NonEmpty = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
)


class Strict(BaseModel):
    """No conversions, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Lenient(Strict):
    """An object inside a request, of which fields that are null or empty ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_empty(cls, sent: Any) -> Any:
        return {k: v for k, v in sent.items() if v is not None and v != []} if isinstance(sent, dict) else sent


class StreamOptions(Lenient):
    """Options of a stream."""

    include_obfuscation: Literal[False] | None = Field(None, description="padding of events, which is not done")
    include_usage: bool | None = Field(None, description="one more event at the end, with usage and `remoe`")


class Sampled(Strict):
    """The fields that both kinds of request share; null is the same as leaving a field out."""

    model: str | None = Field(None, description="the served model's name; may be left out")
    max_tokens: int | None = Field(None, ge=0, description="most new tokens of a choice; 0 only with echo")
    temperature: float | None = Field(None, ge=0, le=2, description=f"0 is greedy; else {COOLEST} or more")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, description="0 turns it off; else as in generation_config.json, or 50")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="torch's seed for each prompt of this request")
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="choices per prompt, sampled in one batch")
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=4, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        temperature, top_k, best_of = (sent.get(name) for name in ("temperature", "top_k", "best_of"))
        changed: dict[str, Any] = {"top_k": 0} if top_k == -1 else {}  # vLLM's way of turning it off
        if isinstance(temperature, float) and 0 < temperature < GREEDY_BELOW:
            changed["temperature"] = 0.0
        if best_of is None or best_of == (sent.get("n") or 1):
            sent = {name: value for name, value in sent.items() if name != "best_of"}
        return {
            name: value
            for name, value in (sent | changed).items()
            if name not in HARMLESS and not (name in NEUTRAL and (value is None or value in NEUTRAL[name]))
        }

    @model_validator(mode="after")
    def _fits_together(self) -> "Sampled":
        if self.wants_usage and not self.stream:
            raise ValueError("stream_options.include_usage is only for stream=true")
        if self.temperature is not None and 0 < self.temperature < COOLEST:
            raise ValueError(f"temperature must be 0 (greedy) or at least {COOLEST}")
        if self.n is not None and self.n > 1 and self.temperature == 0:
            raise ValueError("n above 1 needs a temperature above 0: greedy choices would all be the same")
        if self.max_tokens == 0 and not getattr(self, "echo", None):
            raise ValueError("max_tokens is 0, which makes nothing; that is only for echo=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a list, whatever was sent."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with an event about usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="number of alternatives beside each token")
    echo: bool | None = Field(
        None, description="begin every choice with the prompt, and log probabilities with its tokens'"
    )


class TextPart(Lenient):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Lenient):
    """One turn of a conversation, as users write it or as an answer gave it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = None
    name: Text | None = Field(None, description="of the speaker; for templates that show it")

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and self.role != "assistant":  # an answer may have been empty
            raise ValueError(f"a message of role {self.role} has no content")
        return self

    @property
    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])


class ChatCompletionRequest(Sampled):
    """`POST /v1/chat/completions`; the model's own chat template makes the prompt."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _says_everything_once(self) -> "ChatCompletionRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens mean the same; send one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs=true")
        return self
