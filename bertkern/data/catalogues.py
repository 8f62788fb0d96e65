"""Messages and their translations in gettext catalogues, .po and .mo.

    msgid "Open"  msgstr "Öffnen"              a pair
    msgid "%d file"  msgid_plural "%d files"   two: each with the form that the catalogue's rule of
    msgstr[0] "%d Datei"  msgstr[1] …          plurals has for it

Left out: the header, and messages that are not translated, fuzzy (a guess that nobody has looked
at) or obsolete. Of .po files Babel has the grammar (https://babel.pocoo.org); a .mo file is two
tables of lengths and offsets, as the manual of GNU gettext has it ("The Format of GNU MO Files").
"""

from __future__ import annotations

import gettext
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CATALOGUES = (".po", ".mo")
_ONE, _MORE = 1, 2  # numbers that the singular and the plural of English stand for
_MAGIC = 0x950412DE
_CONTEXT_END, _FORM_END = b"\x04", b"\0"
_CHARSET = re.compile(rb"charset=([\w.:-]+)", re.IGNORECASE)
_PLURAL = re.compile(rb"^Plural-Forms:.*?plural=([^;\n]+)", re.IGNORECASE | re.MULTILINE)
# a line that is neither empty nor a comment; Babel reads other text as if quotes were around it
_STRING_LINE = re.compile(r'\s*(\w+(\[\d+\])?\s*)?"([^"\\]|\\.)*"\s*')
_GERMANIC = "n != 1"  # the rule of a catalogue that names none
# a mark before the letter that, pressed with Alt, chooses a menu entry: GTK's _, Qt's &
_MARK = re.compile(r"(?<![_&])[_&](?=[^\W_])")


@dataclass(frozen=True)
class _Message:
    """A message: its text, or singular and plural; its translation, or all forms of it."""

    texts: tuple[str, ...]
    forms: tuple[str, ...]
    where: str


def read_catalogue(path: Path) -> Iterator[tuple[str, str, str]]:
    """(message, translation, where it stands: "line 12" or "message 12") in the file's order.

    Raises:
        ValueError: a damaged file; what is wrong is named, and the line or message.
        ModuleNotFoundError: a .po file, but Babel is not installed.
    """
    rule, messages = _read_mo(path) if path.suffix == ".mo" else _read_po(path)
    try:
        form_of: Callable[[int], int] = gettext.c2py(rule)
        forms_of = {count: form_of(count) for count in (_ONE, _MORE)}
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{path}: Plural-Forms of the header: {error}") from error
    for message in messages:
        for text, count in zip(message.texts, (_ONE, _MORE), strict=False):
            form = forms_of[count] if len(message.texts) > 1 else 0
            if text and 0 <= form < len(message.forms) and message.forms[form]:
                yield text, message.forms[form], message.where


def strip_accelerators(source: str, target: str) -> tuple[str, str]:
    """Both texts without the mark of a menu entry's key: "_Open", "Save &As".

    A text with several such marks has none of a key, and a word of both texts that has one inside
    (max_length, AT&T) is a name: these stay.
    """
    inside = {word for word in source.split() if _MARK.search(word, 1)}
    if inside & set(target.split()):
        return source, target
    return _without_mark(source), _without_mark(target)


def _without_mark(text: str) -> str:
    return _MARK.sub("", text) if len(_MARK.findall(text)) == 1 else text


def _read_po(path: Path) -> tuple[str, list[_Message]]:
    """The rule of plurals and the messages."""
    try:
        from babel.messages.pofile import PoFileError, read_po
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs the package babel: pip install 'bertkern[train]'", name="babel"
        ) from error
    # Babel itself decodes what comes before the header's charset as UTF-8
    charset = _charset(path.read_bytes())
    line = 0

    def counted() -> Iterator[str]:
        nonlocal line
        with path.open("rb") as file:
            for content in file:
                line += 1
                text = content.decode(charset)
                if line == 1:
                    text = text.removeprefix("\ufeff")
                if text.strip() and text.lstrip()[0] != "#" and not _STRING_LINE.fullmatch(text):
                    raise ValueError(f"not one string in double quotes: {text.strip()!r}")
                yield text

    try:
        catalogue = read_po(counted(), ignore_obsolete=True, charset=charset, abort_invalid=True)
    except PoFileError as error:
        number = error.lineno + 1  # Babel counts from 0
        raise ValueError(f"{path}: line {number}: {error.args[0]}: {error.line!r}") from error
    except UnicodeDecodeError as error:
        raise _undecodable(f"{path}: line {line}", error) from error
    except (ValueError, LookupError) as error:
        raise ValueError(f"{path}: line {line}: {error}") from error
    return catalogue.plural_expr, [
        _Message(_as_tuple(m.id), _as_tuple(m.string), f"line {m.lineno}")
        for m in catalogue
        if m.id and not m.fuzzy
    ]


def _as_tuple(text: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else tuple(text or ())


def _read_mo(path: Path) -> tuple[str, list[_Message]]:
    """The rule of plurals and the messages."""
    content = path.read_bytes()
    order = next((o for o in "<>" if content[:4] == struct.pack(f"{o}I", _MAGIC)), None)
    if order is None:
        raise ValueError(f"{path}: not a .mo catalogue: it begins with {content[:4].hex()!r}")
    try:
        _, count, ids_at, strings_at = struct.unpack_from(f"{order}4I", content, 4)
        entries = [
            tuple(_text_at(content, order, table + 8 * i) for table in (ids_at, strings_at))
            for i in range(count)
        ]
    except (struct.error, IndexError) as error:
        raise ValueError(f"{path}: damaged: its tables point behind the file's end") from error
    header = next((string for text, string in entries if not text), b"")
    charset = _charset(header)
    rule = found[1].decode("ascii", "replace") if (found := _PLURAL.search(header)) else _GERMANIC
    messages = []
    for number, (text, string) in enumerate(entries):
        if not text:
            continue
        where = f"message {number}"
        text = text.split(_CONTEXT_END, 1)[-1]
        try:
            texts, forms = (
                tuple(part.decode(charset) for part in side.split(_FORM_END))
                for side in (text, string)
            )
        except UnicodeDecodeError as error:
            raise _undecodable(f"{path}: {where}", error) from error
        except LookupError as error:
            raise ValueError(f"{path}: the header: {error}") from error
        messages.append(_Message(texts, forms, where))
    return rule, messages


def _charset(text: bytes) -> str:
    """What a header, or the first one in a text, says; without one UTF-8."""
    found = _CHARSET.search(text)
    return found[1].decode() if found else "utf-8"


def _text_at(content: bytes, order: str, entry: int) -> bytes:
    length, start = struct.unpack_from(f"{order}2I", content, entry)
    if start + length > len(content):
        raise IndexError
    return content[start : start + length]


def _undecodable(where: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{where}: not {error.encoding}, the header's charset (UTF-8 without one): byte "
        f"0x{error.object[error.start]:02x}"
    )
