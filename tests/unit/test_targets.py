"""The target token of a prompt, under every kind of tokenizer that base models have. Tokenizers are trained here."""

import logging
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moescope import targets
from moescope.targets import Target, TargetError

FACTS = [
    ("capital", "Mexico", "Mexico City", "The capital of {} is"),
    ("capital", "France", "Paris", "The capital of {} is"),
    ("capital", "Peru", "Lima", "The capital of {} is"),
    ("letter", "apple", "A", "{} starts with the letter"),
    ("antonym", "big", "small", "The opposite of {} is"),
    ("antonym", "big", "little", "The opposite of {} is"),
    ("antonym", "fast", "slow", "The opposite of {} is"),
    ("language", "Peru", "Spanish", "People in {} speak"),
    ("superclass", "fruit fly", "fruit", "A {} is a kind of"),
]
PROMPTS = [
    {
        "prompt_id": f"{relation}/{row}",
        "relation": relation,
        "subject": subject,
        "object": right,
        "text": template.replace("{}", subject),
    }
    for row, (relation, subject, right, template) in enumerate(FACTS)
]
CORPUS = [f"{row['text']} {row['object']} ." for row in PROMPTS for _ in range(20)]


def prompt(text: str, right: str, relation: str = "r", subject: str = "s", row: int = 0) -> dict[str, str]:
    return {"prompt_id": f"{relation}/{row}", "relation": relation, "subject": subject, "object": right, "text": text}


def wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def with_template(tokenizer: Tokenizer, template: str) -> None:
    """Add special tokens around every text, as BOS- and EOS-adding tokenizers do: '<s> $A </s>'."""
    names = [piece for piece in template.split() if piece != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )


def byte_level(template: str = "$A", corpus=CORPUS, size: int = 600) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes, a blank belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if template != "$A":
        with_template(tokenizer, template)
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace(scheme: str, split: bool = True, corpus=CORPUS, size: int = 400, template: str = "$A"):
    """SentencePiece's kind: blanks are written as a visible mark; ``split=False`` lets words merge with each other."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    if template != "$A":
        with_template(tokenizer, template)
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_style() -> PreTrainedTokenizerFast:
    """The older Llama kind: a normalizer puts one more blank before every text, even one that begins with a blank."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    with_template(tokenizer, "<s> $A")
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_level(words: list[str]) -> PreTrainedTokenizerFast:
    """One token a word; whatever else there is, is unknown."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(tokenizer, unk_token="[UNK]")


KINDS = {
    "byte-level": byte_level,
    "byte-level, BOS": lambda: byte_level("<s> $A"),
    "byte-level, EOS": lambda: byte_level("$A </s>"),
    "byte-level, BOS and EOS": lambda: byte_level("<s> $A </s>"),
    "bytes only": lambda: byte_level(size=258),
    "metaspace always": lambda: metaspace("always"),
    "metaspace first, BOS": lambda: metaspace("first", template="<s> $A"),
    "metaspace never": lambda: metaspace("never"),
    "metaspace without splits": lambda: metaspace("always", split=False),
    "llama": llama_style,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {kind: build() for kind, build in KINDS.items()}


def brute_force(tokenizer, row) -> tuple[list[int], int, bool, bool]:
    """(tokens, target_id, single_token, boundary_merge) by the definition, one prompt at a time, prefixes tried one
    by one from the longest; special tokens at the end are told by their ids."""

    def ids(text: str) -> list[int]:
        found = tokenizer(text)["input_ids"]
        while found[-1] == tokenizer.eos_token_id:
            found = found[:-1]
        return found

    tokens, whole = ids(row["text"]), ids(row["text"] + " " + row["object"])
    longest = max(n for n in range(len(tokens) + 1) if whole[:n] == tokens[:n])
    if longest == len(tokens):
        return tokens, whole[longest], len(whole) == longest + 1, False
    alone = tokenizer(" " + row["object"], add_special_tokens=False)["input_ids"]
    while tokenizer.decode(alone[0]).strip() == "":
        alone = alone[1:]
    return tokens, alone[0], len(alone) == 1, True


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_agrees_with_the_definition(tokenizers, kind):
    tokenizer = tokenizers[kind]
    found = targets.find(tokenizer, PROMPTS)
    assert [target.prompt_id for target in found] == [row["prompt_id"] for row in PROMPTS]
    for row, target in zip(PROMPTS, found, strict=True):
        expected = brute_force(tokenizer, row)
        assert (list(target.tokens), target.target_id, target.single_token, target.boundary_merge) == expected, row


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bytes only", "metaspace without splits")])
def test_the_target_is_how_the_object_begins(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for row, target in zip(PROMPTS, targets.find(tokenizer, PROMPTS), strict=True):
        said = tokenizer.decode([*target.tokens, target.target_id], skip_special_tokens=True)
        assert said.startswith(row["text"] + " ")
        assert (row["text"] + " " + row["object"]).startswith(said)
        assert not target.boundary_merge


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, BOS", "metaspace always", "llama"])
def test_frequent_objects_are_one_token_and_longer_ones_say_so(tokenizers, kind):
    found = dict(zip((row["object"] for row in PROMPTS), targets.find(tokenizers[kind], PROMPTS), strict=True))
    assert found["Paris"].single_token
    assert found["small"].single_token
    assert not found["Mexico City"].single_token


def test_what_the_tokenizer_appends_is_stripped_and_what_it_prepends_stays(tokenizers):
    plain = targets.find(tokenizers["byte-level"], PROMPTS)
    for kind, prefix in [("byte-level, BOS", 1), ("byte-level, EOS", 0), ("byte-level, BOS and EOS", 1)]:
        tokenizer = tokenizers[kind]
        for ours, theirs in zip(targets.find(tokenizer, PROMPTS), plain, strict=True):
            assert ours.tokens == (tokenizer.bos_token_id,) * prefix + theirs.tokens
            assert (ours.target_id, ours.leaked) == (theirs.target_id, theirs.leaked)
            assert not ours.boundary_merge, "an EOS left in place would look like a merge"


def test_appended_tokens_are_told_by_their_place_not_their_name():
    """What a tokenizer appends need not be its EOS, and an EOS that the text itself ends in stays."""
    appending = byte_level("<s> $A </s>")
    appending.eos_token = "<s>"
    assert targets.find(appending, PROMPTS[:1])[0].tokens == targets.find(byte_level("<s> $A"), PROMPTS[:1])[0].tokens
    tokenizer = byte_level("<s> $A")
    (target,) = targets.find(tokenizer, [prompt("The end</s>", "Paris")])
    assert target.tokens[-1] == tokenizer.eos_token_id


def test_a_merge_across_the_boundary_is_flagged_and_scored_alone():
    """Without splits at blanks, 'is' + ' Paris' become one piece wherever they are frequent."""
    tokenizer = metaspace("always", split=False, corpus=["it is Paris", "so is Paris", "it is", "Paris"] * 50, size=60)
    row = prompt("it is", "Paris")
    whole = tokenizer("it is Paris")["input_ids"]
    assert whole[: len(tokenizer("it is")["input_ids"])] != tokenizer("it is")["input_ids"], "the case must arise"
    (target,) = targets.find(tokenizer, [row])
    assert target.boundary_merge
    assert list(target.tokens) == tokenizer("it is")["input_ids"]
    assert target.target_id == tokenizer(" Paris", add_special_tokens=False)["input_ids"][0]
    assert tokenizer.convert_ids_to_tokens(target.target_id) == "▁Paris"
    assert target.single_token


def merging_llama(object_pieces: bool) -> PreTrainedTokenizerFast:
    """A tokenizer written by hand: 's' merges with the blank after it, and one blank more is put before every text."""
    merges = [("s", "▁")] + ([("▁", "L"), ("▁L", "i")] if object_pieces else [])
    pieces = ["<unk>", *"▁isLa", "m", *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    return wrap(tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(("object_pieces", "expected", "count"), [(True, "▁Li", 3), (False, "L", 4)])
def test_bare_blanks_before_an_object_alone_are_passed_over(object_pieces, expected, count):
    tokenizer = merging_llama(object_pieces)
    assert tokenizer.tokenize(" Lima")[0] == "▁", "the case must arise"
    (target,) = targets.find(tokenizer, [prompt("is", "Lima")])
    assert target.boundary_merge
    assert not target.single_token
    assert tokenizer.convert_ids_to_tokens(target.target_id) == expected
    assert len([t for t in tokenizer.tokenize(" Lima") if t != "▁"]) == count


def test_a_bare_blank_that_really_comes_next_is_the_target_and_is_warned_about(caplog):
    """Where the tokenizer writes blank and digit apart, the blank is what the model must say after the prompt."""
    pieces = ["<unk>", "▁", *"agei47", "▁a"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    with caplog.at_level(logging.WARNING):
        (target,) = targets.find(wrap(tokenizer), [prompt("age", "47")])
    assert (target.target_id, target.single_token, target.boundary_merge) == (1, False, False)
    assert "bare blank in 1 prompts (the first is r/0)" in caplog.text


# Flags ---------------------------------------------------------------------------------------------------------------


def test_leaked_by_token_and_by_word():
    tokenizer = byte_level()
    rows = [
        prompt("The capital of Mexico is", "Mexico City"),
        prompt("Mexico has as its capital", "Mexico City"),  # " Mexico" is another token than "Mexico"
        prompt("The capital of France is", "Paris"),
        prompt("Parisian bread is made in", "Paris"),
        prompt("Outsmall is the opposite of", "small"),
        prompt("paris is", "Paris"),
        prompt("A (small) thing is", "small"),
        prompt("C++ is faster than", "C++ itself"),
    ]
    found = targets.find(tokenizer, rows)
    assert [target.leaked for target in found] == [True, True, False, False, False, False, True, True]
    by_token = [target.target_id in target.tokens for target in found]
    assert by_token[:2] == [True, False], "both ways of leaking must arise"


def test_leaked_by_a_piece_of_other_words():
    """To a tokenizer of bytes every object begins with a blank, which stands in the prompt already."""
    tokenizer = byte_level(size=258)
    (target,) = targets.find(tokenizer, [prompt("one two", "three")])
    assert target.leaked
    assert tokenizer.decode([target.target_id]) == " "


def test_embedded_like_prompts_leak_where_they_should(tokenizers):
    leaked = {t.prompt_id for t in targets.find(tokenizers["byte-level"], PROMPTS) if t.leaked}
    assert leaked == {"capital/0", "superclass/8"}


def test_other_targets_are_those_of_the_same_relation_and_subject():
    tokenizer = byte_level()
    rows = [
        prompt("The opposite of big is", "small", "antonym", "big", 0),
        prompt("The opposite of big is", "little", "antonym", "big", 1),
        prompt("The opposite of big is", "small", "antonym", "big", 2),
        prompt("The opposite of fast is", "slow", "antonym", "fast", 3),
        prompt("big is", "little", "synonym", "big", 0),
        prompt("The capital of Mexico is", "Mexico", "capital", "Mexico", 0),
        prompt("The capital of Mexico is", "Mexico City", "capital", "Mexico", 1),
    ]
    found = targets.find(tokenizer, rows)
    small, little = found[0].target_id, found[1].target_id
    assert targets.other_targets(rows, found) == [
        {little},
        {small},
        {little},
        frozenset(),
        frozenset(),
        frozenset(),
        frozenset(),
    ], "objects that begin with one token are one target"
    for row, own, others in zip(rows, found, targets.other_targets(rows, found), strict=True):
        expected = {
            t.target_id
            for r, t in zip(rows, found, strict=True)
            if (r["relation"], r["subject"]) == (row["relation"], row["subject"])
        }
        assert others == expected - {own.target_id}


def test_another_target_takes_its_own_flags():
    target = Target("r/0", (1, 5, 6), 7, single_token=True, leaked=False, boundary_merge=True)
    assert targets.retarget(target, 7) == target
    assert targets.retarget(target, 5) == Target("r/0", (1, 5, 6), 5, False, True, False)
    assert targets.retarget(target, 9) == Target("r/0", (1, 5, 6), 9, False, False, False)


# What cannot be tokenised --------------------------------------------------------------------------------------------


def error_of(tokenizer, rows) -> str:
    with pytest.raises(TargetError) as caught:
        targets.find(tokenizer, rows)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_object_is_named():
    tokenizer = word_level(["it", "is", "red", "dark"])
    rows = [prompt("it is", "red"), prompt("it is", "blue", row=1), prompt("it is", "green", row=2)]
    message = error_of(tokenizer, rows)
    assert message.startswith("r/1: the object 'blue' begins with what the tokenizer does not know; drop the row")
    assert message.endswith("(1 more rows like it)")
    (known,) = targets.find(tokenizer, [prompt("it is", "dark blue")])
    assert not known.single_token, "a later unknown word does not make the first one unknown"


def test_the_unknown_token_of_the_model_counts_though_the_wrapper_does_not_name_it():
    tokenizer = word_level(["it", "is", "red"])
    tokenizer.unk_token = None
    assert "'blue'" in error_of(tokenizer, [prompt("it is", "blue")])


def test_an_unknown_letter_behind_a_bare_blank_is_unknown():
    assert "'Ω'" in error_of(metaspace("always"), [prompt("The capital of Peru is", "Ω")])


def test_an_object_that_vanishes_is_named():
    """A tokenizer without an unknown token drops what it does not know."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert error_of(wrap(tokenizer), [prompt("ab", "Ω{}")]).startswith(
        "r/0: the tokenizer makes no token of the object 'Ω{}'"
    )
    tokenizer.pre_tokenizer = None
    assert "no token of the object" in error_of(wrap(tokenizer), [prompt("ab", "Ω")])


@pytest.mark.parametrize("template", ["$A", "<s> $A"])
def test_a_prompt_that_vanishes_is_named(template):
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "a": 1, "b": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with_template(tokenizer, template)
    rows = [prompt("Ω", "b"), prompt("a", "b", row=1)]
    assert error_of(wrap(tokenizer), rows).startswith("r/0: the tokenizer makes no token of the prompt")
    (target,) = targets.find(wrap(tokenizer), rows[1:])
    assert target.tokens == ((1,) if template == "$A" else (0, 1))


def test_a_subject_that_the_tokenizer_does_not_know_is_warned_about(caplog):
    tokenizer = word_level(["it", "is", "red"])
    rows = [prompt("it is", "red"), prompt("Ω is", "red", row=1), prompt("Ψ is", "red", row=2)]
    assert [target.target_id for target in targets.find(tokenizer, rows)] == [3, 3, 3]
    assert "unknown token in 2 prompts (the first is r/1)" in caplog.text


def test_no_prompts_have_no_targets():
    assert targets.find(byte_level(), []) == []


def test_the_longest_common_prefix_against_brute_force():
    generator = random.Random(0)
    for _ in range(2000):
        a, b = ([generator.randrange(2) for _ in range(generator.randrange(8))] for _ in range(2))
        common = [n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n]]
        assert targets._shared(a, b) == max(common)
