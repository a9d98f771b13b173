"""Where the repository is, and small facts that several tests use."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: Facts of three relations in two categories: templates of their own, and subjects that occur more than once.
FACTS = [
    ("capital", "France", "Paris", "The capital of {} is", "places"),
    ("capital", "Spain", "Madrid", "The capital of {} is", "places"),
    ("capital", "Italy", "Rome", "{}, whose capital is", "places"),
    ("capital", "Japan", "Tokyo", "The capital of {} is", "places"),
    ("language", "France", "French", "People in {} speak", "places"),
    ("language", "Spain", "Spanish", "People in {} speak", "places"),
    ("language", "Italy", "Italian", "In {} the language is", "places"),
    ("colour", "lemon", "yellow", "The colour of a {} is", "things"),
    ("colour", "cherry", "red", "The colour of a {} is", "things"),
    ("colour", "lime", "green", "A {} is", "things"),
]


def write_facts(path: str | os.PathLike, facts: Iterable[tuple[str, ...]] = FACTS) -> Path:
    """A CSV file of facts, as ``relations.source`` takes it."""
    path = Path(path)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("relation", "subject", "object", "template", "category"))
        writer.writerows(facts)
    return path
