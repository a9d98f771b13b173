"""Pre-training a small model of any transformers architecture on facts, and the series of checkpoints it leaves.

The corpus is every fact in every template of its relation, exposed by a Zipf law; for a part of the facts the scored
template is held out, so that knowing a fact can be told from having memorised its string. Only the standard library is
imported at import: the Snakefile asks this module which steps are saved and which files a checkpoint has.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import logging
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from moescope.errors import MoescopeError
from moescope.relations import Relation, fill

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import torch
    from tqdm import tqdm
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

#: The files of a saved checkpoint, exactly.
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
#: Special tokens, with the ids 0 and 1: the end of a document, and what fills a window behind its last document.
EOS, PAD = "<|endoftext|>", "<|padding|>"
_EOS_ID, _PAD_ID = 0, 1
_SMALLEST_VOCABULARY = 256 + 2
#: AdamW and its schedule: linear warm-up over this share of the steps, then a cosine down to this share of the peak.
WARM_UP, FINAL_RATE = 0.05, 0.1
#: A slow second moment: with the usual 0.95 the tokens of rare facts are hardly moved.
BETAS, WEIGHT_DECAY, LARGEST_GRADIENT = (0.9, 0.99), 0.01, 1.0
_IGNORED = -100
#: What a shape cannot set, and what sets it.
_NOT_SHAPE = {
    "vocab_size": "training.vocabulary sets it",
    "dtype": "training is in float32",
    "bos_token_id": "the tokenizer has none",
    "eos_token_id": "the tokenizer sets it",
    "pad_token_id": "the tokenizer sets it",
    "output_router_logits": "experts are always balanced in training",
}


class PretrainingError(MoescopeError):
    """What is to be trained cannot be, or the training went wrong."""


# What is trained: plain facts, known when the Snakefile is parsed -----------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How a series is trained; raises PretrainingError, naming the key, on values that cannot be.

    seed: of initial weights, held-out facts, ranks of exposure and order of documents. steps: updates. save_at: steps
    whose weights are saved (None: 12 log-spaced ones), step s being the model after s updates. batch: windows an
    update. length: tokens a window. learning_rate: peak of the schedule. vocabulary: tokens of the tokenizer, at most.
    zipf: exponent of the exposure law. held_out: share of the subjects of a relation, 0 to 1, whose facts are never
    seen in the scored template.
    """

    seed: int = 0
    steps: int = 800
    save_at: tuple[int, ...] | None = None
    batch: int = 8
    length: int = 64
    learning_rate: float = 0.004
    vocabulary: int = 2048
    zipf: float = 0.8
    held_out: float = 0.2

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"steps is {self.steps}; train for at least 1")
        saved = log_spaced(self.steps) if self.save_at is None else sorted(set(self.save_at))
        object.__setattr__(self, "save_at", tuple(saved))
        _require(bool(saved), "save_at is empty; name at least one step")
        outside = [step for step in saved if not 0 <= step <= self.steps]
        cure = "remove it or raise training.steps"
        _require(not outside, f"save_at: step {outside and outside[0]} is not within 0..{self.steps}; {cure}")
        _require(self.batch >= 1, f"batch is {self.batch}; a batch holds at least 1 window")
        _require(self.length >= 2, f"length is {self.length}; a window holds at least 2 tokens")
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be above 0")
        smallest = _SMALLEST_VOCABULARY
        too_small = f"vocabulary is {self.vocabulary}; 256 bytes and 2 special tokens need at least {smallest}"
        _require(self.vocabulary >= smallest, too_small)
        _require(self.zipf >= 0, f"zipf is {self.zipf}; it must be 0 (all facts alike) or above")
        _require(0 <= self.held_out < 1, f"held_out is {self.held_out}; it must be at least 0 and below 1")

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> Training:
        """The training of a series' configuration; what it does not set has the defaults. Unknown keys are refused."""
        config = dict(config or {})
        known = [field.name for field in fields(cls)]
        for key in config:
            _require(key in known, f"{key}: unknown{_near(key, known)}; known are {', '.join(known)}")
        return cls(**config)


def log_spaced(steps: int, count: int = 12) -> list[int]:
    """Step 0 and about ``count - 1`` log-spaced steps from a hundredth of the run to its end."""
    first = max(1, steps // 100)
    ratio = steps / first
    return sorted({0, *(round(first * ratio ** (i / (count - 2))) for i in range(count - 1))})


def learning_rate(training: Training, step: int) -> float:
    """Rate of update ``step`` (1 to training.steps): linear warm-up, then a cosine down to a tenth of the peak."""
    warm = max(1, round(WARM_UP * training.steps))
    if step <= warm:
        return training.learning_rate * step / warm
    done = (step - warm) / max(1, training.steps - warm)
    return training.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PretrainingError(f"training.{message}")


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f", did you mean {' or '.join(near)}?" if near else ""


# What it is trained on ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exposed:
    """A fact of the corpus: the documents that may show it, and the share of all documents that do."""

    prompt_id: str
    held_out: bool
    documents: tuple[str, ...]
    share: float


def corpus(relations: Sequence[Relation], training: Training) -> list[Exposed]:
    """Every fact with its documents (template filled, object, full stop) and its share of the exposure.

    The share of the fact of rank r is proportional to r ** -zipf; ranks are a seeded order over the facts of all
    relations. The scored template comes first; a held-out fact has no document in it. Raises PretrainingError if there
    are no facts.
    """
    held: list[tuple[str, bool, tuple[str, ...]]] = []
    for relation in relations:
        subjects = _held_out_subjects(relation, training)
        for row, fact in enumerate(relation.facts):
            out = fact.subject in subjects
            scored = relation.template_of(fact)
            others = _paraphrases(relation, fact.subject) if out else relation.all_templates
            templates = others if out else (scored, *(t for t in others if t != scored))
            documents = tuple(f"{fill(template, fact.subject)} {fact.object}." for template in templates)
            held.append((f"{relation.name}/{row}", out, documents))
    if not held:
        raise PretrainingError("relations: no facts to train on; name at least one relation that has facts")
    order = sorted(range(len(held)), key=lambda i: _hash(training.seed, "rank", held[i][0]))
    weights = {fact: (rank + 1) ** -training.zipf for rank, fact in enumerate(order)}
    total = math.fsum(weights.values())
    return [Exposed(*fact, share=weights[i] / total) for i, fact in enumerate(held)]


def _held_out_subjects(relation: Relation, training: Training) -> set[str]:
    """The subjects whose facts never stand in the scored template: whole subjects, as their other objects would tell.

    Drawn within each relation, so that every relation has both parts, by a seeded hash of the subject.
    """
    subjects = list(dict.fromkeys(fact.subject for fact in relation.facts))
    possible = [subject for subject in subjects if _paraphrases(relation, subject)]
    wanted = round(training.held_out * len(subjects))
    if wanted > len(possible):
        few = f"{relation.name}: {len(possible)} of its {len(subjects)} subjects have a template besides the scored one"
        logger.warning("%s: so many can be held out, not %d; add templates", few, wanted)
    return set(sorted(possible, key=lambda s: _hash(training.seed, "held out", relation.name, s))[:wanted])


def _paraphrases(relation: Relation, subject: str) -> tuple[str, ...]:
    """The templates that ask for the object in other words than the scored ones of the subject's facts.

    A template that ends like a scored one, but for case and blanks, would show the scored prompt before the object.
    """
    scored = [_plain(fact.template or relation.template) for fact in relation.facts if fact.subject == subject]
    return tuple(t for t in relation.all_templates if not any(_plain(t).endswith(template) for template in scored))


def _plain(template: str) -> str:
    return " ".join(template.split()).casefold()


def _hash(*parts: object) -> str:
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the documents: at most ``vocabulary`` tokens, the special ones first.

    A blank is put before the text, so that a word is the same tokens at its beginning as within it, and a blank is
    joined to the character behind it before all else, so that no word begins with a token that is a mere blank. No
    special token is added to a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = list(documents)
    tokenizer.train_from_iterator([*documents, *_openings(documents)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        add_prefix_space=True,  # so that what is saved beside the tokenizer says what it does
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _openings(documents: Sequence[str]) -> list[str]:
    """Texts in which a blank with any character that opens a word is more frequent than any pair in the documents."""
    pairs = Counter(pair for document in documents for pair in itertools.pairwise(document))
    often = 1 + max(pairs.values(), default=0)
    characters = sorted({word[0] for document in documents for word in document.split()})
    return [f" {character}" * often for character in characters]


@dataclass(frozen=True)
class Batch:
    """Windows of whole documents, each closed by an end token: ids [batch, length], padded, and the facts shown."""

    ids: np.ndarray
    facts: list[int]


def batches(facts: Sequence[Exposed], tokenizer: PreTrainedTokenizerFast, training: Training) -> Iterator[Batch]:
    """Endless batches of packed windows: facts drawn by their share, the documents of a fact in turn.

    A document goes into the first window with room for it; a batch is full at the first document that finds none,
    which opens the next. So every window begins with a document, as a prompt does, and none is cut. Raises
    PretrainingError if a document does not fit a window.
    """
    import numpy as np

    tokens = _tokenised(facts, tokenizer, training)
    rng = np.random.default_rng(training.seed)
    drawn = _draws(facts, rng)
    fact, document = next(drawn)
    while True:
        ids = np.full((training.batch, training.length), _PAD_ID, dtype=np.int64)
        room, shown = [training.length] * training.batch, []
        while True:
            piece = tokens[fact][document]
            window = next((w for w, free in enumerate(room) if free >= len(piece)), None)
            if window is None:
                break
            start = training.length - room[window]
            ids[window, start : start + len(piece)] = piece
            room[window] -= len(piece)
            shown.append(fact)
            fact, document = next(drawn)
        yield Batch(ids, shown)


def _draws(facts: Sequence[Exposed], rng: np.random.Generator, block: int = 4096) -> Iterator[tuple[int, int]]:
    """Endless (fact, document) indices: a fact's documents in turn, so that a fact which is not held out stands in its
    scored template the first time it is shown."""
    import numpy as np

    shares, shown = np.array([f.share for f in facts]), [0] * len(facts)
    while True:
        for fact in rng.choice(len(facts), size=block, p=shares).tolist():
            yield fact, shown[fact] % len(facts[fact].documents)
            shown[fact] += 1


def _tokenised(
    facts: Sequence[Exposed], tokenizer: PreTrainedTokenizerFast, training: Training
) -> list[list[list[int]]]:
    """The documents of every fact as tokens, each with its end token."""
    flat = iter(tokenizer([d for fact in facts for d in fact.documents], return_attention_mask=False)["input_ids"])
    tokens = [[[*next(flat), _EOS_ID] for _ in fact.documents] for fact in facts]
    for fact, documents in zip(facts, tokens, strict=True):
        if (longest := max(map(len, documents))) > training.length:
            cure = f"set training.length to {longest} or more, or shorten the template"
            raise PretrainingError(f"{fact.prompt_id}: a document of {longest} tokens is longer than a window; {cure}")
    return tokens


# The model ------------------------------------------------------------------------------------------------------------


def model_config(architecture: str, shape: Mapping[str, Any], vocabulary: int) -> PreTrainedConfig:
    """The transformers configuration of a causal LM of this architecture, shape and number of tokens.

    Raises PretrainingError on an architecture that transformers does not have as a causal LM, on a key its class does
    not know (transformers itself would swallow it), and on sizes that do not fit each other.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if architecture not in CAUSAL:
        near = _near(architecture, CAUSAL) or "; name a model type of transformers, such as olmoe or llama"
        raise PretrainingError(f"architecture {architecture}: not a causal language model of transformers{near}")
    known = _shape_keys(CONFIG_MAPPING[architecture])
    for key in shape:
        if key in _NOT_SHAPE:
            raise PretrainingError(f"shape.{key}: cannot be set here ({_NOT_SHAPE[key]}); remove it")
        if key not in known:
            raise PretrainingError(
                f"shape.{key}: {architecture} has no such key{_near(key, known)}; see the arguments of its "
                f"configuration class {CONFIG_MAPPING[architecture].__name__}"
            )
    special = {"bos_token_id": None, "eos_token_id": _EOS_ID, "pad_token_id": _PAD_ID}
    try:
        config = CONFIG_MAPPING[architecture](**shape, vocab_size=vocabulary, **special)
    except Exception as error:  # whatever a class of transformers raises on values it does not like
        raise PretrainingError(f"shape: {architecture} refuses it ({_line(error)}); correct the value") from None
    _check_sizes(config)
    return config


def _shape_keys(config_class: type[PreTrainedConfig]) -> set[str]:
    """What the class itself, and its bases, have defaults for; and the other names it has for some of them."""
    return set(config_class().to_dict()) | set(config_class.attribute_map)


def _check_sizes(config: PreTrainedConfig) -> None:
    """Raises PretrainingError on sizes that do not divide, which some classes would round down without a word."""
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if hidden and heads and getattr(config, "head_dim", None) is None and hidden % heads:
        cure = "make hidden_size a multiple of the heads"
        raise PretrainingError(f"shape: hidden_size {hidden} cannot be split into {heads} num_attention_heads; {cure}")
    sources = getattr(config, "num_key_value_heads", None) or heads
    if heads and heads % sources:
        cure = "make num_key_value_heads a divisor of num_attention_heads"
        raise PretrainingError(f"shape: {heads} num_attention_heads cannot share {sources} keys and values; {cure}")
    routed, experts = getattr(config, "num_experts_per_tok", None), getattr(config, "num_local_experts", None)
    experts = experts or getattr(config, "num_experts", None) or getattr(config, "n_routed_experts", None)
    if routed and experts and routed > experts:
        raise PretrainingError(f"shape: num_experts_per_tok {routed} is more than the {experts} experts; lower it")


def _line(error: Exception) -> str:
    """Another library's error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def new_model(config: PreTrainedConfig, length: int, architecture: str) -> PreTrainedModel:
    """A freshly initialised float32 model, in evaluation mode.

    Raises PretrainingError if it has no room for ``length`` tokens, does not run, or looks ahead (an encoder).
    """
    import torch
    from transformers import AutoModelForCausalLM

    limit = getattr(config, "max_position_embeddings", None)
    if limit and limit < length:
        cure = "lower training.length or raise it"
        raise PretrainingError(f"shape.max_position_embeddings: {limit} positions hold no window of {length}; {cure}")
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([[0, 0], [0, 1]]), use_cache=False).logits
    except Exception as error:  # a shape that a class accepts and cannot run
        raise PretrainingError(f"shape: {architecture} does not run with it ({_line(error)}); change it") from None
    if not torch.allclose(logits[0, 0], logits[1, 0], atol=1e-5):
        cure = "choose a decoder, such as olmoe or llama"
        raise PretrainingError(f"architecture {architecture}: its predictions depend on later tokens; {cure}")
    return model


# The training ---------------------------------------------------------------------------------------------------------


def pretrain(
    architecture: str,
    shape: Mapping[str, Any],
    training: Training,
    relations: Sequence[Relation],
    folder: str | os.PathLike,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Train a model, save ``folder/<step>/`` for every step of ``training.save_at``, return (training, exposure).

    Next-token cross-entropy over all tokens of the packed windows, plus the load-balancing loss where the architecture
    has one, times its own coefficient. Deterministic for a seed and a number of threads; the global random state is
    neither used nor changed. The table ``training`` describes the model after ``step`` updates: tokens trained on,
    loss (cross-entropy in nats a token, on the batch that comes next, so never seen before) and lr of its last update.
    ``exposure`` counts the documents of each fact that were trained on. Raises PretrainingError before training on
    what cannot be trained, and when the loss is not finite.
    """
    import polars as pl
    import torch

    from moescope import precision, tables

    facts = corpus(relations, training)
    tokenizer = train_tokenizer((d for fact in facts for d in fact.documents), training.vocabulary)
    config = model_config(architecture, shape, len(tokenizer))
    stream = batches(facts, tokenizer, training)
    where = torch.device(device)
    rows, exposures, tokens = [], [0] * len(facts), 0
    with _own_randomness(training.seed, where), precision.exact_products():
        model = new_model(config, training.length, architecture).to(where).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        _tell(architecture, facts, tokenizer, model)
        with _bar(architecture, training.steps, progress) as bar:
            for step in range(training.steps + 1):
                batch = next(stream)
                loss, objective = _losses(model, torch.from_numpy(batch.ids).to(where))
                _check_loss(loss, architecture, step, training)
                rows.append({"step": step, "tokens": tokens, "loss": loss, "lr": optimizer.param_groups[0]["lr"]})
                if step in training.save_at:
                    save_checkpoint(model, tokenizer, Path(folder) / str(step))
                if step < training.steps:
                    _update(model, optimizer, objective, learning_rate(training, step + 1))
                    tokens += int((batch.ids != _PAD_ID).sum())
                    for fact in batch.facts:
                        exposures[fact] += 1
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update()
    shown = [
        {"prompt_id": fact.prompt_id, "exposures": count, "held_out": fact.held_out}
        for fact, count in zip(facts, exposures, strict=True)
    ]
    return tables.check(pl.DataFrame(rows), "training"), tables.check(pl.DataFrame(shown), "exposure")


def _losses(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Cross-entropy in nats a token, and what is minimised: with the load-balancing loss where there are experts."""
    import torch.nn.functional as F

    routed = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    output = model(input_ids=ids, position_ids=_positions(ids), use_cache=False, **routed)
    labels = F.pad(ids[:, 1:], (0, 1), value=_PAD_ID)
    labels = labels.masked_fill((labels == _PAD_ID) | (ids == _EOS_ID), _IGNORED)
    loss = F.cross_entropy(output.logits.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)
    balance = getattr(output, "aux_loss", None)
    objective = loss if balance is None else loss + model.config.router_aux_loss_coef * balance
    return loss.item(), objective


def _positions(ids: torch.Tensor) -> torch.Tensor:
    """Position of every token in its own document, [batch, length].

    Positions that start again tell transformers where documents begin (where it keeps no cache), and attention does not
    look across: a document is read as a prompt is, from its own first token. Padding counts as one more document.
    """
    import torch
    import torch.nn.functional as F

    places = torch.arange(ids.shape[1], device=ids.device)
    starts = F.pad(ids[:, :-1] == _EOS_ID, (1, 0)) * places
    return places - starts.cummax(dim=1).values


def _update(model: PreTrainedModel, optimizer: torch.optim.Optimizer, objective: torch.Tensor, rate: float) -> None:
    import torch

    objective.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _check_loss(loss: float, architecture: str, step: int, training: Training) -> None:
    if not math.isfinite(loss):
        cure = f"lower training.learning_rate (it is {training.learning_rate:g})"
        raise PretrainingError(f"pre-training of {architecture}: the loss is {loss} after step {step}; {cure}")


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint (CHECKPOINT_FILES) in Hugging Face format, whole; what stood in its place is removed."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with _quiet_transformers():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    if other := set(CHECKPOINT_FILES) ^ {path.name for path in temporary.iterdir()}:
        raise RuntimeError(f"{folder}: transformers wrote more or fewer files than a checkpoint has: {sorted(other)}")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the bars that transformers draws while it writes: they would break up the one of the training."""
    from transformers.utils import logging as messages

    shown = messages.is_progress_bar_enabled()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            messages.enable_progress_bar()


@contextlib.contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seeded initial weights and dropout, deterministic kernels; all settings and states are restored after it.

    With several threads, sums by index (the backward pass of the experts) would else be in any order.
    """
    import torch

    gpus = [device] if device.type == "cuda" else []
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with torch.random.fork_rng(devices=gpus):
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warns)
            torch.utils.deterministic.fill_uninitialized_memory = fills


def _tell(
    architecture: str, facts: Sequence[Exposed], tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    held_out = sum(fact.held_out for fact in facts)
    logger.info("%s: %s parameters, %d tokens", architecture, f"{model.num_parameters():,}", len(tokenizer))
    logger.info("corpus: %d facts, %d of them with the scored template held out", len(facts), held_out)


class _Lines:
    """A stream for a progress bar that is no terminal: a line an update, where a bar would rewrite its line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.write(text.replace("\r", "\n"))

    def flush(self) -> None:
        self._stream.flush()


def _bar(architecture: str, steps: int, shown: bool) -> tqdm:
    """A progress bar on stderr: steps, rate, time left and loss; in a log a line every ten seconds."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=steps,
        desc=f"pre-training {architecture}",
        unit="step",
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.5 if terminal else 10.0,
        disable=not shown,
    )
