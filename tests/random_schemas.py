"""Random JSON schemas that something satisfies."""

from __future__ import annotations

import random
from typing import Any


class Schemas:
    """Of the keywords that people use; ``seed`` says which."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._definitions: dict[str, Any] = {}

    def make(self) -> dict[str, Any]:
        schema = self._any(0)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _any(self, depth: int) -> dict[str, Any]:
        scalars = [self._text, self._integer, self._number, self._constant, lambda _: {"type": "boolean"}]
        nested = [self._object, self._object, self._array, self._tuple, self._union, self._reference]
        made: dict[str, Any] = self._random.choice(scalars if depth > 2 else scalars[:depth] + nested)(depth)
        return made

    def _text(self, _: int) -> dict[str, Any]:
        kind = self._random.randrange(4)
        if kind == 0:
            return {"type": "string", "pattern": self._random.choice(["^[a-f]{2,4}$", "^x", "[0-9]$", "^(ab|cd)*e$"])}
        if kind == 1:
            return {"type": "string", "format": self._random.choice(["date", "time", "ipv4", "uuid"])}
        low = self._random.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + self._random.randrange(6)}

    def _integer(self, _: int) -> dict[str, Any]:
        low = self._random.randrange(-1000, 1000)
        bounds = {"minimum": low, "exclusiveMaximum": low + self._random.randrange(1, 2000)}
        return {"type": "integer", **{k: v for k, v in bounds.items() if self._random.random() < 0.7}}

    def _number(self, _: int) -> dict[str, Any]:
        low = self._random.randrange(-50, 50)
        return {"type": ["number", "null"]} if low < -25 else {"type": "number", "minimum": low, "maximum": low + 3.5}

    def _constant(self, _: int) -> dict[str, Any]:
        values = ["a", "größe\n", "\U0001f600\"'\\", 7, -2.5, None, True, {"k": [1, "z"]}, []]
        return (
            {"const": self._random.choice(values)}
            if self._random.random() < 0.3
            else {"enum": self._random.sample(values, 4)}
        )

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(
            ["a", "b", "größe", 'quo"te', "with space", "$x", "äöü\\"], self._random.randrange(1, 5)
        )
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._any(depth + 1) for name in names},
            "required": [name for name in names if self._random.random() < 0.6],
            "additionalProperties": False,
        }
        if self._random.random() < 0.2:
            schema["patternProperties"] = {"^p_[a-z]{1,3}$": {"type": "boolean"}}
        elif self._random.random() < 0.2:
            schema["additionalProperties"] = {"type": "integer"}
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        low = self._random.randrange(3)
        return {"type": "array", "items": self._any(depth + 1), "minItems": low, "maxItems": low + 2}

    def _tuple(self, depth: int) -> dict[str, Any]:
        return {"type": "array", "prefixItems": [self._any(depth + 1) for _ in range(2)], "items": False, "minItems": 2}

    def _union(self, depth: int) -> dict[str, Any]:
        if self._random.random() < 0.3:
            return {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}, {"type": "null"}]}
        return {"anyOf": [self._any(depth + 1) for _ in range(2)]}

    def _reference(self, depth: int) -> dict[str, Any]:
        name = f"d{len(self._definitions)}"
        self._definitions[name] = {}  # taken, while what it is made of is made
        self._definitions[name] = self._any(depth + 1)
        if self._random.random() < 0.3:  # a tree
            item = {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 2}
            self._definitions[name] = {"type": "object", "properties": {"next": item}, "additionalProperties": False}
        return {"$ref": f"#/$defs/{name}"}
