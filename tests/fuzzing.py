"""Nonsense made from sense: bytes that are not as they were, and messages with one field that is not."""

from __future__ import annotations

from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

EDGES = [0, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
SIGNED_EDGES = [-(2**63), -(2**31), -1, 0, 1, 10**9 - 1, 10**9, 2**31 - 1, 253_402_300_799, 253_402_300_800, 2**63 - 1]
NAMES = ["", "a", "b", "\0", "☃", "x" * 128, "x" * 129, "x" * 300, "../..", "' OR 1=1 --"]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan")]
# Messages within messages that are made up; deeper ones stay empty.
DEPTH = 3


def mutated(frame: bytes, other: bytes, random: Random) -> bytes:
    """A frame with one or two bytes, or pieces, not as they were."""
    data = bytearray(frame)
    for _ in range(random.randint(1, 2)):
        at = random.randrange(len(data) + 1)
        until = min(at + random.randint(1, 8), len(data))
        match random.randrange(6):
            case 0 if data:
                data[at - 1] ^= 1 << random.randrange(8)
            case 1:
                del data[at:until]
            case 2:
                data[at:at] = data[at:until]
            case 3:
                data[at:at] = random.randbytes(random.randint(1, 8))
            case 4:
                del data[at:]
            case _:
                data[at:at] = other
    return bytes(data)


def made_up(kind: type[Message], random: Random, depth: int = DEPTH) -> Message:
    """A message in which about half of the fields are set, to anything."""
    message = kind()
    for field in kind.DESCRIPTOR.fields if depth else ():
        if random.random() < 0.5:
            _set(message, field, random, depth)
    return message


def alter(message: Message, random: Random) -> None:
    """Change one field of a message, or of a message within it."""
    inside: list[Message] = []
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            inside += value if field.is_repeated else [value]
    if inside and random.random() < 0.7:
        alter(random.choice(inside), random)
        return
    if not message.DESCRIPTOR.fields:
        return
    field = random.choice(message.DESCRIPTOR.fields)
    if random.random() < 0.2:
        message.ClearField(field.name)
    else:
        _set(message, field, random, depth=1)


def _set(message: Message, field: FieldDescriptor, random: Random, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return
    if field.is_repeated:
        values = getattr(message, field.name)
        if values and random.random() < 0.4:
            del values[random.randrange(len(values))]
            return
        for _ in range(random.choice([1, 1, 2, 5])):
            if field.message_type is not None:
                added = values.add()
                added.CopyFrom(made_up(type(added), random, depth - 1))
            else:
                values.append(_scalar(field, random))
    elif field.message_type is not None:
        value = getattr(message, field.name)
        value.SetInParent()
        value.CopyFrom(made_up(type(value), random, depth - 1))
    else:
        setattr(message, field.name, _scalar(field, random))


def _scalar(field: FieldDescriptor, random: Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_UINT64:
            return random.choice(EDGES)
        case FieldDescriptor.CPPTYPE_UINT32:
            return random.choice([edge for edge in EDGES if edge < 2**32])
        case FieldDescriptor.CPPTYPE_INT64:
            return random.choice(SIGNED_EDGES)
        case FieldDescriptor.CPPTYPE_INT32:
            return random.choice([edge for edge in SIGNED_EDGES if -(2**31) <= edge < 2**31])
        case FieldDescriptor.CPPTYPE_ENUM:
            return random.choice([*range(8), -1, 2**31 - 1])
        case FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return random.randbytes(random.choice([0, 1, 4, 8, 64]))
        case FieldDescriptor.CPPTYPE_STRING:
            return random.choice(NAMES)
        case _:
            return random.choice(FLOATS)
