"""Turn text into token shards on disk, once, so that training only reads memory-mapped integers.

Run:  python prepare.py                                   # Python's library, as bytes; no download
      python prepare.py --data ~/books --teacher smollm2  # a folder of text, in SmolLM2's tokens
      python prepare.py --data allenai/c4 --config en --teacher microsoft/phi-1_5 --tokens 3e9

What comes out is one folder, and it appears whole or not at all. Killed half way, the same command
goes on from data/.<name>.partial, and ends with the same bytes:

    data/<name>/train_00000.bin ...   only token ids, uint16 (uint32 if the vocabulary needs it)
                val.bin               every 25th token or so, in whole documents, not trained on
                                      (a text file of more than 65,536 characters counts as several,
                                      and so does any document of more tokens than that)
                meta.json             tokenizer, vocabulary, counts, source, every shard's checksum

    document | <|endoftext|> | document | <|endoftext|> | ...   packed end to end, read in windows

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. What cannot be read becomes U+FFFD. The
last line says how often, and what was left out.

Training sees the windows in an order that depends on (seed, epoch) alone. So a place in the data is
one number, the count of windows before it, and a run can be taken up anywhere.

It leaves out: filtering, deduplication, mixing of several sources. Do these before, with tools made
for them.
"""
import argparse
import codecs
import collections
import contextlib
import copy
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import filelock
import huggingface_hub
import numpy as np
import tiktoken
import tokenizers
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from model_ssm import UsageError, first_line, go_offline_if_unreachable
from model_teacher import resolve_name

SHARD_TOKENS = 10**8    # 200 MB a shard in uint16
PIECE = 2**16           # characters read at once, so that memory does not depend on a file's size
BATCH = 2**20           # characters tokenised at once
SAVE_SECONDS = 5        # between two saves: what a kill can cost, and what memory holds
HELD_OUT = 0.04         # share of the tokens that go to val.bin
HELD_OUT_MOST = 2**22   # and its largest size


# -----------------------------------------------------------------------------
# Tokenizers

END_OF_TEXT = "<|endoftext|>"
SURROGATE = re.compile(r"[\ud800-\udfff]")
BLANK = 2**16           # in runs of white space of some eight times this length tiktoken panics
PROBE = ("def f(x):\n    return 'naïve' + str(3.14)\t# The  quick — brown fox\n\n"
         + END_OF_TEXT[:5])


class Tokenizer:
    """One face for the byte encoding and for any Hugging Face tokenizer.

    name: "bytes", or whatever Teacher.load takes ("tiny" has the byte encoding).
    vocab_size: one more than the largest id that text may get.
    eot: the id that separates documents.   stop_ids: all that end a text or a turn, sorted.
    dtype: the narrowest that holds an id.   threads: how many tiktoken may use.
    fingerprint: a hash of what it makes of a fixed sentence; those with one fingerprint agree.
    """

    def __init__(self, name):
        self.name, self.threads, self.hf = "bytes" if name == "tiny" else str(name), 8, None
        if self.name == "bytes":
            self.tiktoken = byte_encoding()
            self.vocab_size, self.eot = self.tiktoken.n_vocab, self.tiktoken.eot_token
            self.stop_ids = (self.eot,)
        else:
            self._from_transformers()
        seen = json.dumps([self.encode(PROBE), self.eot]).encode()
        self.fingerprint = hashlib.sha256(seen).hexdigest()[:16]

    def _from_transformers(self):
        path, options = resolve_name(self.name)
        try:
            self.hf = AutoTokenizer.from_pretrained(path, **options)
        except Exception as error:                # the hub client raises a dozen unrelated types
            raise UsageError(f"no tokenizer for {self.name}: {first_line(error)} "
                             "(with no network: python distill.py --preset tiny)") from error
        self.tiktoken = gpt2_encoding(self.hf)    # the same ids, several times as fast, or None
        vocabulary = self.hf.get_vocab()
        self.eot = vocabulary.get(END_OF_TEXT, self.hf.eos_token_id)
        if self.eot is None:
            raise UsageError(f"the tokenizer of {self.name} has no end-of-text token "
                             "to separate documents with")
        special = {i for i, token in self.hf.added_tokens_decoder.items() if token.special}
        # No text has special tokens in it, see encode_batch, but for what stands for the unknown.
        self.vocab_size = max(set(vocabulary.values()) - special
                              | {self.eot, self.hf.unk_token_id or 0}) + 1
        # The files' ids only if no text has them: a default of transformers may be any letter.
        ends = {self.eot, self.hf.eos_token_id} | end_tokens(path) & special
        self.stop_ids = tuple(sorted(ends - {None}))

    def check_rows(self, rows):
        """UsageError if text may get an id for which a model of `rows` tokens has no embedding"""
        if self.vocab_size > rows:
            raise UsageError(f"the tokenizer of {self.name} gives ids up to "
                             f"{self.vocab_size - 1:,}, the model has embeddings for {rows:,} "
                             "tokens: put the tokenizer that it was trained with in its place")

    @property
    def dtype(self):
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode_batch(self, texts):
        # Text that spells a special token is text, not a command: splitting it keeps data from
        # ending documents.
        texts = [without_surrogates(text) for text in texts]
        if self.tiktoken and not (self.hf and any(map(has_long_blank, texts))):
            return self.tiktoken.encode_ordinary_batch(texts, num_threads=self.threads)
        return self.hf(texts, add_special_tokens=False, split_special_tokens=True,
                       return_attention_mask=False, verbose=False)["input_ids"]

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_pieces(self, pieces):
        """[(text, ends), ...] -> an array of `dtype` for each, with `eot` where a document ends"""
        encoded = self.encode_batch([text for text, _ in pieces])
        return [np.asarray(ids + [self.eot] * ends, self.dtype)
                for ids, (_, ends) in zip(encoded, pieces, strict=True)]

    def save_pretrained(self, folder):
        """As a Hugging Face tokenizer"""
        (self.hf or byte_tokenizer(self.eot)).save_pretrained(folder)

    def bytes_in(self, ids):
        """How many bytes of text ids stand for: a document's end is none."""
        ids = [i for i in ids if i != self.eot]
        return len(self.tiktoken.decode_bytes(ids) if self.tiktoken else self.decode(ids).encode())

    def decode(self, ids):
        if self.hf is None:
            return self.tiktoken.decode(ids)
        return self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def without_surrogates(text):
    """U+FFFD in place of each half of a pair that stands alone: Rust takes no such text"""
    try:
        text.encode()
    except UnicodeEncodeError:
        return SURROGATE.sub("\ufffd", text)
    return text


def has_long_blank(text):
    """Is there a run of white space of 2 BLANK characters? Then BLANK of them, from a multiple of
    BLANK on, are white space too."""
    return any(text[i:i + BLANK].isspace() for i in range(0, len(text) - BLANK + 1, BLANK))


def end_tokens(path):
    """The ids at which the model in `path` ends a text, as its own files say"""
    found = set()
    for name in ("generation_config.json", "config.json"):
        try:
            file = cached_file(path, name)
        except OSError:
            file = None
        if file is not None:                        # a model may have neither
            ids = json.loads(Path(file).read_text("utf-8")).get("eos_token_id")
            found |= set(ids if isinstance(ids, list) else [ids])
    return found


def byte_encoding():
    """UTF-8 bytes as tokens 0..255, <|endoftext|> as 256: nothing to download or to learn."""
    # The pattern cuts the text before ranks are merged. It must never match the empty string:
    # tiktoken panics on that.
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})",
                             mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={END_OF_TEXT: 256})


def byte_tokenizer(eot):
    """The byte encoding as a Hugging Face tokenizer: 0..255 are bytes, 256 ends a text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_letters(), merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                                use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True,
                                                      normalized=False)])
    assert backend.token_to_id(END_OF_TEXT) == eot
    return PreTrainedTokenizerFast(tokenizer_object=backend,
                                   eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def byte_letters():
    """GPT-2 writes each byte as a letter: a printable one as itself, others from U+0100 on.

    -> {letter: byte}
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)}


def gpt2_encoding(hf):
    """A tokenizer with GPT-2's way of splitting, and Phi's, as a tiktoken.Encoding; else None.

    Phi adds runs of 2 to 31 spaces and of 2 to 9 tabs to GPT-2's vocabulary. They are no special
    tokens (tiktoken would look for these only where asked to) but come before all else in a text,
    so they come first in the pattern, and the rest of it must not take their spaces. The ids of
    merged pairs count up in the order of merging, which is what tiktoken ranks by.
    """
    about = json.loads(getattr(hf, "backend_tokenizer", None) and hf.backend_tokenizer.to_str()
                       or "{}")
    model, split = about.get("model", {}), about.get("pre_tokenizer") or {}
    merges = [pair.split(" ") if isinstance(pair, str) else pair
              for pair in model.get("merges", ())]
    ids, added = model.get("vocab", {}), {
        token["content"]: token["id"] for token in about.get("added_tokens", ())
        if token["content"] not in model.get("vocab", {}) and not token["special"]}
    kind = model.get("type"), split.get("type"), about.get("normalizer")
    if kind != ("BPE", "ByteLevel", None) or not merges or split.get("add_prefix_space") \
            or not split.get("use_regex", True) \
            or any(ids.get(a + b) != 256 + n for n, (a, b) in enumerate(merges)):
        return None
    runs = {" " * n for n in range(2, 32)} | {"\t" * n for n in range(2, 10)}
    if added.keys() not in (set(), runs):
        return None
    to_byte = byte_letters()
    ranks = {bytes(to_byte[letter] for letter in token): n for token, n in ids.items()
             if n < 256 + len(merges)}
    ranks |= {run.encode(): n for run, n in added.items()}
    space = r"(?:(?! {2}|\t{2})\s)" if added else r"\s"
    pattern = (r" {2,31}|\t{2,9}|" if added else "") + (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|"
        rf"{space}++(?!\S)|{space}+(?={space})|{space}")
    return tiktoken.Encoding("gpt2 like", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


# -----------------------------------------------------------------------------
# sources

class Documents:
    """The text of `source`, piece by piece, from any place on.

    source: "stdlib", a file or folder of text, JSONL or Parquet, or a Hugging Face id
    files, times: checksums of the names and sizes of what is read, and of when it was last changed;
                  None for a Hugging Face data set
    read: how much was read so far, repaired and left out
    UsageError if there is nothing to read, or no text in it.
    """

    def __init__(self, source, config=None):
        self.source, self.config = str(source), config
        self.paths, self.rows, self.files, self.times = files_of(self.source), None, None, None
        self.read = nothing_read()
        if self.paths is not None:
            about = [(str(path), path.stat()) for path in self.paths]
            self.files = checksum([(name, stat.st_size) for name, stat in about])
            self.times = checksum([stat.st_mtime_ns for _, stat in about])

    def batches(self, note=None):
        """Yields (pieces, note): about BATCH characters, and what to go on with after them.

        pieces: as pieces() yields them; of the last batch perhaps none
        note: JSON. "place" in files counts pieces: reading over them takes no time beside
        tokenising. A Hugging Face data set has a word for its own. "read" is self.read up to there.
        """
        batch, size = [], 0
        for text, ends in self.pieces(note or {}):
            batch.append((text, ends))
            size += len(text)
            if size >= BATCH:
                yield batch, self.note()
                batch, size = [], 0
        yield batch, self.note()

    def note(self):
        place = self.read["pieces"] if self.rows is None else self.rows.state_dict()
        return {"place": place, "read": copy.deepcopy(self.read)}

    def pieces(self, note):
        """Yields (text, ends) after `note`, {} for all: `ends` says that a document is complete."""
        place, hub = note.get("place"), self.paths is None
        self.read = nothing_read()
        if hub and "read" in note:      # files are read again from the first on, and counted again
            self.read = copy.deepcopy(note["read"])
        pieces = self._from_hub(place) if hub else self._from_files()
        try:
            for number, (text, ends) in enumerate(pieces, 1):
                if not isinstance(text, str):
                    raise UsageError(f'{self.source} row {number}: expected text in a field '
                                     f'"text", found {str(text)[:60]}')
                whole = without_surrogates(text)
                if whole is not text:
                    self._count_repairs(text)
                self.read["pieces"] += 1
                self.read["crc32"] = zlib.crc32(whole.encode() + END * ends, self.read["crc32"])
                if hub or number > (place or 0):
                    yield whole, ends
        except UsageError:
            raise
        except Exception as error:      # network, unknown id, gzip, Parquet: many types, one cure
            raise UsageError(f"cannot {self.doing}: {first_line(error)}") from error

    def _count_repairs(self, text):
        unreadable = text.count(UNREADABLE)
        lone = len(SURROGATE.findall(text)) - unreadable
        for what, n in (("lone surrogate", lone), ("unreadable character", unreadable)):
            if n:
                self.read["repaired"][what] = self.read["repaired"].get(what, 0) + n

    def _from_files(self):
        for path in self.paths:
            self.doing = f"read {path}"
            if self.source == "stdlib":
                self.read["files"] += 1
                yield from read_whole(path)
            elif why := why_left_out(path, alone=self.paths == [path]):
                left_out = self.read["left out"].setdefault(why, {"n": 0, "first": path.name})
                left_out["n"] += 1
            else:
                self.read["files"] += 1
                yield from reader(path)(path)

    def _from_hub(self, place):
        import datasets
        self.doing = (f"stream the data set {self.source} "
                      "(with no network: python distill.py --preset tiny)")
        go_offline_if_unreachable()
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
        self.rows = datasets.load_dataset(self.source, self.config, split="train", streaming=True)
        if place:
            self.rows.load_state_dict(place)
        for row in self.rows:
            yield row.get("text", row), True

    def differ_from(self, meta):
        """Is the text here another than the one that `meta` was made from?

        Where names, sizes and times are the same it is taken to be the same. A copy has other
        times: then it is read. (Data prepared before texts had a checksum knows names and sizes.)
        """
        if self.files == meta["files"] and self.times == meta.get("times", self.times):
            return False
        if "read" not in meta:
            return True
        print(f"{self.source} was copied or changed since it was prepared: it is read to compare")
        prepared, again = meta["read"], Documents(self.source)
        in_part = "place" in meta or meta["budget"] and meta["train_tokens"] >= meta["budget"]
        for _ in again.pieces({}):
            if in_part and again.read["pieces"] == prepared["pieces"]:
                break
        return any(again.read[key] != prepared[key] for key in ("pieces", "crc32"))


def nothing_read():
    return {"files": 0, "pieces": 0, "crc32": 0, "repaired": {}, "left out": {}}


def checksum(about):
    return zlib.crc32(json.dumps(about).encode())


def text_files(source):
    """The files of `source` in the order they are read; [] if there are none, or it is not here."""
    path = Path(source).expanduser()
    if source == "stdlib":
        root = Path(os.__file__).parent
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    return sorted(p for p in (path, *path.rglob("*")) if p.is_file() and reader(p))


def other_endings(source):
    """-> Counter {".pdf": 2}: of the files in a folder those that are of no kind we read"""
    others = [] if source == "stdlib" else Path(source).expanduser().rglob("*")
    return collections.Counter(sorted(p.suffix or "without ending" for p in others
                                      if p.is_file() and not reader(p)))


def files_of(source):
    """-> text_files(source); None if it is a Hugging Face id"""
    path = Path(source).expanduser()
    if files := text_files(source):
        return files
    if path.exists():
        raise UsageError(f"nothing to read in {source}: it takes {' '.join(READERS)}, "
                         "text and JSON also as .gz")
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix in READERS:
        raise UsageError(f"no such file or folder: {source} "
                         "(and not a Hugging Face id like allenai/c4)")
    return None


def why_left_out(path, alone):
    """Why a file of a folder is no text, by its beginning, in words; None if it may be one.

    Binary files, and text in an encoding that does not say its name, would be trained on as U+FFFD
    and NUL. A .json file beside others may be about them. (If it is `alone`, reading it will say.)
    """
    kind = reader(path)
    if kind is read_parquet:
        return None
    with opened(path) as file:
        head = file.read(2**13)
    if head.count(UNREADABLE) + head.count("\0") > MOST_UNREADABLE * len(head):
        return "not UTF-8"
    if kind is read_json and ".json" in path.suffixes and not alone:
        try:
            next(read_json(path), None)
        except UsageError:
            return 'no "text"'
    return None


UNREADABLE = "\udcff"       # stands for bytes that are not in the encoding, until they are counted
MOST_UNREADABLE = 0.25      # share of a file's beginning: more is another encoding, or no text
END = b"\xff"               # of a document, in the checksum of a text: no byte of UTF-8
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le",     # before UTF-16's, which
         codecs.BOM_UTF32_BE: "utf-32-be", codecs.BOM_UTF16_LE: "utf-16-le",     # begins like it
         codecs.BOM_UTF16_BE: "utf-16-be"}
codecs.register_error("unreadable", lambda error: (UNREADABLE, error.end))


def opened(path):
    """The text of a file, after its byte order mark. What is not in its encoding is UNREADABLE."""
    file = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    mark = next((mark for mark in MARKS if file.peek(4).startswith(mark)), b"")
    file.read(len(mark))
    return io.TextIOWrapper(file, MARKS.get(mark, "utf-8"), errors="unreadable")


def read_whole(path):
    with opened(path) as file:
        yield file.read(), True


def read_text(path):
    with opened(path) as file:
        text = file.read(PIECE)
        while text:
            if text[-1] != "\n":
                text += file.readline(PIECE)      # cut at the end of a line, where tokens end too
            following = file.read(PIECE)
            yield text, not following
            text = following


def read_json(path):
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line.lstrip("\ufeff"))["text"], True    # of files put together
                except (ValueError, KeyError, TypeError) as error:
                    raise UsageError(f"{path} line {number}: expected one JSON object "
                                     'with a "text" field') from error


def read_parquet(path):
    import pyarrow.parquet
    file = pyarrow.parquet.ParquetFile(path)
    for rows in file.iter_batches(batch_size=1000, columns=["text"]):
        try:
            texts = rows["text"].to_pylist()
        except UnicodeDecodeError:      # Arrow takes its writer's word that this is UTF-8
            texts = [data if data is None else data.decode("utf-8", "unreadable")
                     for data in rows["text"].cast(pyarrow.binary()).to_pylist()]
        yield from ((text, True) for text in texts)


READERS = {".txt": read_text, ".md": read_text, ".rst": read_text, ".py": read_text,
           ".jsonl": read_json, ".json": read_json, ".parquet": read_parquet}


def reader(path):
    """The function that reads `path`, by its name; None for a kind of file that we cannot read."""
    return READERS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)


# -----------------------------------------------------------------------------
# text -> tokens

def encoded(batches, tokenizer, processes=1):
    """(pieces, note), ... -> (an array of ids for each piece, note), ... in the same order

    Several processes take turns. Each has one batch in hand, so memory stays flat:

        batch    1 2 3 4 5 6 ...
        sent to  1 2 3 1 2 3 ...    just after its answer to the batch before was taken from it
    """
    if processes == 1:
        for pieces, note in batches:
            yield encode(pieces, tokenizer), note
        return
    context, workers = multiprocessing.get_context("fork"), {}
    for _ in range(processes):
        ours, theirs = context.Pipe()
        workers[ours] = context.Process(target=work, args=(ours, theirs, tokenizer), daemon=True)
        workers[ours].start()
        theirs.close()                              # now only it has this end: if it dies, we know
    sent = []
    try:
        for (pieces, note), worker in zip(batches, itertools.cycle(workers)):
            answer = [(received(worker), sent.pop(0)[1])] if len(sent) == processes else []
            worker.send(pieces)
            sent.append((worker, note))
            yield from answer
        for worker, note in sent:
            yield received(worker), note
    except (EOFError, OSError) as error:
        workers[worker].join(5)
        raise UsageError(f"a process that tokenises has died: {end_of(workers[worker])}") from error
    finally:
        for worker in workers:
            worker.close()
        for process in workers.values():
            process.join()


def work(ours, theirs, tokenizer):
    """What a worker does, until its pipe is closed, be it by a parent that is killed.

    It is a fork: there at once, and with the tokenizer, whatever that is. torch's threads are
    missing in it, but it never calls torch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the parent
    ours.close()
    os.environ["TOKENIZERS_PARALLELISM"], tokenizer.threads = "false", 1        # one core each
    with contextlib.suppress(EOFError, OSError):
        while True:
            try:
                answer = encode(theirs.recv(), tokenizer)
            except UsageError as error:
                answer = error
            theirs.send(answer)


def received(worker):
    answer = worker.recv()
    if isinstance(answer, UsageError):
        raise answer
    return answer


def end_of(process):
    """What a process died of, in words"""
    if process.exitcode == -signal.SIGKILL:
        return "it was killed, perhaps for want of memory: try fewer --processes"
    if process.exitcode and process.exitcode < 0:
        return f"signal {signal.Signals(-process.exitcode).name}"
    return f"exit code {process.exitcode}"


def encode(pieces, tokenizer):
    """tokenizer.encode_pieces(pieces). Where it fails, one line says so, and on which text.

    A panic in tiktoken's or tokenizers' Rust is no Exception.
    """
    if not pieces:                      # transformers takes no empty list
        return []
    try:
        return tokenizer.encode_pieces(pieces)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        text = pieces[0][0]
        if len(pieces) > 1:             # which of them?
            return [encode([piece], tokenizer)[0] for piece in pieces]
        raise UsageError(f"the tokenizer of {tokenizer.name} fails on a text of {len(text):,} "
                         f"characters, {text[:40]!r} ...: {type(error).__name__}: "
                         f"{first_line(error)}") from error


# -----------------------------------------------------------------------------
# tokens -> shards

def prepare(source, folder, tokenizer, config=None, tokens=None, processes=None):
    """Tokenise `source` into `folder`, up to `tokens` training tokens if given; -> the meta dict.

    Documents are held out greedily: one goes to val.bin whenever less than HELD_OUT of the tokens
    have, so the held-out ones are spread evenly. The bytes depend neither on `processes` (None:
    chosen here) nor on how often the call was killed and made again. UsageError for what Documents
    and encode say, if the folder is there, if another process is making it, or if the disk is
    short.
    """
    folder, documents = Path(folder), Documents(source, config)
    recipe = {"source": str(source), "config": config, "files": documents.files, "budget": tokens,
              "tokenizer": tokenizer.name, "fingerprint": tokenizer.fingerprint,
              "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
              "dtype": tokenizer.dtype.name}
    # One reader feeds about eight. Bytes are as fast to encode as to hand over, and only Linux has
    # forks that can be trusted.
    alone = tokenizer.name == "bytes" or sys.platform != "linux"
    processes = processes or (1 if alone else min(8, os.cpu_count()))
    with unfinished(folder, recipe, documents) as (partial, meta):
        needed = tokenizer.dtype.itemsize * ((tokens or 0) - meta["train_tokens"])
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise UsageError(f"{folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                             "make room, or stream with distill.py --stream")
        partial.mkdir(exist_ok=True)
        write_shards(documents, partial, tokenizer, meta, processes)
        partial.rename(folder)
    print(f"prepared {folder} | {meta['train_tokens']:,} training and {meta['val_tokens']:,} "
          f"held-out tokens of {meta['documents']:,} documents | {tokenizer.name} tokenizer, "
          f"vocabulary {tokenizer.vocab_size:,}\n{what_was_read(documents, meta)}")
    return meta


def what_was_read(documents, meta):
    """One line: how much was read, repaired and left out"""
    read, endings = meta.get("read", documents.read), other_endings(documents.source)
    kinds = [f"{ending} {n:,}" for ending, n in endings.most_common(5)]
    if len(endings) > 5:
        shown = sum(n for _, n in endings.most_common(5))
        kinds.append(f"other endings {endings.total() - shown:,}")
    for why, files in read["left out"].items():
        kinds.append(f"{why} {files['n']:,}, first {files['first']}")
    not_text = sum(files["n"] for files in read["left out"].values())

    said = "read " + counted(meta["documents"], "document")
    if documents.paths:
        said += " in " + counted(read["files"], "file")
        if read["files"] + not_text < len(documents.paths):     # --tokens were enough
            said += f" of {len(documents.paths):,}"
    if read["repaired"]:
        repaired = [counted(n, what) for what, n in read["repaired"].items()]
        said += f" | repaired {', '.join(repaired)} (now U+FFFD)"
    if kinds:
        said += f" | left out {counted(endings.total() + not_text, 'file')} ({', '.join(kinds)})"
    return said


def counted(n, what):
    """
    >>> counted(1, "file"), counted(2000, "file")
    ('1 file', '2,000 files')
    """
    return f"{n:,} {what}{'s' * (n != 1)}"


@contextlib.contextmanager
def unfinished(folder, recipe, documents):
    """-> where `folder` is made, and the note (meta.json) of what this recipe has done there so far

    It is ours alone, by a lock that the system opens if we are killed. Whatever else stops us, what
    the note counts is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "lock"))
    note, meta = partial / "meta.json", recipe | {
        "times": documents.times, "documents": 0, "train_tokens": 0, "val_tokens": 0,
        "train": {}, "val": {}, "place": None}
    with contextlib.ExitStack() as at_the_end:
        try:
            at_the_end.enter_context(filelock.FileLock(lock, timeout=0))
        except filelock.Timeout:
            raise UsageError(f"another process is preparing {folder}: wait for it") from None
        at_the_end.callback(lock.unlink)
        if folder.exists():
            raise UsageError(f"{folder} exists already: delete it to prepare it again, "
                             "or choose another --out")
        if note.exists():
            meta = json.loads(note.read_text("utf-8"))
        else:
            shutil.rmtree(partial, ignore_errors=True)
        for key, want in recipe.items():
            if meta[key] != want:
                raise UsageError(f"{partial} is unfinished and of another recipe ({key} was "
                                 f"{meta[key]}, is {want}): delete it to start over")
        if documents.differ_from(meta):
            raise UsageError(f"{partial} is unfinished and of another text than {documents.source} "
                             "has now: delete it to start over")
        try:
            yield partial, meta
        except BaseException as error:
            said = error
            # In writing: what fails to be read is a UsageError, and a pipe is our own output.
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                said = UsageError(f"cannot write to {folder}: {first_line(error)}")
            if note.exists():
                said.args = (f"{said}; what is prepared is kept in {partial}, "
                             "the same command goes on from there",)
            raise said from error.__cause__
        finally:
            if not note.exists():
                shutil.rmtree(partial, ignore_errors=True)


def write_shards(documents, partial, tokenizer, meta, processes):
    """Go on from meta["place"] to the end, where `meta` has no place any more."""
    budget, unsaved, saved = meta["budget"], {"train": [], "val": []}, time.perf_counter()
    # A note with no place is of a run that was killed when it had only to rename the folder.
    rest = documents.batches(meta) if "place" in meta else iter(())
    with (contextlib.closing(encoded(rest, tokenizer, processes)) as stream,
          tqdm(total=budget, initial=meta["train_tokens"], unit=" tokens", unit_scale=True,
               mininterval=0.5, desc=f"prepare {documents.source}") as bar):
        for pieces, note in stream:
            meta |= note
            if documents.source != "stdlib":        # whose files are always whole
                pieces = parts_of(pieces, tokenizer.eot)
            for ids in pieces:
                share = HELD_OUT * (meta["train_tokens"] + meta["val_tokens"])
                split = "val" if meta["val_tokens"] < min(share, HELD_OUT_MOST) else "train"
                unsaved[split].append(ids)
                meta[f"{split}_tokens"] += len(ids)
                meta["documents"] += int((ids[-1:] == tokenizer.eot).sum())
            bar.update(meta["train_tokens"] - bar.n)
            if budget and meta["train_tokens"] >= budget:
                break
            if time.perf_counter() - saved >= SAVE_SECONDS:
                save(partial, meta, unsaved)
                saved = time.perf_counter()
    if not meta["train_tokens"] or not meta["val_tokens"]:
        raise UsageError(f"{documents.source} is too short: {meta['train_tokens']:,} training and "
                         f"{meta['val_tokens']:,} held-out tokens | "
                         f"{what_was_read(documents, meta)}")
    meta.pop("place", None)
    save(partial, meta, unsaved)


def parts_of(pieces, eot):
    """Arrays of ids, and of a long document its parts: it would be all training, or all held out.

    Of 25 parts write_shards holds out one, which is HELD_OUT. Text files come in pieces already.
    """
    for ids in pieces:
        parts = 1
        if len(ids) > PIECE and ids[-1] == eot:
            parts = max(round(1 / HELD_OUT), -(-len(ids) // PIECE))
        yield from np.array_split(ids, parts)


def save(partial, meta, unsaved):
    """First the tokens, then the note that counts them: each on the disk before the next."""
    for split, pieces in unsaved.items():
        if pieces:
            append(partial, split, np.concatenate(pieces), meta[split])
            pieces.clear()
    with open(partial / "meta.tmp", "w", encoding="utf-8") as file:
        file.write(json.dumps(meta, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial / "meta.tmp", partial / "meta.json")


def append(folder, split, ids, shards):
    """Write `ids` after what `shards`, {name: {"tokens", "crc32"}}, counts, and count them there.

    What a file has beyond, a run wrote that was killed before it could count it: written over.
    """
    while len(ids):
        name, shard = next(reversed(shards.items()), (None, None))
        if not name or shard["tokens"] == SHARD_TOKENS:
            name = f"{split}_{len(shards):05d}.bin".replace("val_00000", "val")
            shard = shards[name] = {"tokens": 0, "crc32": 0}
        data = ids[:SHARD_TOKENS - shard["tokens"]]
        with open(folder / name, "r+b" if shard["tokens"] else "wb") as file:
            file.seek(shard["tokens"] * ids.itemsize)
            file.write(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        shard["crc32"] = zlib.crc32(data, shard["crc32"])
        shard["tokens"] += len(data)
        ids = ids[len(data):]


# -----------------------------------------------------------------------------
# tokens -> windows

def cut(ids, L):
    """ids (n,) -> (windows, L + 1), a view. Neighbours share one token: none is lost as an input.

    tokens[:, :-1] go in, tokens[:, 1:] are what comes next.

    >>> cut(np.arange(8), 3).tolist()
    [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    if len(ids) <= L:
        return ids[:0].reshape(0, L + 1)
    return np.lib.stride_tricks.sliding_window_view(ids, L + 1)[::L]


class Tokens:
    """The tokens of one split of a prepared folder, memory-mapped and checked against meta.json.

    batch(at, B, L)  -> (B, L + 1) int64: windows at ... at + B - 1 of the shuffled stream,
                        a pure function of (seed, at)
    windows(n, L)    -> (n, L + 1) int64: n windows spread evenly over the split, always the same
    """

    def __init__(self, folder, split="train", seed=0):
        folder = Path(folder)
        self.meta = read_meta(folder)
        if not self.meta:
            raise UsageError(f"no prepared data in {folder} (no meta.json of prepare.py): "
                             "run prepare.py")
        if "place" in self.meta:
            raise UsageError(f"{folder} is unfinished: run prepare.py again as before")
        dtype, self.shards = np.dtype(self.meta["dtype"]), []
        for name, shard in self.meta[split].items():
            path = folder / name
            data = np.memmap(path, mode="r") if path.exists() and path.stat().st_size else b""
            if zlib.crc32(data) != shard["crc32"]:
                raise UsageError(f"{path} is damaged, its checksum is not the one in meta.json: "
                                 f"delete {folder} and prepare it again")
            self.shards.append(data.view(dtype))
        self.fingerprint = [shard["crc32"] for shard in self.meta[split].values()]
        self.order = functools.lru_cache(maxsize=1)(
            lambda epoch, count: np.random.default_rng((seed, epoch)).permutation(count))

    def __len__(self):
        return sum(map(len, self.shards))

    def largest_id(self, rows):
        """The largest token id, looked for if there may be one beyond a model's `rows`, else 0"""
        if self.meta["vocab_size"] <= rows:
            return 0
        return max(int(shard.max()) for shard in self.shards)

    def _cut(self, L):
        """All windows in the order of the text. None crosses from one shard to the next."""
        windows = torch.utils.data.ConcatDataset([cut(shard, L) for shard in self.shards])
        if not len(windows):
            raise UsageError(f"the data has {len(self):,} tokens, "
                             f"too few for one window of {L + 1}")
        return windows

    def batch(self, at, B, L):
        windows = self._cut(L)
        places = (divmod(position, len(windows)) for position in range(at, at + B))
        rows = [windows[self.order(epoch, len(windows))[i]] for epoch, i in places]
        return torch.from_numpy(np.stack(rows).astype(np.int64))            # (B, L + 1)

    def windows(self, n, L):
        windows = self._cut(L)
        chosen = np.linspace(0, len(windows) - 1, min(n, len(windows))).astype(int)
        rows = [windows[i] for i in chosen]
        return torch.from_numpy(np.stack(rows).astype(np.int64))            # (n, L + 1)


class Stream:
    """The tokens of a source as it is read, nothing on disk, asked as Tokens is.

    batch(at, B, L)  -> (B, L + 1) int64: windows at ... at + B - 1 in the source's own order.
                        Nothing is shuffled: C4 and FineWeb-Edu come shuffled, a book does not.
    windows(n, L)    -> (n, L + 1) int64: the first n windows, of the `held_out` tokens that no
                        batch contains
    Still a place is one number. A later one is reached by reading over what lies between, an
    earlier one from the beginning. Where the source ends it begins again. UsageError if it is too
    short for one window, and for what Documents says.
    """

    def __init__(self, source, tokenizer, config=None, held_out=0):
        self.documents, self.tokenizer = Documents(source, config), tokenizer
        self.held_out, self.next, self.L, self.rest = held_out, 0, None, None
        self.fingerprint = [str(source), config, self.documents.files, tokenizer.fingerprint,
                            held_out]

    def _once(self, L, skip):
        """The windows after the first `skip` tokens, one by one to the end of the source."""
        ids, first, seen = np.empty(0, np.int64), skip, 0
        for pieces, _ in encoded(self.documents.batches(), self.tokenizer):
            ids = np.concatenate([ids, *pieces])
            ids, skip = ids[skip:], max(0, skip - len(ids))
            windows = cut(ids, L)
            yield from windows
            ids, seen = ids[len(windows) * L:], seen + sum(map(len, pieces))
        if seen - first <= L:
            raise UsageError(f"{self.documents.source} has {seen:,} tokens, {self.held_out:,} of "
                             f"them held out: too few for one window of {L + 1}")

    def batch(self, at, B, L):
        if at < self.next or L != self.L:
            # The last held-out window has one token more, as what comes next.
            skip = self.held_out + 1 if self.held_out else 0
            epochs = (self._once(L, skip) for _ in itertools.count())
            self.next, self.L, self.rest = 0, L, itertools.chain.from_iterable(epochs)
        rows = list(itertools.islice(self.rest, at - self.next, at - self.next + B))
        self.next = at + B
        return torch.from_numpy(np.stack(rows))                             # (B, L + 1)

    def windows(self, n, L):
        rows = list(itertools.islice(self._once(L, 0), n))
        if len(rows) < n or n * L > self.held_out:
            raise UsageError(f"{n} held-out windows of {L} are asked for: {self.held_out:,} tokens "
                             f"are held out of {self.documents.source}")
        return torch.from_numpy(np.stack(rows))                             # (n, L + 1)


def data_folder(source, tokenizer):
    """Where prepared data is: `source` if it is such a folder, else data/<source>-<tokenizer>."""
    if read_meta(Path(source).expanduser()):
        return Path(source).expanduser()
    slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in last_name(source))
    return Path("data") / f"{slug}-{last_name(tokenizer.name).removesuffix('.gguf')}"


def read_meta(folder):
    """-> meta.json of a folder that prepare() wrote; {} of another folder, whatever it has"""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) and {"dtype", "train"} <= meta.keys() else {}


def last_name(name):
    """What a path or a hub id ends with

    >>> last_name("../texts/"), last_name("microsoft/phi-1_5"), last_name("org/Model-v0.1")
    ('texts', 'phi-1_5', 'Model-v0.1')
    """
    path = Path(name).expanduser()
    return Path(os.path.abspath(path)).name if os.path.exists(path) else path.name


def load_or_prepare(source, tokenizer, config=None, tokens=None):
    """-> the prepared folder of `source` in the tokens of `tokenizer`, made now if not there yet.

    tokens: how much of a hub data set to take; files are always taken whole.
    """
    folder = data_folder(source, tokenizer)
    if not folder.exists():
        local = source == "stdlib" or Path(source).expanduser().exists()
        prepare(source, folder, tokenizer, config, None if local else tokens)
    meta = Tokens(folder, "val").meta
    if meta["fingerprint"] != tokenizer.fingerprint:
        raise UsageError(f"{folder} holds {meta['tokenizer']} tokens of a "
                         f"{meta['vocab_size']:,}-word vocabulary, but the teacher reads "
                         f"{tokenizer.name} ({tokenizer.vocab_size:,}): prepare it with --teacher "
                         "and another --out, and give that as --data")
    if folder == Path(source).expanduser():
        return folder                       # asked for by its own name, whatever it was made from
    if not same_source(meta, source, config):
        was, now = (f"{name} --config {part}" if part else name for name, part in
                    ((meta["source"], meta["config"]), (source, config)))
        raise UsageError(f"{folder} was made from {was}, not from {now}: rename one of them")
    if text_files(meta["source"]) and Documents(meta["source"]).differ_from(meta):
        now = (f"the library of Python {platform.python_version()}" if source == "stdlib"
               else f"{source} is now")
        raise UsageError(f"{folder} was made from other text than {now}: delete it to prepare it "
                         f"again, or give --data {folder} to use it as it is")
    return folder


def same_source(meta, source, config):
    """Is `source` what `meta` was made from? A path has many spellings; a part, only a hub data set
    has."""
    was, now = (name if name == "stdlib" else os.path.realpath(os.path.expanduser(name))
                for name in (meta["source"], str(source)))
    return was == now and (meta["files"] is not None or meta["config"] == config)


def open_data(args, tokenizer, budget=None):
    """-> what to train on, held-out windows (n, L + 1), and a name for it

    args: data, config, stream, context, eval_tokens and seed, as distill.py's flags have them
    budget: training tokens that are needed, of a hub data set that is prepared now
    """
    n, L = max(1, args.eval_tokens // args.context), args.context
    if args.stream:
        stream = Stream(args.data, tokenizer, args.config, held_out=n * L)
        return stream, stream.windows(n, L), f"{args.data}, streamed"
    folder = load_or_prepare(args.data, tokenizer, args.config, budget)
    return Tokens(folder, "train", args.seed), Tokens(folder, "val").windows(n, L), str(folder)


# -----------------------------------------------------------------------------
# The command line, here and in distill.py, eval.py and extras/

def count(text, least=0):
    """A whole number as people write it.

    >>> count("3e9"), count("2**15"), count("4096")
    (3000000000, 32768, 4096)
    """
    base, _, power = str(text).partition("**")
    try:
        value = float(base) ** int(power or 1)
    except ArithmeticError:
        value = math.inf
    if not least <= value < 2**63 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} on")
    return int(value)


def at_least_one(text):
    return count(text, least=1)


def not_negative(text, most=1e38):
    """A number, and of a size that fp32 has: nan would pass every comparison."""
    value = float(text)
    if not 0 <= value <= most:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to {most}")
    return value


def positive(text):
    if not (value := not_negative(text)):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def fraction(text):
    return not_negative(text, most=1)


def source_of_text(text):
    """--data in one spelling: a path is relative where it is within this folder, else absolute."""
    path = Path(text).expanduser()
    if text == "stdlib" or not os.path.exists(path):
        return text
    path = path.resolve() if ".." in path.parts else Path(os.path.abspath(path))
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return "./stdlib" if str(path) == "stdlib" else str(path)


class Parser(argparse.ArgumentParser):
    """-h shows the header of the file, as typed; a wrong flag is one line, as every mistake is."""

    def __init__(self, header):
        super().__init__(description=header, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UsageError(f"{message} (python {self.prog} -h lists the flags)")


def run_program(main):
    """main(), where what the user can mend is one line and exit code 2.

    A terminal that has no such character shows a question mark. Where nobody reads on, as behind
    `| head`, the program ends as others do, with 128 + SIGPIPE and no word.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):       # None: closed by `>&-`
        stream.reconfigure(errors="replace")
    try:
        try:
            code = run_main(main)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        for stream in (1, 2):               # both are flushed once more when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def run_main(main):
    """-> the exit code"""
    try:
        main()
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":          # of several processes one says it
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nstopped{stop or '; what was saved is kept'}", file=sys.stderr)
        return 130
    return 0


def parse(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", type=source_of_text, default="stdlib", help="stdlib, a file or folder, or a "
        "Hugging Face id [stdlib]")
    add("--config", help="which part of a Hugging Face data set, such as en for C4")
    add("--teacher", default="tiny", help="whose tokenizer to use [%(default)s]")
    add("--tokens", type=at_least_one, help="stop after this many training tokens [all there are]")
    add("--processes", type=at_least_one, help="that tokenise [one a core, at most 8; for bytes 1]")
    add("--out", help="folder to write [data/<data>-<tokenizer>]")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    tokenizer = Tokenizer(args.teacher)
    folder = args.out or data_folder(args.data, tokenizer)
    prepare(args.data, folder, tokenizer, args.config, args.tokens, args.processes)


if __name__ == "__main__":
    run_program(main)
