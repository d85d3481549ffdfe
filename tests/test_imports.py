"""Who may import whom: read from the sources, and proved in fresh interpreters where what is forbidden is blocked."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "dmtd_errors": ROOT / "runtime" / "dmtd_errors",
    "dmtd_export": ROOT / "dmtd_export",
    "dmtd_runtime": ROOT / "runtime" / "dmtd_runtime",
    "dmtd_models": ROOT / "models" / "dmtd_models",
}
ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder.parent) for folder in PACKAGES.values())}
FORBIDDEN = {
    "dmtd_errors": {"dmtd_export", "dmtd_models", "dmtd_runtime"},
    "dmtd_runtime": {"dmtd_export", "dmtd_models", "torch", "transformers", "onnx", "onnx_ir", "onnxscript"},
    "dmtd_models": {"dmtd_export", "dmtd_runtime"},
    "dmtd_export": {"transformers"},
}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# Reading a checkpoint must not need torch: the exporter does it.
TORCH_FREE_MODELS = {"config", "errors", "families", "checkpoint", "gguf"}

# Runs in a fresh interpreter: argv[1] names what to block, argv[2] what to import; prints a JSON list of failures.
IMPORTER = """
import importlib, json, sys, warnings
blocked, wanted = (argument.split(",") for argument in sys.argv[1:3])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} is blocked in this test")
        return None

sys.meta_path.insert(0, Blocker())
failures = []
for name in wanted:
    try:
        importlib.import_module(name)
    except Exception as failure:
        failures.append(f"{name}: {type(failure).__name__}: {failure}")
print(json.dumps({"failures": failures, "loaded": sorted(sys.modules)}))
"""


def import_in_fresh_interpreter(blocked: set[str], wanted: list[str]) -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTER, ",".join(sorted(blocked)), ",".join(wanted)],
        capture_output=True,
        text=True,
        env=ENVIRON,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, list[str]] = json.loads(done.stdout)
    return report


def run_each_in_fresh_interpreter(statements: list[str]) -> list[str]:
    """What of these import statements fails, and how."""
    code = """
import json, sys
failures = []
for line in json.loads(sys.argv[1]):
    try:
        exec(line)
    except Exception as failure:
        failures.append(f"{line}: {type(failure).__name__}: {failure}")
print(json.dumps(failures))
"""
    command = [sys.executable, "-c", code, json.dumps(statements)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRON, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    failures: list[str] = json.loads(done.stdout)
    return failures


def modules_of(package: str) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    folder = PACKAGES[package]
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (package, *path.relative_to(folder).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


ALL_MODULES = [(package, name, path) for package in PACKAGES for name, path in modules_of(package).items()]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported_names(node: ast.AST, package: str = "") -> list[str]:
    """Dotted names that an import statement may load; ``package`` is what a relative one counts from."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = ".".join(part for part in (package if node.level else "", node.module) if part)
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return []


def run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run on import: not the bodies of functions, not what is only for type checkers."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not is_type_checking(node):
            yield from run_at_import(node)


def test_each_package_has_modules() -> None:
    # Guards the tests below against passing over nothing.
    for package in PACKAGES:
        assert package in modules_of(package), f"{package} has no __init__.py"


def test_imports_go_one_way() -> None:
    offenders = []
    for package, name, path in ALL_MODULES:
        tops = {imported.partition(".")[0] for node in ast.walk(parsed(path)) for imported in imported_names(node)}
        offenders += [f"{name} imports {top}" for top in sorted(tops & FORBIDDEN[package])]
        offenders += [f"{name} imports {top}: use safetensors or JSON" for top in sorted(tops & UNSAFE_MODULES)]
    assert not offenders, "\n".join(offenders)


def test_no_unsafe_call_and_no_parent_import() -> None:
    offenders = []
    for _, name, path in ALL_MODULES:
        for node in ast.walk(parsed(path)):
            where = f"{name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and node.level > 1:
                offenders.append(f"{where}: relative import of a parent package")
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                if function in ("eval", "exec", "compile", "__import__", "torch.load"):
                    offenders.append(f"{where}: {function}")
                allowed = {keyword.arg: keyword.value for keyword in node.keywords}.get("allow_pickle")
                if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
                    offenders.append(f"{where}: allow_pickle")
    assert not offenders, "\n".join(offenders)


def test_runtime_imports_without_torch_onnx_and_the_other_packages() -> None:
    wanted = list(modules_of("dmtd_runtime"))
    report = import_in_fresh_interpreter(FORBIDDEN["dmtd_runtime"], wanted)
    assert report["failures"] == []
    assert set(wanted) <= set(report["loaded"])


def test_blocking_blocks() -> None:
    report = import_in_fresh_interpreter({"numpy"}, ["numpy", "colorsys"])
    assert report["failures"] == ["numpy: ImportError: numpy is blocked in this test"]
    assert "colorsys" in report["loaded"]


def test_importing_the_runtime_loads_no_heavy_library() -> None:
    loaded = import_in_fresh_interpreter(set(), ["dmtd_runtime"])["loaded"]
    assert "dmtd_runtime" in loaded
    assert not {"onnxruntime", "tokenizers", "torch", "onnx"} & set(loaded)


def test_the_core_imports_without_the_server_and_its_libraries() -> None:
    of_the_server = ("dmtd_runtime.server", "dmtd_runtime.cli")
    wanted = [name for name in modules_of("dmtd_runtime") if not name.startswith(of_the_server)]
    report = import_in_fresh_interpreter({"fastapi", "starlette", "uvicorn", "pydantic", "yaml", "llguidance"}, wanted)
    assert report["failures"] == []
    assert not [name for name in report["loaded"] if name.startswith("dmtd_runtime.server")]


def test_export_imports_without_torch() -> None:
    """Export needs no torch: a few modules are bridges to it, and nothing imports them before they are called for."""
    bridges = {
        "dmtd_export.verify.reference",
        "dmtd_export.bundle.calibrated",
        "dmtd_export.bundle.compensation",
        "dmtd_export.evaluate.torch_scorer",
        "dmtd_export.evaluate.lm_eval_adapter",  # the harness brings its own libraries
    }
    names = [name for name in modules_of("dmtd_export") if name not in bridges]
    assert len(names) == len(modules_of("dmtd_export")) - len(bridges)
    report = import_in_fresh_interpreter({"torch", "transformers", "lm_eval", "matplotlib"}, names)
    assert report["failures"] == []
    assert not bridges & set(report["loaded"])


def test_the_package_imports_without_onnx() -> None:
    """A machine with the runtime's dependencies alone still gets the command line."""
    wanted = [name for name in ("dmtd_export", "dmtd_export.cli") if name in modules_of("dmtd_export")]
    report = import_in_fresh_interpreter(
        {"torch", "transformers", "onnx", "safetensors", "gguf", "ml_dtypes", "onnxruntime"}, wanted
    )
    assert report["failures"] == []


def torch_free_modules() -> list[str]:
    """dmtd_models's modules that reach torch neither themselves nor through a module of theirs, by their sources."""
    modules = modules_of("dmtd_models")
    needs = {
        name: {
            imported
            for node in run_at_import(parsed(path))
            for imported in imported_names(node, name if path.name == "__init__.py" else name.rpartition(".")[0])
        }
        for name, path in modules.items()
    }
    tainted = {name for name, imports in needs.items() if any(part.partition(".")[0] == "torch" for part in imports)}
    while grown := {name for name, imports in needs.items() if imports & tainted} - tainted:
        tainted |= grown
    return sorted(set(modules) - tainted)


def test_models_torch_free_modules() -> None:
    modules, free = modules_of("dmtd_models"), torch_free_modules()
    must_be = {f"dmtd_models.{name}" for name in TORCH_FREE_MODELS} & set(modules) | {"dmtd_models"}
    assert must_be <= set(free), f"torch reached when importing {sorted(must_be - set(free))}"
    report = import_in_fresh_interpreter({"torch", "transformers", "onnxruntime"}, free)
    assert report["failures"] == []


def public_names(tree: ast.Module) -> set[str]:
    """What a package's __init__ defines or re-exports, for type checkers only as well; libraries are not its names."""
    names: set[str] = set()
    statements = [*tree.body, *(inner for node in tree.body if is_type_checking(node) for inner in node.body)]
    for node in statements:
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("dmtd_")):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def declared_names(tree: ast.Module) -> set[str] | None:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if value is not None and any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return set(ast.literal_eval(value))
    return None


def test_every_public_name_is_in_all() -> None:
    missing, imports = [], []
    for _, name, path in ALL_MODULES:
        if path.name == "__init__.py":
            public, declared = public_names(parsed(path)), declared_names(parsed(path)) or set()
            missing += [f"{name}: {one}" for one in sorted(public - declared)]
            imports.append(f"import {name}")
            # A lazy package defines its names in __getattr__, so __all__ may hold more than is seen: they must resolve.
            imports += [f"from {name} import {one}" for one in sorted(declared)]
            imports += [f"import {name} as it; assert {declared} <= set(dir(it)), dir(it)"] if declared else []
    assert not missing, "\n".join(["not in __all__:", *missing])
    report = run_each_in_fresh_interpreter(imports)
    assert report == []


def test_telemetry_of_onnxruntime_is_off_before_its_import() -> None:
    code = (
        "import os; os.environ.pop('ORT_DISABLE_TELEMETRY', None);"
        "from dmtd_runtime.ort.library import import_onnxruntime; import_onnxruntime();"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
