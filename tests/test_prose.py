# SPDX-License-Identifier: Apache-2.0
"""Checks that docstrings are sentences in plain English, which a reader who doesn't know the code understands."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent
_FILES = sorted(
    path
    for folder in ("medaccel", "benchmarks", "tests")
    for path in (_ROOT / folder).rglob("*.py")
    if path.is_file()
)


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# A sentence that begins with one of these has lost its subject ("Of a scan: its place.") or hides it in a clause.
_FRAGMENTS = _set(
    "as by for from how none of such that those what when where whether which who whose why with within without"
)
# An argument that is described so lacks its noun ("dataset: that the cases are of.").
_BARE_ARGUMENTS = _set("as by for from of than that to which whose with")
_BARE_COMMENTS = _set("of that whether whose")
# One of these words makes a sentence. Verbs that are nouns too, such as "scores", count at the beginning alone.
_VERBS = _set("""
am are aren't be can can't cannot could did do does doesn't don't had has hasn't have haven't is isn't may might
must needn't should was were will won't would accepts adds agrees allows appears applies asks becomes begins belongs
brings builds calls carries chooses comes compares computes consists contains converts counts covers creates decides
defines depends describes differs draws equals evaluates exists expects explains fails falls fills finds follows get
gets give gives goes grows happens helps holds identifies ignores imports includes keeps knows lacks leaves lets
lies loads loses makes matches means measures names needs obeys occurs owns passes pays prepares prints proves
provides puts raises reads receives refers refuses registers rejects remains removes renders repeats replaces
represents requires returns runs says seeks selects sends serves shows sits solves speaks stands starts stays stops
stores supports takes teaches tells tests trains turns uses verifies waits wants warns works writes yields
""")
# These words end in s as verbs do, and are none.
_NO_VERBS = _set("""
Annotations Arguments Benchmarks Bias Blocks Bugs Bytes Cases Channels Checkpoints Class Commands Constants Curves
Densities Directions Distances Drop-ins Errors Exposures Factors Facts Features Figures Files Folders Gaussians
Histograms His Inputs Intervals Items Its Kernels Layers Lesions Levels Losses Lungs Medians Methods Modules
Networks Nodules Numbers Ops Options Organs Parameters Parts Patches Patients Phantoms Pieces Planes Points Programs
Projections Queries Ranges Regions Samplers Seconds Seeds Settings Slices Statistics Steps Studies Tables Taps Tasks
Tensors Terms Things This Timings Values Versions Views Voxels Weights Windows Words
""")
_RIDDLES = [
    re.compile(r"\bthat there (is|are) not\b", re.I),
    re.compile(r"\bwhere (that|it) is none\b", re.I),
    re.compile(r"\bnone where (that|there)\b", re.I),
    re.compile(r"(?<!instead )\bof what (is|was|has|there)\b", re.I),
]
_ENTRY = re.compile(r"^([\w*`., ]+): (\S.*)$")


def first_sentence(text: str) -> str:
    """Returns the first sentence of a text on one line."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)\.(?=\s|$)", paragraph)[0]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_][\w'’-]*", text)


def sentence_fault(sentence: str, *, verb: bool = True) -> str | None:
    """Says what keeps a text from being a sentence, or returns None; `verb` demands one."""
    words = _words(sentence)
    if not words:
        return "has no word; expected a sentence"
    if words[0].lower() in _FRAGMENTS:
        return f"begins with {words[0]!r}; expected a subject, or a verb in the third person"
    if found := next(filter(None, (riddle.search(sentence) for riddle in _RIDDLES)), None):
        return f"says {found[0]!r}; expected plain words"
    leads = re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)?s", words[0]) and words[0] not in _NO_VERBS
    if verb and not leads and not any(word.lower() in _VERBS for word in words):
        return "has no verb; expected one in the third person"
    return None


def argument_faults(docstring: str) -> Iterator[str]:
    """Yields the faults of a docstring's lists of arguments and attributes."""
    within = False
    for line in docstring.split("\n"):
        if re.match(r"(Args|Attributes)\b.*:$", line):
            within = True
        elif not line.strip():
            within = False
        elif within and re.match(r" {4}\S", line) and (entry := _ENTRY.match(line.strip())):
            words = _words(entry[2])
            if words and entry[2].startswith(words[0]) and words[0] in _BARE_ARGUMENTS:
                yield f"argument {entry[1]!r} begins with {words[0]!r}; expected a noun"


def docstring_faults(source: str, *, tests: bool = False) -> list[str]:
    """Returns the faults of a file's docstrings; in tests, functions and classes may do without a verb."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if (docstring := ast.get_docstring(node)) is None:
            continue
        sentence = first_sentence(docstring)
        found = [
            sentence_fault(sentence, verb=not tests or isinstance(node, ast.Module)),
            *argument_faults(docstring),
        ]
        where = f"{getattr(node, 'lineno', 1)} {getattr(node, 'name', 'module')}"
        faults += [f"{where}: {sentence!r} {fault}" for fault in found if fault]
    return faults


def comment_faults(source: str) -> list[str]:
    """Returns the comments of a file that begin without a noun."""
    faults, previous = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        alone = token.line.lstrip().startswith("#")
        continues = alone and token.start[0] == previous + 1
        previous = token.start[0] if alone else -1
        words = token.string.lstrip("#: ").split()
        if words and not continues and words[0].lower() in _BARE_COMMENTS:
            faults.append(f"{token.start[0]}: the comment {token.string!r} begins with {words[0]!r}; expected a noun")
    return faults


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_docstrings_and_comments_are_sentences(path):
    source = path.read_text(encoding="utf-8")
    assert docstring_faults(source, tests=_ROOT / "tests" in path.parents) + comment_faults(source) == []


@pytest.mark.parametrize(
    ("docstring", "fault"),
    [
        ("What tells one set of options from another.", "begins with 'What'"),
        ("With all that another process needs to run it.", "begins with 'With'"),
        ("Whether a scan is there.", "begins with 'Whether'"),
        ("None where the layer can be served; else why not.", "begins with 'None'"),
        ("Of a scan: its voxels are counted.", "begins with 'Of'"),
        ("Where the slices of a series lie.", "begins with 'Where'"),
        ("The settings of a run.", "has no verb"),
        ("Settings of a run.", "has no verb"),
        ("Write a file.", "has no verb"),
        ("(B, C, *spatial) to the same.", "has no verb"),
        ("Returns 0 for a tensor that there is not.", "says 'that there is not'"),
        ("Returns a list, empty of what was there.", "says 'of what was'"),
        ("Returns it.\n\nArgs:\n    dataset: that the cases are of.", "argument 'dataset' begins with 'that'"),
        ("Returns it.\n\nAttributes:\n    a, b: of the scan.", "argument 'a, b' begins with 'of'"),
    ],
)
def test_fragments_are_found(docstring, fault):
    source = f'def f():\n    """{docstring}"""\n'.replace("\n\n", "\n\n    ").replace(":\n    ", ":\n        ")
    source = source.replace("def f():\n        ", "def f():\n    ")
    faults = docstring_faults(source)
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    "docstring",
    [
        "Returns None if the layer can be served, and says why not otherwise.",
        "A padded token is zero before the projection, so its q, k and v are the projection's bias.",
        "Reads NIfTI files: whole and checked.",
        "σ is in mm.\n\nArgs:\n    dataset: the cases' data set.\n    sizes: whole numbers of at least 1.",
    ],
)
def test_sentences_pass(docstring):
    assert sentence_fault(first_sentence(docstring)) is None
    assert list(argument_faults(docstring)) == []


def test_comments_without_a_noun_are_found():
    source = "x = 1  # of the scan\n# That are left out.\ny = 2\n# The others\n# of the scan stay.\nz = 3\n"
    assert [fault.split(":")[0] for fault in comment_faults(source)] == ["1", "2"]
