"""Who may import whom, who owns which heavy package, and what `import jaxgen` costs."""

import ast
import resource
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import jaxgen

PACKAGE = Path(jaxgen.__file__).parent
# Part of the package -> the parts that it may import besides itself. `config` reads the configs of
# `train`; `train` names `config` for the type checker only, which this test does not count.
BASE = {"errors", "ranges", "sharding"}
ALLOWED = {
    "errors": set(),
    "fields": {"errors"},
    "ranges": {"errors"},
    "sharding": {"errors"},
    "fit": BASE,
    "tables": set(),
    "collectives": BASE | {"tables"},
    "compiler": BASE,
    "distributed": BASE,
    "metrics": BASE | {"distributed", "metric_files", "peaks"},
    "metric_files": {"errors"},
    "peaks": set(),
    "picture": BASE,
    "progress": set(),
    "nn": BASE,
    "models": BASE | {"nn"},
    "data": BASE | {"distributed", "metrics", "progress"},
    "checkpoint": BASE | {"distributed", "metrics"},
    "formats": BASE | {"metrics", "progress", "nn", "models", "data", "checkpoint"},
    "config": BASE | {"fields", "metrics", "models", "data", "checkpoint", "train", "nn"},
    # A trained model, wherever it is from.
    "pretrained": BASE
    | {"config", "models", "nn", "data", "checkpoint", "formats", "tuned"}
    | {"published"},
    "tuned": BASE | {"models", "nn", "checkpoint", "formats", "pretrained", "published"},
    "published": BASE | {"models", "data", "formats", "pretrained"},
    "train": BASE
    | {"compiler", "distributed", "metrics", "nn", "models", "data", "checkpoint", "config"}
    | {"fields", "fit", "pretrained"},
    "plan": BASE | {"compiler", "config", "fields", "nn", "models", "train"},
    "serve": BASE
    | {"fields", "peaks", "progress", "tables", "nn", "models", "data", "config"}
    | {"checkpoint", "pretrained"},
    "eval": BASE
    | {"compiler", "fields", "fit", "progress", "tables", "nn", "models", "data", "config"}
    | {"pretrained", "serve"},
}
ALLOWED["references"] = {"nn"}
ALLOWED["verdict"] = {"errors"}
# All but the command line.
ALLOWED["parity"] = set(ALLOWED)
ALLOWED["doctor"] = ALLOWED["doctor_attention"] = {*ALLOWED, "doctor_attention"}
EVERYTHING = {"cli", "command", "commands", "bench_commands", "options", "__init__", "__main__"}
# What every layer is written in, or so light that owning it means nothing.
SHARED = {"jax", "flax", "numpy", "jaxtyping", "etils", "fsspec", "jaxgen"} | set(
    sys.stdlib_module_names
)


def imports(path):
    """The full dotted names that a module imports when it runs."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name of the module"
            submodules = node.module == "jaxgen"
            yield from (
                f"jaxgen.{alias.name}" if submodules else node.module for alias in node.names
            )


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), set(imports(path))


@pytest.mark.smoke
def test_each_part_imports_only_what_it_may():
    wrong = []
    for module, names in modules():
        part = module.split(".")[0]
        assert part in ALLOWED or part in EVERYTHING, f"give {part} its line in ALLOWED"
        used = {name.split(".")[1] for name in names if name.startswith("jaxgen.")}
        extra = used - ALLOWED.get(part, used) - {part, "__version__"}
        wrong += [f"{module} imports jaxgen.{name}" for name in sorted(extra)]
    assert not wrong


@pytest.mark.smoke
def test_a_heavy_package_has_one_owner():
    owners = defaultdict(set)
    for module, names in modules():
        for name in names:
            owners[name.split(".")[0]].add(module)
    shared = {name: who for name, who in owners.items() if len(who) > 1 and name not in SHARED}
    assert not shared


@pytest.mark.smoke
def test_data_uses_jax_only_in_the_loader():
    using = {module for module, names in modules() if any(n.split(".")[0] == "jax" for n in names)}
    assert {module for module in using if module.startswith("data.")} <= {"data.loader"}


@pytest.mark.smoke
def test_serving_decides_without_jax():
    host = {"serve.request", "serve.blocks", "serve.plan", "serve.scheduler"}
    needed = {name for module, names in modules() if module in host for name in names}
    mine = {"numpy", "jaxgen.errors"} | {f"jaxgen.{module}" for module in host}
    assert {name for name in needed if name.split(".")[0] not in sys.stdlib_module_names} <= mine


@pytest.mark.smoke
def test_import_starts_nothing():
    code = (
        "import time; start = time.perf_counter(); import jaxgen;"
        "print(time.perf_counter() - start); import sys;"
        "heavy = {'jax', 'flax', 'numpy', 'optax', 'orbax', 'grain', 'rich'} & set(sys.modules);"
        "print(sorted(heavy))"
    )
    best = 1e9
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds, heavy = done.stdout.splitlines()
        assert heavy == "[]"
        best = min(best, float(seconds))
    assert best < 0.3


@pytest.mark.smoke
def test_the_command_answers_at_once():
    def spent():
        # Of a core: what else runs beside the tests does not count.
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start = spent()
    done = subprocess.run(
        [sys.executable, "-m", "jaxgen", "--help"], capture_output=True, text=True
    )
    assert spent() - start < 1
    assert "jaxgen train CONFIG" in done.stdout


@pytest.mark.smoke
def test_every_public_name_is_there():
    for name in jaxgen.__all__:
        assert getattr(jaxgen, name).__module__.startswith("jaxgen."), name
