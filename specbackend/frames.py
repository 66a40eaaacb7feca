"""Dataclasses as length-prefixed msgpack frames. What a protocol says is its tuple of kinds; their order counts."""

import struct
from collections.abc import Sequence
from dataclasses import fields
from functools import cache

import msgpack

LENGTH = struct.Struct("<I")


def pack(message: object, kinds: Sequence[type]) -> bytes:
    """One frame: the body's length, then [kind, field, field, ...]. Dataclasses in it become lists of their fields."""
    body = msgpack.packb([kinds.index(type(message)), *_values(message)], default=_values)
    return LENGTH.pack(len(body)) + body


def unpack(body: bytes, kinds: Sequence[type]) -> object:
    """The message; what was a dataclass in it is a list."""
    kind, *values = msgpack.unpackb(body)
    return kinds[kind](*values)


@cache
def field_names(kind: type) -> tuple[str, ...]:
    """Of a dataclass. Remembered: to ask for `fields` each time takes longer than to pack or unpack their values."""
    return tuple(each.name for each in fields(kind))


def _values(message: object) -> list:
    return [getattr(message, name) for name in field_names(type(message))]
