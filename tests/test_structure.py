"""The project's structure: which file may import which, names, and how long files, functions and signatures may be."""

import ast
import builtins
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from code_lines import LIMITS, ROOT, code_lines, counts, project_files, rings

LONGEST_FUNCTION, MOST_PARAMETERS = 40, 7
# A formula has as many inputs as it has.
MATHEMATICS = {"grpo/loss.py policy_loss"}
PRESCRIBED = {"grpo/attention.py batched_vision_attention"}  # transformers calls it so
BASE = {"grpo/config.py", "grpo/errors.py"}  # the part of ring 3 that all may import
BELOW_BASE = {"grpo/errors.py", "grpo/families/__init__.py"}  # the second has the families' names, choices of a flag
ENGINE_OF_THE_ALGORITHM = {"grpo/engine/model.py", "grpo/engine/distributed.py", "grpo/engine/cuda_graph.py"}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
FILES = project_files()
TREES = {file: ast.parse((ROOT / file).read_text()) for file in FILES}


def imported_names(file):
    """The dotted names that a file imports, at its top or inside a function, `from a import b` being a.b."""
    names = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def file_of(name):
    """The file of the project that a dotted name is of: grpo.loss and grpo.loss.kl_k3 are of grpo/loss.py; None of
    others'."""
    path = name.replace(".", "/")
    while path:
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if file in TREES:
                return file
        path = path.rpartition("/")[0]
    return None


def imports(file):
    """The project's files that a file imports."""
    return {other for name in imported_names(file) if (other := file_of(name))}


def inside(*folders):
    return [file for file in FILES if file.startswith(folders)]


def functions():
    """Yields ("FILE NAME", its file, its tree) of all functions and methods."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                yield f"{file} {node.name}", file, node


def test_names_are_resolved_to_files():
    """What the tests below rely on."""
    assert file_of("grpo.loss.kl_k3") == file_of("grpo.loss") == "grpo/loss.py"
    assert file_of("grpo.engine") == "grpo/engine/__init__.py" and file_of("train") == "train.py"
    assert file_of("torch.distributed") is None
    assert imports("grpo/policy.py") >= {"grpo/attention.py", "grpo/batch.py", "grpo/engine/model.py"}


def test_every_file_of_grpo_is_of_one_ring():
    ringed = [file for files in rings().values() for file in files]
    assert sorted(ringed) == sorted({*inside("grpo/"), "train.py"} - {"grpo/__init__.py"})


def test_imports_have_no_cycle():
    list(TopologicalSorter({file: imports(file) for file in FILES}).static_order())  # CycleError names the files


def test_inner_rings_do_not_import_outer_ones():
    one, two, three = (set(files) for files in rings().values())
    for file in one | two:
        assert imports(file) & three <= BASE, file
    for file in one:
        assert imports(file) & two <= ENGINE_OF_THE_ALGORITHM, file
    for file in BASE:
        assert {other for other in imports(file) if other.startswith("grpo/")} <= BELOW_BASE, file
    for file in inside("grpo/"):
        assert not imports(file) & set(inside("evaluation/", "demo/")), file


def test_rewards_and_video_stand_alone():
    for file in inside("rewards/", "video/"):
        names = imported_names(file) | {ast.unparse(n) for n in ast.walk(TREES[file]) if isinstance(n, ast.Attribute)}
        assert not [name for name in names if f"{name}.".startswith(("torch.distributed.", "grpo."))], file
    for file in inside("rewards/"):
        assert not [name for name in imported_names(file) if name.split(".")[0] == "torch"], file


@pytest.mark.parametrize("module", ["grpo.config", "rewards"])
def test_a_command_line_is_read_without_torch(module):
    """So --help and a wrong flag answer at once."""
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


def test_no_module_is_named_as_one_of_the_standard_library():
    assert not [file for file in FILES if file.rpartition("/")[2].removesuffix(".py") in sys.stdlib_module_names]


def test_no_function_is_named_as_a_builtin():
    top = [(file, node) for file, tree in TREES.items() for node in tree.body if isinstance(node, FUNCTIONS)]
    assert not [f"{file} {node.name}" for file, node in top if hasattr(builtins, node.name)]


def exists(name):
    """Whether a dotted name is a module of the project, or what a module's top defines."""
    file = file_of(name)
    if file is None:
        return False
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    own = name.removeprefix(module).strip(".").split(".")[0]
    body = TREES[file].body
    defined = {getattr(node, "name", None) for node in body}
    defined |= {ast.unparse(target) for node in body for target in getattr(node, "targets", ())}
    return not own or own in defined


def test_what_docstrings_and_comments_refer_to_exists():
    written = re.compile(r"`((?:grpo|rewards|video|evaluation|demo)(?:\.\w+)+)`")
    found = [(file, name) for file in FILES for name in written.findall((ROOT / file).read_text())]
    assert ("grpo/batch.py", "video.prompt.Prompt") in found
    assert not [(file, name) for file, name in found if not exists(name)]


def test_functions_are_short():
    """Lines of an inner function are lines of the outer one, too."""
    lines = {file: code_lines((ROOT / file).read_text()) for file in FILES}
    sizes = [(name, len(lines[file] & set(range(f.lineno, f.end_lineno + 1)))) for name, file, f in functions()]
    assert not [(name, n) for name, n in sizes if n > LONGEST_FUNCTION and name not in MATHEMATICS]


def test_signatures_are_short():
    """self, cls, *args and **kwargs are not counted."""
    given = [(name, [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]) for name, _, f in functions()]
    sizes = [(name, sum(a.arg not in ("self", "cls") for a in arguments)) for name, arguments in given]
    assert not [(name, n) for name, n in sizes if n > MOST_PARAMETERS and name not in MATHEMATICS | PRESCRIBED]


def test_code_lines_by_hand():
    source = (
        '"""What\nit is."""\n\nimport a  # why\n# because\n\n\ndef f(\n    x,\n):\n    "Doc."\n    return """1\n2"""\n'
    )
    assert code_lines(source) == {4, 8, 9, 10, 12, 13}


@pytest.fixture(scope="module")
def counted():
    return counts()


@pytest.mark.parametrize("part", LIMITS)
def test_code_stays_small(counted, part):
    advice = f"{part} has {counted[part]} lines of code: shorten it, or raise LIMITS in tests/code_lines.py and say why"
    assert counted[part] <= LIMITS[part], advice
