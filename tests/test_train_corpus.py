"""The corpus: what its packages are, how their files become documents, and how documents become splits."""

import dataclasses
import hashlib
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from deltanet.train.corpus import __main__ as command
from deltanet.train.corpus import documents, packages, readers
from deltanet.train.corpus.documents import Deduplicator, Document, clean, document, is_sentence, split
from deltanet.train.corpus.packages import Package, fetch, manifest, members
from deltanet.train.shards import TokenShards

SENTENCE = "The lazy dog saw that the quick brown fox jumped over it, and went back to sleep number {}."


def package(name="stories", sha256="", **fields) -> Package:
    row = {
        "registry": "pypi",
        "version": "1.0",
        "licence": "MIT",
        "contents": "stories",
        "reader": "text",
        "files": "stories/*.txt",
    }
    return Package(**{"name": name, "sha256": sha256, "prose": True, **row, **fields})


def wheel(folder: Path, name="stories", count=12) -> Path:
    """A wheel with `count` stories, all of which tell one paragraph."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for story in range(count):
            own = "\n\n".join(SENTENCE.format(f"{name} {story} {i}") for i in range(8))
            archive.writestr(zipfile.ZipInfo(f"stories/{story:02d}.txt"), f"{own}\n\n{SENTENCE.format('of all')}\n")
        archive.writestr(zipfile.ZipInfo("stories/code.py"), "print()")
    return path


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_manifest():
    rows = manifest()
    assert len({row.name for row in rows}) == len(rows) > 10
    assert all(row.registry in packages.COMMANDS and row.reader in readers.READERS for row in rows)
    assert all(row.licence and row.contents and len(row.sha256) == 64 for row in rows)


class TestFetch:
    @pytest.fixture
    def registry(self, tmp_path, monkeypatch):
        """A client that copies what is in a folder, as `pip download` fetches it."""
        shelf = tmp_path / "shelf"
        shelf.mkdir()
        script = "import shutil, sys, pathlib; name = sys.argv[1]\n"
        script += f"files = list(pathlib.Path({str(shelf)!r}).glob(name.split('==')[0] + '-*'))\n"
        script += "shutil.copy(files[0], '.') if files and '==2' not in name else sys.exit('No match for ' + name)"
        monkeypatch.setitem(packages.COMMANDS, "pypi", [sys.executable, "-c", script])
        return shelf

    def test_once(self, registry, tmp_path, monkeypatch):
        wanted = package(sha256=checksum(wheel(registry)))
        found = fetch(wanted, tmp_path / "packages")
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched again"))
        assert fetch(wanted, tmp_path / "packages") == found
        assert [path for path, _ in members(wanted, found)] == [f"stories/{i:02d}.txt" for i in range(12)]

    def test_another_checksum(self, registry, tmp_path):
        wheel(registry)
        with pytest.raises(ValueError, match="has the checksum .*; allowed: 00, of 1.0"):
            fetch(package(sha256="00"), tmp_path / "packages")
        assert not list((tmp_path / "packages").iterdir())
        assert fetch(package(sha256="00"), tmp_path / "packages", any_version=True).exists()

    def test_a_damaged_archive(self, registry, tmp_path):
        wanted = package(sha256=checksum(wheel(registry)))
        fetch(wanted, tmp_path / "packages").write_bytes(b"half")
        with pytest.raises(ValueError, match="has the checksum"):
            fetch(wanted, tmp_path / "packages")

    def test_another_version(self, registry, tmp_path):
        wheel(registry)
        with pytest.raises(ValueError, match="stories==2.0 could not be fetched from pypi.*No match.*--any-version"):
            fetch(package(version="2.0"), tmp_path / "packages")

    def test_a_missing_client(self, tmp_path, monkeypatch):
        monkeypatch.setitem(packages.COMMANDS, "debian", [str(tmp_path / "apt-get"), "download"])
        with pytest.raises(ValueError, match="apt-get` is missing, which fetches stories=1.0 from debian"):
            fetch(package(registry="debian"), tmp_path / "packages")

    def test_all_missing_packages_are_named(self, registry, tmp_path):
        with pytest.raises(ValueError, match="(?s)one==1.0 .*two==1.0 .*--without PACKAGE"):
            command._fetch([package("one"), package("two")], tmp_path / "packages", False)


def test_a_debian_package(tmp_path):
    root = tmp_path / "tree"
    (root / "DEBIAN").mkdir(parents=True)
    control = "Package: stories\nVersion: 1.0\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: stories\n"
    (root / "DEBIAN" / "control").write_text(control)
    (root / "usr").mkdir()
    for name in ("b.txt", "a.txt", "c.png"):
        (root / "usr" / name).write_text(name)
    (root / "usr" / "link.txt").symlink_to("a.txt")
    try:
        subprocess.run(["dpkg-deb", "--build", root, tmp_path / "stories.deb"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("dpkg-deb is missing")
    found = members(package(files="usr/*.txt"), tmp_path / "stories.deb")
    assert found == [("usr/a.txt", b"a.txt"), ("usr/b.txt", b"b.txt")]
    with pytest.raises(ValueError, match=r"has no file usr/\*.pdf"):
        members(package(files="usr/*.pdf"), tmp_path / "stories.deb")


class TestReaders:
    def test_text(self):
        assert list(readers.text([("a/1790.txt", b"One\nline.\r\n\r\nTwo.")])) == [("1790", ["One\nline.", "Two."])]

    def test_pages(self):
        page = """<html><head><title>No</title></head><body><nav><p>No.</p></nav><h1>No</h1>
            <p>One <b>bold</b> &amp; <code>c</code>
            <p>Two<br>lines.<pre>no</pre><table><tr><td><p>No.</table><ul><li>No<li><p>Three.</ul>
            <div class="para">Four.<div>no</div></div><script>no</script></body></html>"""
        ((name, found),) = readers.pages([("a.html", page.encode())])
        assert name == "a.html"
        assert [" ".join(text.split()) for text in found] == ["One bold & c", "Two lines.", "Three.", "Four."]

    def test_novels(self):
        def r_value(lines):
            strings = b"".join(struct.pack(">II", 0x40009, len(line)) + line.encode() for line in lines)
            data = b"X\n" + struct.pack(">IIII", 3, 0, 0, 5) + b"UTF-8" + struct.pack(">II", 16, len(lines)) + strings
            return struct.pack(">I", len(data)) + zlib.compress(data)

        emma = [
            "EMMA",
            "By",
            "VOLUME I",
            "CHAPTER I",
            "",
            "A _very_",
            "nice day.",
            "",
            "Yes.",
            "VOLUME II",
            "CHAPTER II",
            "",
            "End.",
            "FINIS",
        ]
        other = ["NORTHANGER ABBEY", "CHAPTER 1", "", "Held out."]
        found = list(readers.novels([("Rdata.rdb", r_value(emma) + r_value(other))]))
        assert [name for name, _ in found] == ["emma, 1", "emma, 2"]
        assert [[clean(text) for text in paragraphs if text.strip()] for _, paragraphs in found] == [
            ["A very nice day.", "Yes."],
            ["End."],
        ]

    def test_bible(self):
        book = """<div osisID="Jude" type="book"/><title>No</title>
            <div sID="1" type="x-p"/><chapter n="1" osisID="Jude.1" sID="Jude.1"/>
            <w lemma="x">Jude</w>,<note placement="foot">no <w>no</w></note> a servant.<div eID="1" type="x-p"/>
            <div sID="2" type="x-p"/>Mercy &amp; peace.<l level="1" sID="3"/>Love<l eID="3"/><chapter eID="Jude.1"/>"""
        block = zlib.compress(book.encode())
        index = struct.pack("<III", 0, len(block), len(book))
        empty = [("ot.bzs", b""), ("ot.bzz", b"")]
        ((name, found),) = readers.bible([*empty, ("x/nt.bzs", index), ("x/nt.bzz", block)])
        assert name == "Jude.1"
        assert [clean(text) for text in found] == ["Jude, a servant.", "Mercy & peace. Love"]


class TestDocuments:
    def test_cleaning(self):
        assert clean("\u201cIt\u2019s\u00a0\ufb01ne,\u201d\n she\u00ad  said\u2026") == '"It\'s fine," she said...'

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            (SENTENCE.format(1), True),
            ("As Malatesta argued, property is the power of the master. [Anarchy, p. 12]", True),
            ("Chapter headings have no full stop, however long they may well be", False),
            ("Too short.", False),
            ("x = f(1, 2) + {'a': 3}; y[0] -> *p++; if (z != 0x1F) return;", False),
            ("Changed in version 3.9: this function now accepts paths and other things.", False),
        ],
    )
    def test_sentences(self, text, kept):
        assert is_sentence(text) is kept

    def test_paragraphs_occur_once(self):
        copies = Deduplicator([SENTENCE.format("known")])
        texts = [SENTENCE.format(i) for i in (1, 2, 1)]
        assert copies.first(texts) == texts[:2]
        assert copies.first([texts[0].upper().replace(",", " "), SENTENCE.format("known"), "Yes.", "Yes."]) == [
            "Yes.",
            "Yes.",
        ]

    def test_a_document_that_is_too_short(self):
        assert document("s", "n", [SENTENCE.format(1)], True, Deduplicator()) is None
        found = document("s", "n", ["***", *(SENTENCE.format(i) for i in range(8))], True, Deduplicator())
        assert found.text.split("\n\n") == [SENTENCE.format(i) for i in range(8)]

    def test_splits_by_document(self):
        whole = [
            Document(source, f"{source} {i}", "x" * 100) for source, count in (("a", 80), ("b", 20)) for i in range(count)
        ]
        parts = split(whole, held_out=1000)
        assert sorted(map(id, sum(parts.values(), []))) == sorted(map(id, whole))
        counts = {name: [sum(d.source == source for d in part) for source in "ab"] for name, part in parts.items()}
        assert counts == {"train": [64, 16], "validation": [8, 2], "test": [8, 2]}
        alone = split([d for d in whole if d.source == "b"], held_out=200)
        assert {d.name for d in alone["test"]} == {d.name for d in parts["test"] if d.source == "b"}

    def test_a_large_document_is_passed_over(self):
        whole = [Document("a", str(i), "x" * (5000 if i % 2 else 10)) for i in range(8)]
        parts = split(whole, held_out=30)
        assert max(d.size for d in parts["test"] + parts["validation"]) == 10

    def test_too_few_documents(self):
        with pytest.raises(ValueError, match="`a` has 2 documents; allowed: three and more"):
            split([Document("a", "1", "x"), Document("a", "2", "x")], 1)


class TestBuild:
    @pytest.fixture
    def output(self, tmp_path, monkeypatch):
        """Two packages that are fetched, and held-out splits of two documents each."""
        rows = []
        for name in ("stories", "tales"):
            (tmp_path / "corpus" / "packages" / name).mkdir(parents=True)
            archive = wheel(tmp_path / "corpus" / "packages" / name, name)
            rows.append(dataclasses.asdict(package(name, checksum(archive))))
        (tmp_path / "manifest.json").write_text(json.dumps(rows))
        monkeypatch.setattr(packages, "MANIFEST", tmp_path / "manifest.json")
        monkeypatch.setattr(command, "HELD_OUT", 2000)
        return tmp_path / "corpus"

    def test_everything(self, output, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["corpus", str(output), "--vocab-size", "300"])
        assert command.main() == 0
        assert "tokens" in capsys.readouterr().out
        report = json.loads((output / "corpus.json").read_text())
        texts = {}
        for name in documents.SPLITS:
            rows = [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
            texts[name] = [paragraph for row in rows for paragraph in row["text"].split("\n\n")]
            assert {row["source"] for row in rows} == {"stories", "tales"}
            shards = TokenShards(output / "shards" / name)
            sizes = {"documents": len(rows), "bytes": sum(len(row["text"]) for row in rows), "tokens": len(shards)}
            assert report["splits"][name] == {
                **sizes,
                "bytes_per_token": pytest.approx(sizes["bytes"] / len(shards), abs=1e-4),
            }
        everything = sum(texts.values(), [])
        assert len(everything) == len(set(everything)) == 2 * 12 * 8 + 1
        assert len(AutoTokenizer.from_pretrained(output / "tokenizer")) == 300
        assert report["packages"][1]["licence"] == "MIT" and report["packages"][1]["train"]["documents"] > 5

    def test_goes_on_and_begins_anew(self, output, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(command, "prepare", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                command.build(output, 300)
        with monkeypatch.context() as patch:
            for name in ("_write_texts", "train_tokenizer"):
                patch.setattr(command, name, lambda *a: pytest.fail("done already"))
            whole = command.build(output, 300)
        assert command.build(output, 310)["splits"]["train"]["tokens"] < whole["splits"]["train"]["tokens"]

    def test_a_package_left_out(self, output):
        report = command.build(output, 300, without=["tales"])
        assert [row["name"] for row in report["packages"]] == ["stories"]
