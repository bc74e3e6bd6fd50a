"""What the documents point at is there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.config import SampleConfig
from pavdm_dist.values.merging import load_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("cluster/**/*.md")]
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_are_there(document: Path) -> None:
    text = document.read_text()
    assert "@@" not in text, "a figure that was to be filled in"
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("http") or (document.parent / target).exists(), target
    for name in re.findall(
        r"(?<![\w/.-])(?:docs|configs|benchmarks|cluster|tests)/[\w./-]*\w\.(?:md|yaml|py|png|sh)", text
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_python_in_documents_imports_is_there(document: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pavdm_dist"):
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_the_tree_names_every_room_and_no_other() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    named = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    rooms = {path.parent.name for path in (ROOT / "pavdm_dist").glob("*/__init__.py")}
    assert named == rooms


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sample").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_prompts_are_words_that_the_shipped_model_knows(path: Path) -> None:
    config = load_config(SampleConfig, str(path), [])
    if config.model == SampleConfig().model and config.prompt:
        assert Checkpoint.open(config.model).text_encoder.unknown_words(config.prompt) == []


def test_prompts_that_begin_as_the_digits_do_are_known_throughout() -> None:
    words = Checkpoint.open("embedded").text_encoder.unknown_words
    said = [prompt for path in DOCUMENTS for prompt in re.findall(r'"(an? \w+ \w+[^"]*)"', path.read_text())]
    colours = ("red", "green", "blue", "yellow", "cyan", "magenta", "white")
    prompts = [prompt for prompt in said if prompt.split()[1] in colours]
    assert len(prompts) > 5 and [words(prompt) for prompt in prompts] == [[]] * len(prompts)
