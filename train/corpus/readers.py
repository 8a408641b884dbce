"""The documents of a package's files, as paragraphs: text, pages of HTML, the novels of an R package, Bibles for SWORD."""

import html
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import PurePosixPath

Files = Iterable[tuple[str, bytes]]
Documents = Iterator[tuple[str, list[str]]]

NOT_READ = ("northanger abbey",)
"""Its chapters are the held-out text of the tests and of the smoke suite."""


def text(files: Files) -> Documents:
    """One document a file; blank lines part paragraphs."""
    for path, data in files:
        yield PurePosixPath(path).stem, _paragraphs(data.decode("utf-8"))


def pages(files: Files) -> Documents:
    """One document a page of HTML: its `<p>`, without what stands in code blocks, tables and navigation."""
    for path, data in files:
        page = _Page()
        page.feed(data.decode("utf-8", errors="ignore"))
        page.close()
        page.end()
        yield path, page.paragraphs


def novels(files: Files) -> Documents:
    """One document a chapter, of novels kept as lines in a lazy-loading database of R."""
    for _, data in files:
        while data:
            # Each value: its length in four bytes, and a zlib stream.
            stream = zlib.decompressobj()
            lines = list(_r_strings(stream.decompress(data[4:])))
            data = stream.unused_data
            title = lines[0].strip().lower()
            if title not in NOT_READ:
                for number, chapter in enumerate(_chapters("\n".join(lines[1:])), 1):
                    yield f"{title}, {number}", [paragraph.replace("_", "") for paragraph in _paragraphs(chapter)]


def bible(files: Files) -> Documents:
    """One document a chapter, of SWORD's `zText` module with a book a block: OSIS without notes and titles."""
    files = {PurePosixPath(path).name: data for path, data in files}
    for testament in ("ot", "nt"):
        blocks, data = files[f"{testament}.bzs"], files[f"{testament}.bzz"]
        for offset, size, _ in struct.iter_unpack("<III", blocks):
            book = zlib.decompress(data[offset : offset + size]).decode("utf-8") if size else ""
            _, *parts = re.split(r'<chapter [^>]*?osisID="([^"]+)"[^>]*?sID=[^>]*>', book)
            for name, chapter in zip(parts[::2], parts[1::2]):
                yield name, _osis(chapter)


READERS: dict[str, Callable[[Files], Documents]] = {"text": text, "pages": pages, "novels": novels, "bible": bible}


class _Page(HTMLParser):
    LEFT_OUT = ("pre", "table", "script", "style", "nav", "header", "footer", "head", "svg", "form", "aside")
    BLOCKS = ("div", "ul", "ol", "li", "dl", "dd", "dt", "h1", "h2", "h3", "h4", "h5", "h6")

    def __init__(self):
        super().__init__()
        self.paragraphs, self.pieces, self.left_out = [], None, 0

    def handle_starttag(self, tag, attributes):
        if tag == "br" and self.pieces is not None:
            self.pieces.append(" ")
        if tag not in ("p", "blockquote", *self.BLOCKS, *self.LEFT_OUT):
            return
        self.end()
        self.left_out += tag in self.LEFT_OUT
        # DocBook's pages have paragraphs of this form.
        if tag in ("p", "blockquote") or ("class", "para") in attributes:
            self.pieces = []

    def handle_endtag(self, tag):
        if tag in self.LEFT_OUT:
            self.left_out = max(0, self.left_out - 1)
        if tag in ("p", "blockquote", *self.BLOCKS, *self.LEFT_OUT):
            self.end()

    def handle_data(self, data):
        if self.pieces is not None and not self.left_out:
            self.pieces.append(data)

    def end(self):
        if self.pieces:
            self.paragraphs.append("".join(self.pieces))
        self.pieces = None


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text.replace("\r\n", "\n"))


def _r_strings(data: bytes) -> Iterator[str]:
    """The elements of a character vector in R's serialisation, version 3 in XDR: a header, the count, each with a flag."""
    encoding = int.from_bytes(data[14:18], "big")
    offset = 18 + encoding
    count = int.from_bytes(data[offset + 4 : offset + 8], "big")
    offset += 8
    for _ in range(count):
        size = int.from_bytes(data[offset + 4 : offset + 8], "big")
        yield data[offset + 8 : offset + 8 + size].decode("utf-8")
        offset += 8 + size


def _chapters(novel: str) -> list[str]:
    heading = re.compile(r"^ *(?:VOLUME [IVX]+\s+)?CHAPTER [IVXL\d]+\.?[^\n]*$", re.MULTILINE | re.IGNORECASE)
    closing = re.compile(r"^ *(VOLUME [IVX]+|THE END|FINIS) *$", re.MULTILINE | re.IGNORECASE)
    return [closing.sub("", part) for part in heading.split(novel)[1:]]


def _osis(chapter: str) -> list[str]:
    chapter = re.sub(r"<(note|title)\b[^>]*>.*?</\1>", " ", chapter, flags=re.DOTALL)
    chapter = re.sub(r'<div [^>]*sID=[^>]*type="x-p"[^>]*>', "\n\n", chapter)
    chapter = re.sub(r"<lg?\b[^>]*>|<verse\b[^>]*>", " ", chapter)
    return _paragraphs(html.unescape(re.sub(r"<[^>]+>", "", chapter)))
