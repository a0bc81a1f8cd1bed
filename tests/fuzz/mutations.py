"""Files that were whole, and values that nobody wrote."""

import json
from typing import Any

from hypothesis import strategies as st

WORDS = """
{} {1} {99} ../../x /etc/passwd nan inf -1 1e999 1_0 0x10 ${oc.env:HOME} ${a} <script> $\\frac %s ² __class__ os.system
!!python/object:os.x ldm.models.unet.UNet infusion \x1b[2J
"""
BLANKS = ["", " ", "\0", "a\nb", "\u202e", "\ud800"]
LONG = ["{" * 40, "9" * 5000, "[" * 5000, "a" * 20_000]
ODD_TEXT = st.text(max_size=60) | st.sampled_from([*WORDS.split(), *BLANKS, *LONG])
ODD_NUMBER = st.one_of(
    st.integers(-5, 300),
    st.sampled_from([2**15, 2**31 - 1, 2**31, 2**32, 2**48, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)]),
    st.floats(),
)
ODD_VALUE: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), ODD_NUMBER, ODD_TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(ODD_TEXT, inner, max_size=4)),
    max_leaves=12,
)
CHUNK = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [b"\0", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 8, b"[" * 200, b'"', b"{", b"}", b"nan", b"9" * 400]
    ),
)


@st.composite
def mutated(draw: st.DrawFn, content: bytes, edits: int = 6) -> bytes:
    """Bytes replaced, put in, left out, moved, or all cut off behind some place."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, edits))):
        start = draw(st.integers(0, max(0, min(len(data), 4096) - 1)) | st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(0, 16) | st.integers(0, len(data)))
        match draw(st.sampled_from(["replace", "flip", "put in", "leave out", "cut off", "move"])):
            case "replace":
                chunk = draw(CHUNK)
                data[start : start + len(chunk)] = chunk
            case "flip" if data:
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "put in":
                data[start:start] = draw(CHUNK)
            case "leave out":
                del data[start : start + min(length, 64)]
            case "cut off":
                del data[start:]
            case "move":
                data[start:start] = data[start : start + length][:2000]
    return bytes(data)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value of which some parts are others, gone, or twice there."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.sampled_from(["inside", "gone", "other key", "more"])):
            case "inside":
                return value | {key: draw(changed(value[key]))}
            case "gone":
                return {name: one for name, one in value.items() if name != key}
            case "other key":
                return {draw(ODD_TEXT) if name == key else name: one for name, one in value.items()}
            case _:
                return value | {draw(ODD_TEXT): draw(ODD_VALUE)}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(changed(value[index])), *value[index + draw(st.integers(0, 1)) :]]
    return draw(ODD_VALUE)


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()
