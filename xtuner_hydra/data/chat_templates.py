"""Jinja chat templates: a Conversation -> its text, and the spans of it that the assistant must produce.

A template's own {% generation %} marks are trusted. One without them is rendered turn by turn: the text up to a turn, with the
prompt that asks for an answer, must be the beginning of the whole text, and what follows it, to the token that ends the turn, is the span. A
template that renders earlier turns differently once others follow cannot be learnt from that way (template_choice.py has one of ours for some)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import zip_longest
from typing import Any

from xtuner_hydra.data.fold import TOOLS_END, fold
from xtuner_hydra.data.formats import Conversation, Message
from xtuner_hydra.errors import ConfigError

KEY = "model.chat_template"
_REMEDY = (
    "give a template that does not with model.chat_template=PATH, a .jinja file with {% generation %} around what the assistant writes"
)
_MARKED = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")

_ASKING = ("system", "developer", "user")

_PLACE = "\ue000"  # a private character, which no template writes by itself

# Templates that ask for the date get this one: a run must be the same tomorrow. It is the date that Llama's templates fall back to.
_DATE = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24"}
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DATE.items())
    + " }}{% endmacro %}{{ '' }}"
)


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, and [start, stop) of each supervised stretch of it, in order and apart."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class ChatTemplate:
    """A template with what transformers gives it: `special`, the names of special tokens (bos_token, ...) and their text.

    name: for people. added: texts of all added tokens, by which the end of a turn is known. with_tools: the template for conversations with
    tools where the tokenizer has one of its own for them."""

    name: str
    template: str
    special: dict[str, str]
    added: tuple[str, ...]
    with_tools: str | None = None

    @cached_property
    def lacks(self) -> list[str]:
        """What the template has no place for; it is written into the text."""
        lacking = {"tools": "tool_calls" not in self._all, "thinking": not re.search(r"reasoning|(?<!enable_)thinking", self._all)}
        return [name for name, missing in lacking.items() if missing]

    @property
    def _all(self) -> str:
        return self.template + (self.with_tools or "")

    def render(self, conversation: Conversation, *, ask: bool = False) -> str:
        """The text; `ask`: with the prompt for an answer at its end. ValueError where the template refuses the conversation."""
        return self._render(self._folded(conversation), ask=ask)[0]

    def spans(self, conversation: Conversation) -> Rendered:
        """The text with what is supervised. ValueError for a conversation that this template does not let us learn from."""
        given, conversation = conversation, self._folded(conversation)
        if any(message.role == "pretrain" for message in conversation.messages):
            raise ValueError("role pretrain has no place in a chat template; use data.format=text for such data")
        text, marked = self._render(conversation)
        self._refuse_lost_tools(given, conversation, text)
        self._refuse_lost_content(given, conversation, text)
        self._refuse_lost_calls(conversation, text)
        if is_marked(self._of(conversation)):
            spans = self._by_marks(conversation, marked)
        else:
            _refuse_lost_thinking(given, text)
            spans = [self._answer(conversation, text, i) for i, message in enumerate(conversation.messages) if _learnt(message)]
        others = [i for i, message in enumerate(conversation.messages) if message.supervised and message.role != "assistant"]
        spans += [self._other(conversation, text, i) for i in others]
        return Rendered(text, sorted(span for span in spans if span[0] < span[1]))

    def _refuse_lost_tools(self, given: Conversation, folded: Conversation, text: str) -> None:
        """ValueError where the tools of a conversation or their results are not in its text: the model would learn to call what it has not been
        told of, and to know what it has not read."""
        if self._ignores_results and any(message.role == "tool" for message in given.messages):
            raise ValueError(f"the chat template leaves out the results of tools; {_REMEDY}")
        if given.tools and (self._ignores_tools if folded.tools else TOOLS_END not in text):
            raise ValueError(
                "the chat template leaves out the tools that the conversation has; give one that writes them with model.chat_template=PATH, "
                "a .jinja file, or write them into a message and take `tools` out"
            )

    def _refuse_lost_calls(self, conversation: Conversation, text: str) -> None:
        """ValueError where a call of an answer, or the content beside it, is not in the text. The same words may stand elsewhere in it: a call's
        name in the list of tools, a short answer in the question."""
        for i, message in enumerate(conversation.messages):
            if not _learnt(message) or not message.tool_calls:
                continue
            if any(self._is_same(conversation, text, i, _without_call(message, call)) for call in range(len(message.tool_calls))):
                raise ValueError(f"message {i + 1}: the chat template leaves out its tool calls; {_REMEDY}")
            if message.content.strip() and self._is_same(conversation, text, i, replace(message, content="")):
                raise ValueError(f"message {i + 1}: the chat template leaves out its content; {_REMEDY}")

    def _refuse_lost_content(self, given: Conversation, folded: Conversation, text: str) -> None:
        """ValueError where what an answer that is to be learnt says is not in `text`, or what a system or user message says (a tool's result may
        be written in another way)."""
        said = {i: _said(message) for i, message in enumerate(given.messages) if _learnt(message) or message.role in _ASKING}
        together = "\0".join(said.values())
        for i, words in said.items():
            message = given.messages[i]
            lost = words not in text
            if words and not lost and text.count(words) < together.count(words) and len(given.messages) == len(folded.messages):
                # another message says the same, and one of the two is missing
                lost = self._is_same(folded, text, i, replace(folded.messages[i], content=""))
            if lost:
                what = "its content" if message.role == "assistant" else f"what the {message.role} says"
                raise ValueError(f"message {i + 1}: the chat template leaves out {what}; {_REMEDY}")

    def _is_same(self, conversation: Conversation, text: str, i: int, without: Message) -> bool:
        """Whether the text is the same with `without` in the place of message `i`."""
        try:
            messages = [*conversation.messages[:i], without, *conversation.messages[i + 1 :]]
            return self._render(replace(conversation, messages=messages))[0] == text
        except ValueError:  # that would be no conversation
            return False

    def _by_marks(self, conversation: Conversation, marked: list[tuple[int, int]]) -> list[tuple[int, int]]:
        answers = [message for message in conversation.messages if message.role == "assistant"]
        if all(message.supervised for message in answers):
            return marked
        if len(marked) != len(answers):
            raise ValueError(
                f"the chat template marks {len(marked)} passages in {len(answers)} assistant messages, so `loss` cannot be told for each"
            )
        return [span for span, message in zip(marked, answers, strict=True) if message.supervised]

    def _answer(self, conversation: Conversation, text: str, i: int) -> tuple[int, int]:
        """The span of assistant message `i`: from the end of the prompt that asks for it to the end of its turn."""
        turn, message = self._prefix(conversation, text, i + 1), conversation.messages[i]
        if i > 0 or message.thinking or message.tool_calls:
            asked = self._prefix(conversation, text, i, ask=True)
        else:  # no chat asks for a greeting, and templates refuse to render none
            asked = self._content(conversation, text, i, 0, turn)
        if turn < asked:
            raise ValueError(f"message {i + 1}: the chat template renders no more of it than the prompt that asks for it; {_REMEDY}")
        return asked, self._end_of_turn(text, asked, turn)

    def _other(self, conversation: Conversation, text: str, i: int) -> tuple[int, int]:
        """The span of a message that is not the assistant's and yet to be learnt (`loss`: true): its content to the end of its turn."""
        stop = self._prefix(conversation, text, i + 1)
        place = self._content(conversation, text, i, self._prefix(conversation, text, i), stop)
        return place, self._end_of_turn(text, place, stop)

    def _content(self, conversation: Conversation, text: str, i: int, begin: int, stop: int) -> int:
        """Where the content of message `i` begins, whose turn is text[begin:stop]."""
        message = conversation.messages[i]
        marked = replace(conversation, messages=[*conversation.messages[:i], replace(message, content=_PLACE)])
        # from where the content stands: a short one may be found in the header of the turn too
        header = self._render(marked)[0].find(_PLACE, begin)
        place = text.find(message.content.strip(), header, stop) if header >= 0 else -1
        if place < 0:
            raise ValueError(f"message {i + 1}: the chat template changes its content, so its `loss` cannot be taken")
        return place

    def _end_of_turn(self, text: str, start: int, stop: int) -> int:
        """`stop` without the white space after the token that ends the turn, where one does."""
        turn = text[start:stop].rstrip()
        return start + len(turn) if turn.endswith(self.added) else stop

    def _prefix(self, conversation: Conversation, text: str, count: int, *, ask: bool = False) -> int:
        """Length of the first `count` messages' text, which `text` must begin with, an EOS at its end apart."""
        if count == len(conversation.messages):
            return len(text)
        if count == 0 and not ask:
            return 0
        part, _ = self._render(Conversation(conversation.messages[:count], conversation.tools), ask=ask)
        if not text.startswith(part) and (eos := self.special.get("eos_token")):
            part = part.rstrip().removesuffix(eos)  # some templates write it at the end of every text, whole or not
        if not text.startswith(part):
            raise ValueError(
                f"message {count + ask}: the chat template renders what stands before differently once more follows; {_REMEDY}"
            )
        return len(part)

    def _folded(self, conversation: Conversation) -> Conversation:
        """What the template has no place for written into the text."""
        lacks = self.lacks
        if any(message.role == "developer" for message in conversation.messages) and self._drops_developers:
            messages = [replace(one, role="system") if one.role == "developer" else one for one in conversation.messages]
            conversation = replace(conversation, messages=messages)
        return fold(conversation, tools="tools" in lacks, thinking="thinking" in lacks) if lacks else conversation

    @cached_property
    def learnt_header(self) -> str:
        """What a template without marks writes before an answer, but not where it is asked for one, so that the model must write it."""
        asked, answered = Conversation([user("a")]), Conversation([user("a"), assistant(_PLACE)])
        try:
            prompt, text = self._render(asked, ask=True)[0], self._render(answered)[0]
        except ValueError:
            return ""
        is_header = text.startswith(prompt) and _PLACE in text and not is_marked(self.template)
        return text[len(prompt) :].partition(_PLACE)[0].strip() if is_header else ""

    @cached_property
    def _ignores_tools(self) -> bool:
        """Whether the template has a place for calls, but none for the tools that may be called."""
        chat = Conversation([user("a"), assistant("b")], [{"type": "function", "function": {"name": "f", "parameters": {}}}])
        try:
            return self._render(chat)[0] == self._render(replace(chat, tools=[]))[0]
        except ValueError:
            return False

    @cached_property
    def _ignores_results(self) -> bool:
        """Whether the template passes over what a tool has answered."""
        calls = [{"name": "f", "arguments": {"x": number}} for number in (1, 2)]
        results = [Message("tool", f"result{number}", supervised=False) for number in (1, 2)]
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        chat = self._folded(Conversation([user("a"), assistant("", calls=calls), *results, assistant("b")], tools))
        try:
            text = self._render(chat)[0]
        except ValueError:
            return False
        return not all(result.content in text for result in results)

    @cached_property
    def _drops_developers(self) -> bool:
        """Whether the template passes over messages of the role that newer models have for `system`."""
        chat = Conversation([Message("developer", "instructions", supervised=False), user("a")])
        try:
            return "instructions" not in self._render(chat)[0]
        except ValueError:
            return True

    def _render(self, conversation: Conversation, *, ask: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """(text, passages marked by {% generation %}); by transformers, as apply_chat_template does it."""
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._of(conversation)
        render: Any = render_jinja_template  # its annotations do not fit what it takes and returns
        try:
            texts, marked = render(
                [[_as_dict(message) for message in conversation.messages]],
                tools=conversation.tools or None,
                chat_template=_FIXED_DATE + template if "strftime_now" in template else template,
                return_assistant_tokens_mask=is_marked(template),
                add_generation_prompt=ask,
                **self.special,
            )
        except TemplateSyntaxError as error:
            raise ConfigError(KEY, self.name, f"line {error.lineno} is not Jinja ({error.message})") from None
        except TemplateError as error:  # also where it reaches for what the sandbox forbids
            raise ValueError(f"the chat template refuses this conversation ({error})") from None
        except Exception as error:  # a template is a program of others: it may divide by zero, or ask for too long a range
            raise ValueError(f"the chat template fails on this conversation ({type(error).__name__}: {error})") from None
        return texts[0], [(int(start), int(stop)) for start, stop in marked[0]] if marked else []

    def _of(self, conversation: Conversation) -> str:
        return self.with_tools if conversation.tools and self.with_tools else self.template


@cache
def is_marked(template: str) -> bool:
    """Whether it has {% generation %}, comments apart."""
    return bool(_MARKED.search(re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)))


def user(content: str) -> Message:
    """A question, to try a template with."""
    return Message("user", content, supervised=False)


def assistant(content: str, thinking: str | None = None, calls: list[dict[str, Any]] | None = None) -> Message:
    """An answer, to try a template with."""
    return Message("assistant", content, True, calls or [], thinking=thinking)


def _without_call(message: Message, call: int) -> Message:
    calls, ids = ([*values[:call], *values[call + 1 :]] for values in (message.tool_calls, message.call_ids))
    return replace(message, tool_calls=calls, call_ids=ids)


def _refuse_lost_thinking(conversation: Conversation, text: str) -> None:
    """ValueError where an answer that is to be learnt has thinking which the template left out of `text`. One with {% generation %} may: it was
    written for training."""
    for number, message in enumerate(conversation.messages, 1):
        if not _learnt(message):
            continue
        if any(thought.strip() not in text for thought in (message.thinking or "", *_thoughts(message.content))):
            raise ValueError(f"message {number}: the chat template leaves out its thinking; {_REMEDY}")


def _thoughts(content: str) -> list[str]:
    """What an answer that holds its thinking itself (`<think>...</think>`) thinks."""
    return [part.rpartition("<think>")[2] for part in content.split("</think>")[:-1]]


def _said(message: Message) -> str:
    """The content of a message, without the thinking that an answer may hold itself."""
    return (message.content.rpartition("</think>")[2] if message.role == "assistant" else message.content).strip()


def _learnt(message: Message) -> bool:
    return message.supervised and message.role == "assistant"


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as transformers' templates expect it: keys without a value are left out."""
    calls = [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
            **({} if identity is None else {"id": identity}),
        }
        for call, identity in zip_longest(message.tool_calls, message.call_ids)  # calls made on the spot have none
    ]
    values = {
        "role": message.role,
        "content": message.content,
        "tool_calls": calls or None,
        "reasoning_content": message.thinking,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
    }
    return {key: value for key, value in values.items() if value is not None}
