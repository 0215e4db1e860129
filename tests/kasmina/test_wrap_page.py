"""Every program of docs/wrap.md runs as it stands, and says what the page shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "wrap.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_every_program_of_the_page_runs(capsys):
    names: dict[str, Any] = {}
    said = []
    for program in blocks("python"):
        exec(compile(program, "docs/wrap.md", "exec"), names)
        said.append(capsys.readouterr().out)
    preview, selected, graph = said
    [shown] = blocks("text")
    # The page shortens what can grow, which is more with each blueprint.
    for line, on_page in zip(preview.splitlines(), shown.splitlines(), strict=True):
        assert " ".join(line.split()).startswith(" ".join(on_page.removesuffix(", …").split()))
    assert "1.attention" in selected
    assert "2.fc1" not in selected
    assert re.search(r"^trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: 100", selected, re.MULTILINE)
    assert graph.splitlines()[0].startswith("['0', '1.norm', '1.attention'")
    assert graph.splitlines()[1] == "forward ('input',) ('',)"
