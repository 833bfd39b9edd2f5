"""The intake makes work for this model out of a request: texts become token ids, lengths are checked against the context."""

from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from evaluation.server.errors import ApiError
from evaluation.server.protocol import ChatCompletionRequest, CompletionRequest, Message, Sampled
from evaluation.server.work import Work

MARKER = "a text to look for"
COMPLETION_TOKENS = 16
"""Length of a completion if none is asked for, as OpenAI has it; a chat answer may fill the context."""


class Intake:
    """Tokenizer, name and context of the model that is served. Only one thread at a time may call it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, served_name: str, context_tokens: int, vocabulary: int,
        stop_strings: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.served_name, self.context_tokens, self._stop_strings = served_name, context_tokens, stop_strings
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def completion(self, request: CompletionRequest) -> Work:
        """Work for every prompt; an `ApiError` for another model, an empty or too long prompt, an unknown token."""
        self.check_name(request.model)
        prompts = self._prompts(request.prompt)
        most = [self._new_tokens(prompt, request.max_tokens, COMPLETION_TOKENS) for prompt in prompts]
        return self._work(request, prompts, most, top_logprobs=request.logprobs, echo=bool(request.echo))

    def chat(self, request: ChatCompletionRequest) -> Work:
        """Work for a conversation; an `ApiError` as above, or if no chat template takes these messages."""
        self.check_name(request.model)
        prompt = self._conversation(request)
        asked = request.max_completion_tokens or request.max_tokens or None
        most = self._new_tokens(prompt, asked, self.context_tokens)
        return self._work(
            request, [prompt], [most], top_logprobs=(request.top_logprobs or 0) if request.logprobs else None
        )

    def check_name(self, name: str | None) -> None:
        """Refuse a name that is another model's by an `ApiError`."""
        if name not in (None, self.served_name):
            message = f"model {name!r} is not served here, only {self.served_name!r}"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    def _new_tokens(self, prompt: list[int], asked: int | None, default: int) -> int:
        """How many tokens may follow this prompt: as many as were asked for, or as the context holds."""
        if not prompt:
            raise ApiError("the prompt has no tokens; write some text", param="prompt")
        coming = 1 if asked is None else asked
        if len(prompt) + coming > self.context_tokens:
            message = (  # clients look for OpenAI's words
                f"This model's maximum context length is {self.context_tokens} tokens. However, you requested "
                f"{len(prompt) + coming} tokens ({len(prompt)} in the prompt, {'at least ' * (asked is None)}{coming} for the "
                "completion). Please reduce the length of the prompt or of the completion."
            )
            param = "max_tokens" if len(prompt) < self.context_tokens else "prompt"
            raise ApiError(message, param=param, code="context_length_exceeded")
        return min(default, self.context_tokens - len(prompt)) if asked is None else asked

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """One list of ids for every prompt, in whichever of the four forms the prompts came."""
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            prompt = [prompt]
        return [self._encode(one) if isinstance(one, str) else self._checked(one) for one in prompt]

    def _checked(self, ids: list[int]) -> list[int]:
        if max(ids) >= self._vocabulary:
            raise ApiError(f"token id {max(ids)} is not in the vocabulary of {self._vocabulary}", param="prompt")
        return ids

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _conversation(self, request: ChatCompletionRequest) -> list[int]:
        if not self._tokenizer.chat_template:
            message = (
                f"the tokenizer of {self.served_name} has no chat template, so it is not known how this model marks "
                "turns; use /v1/completions"
            )
            raise ApiError(message, param="messages", code="no_chat_template")
        turns = [self._turn(message) for message in request.messages]
        try:
            text = self._rendered(turns)
        except (TemplateError, ValueError, TypeError) as error:
            raise ApiError(f"the model's chat template refuses these messages: {error}", param="messages") from error
        return self._encode(text, add_special_tokens=False)

    def _turn(self, message: Message) -> dict[str, Any]:
        """A message as the template is given it: its content as text, or as a list of parts where text would be lost."""
        role = "system" if message.role == "developer" else message.role
        content = [{"type": "text", "text": message.text}] if self._wants_parts else message.text
        return {"role": role, "content": content, **({"name": message.name} if message.name else {})}

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template shows the text of content parts and not that of plain content."""
        parts = [{"role": "user", "content": [{"type": "text", "text": MARKER}]}]
        return not self._shows([{"role": "user", "content": MARKER}]) and self._shows(parts)

    def _shows(self, turns: list[dict[str, Any]]) -> bool:
        try:
            return MARKER in self._rendered(turns)
        except (TemplateError, ValueError, TypeError):
            return False

    def _rendered(self, turns: list[dict[str, Any]]) -> str:
        return str(self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    def _work(self, request: Sampled, prompts: list[list[int]], max_new_tokens: list[int], **more: Any) -> Work:
        sampling = request.model_dump(include={"temperature", "top_p", "top_k", "seed"})
        stops = (*request.stops, *self._stop_strings)
        return Work(prompts, max_new_tokens, n=request.n or 1, stops=stops, **more, **sampling)
