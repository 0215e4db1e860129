"""What is written down is true."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parents[2]


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    return _tool("docs")


def test_the_page_of_settings_lists_what_there_is(docs: ModuleType) -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == docs.settings_page(), "run `make docs` and commit docs/settings.md"


def test_generated_code_is_what_the_protos_make(tmp_path: Path) -> None:
    generate = _tool("generate")
    generate.generate(tmp_path / "generated")
    assert generate.differences(tmp_path / "generated", ROOT / "generated") == []


def test_an_undocumented_field_fails_the_contract_reference(docs: ModuleType) -> None:
    file = descriptor_pb2.FileDescriptorProto(name="bare.proto")
    message = file.message_type.add(name="Bare")
    message.field.add(name="naked", type=descriptor_pb2.FieldDescriptorProto.TYPE_STRING)
    contract = docs.Contract(file)
    assert "naked" in "".join(contract.html())
    assert contract.undocumented == ["bare.proto: Bare", "bare.proto: Bare.naked"]


def test_the_contract_reference_covers_every_service_and_has_no_gaps(docs: ModuleType) -> None:
    files = [docs.Contract(file) for file in docs.describe().file if file.package == "esperml.v1"]
    text = "".join(piece for file in files for piece in file.html())
    assert [name for file in files for name in file.undocumented] == []
    assert all(f"service {name}" in text for name in ("Oona", "Tamiyo", "Runs"))
