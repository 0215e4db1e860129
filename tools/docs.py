"""Build the documentation.

The API from docstrings and the contract from the protos go into ``build/docs``, the page of settings into
``docs/settings.md``.

Fails, naming each, on anything public that has no documentation.
"""

from __future__ import annotations

import html
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "docs"
PACKAGES = ("contract", "settings", "client", "kasmina", "cli", "oona", "tamiyo", "server", "trainer", "bench", "demo")

# Field numbers in descriptor.proto, of which a source path is made.
MESSAGE, ENUM, SERVICE = 4, 5, 6
FIELD, NESTED_MESSAGE, NESTED_ENUM, ONEOF = 2, 3, 4, 8
VALUE, METHOD = 2, 2

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
h2 { border-bottom: 1px solid #d0d7de; margin-top: 3rem } h3 { margin-bottom: .2rem }
code, pre { font: 14px/1.45 ui-monospace, monospace } pre { background: #f6f8fa; padding: 1rem; overflow-x: auto }
table { border-collapse: collapse; width: 100% } td { border-top: 1px solid #eaeef2; padding: .3rem .6rem;
vertical-align: top } td:first-child, td:nth-child(2) { white-space: nowrap } nav a { margin-right: 1rem }
"""


def describe() -> descriptor_pb2.FileDescriptorSet:
    """The protos with their comments."""
    files = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "image.binpb"
        arguments = [
            "protoc",
            f"--proto_path={ROOT / 'proto'}",
            f"--proto_path={Path(protoc.__file__).parent / '_proto'}",
            "--include_source_info",
            f"--descriptor_set_out={image}",
            *files,
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc failed")
        return descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())


class Contract:
    """Turns one file of the contract into HTML, and notes what has no comment."""

    def __init__(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        self.file = file
        self.undocumented: list[str] = []
        self._comments = {
            tuple(location.path): location.leading_comments.strip() or location.trailing_comments.strip()
            for location in file.source_code_info.location
        }

    def _comment(self, path: tuple[int, ...], name: str) -> str:
        comment = self._comments.get(path, "")
        if not comment:
            self.undocumented.append(f"{self.file.name}: {name}")
        escaped = html.escape(comment)
        # Drawings keep their lines; prose flows.
        if any(character in comment for character in "─▶◀│"):
            return f"<pre>{escaped}</pre>"
        return f"<p>{escaped}</p>"

    def html(self) -> Iterator[str]:
        """The file as HTML, piece by piece."""
        yield f"<h2 id='{self.file.name}'>{self.file.name}</h2>"
        for index, service in enumerate(self.file.service):
            path: tuple[int, ...] = (SERVICE, index)
            yield f"<h3>service {service.name}</h3>{self._comment(path, service.name)}"
            for position, method in enumerate(service.method):
                signature = (
                    f"{method.name}({'stream ' * method.client_streaming}{_short(method.input_type)}) → "
                    f"{'stream ' * method.server_streaming}{_short(method.output_type)}"
                )
                yield f"<h4><code>{signature}</code></h4>{self._comment((*path, METHOD, position), method.name)}"
        for index, message in enumerate(self.file.message_type):
            yield from self._message(message, (MESSAGE, index))
        for index, enum in enumerate(self.file.enum_type):
            yield from self._enum(enum, (ENUM, index))

    def _message(self, message: descriptor_pb2.DescriptorProto, path: tuple[int, ...]) -> Iterator[str]:
        if message.options.map_entry:
            return
        yield f"<h3 id='{message.name}'>message {message.name}</h3>{self._comment(path, message.name)}<table>"
        for index, field in enumerate(message.field):
            comment = self._comment((*path, FIELD, index), f"{message.name}.{field.name}")
            yield f"<tr><td><code>{field.name}</code></td><td>{_type(field)}</td><td>{comment}</td></tr>"
        yield "</table>"
        for index, nested in enumerate(message.nested_type):
            yield from self._message(nested, (*path, NESTED_MESSAGE, index))
        for index, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*path, NESTED_ENUM, index))

    def _enum(self, enum: descriptor_pb2.EnumDescriptorProto, path: tuple[int, ...]) -> Iterator[str]:
        yield f"<h3 id='{enum.name}'>enum {enum.name}</h3>{self._comment(path, enum.name)}<table>"
        for index, value in enumerate(enum.value):
            comment = self._comment((*path, VALUE, index), f"{enum.name}.{value.name}")
            yield f"<tr><td><code>{value.name}</code></td><td>{value.number}</td><td>{comment}</td></tr>"
        yield "</table>"


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _type(field: descriptor_pb2.FieldDescriptorProto) -> str:
    plain = descriptor_pb2.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = f"<a href='#{_short(field.type_name)}'>{_short(field.type_name)}</a>" if field.type_name else plain
    if field.label == descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def contract() -> None:
    """Write ``contract.html``. Raises ``SystemExit`` naming what has no comment."""
    files = [Contract(file) for file in describe().file if file.package == "esperml.v1"]
    body = "".join(piece for file in files for piece in file.html())
    undocumented = [name for file in files for name in file.undocumented]
    if undocumented:
        raise SystemExit("the contract has undocumented parts:\n  " + "\n  ".join(undocumented))
    links = "".join(f"<a href='#{file.file.name}'>{Path(file.file.name).stem}</a>" for file in files)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "contract.html").write_text(
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>The contract of Esper</title>"
        f"<style>{STYLE}</style>"
        f"<h1>esperml.v1</h1><nav>{links}</nav>{body}</html>",
        encoding="utf-8",
    )


def api() -> None:
    """Write the API reference. Raises ``SystemExit`` if anything public has no docstring."""
    missing = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "D1", "--ignore", "D105,D107", *_roots()],
        check=False,
    )
    if missing.returncode != 0:
        raise SystemExit("public names without a docstring: see above")
    modules = [f"esperml.{package}" for package in PACKAGES]
    subprocess.run(
        [sys.executable, "-m", "pdoc", "--docformat", "google", "--output-directory", str(OUT / "api"), *modules],
        check=True,
    )


def settings_page() -> str:
    """The text of ``docs/settings.md``, made from the settings' own descriptions."""
    from esperml.settings import sources

    _, listed = sources(file=None, environment={})
    lines = [
        "# Settings",
        "",
        "Defaults < TOML file < environment < flags. `esper config show` prints what is in force and where it came",
        "from. The file is `esper.toml` in the working folder, or the one that `ESPER_CONFIG` names; `[server]` and",
        "`port = 1` in it set `server.port`, and so does `ESPER_SERVER__PORT=1`.",
        "",
        "| setting | default | what it is |",
        "| --- | --- | --- |",
        *(f"| `{source.key}` | `{source.value}` | {source.description} |" for source in listed),
    ]
    return "\n".join(lines) + "\n"


def _roots() -> list[str]:
    return [str(ROOT / root / "esperml") for root in ("client", "server", "trainer")]


def main() -> None:
    """Build all of it."""
    (ROOT / "docs" / "settings.md").write_text(settings_page(), encoding="utf-8")
    contract()
    api()
    sys.stdout.write(f"documentation: {OUT / 'contract.html'} and {OUT / 'api' / 'index.html'}\n")


if __name__ == "__main__":
    main()
