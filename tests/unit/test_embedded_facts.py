"""The embedded relation set keeps the promises of its README: counts, true letters, clean templates, no duplicates.

The files are read as plain JSON, so that nothing here depends on the library's own loader.
"""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

RELATIONS = Path(__file__).resolve().parents[2] / "resources" / "relations"

# Number of facts by category and relation, exact, so that every edit of the set is a deliberate one.
FACTS = {
    "factual": {"country_capital_city": 96, "country_language": 72},
    "commonsense": {"fruit_inside_color": 56, "object_superclass": 111, "work_location": 65},
    "linguistic": {"adj_antonym": 137, "word_first_letter": 133, "word_last_letter": 133},
    "bias": {"name_religion": 48, "name_birthplace": 58, "occupation_age": 45, "occupation_gender": 42},
}
NAMES = sorted((category, name) for category, relations in FACTS.items() for name in relations)
TWO_ANTONYMS = {"careful", "dominant", "easy", "fake", "fat", "neat", "noisy", "ugly"}
ANSWERS = {
    "fruit_inside_color": {"white", "orange", "green", "red", "yellow", "purple", "brown"},
    "name_religion": {"Islam", "Judaism", "Christianity", "Hinduism", "Buddhism", "Sikhism"},
    "occupation_age": {"young", "old"},
    "occupation_gender": {"women", "men"},
}


def read(category: str, name: str) -> dict:
    return json.loads((RELATIONS / category / f"{name}.json").read_text(encoding="utf-8"))


def facts(category: str, name: str) -> list[tuple[str, str]]:
    return [(sample["subject"], sample["object"]) for sample in read(category, name)["samples"]]


def templates(relation: dict) -> list[str]:
    return relation["prompt_templates_zs"] + relation["prompt_templates"]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def test_twelve_relations_in_four_categories():
    assert sorted((path.parent.name, path.stem) for path in RELATIONS.glob("*/*.json")) == NAMES
    assert len(NAMES) == 12
    assert len(FACTS) == 4


def test_counts():
    found = {category: {name: len(facts(category, name)) for name in names} for category, names in FACTS.items()}
    assert found == FACTS
    assert sum(sum(names.values()) for names in found.values()) >= 900


def test_readme_states_the_counts():
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \| (\d+) \|", (RELATIONS / "README.md").read_text(), re.MULTILINE)
    stated = {(category, name): (int(count), int(number)) for category, name, count, number in rows}
    assert stated == {key: (FACTS[key[0]][key[1]], len(templates(read(*key)))) for key in NAMES}
    total = sum(sum(names.values()) for names in FACTS.values())
    assert f"| all | 12 relations | {total} |" in (RELATIONS / "README.md").read_text()


@pytest.mark.parametrize(("category", "name"), NAMES)
def test_schema(category, name):
    relation = read(category, name)
    assert set(relation) == {"name", "prompt_templates", "prompt_templates_zs", "properties", "samples"}
    properties = dict(relation["properties"])
    # Only the bias relations say of themselves that they hold associations.
    assert ("not a truth about people" in properties.pop("note", "")) == (category == "bias")
    assert set(properties) == {"relation_type", "domain_name", "range_name", "symmetric"}
    assert properties["relation_type"] == category
    assert properties["symmetric"] is (name == "adj_antonym")
    assert all(set(sample) == {"subject", "object"} for sample in relation["samples"])


@pytest.mark.parametrize(("category", "name"), NAMES)
def test_templates(category, name):
    relation = read(category, name)
    assert relation["prompt_templates"]
    assert relation["prompt_templates_zs"]
    every = templates(relation)
    assert len({template.casefold() for template in every}) == len(every) >= 4
    for template in every:
        assert template.count("{}") == 1, template
        assert template.count("{") == template.count("}") == 1, template
        assert template == template.strip(), template
        assert "  " not in template, template
        # A subject at the very start, or in quotes, would be cut into other tokens than in the other templates.
        assert " {}" in template, template


def test_no_template_serves_two_relations():
    assert max(Counter(t for key in NAMES for t in templates(read(*key))).values()) == 1


@pytest.mark.parametrize(("category", "name"), NAMES)
def test_templates_do_not_give_the_answer_away(category, name):
    answers = {answer for _, answer in facts(category, name)}
    for template in templates(read(category, name)):
        # Case counts: the article "a" is no answer to "which letter", the capital "A" is.
        assert not answers & set(re.findall(r"\w+", template.replace("Q:", "").replace("A:", ""))), template


@pytest.mark.parametrize(("category", "name"), NAMES)
def test_subjects_do_not_contain_the_answer(category, name):
    assert not [fact for fact in facts(category, name) if words(fact[0]) & words(fact[1])]


@pytest.mark.parametrize(("category", "name"), NAMES)
def test_facts_are_clean_and_unique(category, name):
    pairs = facts(category, name)
    for text in (text for pair in pairs for text in pair):
        assert text
        assert text == " ".join(text.split())
        assert "{" not in text
    assert len({(subject.casefold(), answer.casefold()) for subject, answer in pairs}) == len(pairs)


@pytest.mark.parametrize(("category", "name"), NAMES)
def test_one_answer_a_subject_but_for_named_antonyms(category, name):
    answers = Counter(subject for subject, _ in facts(category, name))
    assert {subject for subject, n in answers.items() if n > 1} == (TWO_ANTONYMS if name == "adj_antonym" else set())
    assert max(answers.values()) <= 2


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_closed_answer_sets(name):
    category = next(category for category, names in FACTS.items() if name in names)
    counts = Counter(answer for _, answer in facts(category, name))
    assert set(counts) == ANSWERS[name]
    # No single answer is so common that always giving it would look like knowledge.
    assert max(counts.values()) <= 0.55 * counts.total()


def test_letters_are_right():
    assert all(letter == word[0].upper() for word, letter in facts("linguistic", "word_first_letter"))
    assert all(letter == word[-1].upper() for word, letter in facts("linguistic", "word_last_letter"))


def test_letter_relations_share_their_words_and_cover_the_alphabet():
    first, last = dict(facts("linguistic", "word_first_letter")), dict(facts("linguistic", "word_last_letter"))
    assert list(first) == list(last)
    assert all(re.fullmatch("[a-z]{3,}", word) for word in first)
    assert len(set(first.values())) == 26
    assert len(set(last.values())) >= 20


def test_countries_overlap_and_capitals_are_unique():
    capital, language = dict(facts("factual", "country_capital_city")), dict(facts("factual", "country_language"))
    assert set(language) - set(capital) == {"Israel"}
    assert len(set(capital.values())) == len(capital)


def test_capitals_and_languages_by_hand():
    """A few entries checked against an atlas, so that a shifted column of objects cannot pass."""
    capital, language = dict(facts("factual", "country_capital_city")), dict(facts("factual", "country_language"))
    atlas = {"France": "Paris", "Latvia": "Riga", "Nepal": "Kathmandu", "Uruguay": "Montevideo", "Samoa": "Apia"}
    assert {country: capital[country] for country in atlas} == atlas
    spoken = {"Brazil": "Portuguese", "Iran": "Persian", "Cambodia": "Khmer", "Cuba": "Spanish", "Austria": "German"}
    assert {country: language[country] for country in spoken} == spoken


def test_antonym_pairs_are_listed_in_one_direction():
    pairs = set(facts("linguistic", "adj_antonym"))
    assert not {(subject, answer) for subject, answer in pairs if (answer, subject) in pairs}


def test_subjects_shared_between_relations_are_the_intended_ones():
    owners = defaultdict(set)
    for category, name in NAMES:
        for subject, _ in facts(category, name):
            owners[subject].add(name)
    shared = Counter(frozenset(names) for names in owners.values() if len(names) > 1)
    assert shared == {
        frozenset({"word_first_letter", "word_last_letter"}): 133,
        frozenset({"country_capital_city", "country_language"}): 71,
        frozenset({"occupation_age", "occupation_gender"}): 1,
    }
