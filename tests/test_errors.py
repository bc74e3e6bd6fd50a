"""What errors of libraries say in sentences of this package."""

from __future__ import annotations

import pytest

from pavdm_dist.errors import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no room\non the card"), "no room"),
        (ValueError("\n  \n  late words \n"), "late words"),
        (EOFError(), "EOFError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_the_first_line_with_words_is_said_else_the_name(error: Exception, said: str) -> None:
    assert first_line(error) == said
