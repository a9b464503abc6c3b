"""Fonts that can write what a picture says, in the site's own language."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from io import BytesIO

from PIL import ImageFont

_OF_THE_SYSTEM = (
    # where Roboto has no glyph: what Debian's fonts-noto-cjk, fonts-noto-core and fonts-dejavu bring
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "DejaVuSans.ttf",
)
_NO_CHARACTER = "\ufffe"


def font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return the first font here that has every character of `text`; Roboto where none has."""
    return next((one for one in _fonts(size) if not _lacks(one, text)), _fonts(size)[0])


def undrawable(text: str) -> str:
    """Return the characters of `text` for which the font that would be taken has no glyph, in their order."""
    return "".join(_lacks(font(text, 20), text))


@cache
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    own = files("font_roboto") / "files" / "Roboto-Regular.ttf"
    found = [ImageFont.truetype(BytesIO(own.read_bytes()), size)]
    for name in _OF_THE_SYSTEM:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not installed
            continue
    return tuple(found)


def _lacks(one: ImageFont.FreeTypeFont, text: str) -> list[str]:
    return [character for character in dict.fromkeys(text) if not character.isspace() and not _has(one, character)]


@cache
def _has(one: ImageFont.FreeTypeFont, character: str) -> bool:
    return character.isascii() or _drawn(one, character) != _drawn(one, _NO_CHARACTER)


def _drawn(one: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], Iterable[int]]:
    mask, _ = one.getmask2(character, mode="L")
    return mask.size, bytes(mask)
