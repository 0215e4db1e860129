"""Make ``generated/`` from ``proto/``: messages, services and their type stubs.

``python tools/generate.py`` writes; ``python tools/generate.py --check`` fails if what is committed differs.
"""

from __future__ import annotations

import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
GENERATED = ROOT / "generated"
# They lie beside the interpreter, which need not be on the PATH.
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")


def generate(out: Path) -> None:
    """Write the generated package into ``out``. Raises ``SystemExit`` if protoc fails."""
    out.mkdir(parents=True, exist_ok=True)
    well_known = Path(protoc.__file__).parent / "_proto"
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTO}",
            f"--proto_path={well_known}",
            *(f"--plugin={plugin}={Path(sys.executable).parent / plugin}" for plugin in PLUGINS),
            f"--python_out={out}",
            f"--mypy_out=readable_stubs,quiet:{out}",
            f"--grpc_python_out={out}",
            f"--mypy_grpc_out=quiet:{out}",
            *files,
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")
    # Files without a service get an empty gRPC module; it would only be noise.
    for module in out.rglob("*_pb2_grpc.py"):
        if "class " not in module.read_text():
            module.unlink()
            module.with_suffix(".pyi").unlink(missing_ok=True)
    for package in {path.parent for path in out.rglob("*_pb2.py")}:
        (package / "py.typed").touch()


def differences(left: Path, right: Path) -> list[str]:
    """Files that differ between two trees, by path relative to them."""
    names = {
        path.relative_to(root)
        for root in (left, right)
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return sorted(
        str(name)
        for name in names
        if not (left / name).exists()
        or not (right / name).exists()
        or not filecmp.cmp(left / name, right / name, shallow=False)
    )


def main() -> None:
    """Generate, or check that nothing has drifted."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "generated"
        generate(fresh)
        if "--check" in sys.argv[1:]:
            drifted = differences(fresh, GENERATED)
            if drifted:
                raise SystemExit("generated/ does not match proto/; run `make generate`:\n  " + "\n  ".join(drifted))
            return
        shutil.rmtree(GENERATED, ignore_errors=True)
        shutil.copytree(fresh, GENERATED)


if __name__ == "__main__":
    main()
