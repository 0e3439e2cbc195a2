"""`chat RUN_OR_DIR [-p TEXT]`: talk with a trained model, or with a Hugging Face one.

An answer is shown as it comes. Ctrl-C stops an answer, and the part already generated stays in the conversation; Ctrl-D ends the chat."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from xtuner_hydra.data.formats import Message
from xtuner_hydra.data.prompts import prompt_ids
from xtuner_hydra.data.tokenizers import Tokenizer, load_tokenizer
from xtuner_hydra.errors import EXIT_DONE, RefusedError
from xtuner_hydra.model.generation import Choose, generate, greedy, sampler
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.safe_text import printable
from xtuner_hydra.trained import find, refuse_several_ranks

_UNFINISHED = "\ufffd"  # how a decoder shows bytes that are not a character yet


@dataclass(frozen=True)
class Speaker:
    """A model that answers conversations with at most `most` tokens, each chosen by `choose`."""

    model: CausalLM
    tokenizer: Tokenizer
    choose: Choose
    most: int

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """The answer in pieces, as they are known. Raises RefusedError where the model cannot read the conversation."""
        config = self.model.config
        try:
            prompt = prompt_ids(messages, self.tokenizer, config)
        except ValueError as error:
            raise RefusedError(f"chat: {error}") from None
        most = min(self.most, config.max_position_embeddings - len(prompt))
        ids = generate(self.model, prompt, most=most, stop=self.tokenizer.stop_token_ids, choose=self.choose)
        return in_pieces(ids, self.tokenizer.decode)


def main(argv: list[str]) -> int:
    """Answer one prompt, or talk until the input ends."""
    arguments = _parser().parse_args(argv)
    refuse_several_ranks("chat")
    choose = _choice(arguments)
    if arguments.max_new_tokens < 1:
        raise RefusedError(f"chat: --max-new-tokens {arguments.max_new_tokens}: must be at least 1")
    trained = find(arguments.model)
    speaker = Speaker(trained.load(), load_tokenizer(trained.model), choose, arguments.max_new_tokens)
    opening = [Message("system", arguments.system, False)] if arguments.system is not None else []
    if arguments.prompt is not None:
        _say(speaker.answer([*opening, Message("user", arguments.prompt, False)]), [])
    else:
        talk(speaker, opening)
    return EXIT_DONE


def talk(speaker: Speaker, opening: list[Message]) -> None:
    """Ask and answer until the input ends."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - input() edits lines and remembers them where it is loaded
    print("Ctrl-C ends an answer, Ctrl-D the chat.", file=sys.stderr)
    messages = list(opening)
    while True:
        try:
            question = input("> ")
            if question.strip():
                messages.append(Message("user", question, False))
                _reply(speaker, messages)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # while typing, or before the answer has begun
            print()
        except RefusedError as error:
            print(f"{printable(str(error))}; the conversation starts anew", file=sys.stderr)
            messages = list(opening)


def _reply(speaker: Speaker, messages: list[Message]) -> None:
    """Answer, and add what has been said to `messages`, also where Ctrl-C cuts it short."""
    said: list[str] = []
    try:
        _say(speaker.answer(messages), said)
    finally:
        messages.append(Message("assistant", "".join(said), False))


def in_pieces(ids: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """The text of `ids` as they come, in whole characters; bytes that never become one are shown at the end."""
    known: list[int] = []
    text = shown = ""
    for token in ids:
        known.append(token)
        text = decode(known)
        if not text.endswith(_UNFINISHED):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


def _say(pieces: Iterator[str], said: list[str]) -> None:
    """Print an answer as it comes, and collect it in `said`."""
    for piece in pieces:
        said.append(piece)
        print(printable(piece), end="", flush=sys.stdout.isatty())
    print(flush=True)


def _choice(arguments: argparse.Namespace) -> Choose:
    temperature, top_p = arguments.temperature, arguments.top_p
    if not 0 <= temperature < float("inf"):
        raise RefusedError(f"chat: --temperature {temperature}: must be 0 (the likeliest token) or above")
    if not 0 < top_p <= 1:
        raise RefusedError(f"chat: --top-p {top_p}: must be above 0 and at most 1")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**63:
        raise RefusedError(f"chat: --seed {arguments.seed}: must be a whole number from 0 to 2^63 - 1")
    if temperature > 0:
        return sampler(temperature, top_p, arguments.seed)
    if top_p < 1 or arguments.seed is not None:
        name = "--top-p" if top_p < 1 else "--seed"
        raise RefusedError(f"chat: {name} says how to draw tokens, but --temperature 0 takes the likeliest; set --temperature too")
    return greedy


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xtuner-hydra chat", description="Talk with the model of a run or of a Hugging Face directory.")
    where = "a run (its newest checkpoint or export), a Hugging Face directory, of an adapter too, or Hub id"
    parser.add_argument("model", metavar="RUN_OR_DIR", help=where)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this and end; else questions are read line by line")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="tokens of an answer at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token (the default); 1: as learnt")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that have this share")
    parser.add_argument("--seed", type=int, metavar="S", help="repeat what was drawn")
    return parser
