"""Preparing data: sources, shards, interruptions, the data sets over them, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from models import tiny_model

from deltanet.train import finished, prepare, shards
from deltanet.train.blocks import TokenBlocks, document_ids, token_stream
from deltanet.train.prepare import prepare_shipped
from deltanet.train.shards import PackedDocuments, ShardBlocks, TokenShards, collate_packs, token_dtype
from deltanet.train.sources import DatasetSource, FileSource
from deltanet.train.tokenization import train_tokenizer

DOCUMENTS = [f"Chapter {i}\n\nIt was a fine day; {'nobody said so. ' * (i % 4)}£{i}." for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300)


def write_jsonl(path, documents, field="text"):
    path.write_text("".join(json.dumps({field: text, "id": 1}) + "\n" for text in documents))
    return path


@pytest.fixture
def source(tmp_path):
    return FileSource([write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)])


@pytest.fixture
def prepared(tmp_path, source, tokenizer):
    prepare.prepare(tmp_path / "data", source, tokenizer, shard_tokens=100)
    return tmp_path / "data"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class TestSources:
    def test_every_kind_of_file_gives_its_documents(self, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        folder = tmp_path / "folder"
        folder.mkdir()
        for i, text in enumerate(DOCUMENTS[:2]):
            (folder / f"{i}.txt").write_text(text)
        write_jsonl(folder / "2.jsonl", [*DOCUMENTS[2:5], ""])
        parquet.write_table(pyarrow.table({"text": [*DOCUMENTS[5:7], "", *DOCUMENTS[7:]]}), folder / "3.parquet")
        (folder / "ignored.csv").write_text("a,b")
        source = FileSource([folder])
        read = list(source.documents(0))
        assert [text for text, _ in read] == DOCUMENTS
        assert sum(size for _, size in read) == pytest.approx(source.size, rel=0.15)  # the rest is the two empty ones
        assert [text for text, _ in source.documents(6)] == DOCUMENTS[6:]

    def test_data_set(self, tmp_path):
        pytest.importorskip("datasets")
        write_jsonl(tmp_path / "train.jsonl", ["", *DOCUMENTS], field="content")
        source = DatasetSource(str(tmp_path), None, "train", "content")
        assert [text for text, _ in source.documents(0)] == DOCUMENTS
        assert [text for text, _ in source.documents(7)] == DOCUMENTS[7:]

    @pytest.mark.parametrize(
        ("name", "content", "field", "message"),
        [
            ("a.csv", b"a", "text", "a.csv is none of these; allowed: directories and .txt, .jsonl, .parquet"),
            ("a.txt", b"\xff", "text", "a.txt is not UTF-8"),
            ("a.jsonl", b'{"text": "x"}\n{"te', "text", "a.jsonl, line 2 is no JSON"),
            ("a.jsonl", b'{"content": "x", "id": 1}\n', "text", "'text', which .*line 1 has no text under.*'content'"),
        ],
    )
    def test_bad_files(self, tmp_path, name, content, field, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(FileSource([tmp_path / name], field).documents(0))

    def test_missing_files(self, tmp_path):
        with pytest.raises(ValueError, match="nowhere does not exist"):
            FileSource([tmp_path / "nowhere"])
        with pytest.raises(ValueError, match="`files` is .*; allowed: at least one .txt"):
            FileSource([tmp_path])


class TestPrepare:
    def test_shards_are_the_documents_in_turn(self, prepared, tokenizer):
        data, expected = TokenShards(prepared), token_stream(DOCUMENTS, tokenizer)
        assert len(data.index["shards"]) > 2
        assert torch.equal(data.read(0, len(data)), expected)
        lengths = [len(document_ids(text, tokenizer)) for text in DOCUMENTS]
        assert data.document_starts().tolist() == [0, *np.cumsum(lengths)[:-1]]

    def test_dtype_is_the_smallest_that_holds_the_vocabulary(self):
        assert [token_dtype(size).itemsize for size in (300, 2**16, 2**16 + 1)] == [2, 2, 4]

    @pytest.mark.parametrize("point", ["tokens", "documents", "index.json", "between"])
    def test_an_interruption_anywhere_changes_nothing(self, tmp_path, source, tokenizer, prepared, monkeypatch, point):
        output, write, finished_shards = tmp_path / "broken", prepare.write_whole, []

        def broken_write(path, data):
            if path.name in (f"shard-00001.{point}", point) and (output / "shard-00001.tokens").exists() == (
                point != "tokens"
            ):
                path.with_name(f"{path.name}.partial").write_bytes(bytes(data)[:5])  # what a kill leaves
                raise KeyboardInterrupt
            if point == "between" and path.name == "shard-00002.tokens":
                raise KeyboardInterrupt
            write(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(prepare, "write_whole", broken_write)
            with pytest.raises(KeyboardInterrupt):
                prepare.prepare(output, source, tokenizer, shard_tokens=100)
        with pytest.raises(ValueError, match="broken is not finished; the command that began it goes on"):
            TokenShards(output)
        monkeypatch.setattr(
            prepare, "write_whole", lambda path, data: (finished_shards.append(path.name), write(path, data))
        )
        prepare.prepare(output, source, tokenizer, shard_tokens=100)
        assert "shard-00000.tokens" not in finished_shards
        assert contents(output) == contents(prepared)

    def test_processes_change_nothing(self, tmp_path, source, tokenizer, prepared, monkeypatch):
        monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 100)
        prepare.prepare(tmp_path / "parallel", source, tokenizer, shard_tokens=100, processes=2)
        assert contents(tmp_path / "parallel") == contents(prepared)

    def test_a_finished_directory_is_used_again_and_not_for_something_else(self, tmp_path, source, tokenizer, prepared):
        before = contents(prepared)
        prepare.prepare(prepared, source, tokenizer, shard_tokens=100)
        with pytest.raises(ValueError, match="begun with another tokenizer_sha256, vocab_size; remove it"):
            prepare.prepare(prepared, source, train_tokenizer(DOCUMENTS, 290), shard_tokens=100)
        with pytest.raises(ValueError, match="begun with another shard_tokens, source"):
            prepare.prepare(prepared, FileSource([write_jsonl(tmp_path / "x.jsonl", DOCUMENTS[1:])]), tokenizer)
        assert contents(prepared) == before
        with pytest.raises(ValueError, match="has no readable index.json"):
            prepare.prepare(tmp_path, source, tokenizer)

    def test_no_room_is_noticed_before_work_and_before_each_shard(self, tmp_path, source, tokenizer, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(finished.shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(OSError, match="0.0 GB free; about 0.0 GB are needed"):
            prepare.prepare(tmp_path / "data", source, tokenizer)
        assert not (tmp_path / "data").exists()
        monkeypatch.setattr(prepare, "BYTES_PER_TOKEN", source.size)
        with pytest.raises(OSError, match="are needed"):
            prepare.prepare(tmp_path / "data", source, tokenizer)
        assert [path.name for path in (tmp_path / "data").glob("shard*")] == []

    def test_nothing_but_empty_documents(self, tmp_path, tokenizer):
        source = FileSource([write_jsonl(tmp_path / "empty.jsonl", ["", ""])])
        with pytest.raises(ValueError, match="are empty; allowed: at least one that is not"):
            prepare.prepare(tmp_path / "data", source, tokenizer)

    def test_shipped_text_goes_on_with_its_tokenizer(self, tmp_path, monkeypatch):
        monkeypatch.setattr("deltanet.train.sources.shipped_chapters", lambda split: DOCUMENTS)
        first = prepare_shipped(tmp_path / "data", 300)
        assert prepare_shipped(tmp_path / "data", 300) == first and first["vocab_size"] == 300

    def test_command(self, tmp_path, source, tokenizer, prepared, monkeypatch, capsys):
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        command = ["prepare", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer"), "--processes", "1"]
        monkeypatch.setattr(prepare, "quiet", lambda: None)
        monkeypatch.setattr("sys.argv", [*command, "--shard-tokens", "100", str(tmp_path / "documents.jsonl")])
        assert prepare.main() == 0
        assert contents(tmp_path / "out") == contents(prepared)
        assert f"{len(TokenShards(prepared)):,} tokens of 12 documents" in capsys.readouterr().out
        monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "nowhere")])
        assert prepare.main() == 2
        assert "nowhere does not exist" in capsys.readouterr().err


class TestRefusedShards:
    def test_an_empty_shard(self, prepared):
        (prepared / "shard-00001.tokens").write_bytes(b"")
        with pytest.raises(ValueError, match="shard-00001.tokens has 0 bytes; allowed: .* more than none"):
            TokenShards(prepared, verify=False)

    @pytest.mark.parametrize("kind", ["tokens", "documents"])
    def test_a_changed_byte(self, prepared, kind):
        path = prepared / f"shard-00001.{kind}"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        with pytest.raises(ValueError, match=f"shard-00001.{kind} has the checksum"):
            TokenShards(prepared)
        TokenShards(prepared, verify=False)

    @pytest.mark.parametrize(
        ("size", "message"),
        [(290, "a vocabulary of 290 ids; allowed: 300"), (300, "has the checksum .* which made the shards")],
    )
    def test_another_tokenizer(self, prepared, size, message):
        train_tokenizer(["another text " * 9, *DOCUMENTS[3:]], size).save_pretrained(prepared / "tokenizer")
        with pytest.raises(ValueError, match=message):
            TokenShards(prepared)

    def test_checksum_of_a_tokenizer_outlives_its_use(self, tokenizer):
        before = shards.tokenizer_checksum(tokenizer)
        tokenizer(DOCUMENTS, padding=True, truncation=True, max_length=5)
        assert shards.tokenizer_checksum(tokenizer) == before


class TestBlocks:
    @pytest.mark.parametrize("length", [7, 60, 200])
    def test_blocks_are_those_in_memory(self, prepared, tokenizer, length):
        expected = TokenBlocks(token_stream(DOCUMENTS, tokenizer), length)
        blocks = ShardBlocks(TokenShards(prepared), length)
        assert len(blocks) == len(expected)
        for i in range(len(blocks)):
            assert all(torch.equal(blocks[i][key], expected[i][key]) for key in ("input_ids", "labels"))

    def test_too_short(self, prepared):
        with pytest.raises(ValueError, match="tokens; allowed: at least `block_length` = 100000"):
            ShardBlocks(TokenShards(prepared), 100000)


class TestPacks:
    @pytest.mark.parametrize("length", [60, 100, 10000])
    def test_packs_are_whole_documents_and_as_many_as_fit(self, prepared, tokenizer, length):
        packs = PackedDocuments(TokenShards(prepared), length)
        found = [[document["input_ids"].tolist() for document in packs[i]["documents"]] for i in range(len(packs))]
        assert sum(found, []) == [document_ids(text, tokenizer) for text in DOCUMENTS]
        sizes = [sum(map(len, pack)) for pack in found]
        assert max(sizes) <= length
        assert all(size + len(after[0]) > length for size, after in zip(sizes, found[1:]))

    @pytest.mark.parametrize("kind", ["pure", "sliding", "global"])
    def test_a_batch_of_packs_has_the_losses_of_its_documents_alone(self, prepared, kind):
        packs = PackedDocuments(TokenShards(prepared), 70)
        batch, model = collate_packs([packs[0], packs[1]]), tiny_model(kind, vocab_size=300)
        packed = model(**{**batch, "num_items_in_batch": 1}).loss
        alone = 0.0
        for document in packs[0]["documents"] + packs[1]["documents"]:
            ids = document["input_ids"][None]
            logits = model(ids).logits[0, :-1].log_softmax(-1)
            alone -= logits.gather(1, ids[0, 1:, None]).sum()
        assert packed.item() == pytest.approx(alone.item(), rel=1e-5)

    def test_a_document_longer_than_the_context(self, prepared):
        with pytest.raises(ValueError, match="Document 11 of .* tokens.*at most `block_length` = 20. Raise that"):
            PackedDocuments(TokenShards(prepared), 20)
