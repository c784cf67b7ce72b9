# SPDX-License-Identifier: Apache-2.0
"""Checks that docstrings and comments are sentences: a reader who knows nothing of the code understands them at once."""

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

# A sentence that begins with one of these has lost its subject ("Of a scan: where it lies."), or hides it in a clause.
_FRAGMENT = set(
    "of as with what whether how that for by from where which who whose why without within when none those such".split()
)
_ARGUMENT_FRAGMENT = set("of as with that which whose by for from to than".split())

# Verbs that can be nothing else: one of them anywhere makes a sentence.
_FINITE = set(
    """
    is are was were be has have had does do did can can't cannot may must might could should would will isn't aren't
    doesn't don't hasn't haven't won't needn't
    accepts adds agrees allows appears applies asks averages becomes begins behaves belongs brings builds calls carries
    chooses comes compares computes consists contains converts corrects counts covers creates cuts decides defines
    depends describes differs does draws ends estimates evaluates expects explains fails fills finds fits follows
    gets gives goes grows happens helps holds identifies ignores imports includes keeps knows lacks lays learns leaves
    lets lies lists loads looks loses maintains makes matches means measures mirrors names needs obeys occurs
    organises pads passes pays prepares pretrains prints produces proves provides puts raises reaches reads receives
    refers refuses registers rejects relates remains removes renders repeats replaces represents requires restores
    returns rises runs says scans seeks selects sends separates serves sets shares shows simulates sits smooths
    solves splits spreads stands starts stays stops stores sums supports takes teaches tells trains transforms treats
    tries turns uses verifies waits wants warns works writes yields
    """.split()
)
# Constructions that nobody understands at first reading.
_RIDDLES = [re.compile(pattern, re.I) for pattern in (
    r"\bthat there (is|are) not\b",
    r"\bwhere (that|it) is none\b",
    r"\bnone where (that|there)\b",
    r"^(an? )?[\w ]+ that (is|are) of\b",
    r"(?<!instead )\bof what (is|was|has|there)\b",
)]  # fmt: skip

_SECTIONS = ("Args:", "Arguments:", "Attributes:")
_ENTRY = re.compile(r"^([\w*`., ]+): (\S.*)$")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_][\w'’-]*", text)


def first_sentence(text: str) -> str:
    """Returns the first sentence of a docstring or comment on one line."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)\.(?=\s|$)", paragraph)[0]


def sentence_fault(sentence: str) -> str | None:
    """Says what keeps a text from being a sentence; returns None for a sentence."""
    words = _words(sentence)
    if not words:
        return "holds no word; expected a sentence"
    if words[0].lower() in _FRAGMENT:
        return f"begins with {words[0]!r}; expected a subject or a verb in the third person"
    for riddle in _RIDDLES:
        if found := riddle.search(sentence):
            return f"says {found[0]!r}; expected plain words"
    starts_with_verb = re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)?s", words[0]) is not None and words[0] not in _PLURALS
    if not starts_with_verb and not any(word.lower() in _FINITE for word in words):
        return "has no verb; expected a verb in the third person"
    return None


# Nouns in the plural that stand at the beginning of a sentence: no verbs in the third person.
_PLURALS = set(
    """
    Losses Networks Drop-ins Settings Figures Voxels Names Factors Tensors Rows Options Medians Exposures Bytes
    Weights Taps Tasks Queries Histograms Errors Dice Channels Views Versions Values Terms Tables Statistics Steps
    Seeds Seconds Samples Samplers Reports Projections Programs Points Planes Percents Nodules Methods Means Maps
    Lungs Levels Labels Items Intervals Folders Files Features Facts Drops Distances Directions Densities Curves
    Constants Blocks Arguments Annotations Scales Scans Sums Studies Kernels Cases Inputs Patients Patches Ranges
    Parts Pieces Tests Bugs Ops Numbers Layers Modules This Its His Standardised Bias Class Ordered-subsets Gaussians
    Benchmarks Timings Checkpoints Configs Commands Regions Lesions Organs Phantoms Slices Windows
    """.split()
) - {"Scans", "Sums", "Samples", "Names", "Labels", "Scales", "Maps", "Tests", "Cases"}


def argument_faults(docstring: str) -> Iterator[str]:
    """Yields what is wrong with the entries of a docstring's lists of arguments and attributes."""
    within = False
    for line in docstring.split("\n"):
        text = line.strip()
        if text.endswith(":") and not line.startswith(" ") and text:
            within = text.startswith(_SECTIONS) or text.split(" ")[0] in ("Args", "Attributes")
        elif not text:
            within = False
        elif within and re.match(r" {4}\S", line) and (entry := _ENTRY.match(text)):
            words = _words(entry[2])
            if words and entry[2].startswith(words[0]) and words[0] in _ARGUMENT_FRAGMENT:
                yield f"argument {entry[1]!r} begins with {words[0]!r}; expected a noun"


def docstring_faults(source: str) -> list[str]:
    """Returns the faults of a module's docstrings, each with its line and name."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        where = f"{getattr(node, 'lineno', 1)} {getattr(node, 'name', 'module')}"
        found = sentence_fault(first_sentence(docstring))
        faults += [f"{where}: {found}: {first_sentence(docstring)}"] if found else []
        faults += [f"{where}: {fault}" for fault in argument_faults(docstring)]
    return faults


def comment_faults(source: str) -> list[str]:
    """Returns the comments of a file that begin in the middle of a thought, each with its line."""
    faults, previous = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("#: ")
        begins = line != previous + 1 or token.line.lstrip() != token.line.lstrip("#")
        previous = line
        words = _words(text)
        if begins and words and text.startswith(words[0]) and words[0].lower() in ("of", "that", "whose", "whether"):
            faults.append(f"{line}: a comment begins with {words[0]!r}: {text}")
    return faults


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_docstrings_and_comments_are_sentences(path):
    source = path.read_text(encoding="utf-8")
    assert docstring_faults(source) + comment_faults(source) == []
