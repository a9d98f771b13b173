"""Prompts as tokens, and the one token of the object that is scored after each of them.

The target is the first token of ``prompt + " " + object`` after the longest prefix that it shares with the tokens of
the prompt. The tokenizer is passed in: a tokenizer of transformers, or what is called like one.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moescope.errors import MoescopeError

logger = logging.getLogger(__name__)

Tokens = Sequence[int]


class TargetError(MoescopeError):
    """The tokenizer cannot make a prompt, or the object that is to follow it."""


@dataclass(frozen=True)
class Target:
    """A prompt in tokens and the token that is scored at its last position.

    tokens: what the tokenizer makes of the prompt, with what it prepends, without what it appends.
    single_token: the whole object is the target. leaked: the target, or the object's first word, stands in the prompt.
    boundary_merge: the end of the prompt merges with the object, so that the target is the first token of
    ``" " + object`` alone.
    """

    prompt_id: str
    tokens: tuple[int, ...]
    target_id: int
    single_token: bool
    leaked: bool
    boundary_merge: bool


def find(tokenizer: Any, prompts: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The tokens and the target of every prompt (rows with prompt_id, text and object), in the order of the rows.

    Raises TargetError, naming the first such row and how many there are, where the prompt has no token or the object
    has none but blanks, or begins with the unknown token. Warns where a target is a bare blank (the tokenizer writes
    it apart from the object, as many do before digits) and where a prompt holds the unknown token.
    """
    texts = [row["text"] for row in prompts]
    plain, bounded = _encode(tokenizer, texts, special=False), _encode(tokenizer, texts, special=True)
    wholes = _encode(tokenizer, [f"{row['text']} {row['object']}" for row in prompts], special=True)
    # An appended EOS would stand between prompt and object, and be the last position.
    appended = _appended(plain, bounded)
    prompt_tokens, whole_tokens = ([ids[: len(ids) - appended] for ids in batch] for batch in (bounded, wholes))
    shared = [_shared(prompt, whole) for prompt, whole in zip(prompt_tokens, whole_tokens, strict=True)]
    merged = [length < len(prompt) for length, prompt in zip(shared, prompt_tokens, strict=True)]
    answers = [whole[length:] for length, whole in zip(shared, whole_tokens, strict=True)]
    is_blank, unknown = _blank_test(tokenizer), _unknown_ids(tokenizer)
    for i, alone in _alone(tokenizer, prompts, merged):
        # A tokenizer that prepends a blank of its own gives a bare blank first, which says nothing of the object.
        answers[i] = _bare(alone, is_blank) or alone

    failures, found = [], []
    for row, bare_prompt, tokens, answer, merge in zip(prompts, plain, prompt_tokens, answers, merged, strict=True):
        if problem := _problem(bare_prompt, answer, is_blank, unknown):
            failures.append(f"{row['prompt_id']}: {problem.format(object=row['object'])}")
            continue
        leaked = answer[0] in tokens or _has_word(row["text"], row["object"].split()[0])
        found.append(Target(row["prompt_id"], tuple(tokens), answer[0], len(answer) == 1, leaked, merge))
    if failures:
        others = f" ({len(failures) - 1} more rows like it)" if len(failures) > 1 else ""
        raise TargetError(f"{failures[0]}; drop the row or use a tokenizer that knows it{others}")
    _warn("the target is a bare blank", [target.prompt_id for target in found if is_blank(target.target_id)])
    strange = [row["prompt_id"] for row, ids in zip(prompts, plain, strict=True) if not unknown.isdisjoint(ids)]
    _warn("the prompt holds the unknown token", strange)
    return found


def retarget(target: Target, target_id: int) -> Target:
    """The same prompt with another token as its target (``target: argmax``); the flags follow.

    Only the object itself can be a single-token object, and a token that the model says itself is at no boundary.
    """
    if target_id == target.target_id:
        return target
    leaked = target_id in target.tokens
    return replace(target, target_id=target_id, single_token=False, leaked=leaked, boundary_merge=False)


def other_targets(prompts: Sequence[Mapping[str, Any]], targets: Sequence[Target]) -> list[frozenset[int]]:
    """Per prompt the targets of the other right objects of its relation and subject: what rank_filtered leaves out.

    ``targets`` are those of the objects, as ``find`` gives them; a prompt's own is never among its others.
    """
    right: dict[tuple[str, str], set[int]] = defaultdict(set)
    for row, target in zip(prompts, targets, strict=True):
        right[row["relation"], row["subject"]].add(target.target_id)
    return [
        frozenset(right[row["relation"], row["subject"]] - {target.target_id})
        for row, target in zip(prompts, targets, strict=True)
    ]


def _encode(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)["input_ids"]


def _appended(plain: Sequence[Tokens], bounded: Sequence[Tokens]) -> int:
    """How many special tokens (EOS) the tokenizer puts after a text: what follows its plain tokens.

    Told by place, not by name: a text that itself ends in such a token keeps it.
    """
    for inner, outer in zip(plain, bounded, strict=True):
        starts = [i for i in range(len(outer) - len(inner) + 1) if outer[i : i + len(inner)] == inner]
        if inner and starts:
            return len(outer) - len(inner) - starts[0]
    return 0


def _alone(tokenizer: Any, prompts: Sequence[Mapping[str, Any]], merged: Sequence[bool]) -> list[tuple[int, list[int]]]:
    """(row, tokens of ``" " + object``) for the rows whose prompt merges with the object."""
    rows = [i for i, merge in enumerate(merged) if merge]
    return list(zip(rows, _encode(tokenizer, [" " + prompts[i]["object"] for i in rows], special=False), strict=True))


def _shared(first: Tokens, second: Tokens) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _bare(tokens: Tokens, is_blank: Callable[[int], bool]) -> list[int]:
    """The tokens from the first that is not a blank on."""
    return list(itertools.dropwhile(is_blank, tokens))


def _problem(prompt: Tokens, answer: Tokens, is_blank: Callable[[int], bool], unknown: frozenset[int]) -> str | None:
    if not prompt:
        return "the tokenizer makes no token of the prompt"
    spoken = _bare(answer, is_blank)
    if not spoken:
        return "the tokenizer makes no token of the object {object!r}"
    if spoken[0] in unknown:
        return "the object {object!r} begins with what the tokenizer does not know"
    return None


def _blank_test(tokenizer: Any) -> Callable[[int], bool]:
    @functools.cache
    def is_blank(token: int) -> bool:
        return not tokenizer.decode([token]).strip()

    return is_blank


def _unknown_ids(tokenizer: Any) -> frozenset[int]:
    """The unknown token, as the wrapper declares it and as the model behind it uses it."""
    ids = {getattr(tokenizer, "unk_token_id", None)}
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if (piece := getattr(model, "unk_token", None)) is not None:
        ids.add(model.token_to_id(piece))
    return frozenset(ids - {None})


def _has_word(text: str, word: str) -> bool:
    """Whether the word stands in the text and is not part of a longer one; case counts, as it does for tokens."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _warn(problem: str, prompt_ids: Sequence[str]) -> None:
    if prompt_ids:
        logger.warning("%s in %d prompts (the first is %s)", problem, len(prompt_ids), prompt_ids[0])
