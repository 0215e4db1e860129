"""Every command of docs/security.md runs as it stands, in one folder, from top to bottom."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from esperml.contract import KINDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_command_of_the_page_runs(start_server, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    targets: dict[str, str] = {}
    said: dict[str, str] = {}

    def run(line: str) -> str:
        for written, real in targets.items():
            line = line.replace(written, real)
        line = line.replace("examples/", f"{ROOT}/examples/")
        environment = os.environ | {"PATH": path}
        result = subprocess.run(
            ["/bin/sh", "-c", f"umask 077; {line}"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    for line in COMMANDS:
        if line.startswith("esper serve"):
            words = shlex.split(line)[2:]
            port = words.pop(words.index("--port") + 1)
            words.remove("--port")
            flags = [str(tmp_path / word) if re.search(r"\.(pem|key|json)$", word) else word for word in words]
            folder = tmp_path / port
            if "--data-dir" in flags:
                del flags[flags.index("--data-dir") : flags.index("--data-dir") + 2]
            server = start_server(*flags, "--policy", "chance", data_dir=folder)
            assert server.target.startswith("0.0.0.0:")
            targets[f"localhost:{port}"] = f"localhost:{server.port}"
        elif line != "umask 077":
            said[line] = run(line)

    listed = [text for line, text in said.items() if line.startswith("esper topics list")]
    assert [len(text.splitlines()) for text in listed] == [1 + len(KINDS)] * 2
    assert "grow-a-classifier" in next(text for line, text in said.items() if line.startswith("ESPER_CA"))
    assert '"grow-a-classifier"' in next(text for line, text in said.items() if line.startswith("grpcurl"))
    assert "ann" in said["esper token --file tokens.json list"]
    assert "revoked" in said["esper token --file tokens.json revoke ann"]
    for name in ("ca.key", "server.key", "tokens.json", "host.token", "ann.token"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0, name
