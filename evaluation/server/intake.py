"""The intake makes work for this model out of a request: texts become token ids, lengths are checked against the context."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from evaluation.server.errors import ApiError
from evaluation.server.protocol import ChatCompletionRequest, CompletionRequest, Sampled
from evaluation.server.work import Work

COMPLETION_TOKENS = 16
"""Length of a completion if none is asked for, as OpenAI has it; a chat answer may fill the context."""


class Intake:
    """Tokenizer, name and context of the model that is served. Only one thread at a time may call it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, served_name: str, context_tokens: int, vocabulary: int
    ) -> None:
        self.served_name, self.context_tokens = served_name, context_tokens
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def completion(self, request: CompletionRequest) -> Work:
        """Work for every prompt; an `ApiError` for another model, an empty or too long prompt, an unknown token."""
        self._check_name(request)
        prompts = self._prompts(request.prompt)
        most = [self._new_tokens(prompt, request.max_tokens, COMPLETION_TOKENS) for prompt in prompts]
        return _work(request, prompts, most, top_logprobs=request.logprobs)

    def chat(self, request: ChatCompletionRequest) -> Work:
        """Work for a conversation; an `ApiError` as above, or if no chat template takes these messages."""
        self._check_name(request)
        prompt = self._conversation(request)
        asked = request.max_completion_tokens or request.max_tokens
        most = self._new_tokens(prompt, asked, self.context_tokens)
        return _work(request, [prompt], [most], top_logprobs=(request.top_logprobs or 0) if request.logprobs else None)

    def _check_name(self, request: Sampled) -> None:
        if request.model not in (None, self.served_name):
            message = f"model {request.model!r} is not served here, only {self.served_name!r}"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    def _new_tokens(self, prompt: list[int], asked: int | None, default: int) -> int:
        """How many tokens may follow this prompt: as many as were asked for, or as the context holds."""
        if not prompt:
            raise ApiError("the prompt has no tokens; write some text", param="prompt")
        if len(prompt) + (asked or 1) > self.context_tokens:
            message = (
                f"the prompt has {len(prompt)} tokens and {asked or 'at least 1'} are to come; the context of "
                f"{self.served_name} holds {self.context_tokens}: shorten the prompt or lower max_tokens"
            )
            param = "max_tokens" if len(prompt) < self.context_tokens else "prompt"
            raise ApiError(message, param=param, code="context_length_exceeded")
        return asked or min(default, self.context_tokens - len(prompt))

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
        roles = {"developer": "system"}
        turns = [{"role": roles.get(m.role, m.role), "content": m.text} for m in request.messages]
        try:
            text: Any = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            raise ApiError(f"the model's chat template refuses these messages: {error}", param="messages") from error
        return self._encode(text, add_special_tokens=False)


def _work(request: Sampled, prompts: list[list[int]], max_new_tokens: list[int], *, top_logprobs: int | None) -> Work:
    sampling = request.model_dump(include={"temperature", "top_p", "top_k", "seed"})
    return Work(prompts, max_new_tokens, n=request.n or 1, stops=request.stops, top_logprobs=top_logprobs, **sampling)
