"""What an import costs and what it may know: torch comes with a model, the Snakefile needs the standard library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moescope import digest
from tests.examples import ROOT

LIBRARY = ROOT / "workflow" / "scripts" / "moescope"
HEAVY = ("torch", "transformers", "polars", "numpy", "matplotlib")
WITH_TORCH = {
    *("attribution", "decomposition", "lpi", "precision", "readout", "scores", "clean"),
    *(
        "interventions",
        "replay",
        "passes",
        "expert_ablation",
        "coupling",
        "experiments",
        "ablation",
        "faithfulness",
        "masking",
    ),
    *("unembedding", "moments", "memory", "timing", "scratch", "local_norm", "norms", "patching", "routing"),
}
MODULES = sorted(path.stem for path in LIBRARY.glob("*.py") if path.stem != "__init__")


def imported(statement: str) -> set[str]:
    """The packages that are in memory after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    environment = {"PYTHONPATH": str(LIBRARY.parent), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return set(result.stdout.split())


def test_the_package_alone_imports_nothing():
    assert not imported("import moescope; moescope.__version__") & {*HEAVY, "yaml", "jsonschema"}


@pytest.mark.parametrize("module", [module for module in MODULES if module not in WITH_TORCH])
def test_no_torch_until_a_model_is_touched(module: str):
    assert not imported(f"import moescope; moescope.{module}") & {"torch", "transformers"}


def test_what_the_snakefile_imports_is_light():
    names = imported("from moescope import digest, plan; from moescope.errors import MoescopeError")
    assert not names & {*HEAVY, "jinja2", "scipy", "psutil"}


def test_names_come_through_the_package():
    assert "torch" in imported("import moescope; moescope.load; moescope.attribute")
    with pytest.raises(subprocess.CalledProcessError):
        imported("import moescope; moescope.no_such_thing")


#: Modules from the ground up; each may import those above it in this list, never one below.
ORDER = """
    errors files pairs tables relations targets statistics digest job provenance resume config facts
    steps layout catalog hub cataloguing manifests audit store fused loading checkpoints
    scratch norms patching decomposition routing precision timing unembedding moments lpi local_norm readout clean
    memory models scores attribution masking pretraining
    neuron_sets selection interventions replay passes ablation faithfulness
    expert_importance expert_sets expert_ablation coupling experiments
    sample overview dynamics prompt_dynamics layer_dynamics robustness sparsity published
    efficiency neuron_types association collaboration causality collaboration_published
    drawing plots dynamics_plots ablation_plots comparison_plots marks collaboration_plots leading_plots coupling_plots
    report dynamics_report collaboration_report plan costs estimate
""".split()  # noqa: SIM905 (one line a layer is easier to read)


def library_imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((LIBRARY / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "moescope":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moescope."):
            found.add(node.module.removeprefix("moescope."))
    return found


ADAPTERS = sorted((ROOT / "workflow" / "scripts").glob("*.py"))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=[path.stem for path in ADAPTERS])
def test_the_environment_of_a_job_holds_what_it_imports(adapter: Path):
    """The one without torch where the code behind an adapter never names it."""
    nodes = [
        node for path in (adapter, *digest.modules(adapter).values()) for node in ast.walk(ast.parse(path.read_text()))
    ]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0].replace("_", "-") for name in names} - {"moescope", "--future--", "markupsafe"}
    foreign = {name for name in packages if name not in sys.stdlib_module_names}
    environment = yaml.safe_load((ROOT / "envs" / ("lm.yaml" if "torch" in foreign else "analysis.yaml")).read_text())
    (pinned,) = (part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert foreign <= {package.split(" ")[0] for package in pinned}


def test_the_order_is_complete():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str):
    assert library_imports(module) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize(
    ("module", "unknown"),
    [
        ("relations", {"checkpoints", "attribution", "decomposition", "lpi", "pretraining"}),
        ("checkpoints", {"attribution", "decomposition", "lpi"}),
        ("pretraining", {"attribution", "decomposition", "lpi", "checkpoints"}),
        ("decomposition", {"lpi", "overview"}),
        ("lpi", {"files", "tables", "checkpoints", "decomposition"}),
        ("attribution", {"overview", "plots", "report", "checkpoints", "files"}),
        ("interventions", {"attribution", "selection", "ablation", "files", "checkpoints"}),
        ("ablation", {"overview", "dynamics", "robustness", "checkpoints", "files", "drawing"}),
        ("dynamics", {"files", "plots", "drawing", "checkpoints"}),
        ("robustness", {"files", "drawing", "checkpoints", "ablation"}),
        ("statistics", {"tables", "files", "relations"}),
        ("plots", {"statistics", "overview"}),
        ("dynamics_plots", {"statistics", "overview", "dynamics", "robustness", "sparsity"}),
    ],
)
def test_what_a_module_must_not_know(module: str, unknown: set[str]):
    assert not library_imports(module) & unknown


def test_no_adapter_hides_a_module_of_python():
    """Adapters lie on the path of every job, before the standard library."""
    assert not {path.stem for path in LIBRARY.parent.glob("*.py")} & set(sys.stdlib_module_names)


def test_adapters_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in LIBRARY.parent.glob("*.py")}
    assert max(lengths.values()) <= 48, lengths


def test_the_snakefile_is_short():
    assert len((ROOT / "Snakefile").read_text().splitlines()) < 40
