"""No call that can run what a file says, outside a list of places with reasons."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ALLOWED = {  # file, call: why
    ("verl/user_files.py", "exec"): "runs the file that the user names as a plugin",
    ("verl/plugin_outline.py", "exec"): "runs a class of a file of verl's own, as an import would",
    ("verl/sandbox/program.py", "exec"): "runs a model's code, in a process that the kernel holds",
    ("verl/sandbox/program.py", "eval"): "the last line of that code",
    ("verl/workers/serve.py", "pickle.loads"): "arguments and settings from the trainer, the parent process",
    ("verl/workers/pool.py", "pickle.dumps"): "to the worker",
    ("verl/workers/host.py", "pickle.loads"): "a call from the trainer, the parent process",
    ("verl/workers/hosts.py", "pickle.dumps"): "to the process of an episode",
    ("verl/workers/agents.py", "pickle.dumps"): "to the process of an agent's run",
    ("verl/workers/nursery.py", "pickle.loads"): "a row from the trainer, the parent process",
    ("verl/exchange.py", "pickle.loads"): "values from a rank of this run",
    ("verl/exchange.py", "pickle.dumps"): "to the other ranks",
    ("verl/prove/ranks.py", "pickle.loads"): "the result of a rank, which it wrote into the command's own temporary folder",
    ("verl/prove/ranks.py", "pickle.dumps"): "into that folder",
}
UNSAFE = {
    "eval",
    "exec",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.load",
    "shutil.unpack_archive",
}
MODULES = ("pickle.", "cPickle.", "dill.", "cloudpickle.", "joblib.", "marshal.", "shelve.")


def _calls(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if isinstance(shell := options.get("shell"), ast.Constant) and shell.value:
            yield node.lineno, "shell=True"
        if name in UNSAFE or name.startswith(MODULES) or name.endswith((".extractall", ".read_pickle")):
            yield node.lineno, name
        for option in ("trust_remote_code", "allow_pickle"):
            if isinstance(given := options.get(option), ast.Constant) and given.value:
                yield node.lineno, f"{option}=True"


def test_unsafe_calls_are_those_of_the_list() -> None:
    found = {(str(file.relative_to(ROOT)), name): line for file in (ROOT / "verl").rglob("*.py") for line, name in _calls(file)}
    assert {f"{file}:{line} {name}" for (file, name), line in found.items() if (file, name) not in ALLOWED} == set()
    assert set(ALLOWED) - set(found) == set(), "these are not needed any more"


def test_an_unsafe_call_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import pickle, torch, subprocess\npickle.load(f)\ntorch.load(f)\nsubprocess.run(x, shell=True)\neval(y)\n"
    )
    assert [name for _, name in sorted(_calls(tmp_path / "a.py"))] == ["pickle.load", "torch.load", "shell=True", "eval"]


def test_the_loaders_of_yaml_are_safe() -> None:
    import yaml

    from verl.config import yaml_text

    assert issubclass(yaml_text.Loader, yaml.SafeLoader) and issubclass(yaml_text.TextLoader, yaml.SafeLoader)


def test_versions_with_known_holes_are_not_accepted() -> None:
    """torch before 2.10: CVE-2025-32434, CVE-2026-24747; transformers before 5.3: CVE-2026-4372, CVE-2026-5241, CVE-2026-1839."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    accepted = {
        one.name: one.specifier for one in map(Requirement, re.findall(r'^    "((?:torch|transformers)[<>=].*)",$', text, re.MULTILINE))
    }
    assert not any(accepted["torch"].contains(version) for version in ("2.5.1", "2.9.1"))
    assert not any(accepted["transformers"].contains(version) for version in ("4.57.0", "5.2.0"))
