"""Random JSON schemas, of the keywords that grammars hold to."""

import numpy as np


def schema(rng: np.random.Generator, depth=3):
    kinds = [
        "string",
        "integer",
        "number",
        "boolean",
        "enum",
        "const",
        "pattern",
        "search",
        "format",
    ]
    if depth:
        kinds += ["object", "array", "anyOf", "object", "array", "tuple", "map", "$ref", "oneOf"]
    kind = str(rng.choice(kinds))
    low = int(rng.integers(0, 4))
    match kind:
        case "string":
            return {"type": "string", "minLength": low, "maxLength": low + int(rng.integers(0, 9))}
        case "integer":
            return {"type": "integer", "minimum": -low, "exclusiveMaximum": 10**low + 1}
        case "number":
            return {"type": ["number", "null"], "minimum": -1.5, "maximum": low + 0.25}
        case "enum":
            return {"enum": ["é 漢", 3, None, [1, {"a": 2}], 'q"\\', 1.5e-7, True][: low + 1]}
        case "const":
            return {"const": {"k": [low, "x\n"]}}
        case "pattern":
            return {"type": "string", "pattern": f"^[a-c]{{{low},5}}(x|yz)+$", "maxLength": 12}
        case "multiple":
            return {"type": "integer", "multipleOf": low + 2, "minimum": 0, "maximum": 99}
        case "all of":
            return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": 7}]}
        case "search":
            return {"type": "string", "pattern": "[0-9]é|b$", "maxLength": 9}
        case "format":
            return {"type": "string", "format": str(rng.choice(["ipv4", "ipv6", "uuid"]))}
        case "object":
            names = ["a", "b c", "é", 'q"'][: low + 1]
            return {
                "type": "object",
                "properties": {name: schema(rng, depth - 1) for name in names},
                "required": [name for name in names if rng.random() < 0.5],
                "additionalProperties": False,
            }
        case "array":
            return {
                "type": "array",
                "items": schema(rng, depth - 1),
                "minItems": low,
                "maxItems": 4,
            }
        case "tuple":
            return {
                "type": "array",
                "prefixItems": [schema(rng, depth - 1), {"type": "null"}],
                "items": False,
                "minItems": 2,
            }
        case "map":
            return {
                "type": "object",
                "patternProperties": {"^x[0-9]$": schema(rng, depth - 1)},
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 3,
            }
        case "anyOf":
            return {"anyOf": [schema(rng, depth - 1), {"type": "null"}]}
        case "oneOf":
            return {"oneOf": [{"type": "boolean"}, {"enum": ["a", "b"]}, {"type": "null"}]}
        case "$ref":
            return (
                {"type": "object", "properties": {"next": {"$ref": "#"}, "v": {"type": "null"}}}
                | {"additionalProperties": False}
                if depth == 3
                else {"type": "null"}
            )
        case _:
            return {"type": kind}
