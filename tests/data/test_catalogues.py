"""gettext catalogues: what Babel writes and Python's gettext reads is what comes out."""

import gettext
import io
import struct

import pytest
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po

from bertkern.data.catalogues import read_catalogue, strip_accelerators

PO = r"""# A translator.
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\n"

#: a.c:1
msgid "Open"
msgstr "Öffnen"

msgctxt "menu"
msgid "Open"
msgstr "Aufmachen"

msgid "not translated"
msgstr ""

#, fuzzy
msgid "guessed"
msgstr "geraten"

msgid "%d file\n"
msgid_plural "%d files\n"
msgstr[0] "%d Datei\n"
msgstr[1] "%d Dateien\n"

msgid ""
"two "
"lines"
msgstr ""
"zwei "
"Zeilen"

#~ msgid "old"
#~ msgstr "alt"
"""
PAIRS = [
    ("Open", "Öffnen"),
    ("Open", "Aufmachen"),
    ("%d file\n", "%d Datei\n"),
    ("%d files\n", "%d Dateien\n"),
    ("two lines", "zwei Zeilen"),
]
POLISH = "nplurals=3; plural=(n==1 ? 0 : n%10>=2 && n%10<=4 && (n%100<10 || n%100>=20) ? 1 : 2);"


def compiled(po: str) -> bytes:
    file = io.BytesIO()
    write_mo(file, read_po(io.StringIO(po)))
    return file.getvalue()


def pairs_of(path):
    return [(source, target) for source, target, _ in read_catalogue(path)]


def test_po(write):
    path = write("de.po", PO)
    assert pairs_of(path) == PAIRS
    assert [where for *_, where in read_catalogue(path)] == [
        "line 8",
        "line 12",
        "line 22",
        "line 22",
        "line 27",
    ]


def test_mo(write):
    path = write("de.mo", compiled(PO))
    assert sorted(pairs_of(path)) == sorted(PAIRS)
    assert all(where.startswith("message ") for *_, where in read_catalogue(path))


def test_a_big_endian_mo_is_read(write):
    content = compiled(PO)
    fields = 7 + 4 * struct.unpack_from("<7I", content)[2]  # two tables behind the header
    swapped = struct.pack(f">{fields}I", *struct.unpack_from(f"<{fields}I", content))
    path = write("de.mo", swapped + content[4 * fields :])
    with path.open("rb") as file:
        assert gettext.GNUTranslations(file).gettext("two lines") == "zwei Zeilen"
    assert sorted(pairs_of(path)) == sorted(PAIRS)


@pytest.mark.parametrize("suffix", ["po", "mo"])
def test_the_rule_of_plurals_chooses_the_form(write, suffix):
    po = (
        'msgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=UTF-8\\n"\n'
        f'"Plural-Forms: {POLISH}\\n"\n\n'
        'msgid "%d file"\nmsgid_plural "%d files"\n'
        'msgstr[0] "%d plik"\nmsgstr[1] "%d pliki"\nmsgstr[2] "%d plików"\n'
    )
    path = write(f"pl.{suffix}", po if suffix == "po" else compiled(po))
    truth = gettext.GNUTranslations(io.BytesIO(compiled(po)))
    assert pairs_of(path) == [
        ("%d file", truth.ngettext("%d file", "%d files", 1)),
        ("%d files", truth.ngettext("%d file", "%d files", 2)),
    ]


def test_one_form_for_all_numbers(write):
    po = (
        'msgid ""\nmsgstr ""\n"Plural-Forms: nplurals=1; plural=0;\\n"\n\n'
        'msgid "%d file"\nmsgid_plural "%d files"\nmsgstr[0] "%d ファイル"\n'
    )
    assert pairs_of(write("ja.po", po)) == [("%d file", "%d ファイル"), ("%d files", "%d ファイル")]


@pytest.mark.parametrize("suffix", ["po", "mo"])
def test_another_charset_of_header_and_comments_too(write, suffix):
    po = PO.replace("charset=UTF-8", "charset=ISO-8859-1").replace("# A", "# J\xfcrgen, a")
    po = po.replace('"Content-Type', '"Last-Translator: J\xfcrgen\\n"\n"Content-Type')
    content = po.encode("latin-1") if suffix == "po" else compiled(po)
    assert b"J\xfcrgen" in content
    assert sorted(pairs_of(write(f"de.{suffix}", content))) == sorted(PAIRS)


def test_damaged_mo(write):
    content = compiled(PO)
    with pytest.raises(
        ValueError, match=r"no\.mo: not a \.mo catalogue: it begins with '6d736769'"
    ):
        pairs_of(write("no.mo", b"msgid"))
    for length in (4, 20, 40, len(content) - 10):
        with pytest.raises(ValueError, match=r"cut\.mo: damaged"):
            pairs_of(write("cut.mo", content[:length]))
    with pytest.raises(ValueError, match=r"bad\.mo: message \d: not utf-8.*0x80"):
        pairs_of(write("bad.mo", content.replace("Öffnen".encode(), b"\x80ffnen!")))
    with pytest.raises(ValueError, match="unknown encoding"):
        pairs_of(write("x.mo", content.replace(b"charset=utf-8", b"charset=xyz-8")))


def test_damaged_po(write):
    with pytest.raises(ValueError, match=r"bad\.po: line 9: .*msgtsr"):
        pairs_of(write("bad.po", PO.replace('msgstr "Öffnen"', 'msgtsr "Öffnen"')))
    with pytest.raises(ValueError, match=r"bytes\.po: line \d+: not utf-8.*0xd6"):
        pairs_of(write("bytes.po", PO.encode("latin-1")))
    with pytest.raises(ValueError, match=r"rule\.po: .*Plural-Forms"):
        pairs_of(write("rule.po", PO.replace("plural=(n != 1)", "plural=(n !! 1)")))


@pytest.mark.parametrize("line", ['msgid "Open', "msgid Open", 'msgid "O"pen"', 'msgid "O" "pen"'])
def test_a_line_without_one_quoted_string_is_an_error(write, line):
    # Babel alone takes the first and the last character for quotes, whatever they are
    with pytest.raises(ValueError, match=rf"bad\.po: line 8: not one string.*'{line}'"):
        pairs_of(write("bad.po", PO.replace('msgid "Open"', line, 1)))


def test_quotes_and_backslashes_in_a_string(write):
    po = r'''msgid "\"a\\"''' + "\n" + r'''msgstr "#\\\"b"'''
    assert pairs_of(write("de.po", po)) == [('"a\\', '#\\"b')]


def test_a_byte_order_mark_is_no_text(write):
    assert pairs_of(write("de.po", "\ufeff" + PO)) == PAIRS
    assert pairs_of(write("a.po", '\ufeffmsgid "a"\nmsgstr "b"')) == [("a", "b")]


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("_Open", "Ö_ffnen", ("Open", "Öffnen")),
        ("Save &As…", "Speichern &unter…", ("Save As…", "Speichern unter…")),
        ("max_length is _", "max_length ist _", ("max_length is _", "max_length ist _")),
        ("AT&T files", "Dateien von AT&T", ("AT&T files", "Dateien von AT&T")),
        ("_a or _b", "_a oder _b", ("_a or _b", "_a oder _b")),
        ("Black & white", "Schwarz & weiß", ("Black & white", "Schwarz & weiß")),
        ("__init__", "__init__", ("__init__", "__init__")),
    ],
)
def test_strip_accelerators(source, target, expected):
    assert strip_accelerators(source, target) == expected


@pytest.mark.parametrize("rule", ["n%0", "n/0"])
def test_a_plural_rule_that_divides_by_nothing_is_named(tmp_path, rule):
    path = tmp_path / "a.po"
    path.write_text(
        f'msgid ""\nmsgstr "Plural-Forms: nplurals=2; plural={rule};\\n"\n\n'
        'msgid "a file"\nmsgid_plural "files"\nmsgstr[0] "eine"\nmsgstr[1] "viele"\n'
    )
    with pytest.raises(ValueError, match="Plural-Forms of the header"):
        list(read_catalogue(path))


def test_a_plural_rule_below_zero_gives_no_form(tmp_path):
    path = tmp_path / "a.po"
    path.write_text(
        'msgid ""\nmsgstr "Plural-Forms: nplurals=2; plural=0-1;\\n"\n\n'
        'msgid "a file"\nmsgid_plural "files"\nmsgstr[0] "eine"\nmsgstr[1] "viele"\n'
    )
    assert list(read_catalogue(path)) == []
