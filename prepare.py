"""Turn text into token shards on disk, once, so that training only reads memory-mapped integers.

Run:  python prepare.py                                   # Python's library, as bytes; no download
      python prepare.py --data ~/books --teacher smollm2  # a folder of text, in SmolLM2's tokens
      python prepare.py --data allenai/c4 --config en --teacher microsoft/phi-1_5 --tokens 3e9

The result is one folder. It gets its name only when it is complete. If the command is killed, the
same command goes on from data/.<name>.partial and ends with the same bytes:

    data/<name>/train_00000.bin ...   only token ids, uint16 (uint32 if the vocabulary needs it)
                val.bin               for validation: 4% of the tokens, up to 4 million, by
                                      documents. Those over 65,536 tokens (of a text file,
                                      characters) go by parts, of which only the last has
                                      <|endoftext|> after it. Python's library goes by files
                meta.json             tokenizer, vocabulary, counts, source, every shard's checksum

    document | <|endoftext|> | document | <|endoftext|> | ...   packed end to end, read in windows

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. What cannot be read becomes U+FFFD. The
last line of output counts these, and the files that were left out.

A teacher's name stands for its tokenizer. The default, "tiny", reads bytes.

For one context length the order of the training windows depends on (seed, epoch) alone. So a
position in the data is one number, the count of windows before it, and a run can resume anywhere.

The file follows the text: tokenizers, sources, text -> tokens -> shards -> windows. The last
section is the command line, as distill.py, eval.py and extras/ share it.

It leaves out: filtering, deduplication, mixing of several sources. Do these before, with tools made
for them.
"""
import argparse
import codecs
import collections
import concurrent.futures
import contextlib
import copy
import fcntl
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

import huggingface_hub
import numpy as np
import tiktoken
import tokenizers
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from model_ssm import (UsageError, damage_in_one_line, first_line, go_offline_if_unreachable,
                       progress_bar, read_json, write_json)
from model_teacher import cure, resolve_name

SHARD_TOKENS = 10**8    # 200 MB a shard in uint16
PIECE = 2**16           # characters of a text file read at once (and the rest of a line), so that
                        # memory does not depend on its size; documents of more tokens are split
BATCH = 2**20           # characters tokenised at once
SAVE_SECONDS = 5        # between two saves: a kill costs about this much work
HELD_OUT = 0.04         # share of the tokens that go to val.bin
HELD_OUT_MOST = 2**22   # and its largest size


# -----------------------------------------------------------------------------
# Tokenizers

END_OF_TEXT = "<|endoftext|>"
SURROGATE = re.compile(r"[\ud800-\udfff]")
BLANK = 2**16           # tiktoken panics in runs of white space of some eight times this length
# A text on which tokenizers differ: code, accents, a tab, two spaces, part of a special token
PROBE = ("def f(x):\n    return 'naïve' + str(3.14)\t# The  quick — brown fox\n\n"
         + END_OF_TEXT[:5])


class Tokenizer:
    """One interface to the byte encoding and to any Hugging Face tokenizer.

    name: "bytes", or whatever Teacher.load takes ("tiny" has the byte encoding)
    vocab_size: one more than the largest id that text can get
    eot: the id that separates documents
    stop_ids: every id that ends a text or a turn, sorted
    fingerprint: a hash of the ids of PROBE; tokenizers with the same fingerprint agree
    """

    def __init__(self, name):
        self.name = "bytes" if name == "tiny" else str(name)
        # `hf` may not be called by two threads at once. One call uses all cores by itself.
        self.lock = threading.Lock()
        if self.name == "bytes":
            self.hf = None                      # transformers' tokenizer
            self.tiktoken = byte_encoding()     # or None: then `hf` encodes
            self.vocab_size = self.tiktoken.n_vocab
            self.eot = self.tiktoken.eot_token
            self.stop_ids = (self.eot,)
        else:
            self._from_transformers()
        probe_ids = json.dumps([self.encode(PROBE), self.eot]).encode()
        self.fingerprint = hashlib.sha256(probe_ids).hexdigest()[:16]

    def _from_transformers(self):
        """Set hf, tiktoken, vocab_size, eot and stop_ids."""
        path, options = resolve_name(self.name)
        try:
            self.hf = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
        except Exception as error:                # the hub client raises a dozen unrelated types
            raise UsageError(f"no tokenizer for {self.name}: {first_line(error)} "
                             f"({cure(self.name, path)})") from error
        self.tiktoken = gpt2_encoding(self.hf)    # the same ids, several times as fast, or None
        vocabulary = self.hf.get_vocab()
        # eos is the second choice, because in a chat model it ends a turn, not a text.
        self.eot = vocabulary.get(END_OF_TEXT, self.hf.eos_token_id)
        if self.eot is None:
            raise UsageError(f"the tokenizer of {self.name} has no end-of-text token "
                             "to separate documents with")
        special = {i for i, token in self.hf.added_tokens_decoder.items() if token.special}
        # encode_batch gives text no special id, except the one that stands for the unknown.
        text_ids = set(vocabulary.values()) - special
        self.vocab_size = max(text_ids | {self.eot, self.hf.unk_token_id or 0}) + 1
        # Only ids that are special to the tokenizer count. transformers writes a default, such as
        # 2, into the config.json of a model that has none, and 2 may be a letter here.
        ends = {self.eot, self.hf.eos_token_id} | (end_tokens(path) & special)
        self.stop_ids = tuple(sorted(ends - {None}))

    def check_rows(self, rows):
        """UsageError if text may get an id for which a model of `rows` tokens has no embedding"""
        if self.vocab_size > rows:
            raise UsageError(f"the tokenizer of {self.name} gives ids up to "
                             f"{self.vocab_size - 1:,}, the model has embeddings for {rows:,} "
                             "tokens: put the tokenizer that it was trained with in its place")

    @property
    def dtype(self):
        """The narrowest integer that holds every id"""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode_batch(self, texts):
        """-> an array of ids for each text. Text that spells a special token is split as other text
        is, because otherwise it could end its own document."""
        texts = [without_surrogates(text) for text in texts]
        # On long white space tiktoken panics: `hf` takes such texts. The byte encoding has no `hf`
        # and needs none, since its pattern matches at most 64 characters.
        if self.tiktoken and not (self.hf and any(map(has_long_blank, texts))):
            # Outside the GIL, and with no Python int for each token
            return [self.tiktoken.encode_to_numpy(text, disallowed_special=()) for text in texts]
        with self.lock:
            batch = self.hf(texts, add_special_tokens=False, split_special_tokens=True,
                            return_attention_mask=False, verbose=False)["input_ids"]
        return [np.array(ids, np.uint32) for ids in batch]                  # (tokens,) each

    def encode(self, text):
        """-> a list of ids"""
        return self.encode_batch([text])[0].tolist()

    def encode_chat(self, text):
        """-> ids of `text` as what a user says, up to where the answer begins. UsageError if the
        tokenizer has no chat template"""
        if not getattr(self.hf, "chat_template", None):
            raise UsageError(f"the tokenizer of {self.name} has no chat template: leave out --chat")
        message = [{"role": "user", "content": text}]
        prompt = self.hf.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        # Here the template's special tokens have to be special.
        return self.hf(prompt, add_special_tokens=False)["input_ids"]

    def decode(self, ids):
        if self.hf is None:
            return self.tiktoken.decode(ids)
        return self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def bytes_in(self, ids):
        """How many bytes of text the ids stand for; `eot` stands for none."""
        ids = [i for i in ids if i != self.eot]
        return len(self.tiktoken.decode_bytes(ids) if self.tiktoken else self.decode(ids).encode())

    def save_pretrained(self, folder):
        """As a Hugging Face tokenizer"""
        (self.hf or byte_tokenizer(self.eot)).save_pretrained(folder)


def without_surrogates(text):
    """Half a surrogate pair becomes U+FFFD, because the tokenizers, in Rust, take no such text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return SURROGATE.sub("\ufffd", text)
    return text


def has_long_blank(text):
    """True for every run of 2 BLANK white characters, and for some shorter ones.

    A run so long contains one of BLANK that starts at a multiple of BLANK: it is enough to look
    there.
    """
    return any(text[i:i + BLANK].isspace() for i in range(0, len(text) - BLANK + 1, BLANK))


def end_tokens(path):
    """The ids at which the model in `path` ends a text, by its own files; a model may have none."""
    found = set()
    for name in ("generation_config.json", "config.json"):
        try:
            file = cached_file(path, name)
        except OSError:
            file = None
        if file is not None:
            ids = read_json(file, "copy it again from where it came").get("eos_token_id")
            found |= set(ids if isinstance(ids, list) else [ids])  # one id or several
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
    end = tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)
    backend.add_special_tokens([end])
    assert backend.token_to_id(END_OF_TEXT) == eot  # as in byte_encoding
    return PreTrainedTokenizerFast(tokenizer_object=backend,
                                   eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def byte_letters():
    """-> {letter: byte}. GPT-2 writes a printable byte as itself, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}


def gpt2_encoding(hf):
    """The Hugging Face tokenizer `hf` as a tiktoken.Encoding if it is GPT-2's or Phi's; else None.

    Phi adds runs of 2 to 31 spaces and of 2 to 9 tabs to GPT-2's vocabulary. The tokenizer looks
    for these before all else in a text, so they come first in the pattern, and the rest of the
    pattern must not take their spaces. They go among the ranks: what the pattern matches and is a
    rank as a whole becomes that id, with no merges.
    """
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:                                         # a tokenizer in Python
        return None
    about = json.loads(backend.to_str())                        # the contents of tokenizer.json
    model = about["model"]
    split = about["pre_tokenizer"] or {}                        # null: text is not split
    if model["type"] != "BPE" or split.get("type") != "ByteLevel":  # SentencePiece, or others
        return None
    if split.get("add_prefix_space") or not split.get("use_regex", True):
        return None                                             # words are cut in another way
    if about["normalizer"] or not model["merges"]:              # text is altered; nothing to merge
        return None

    # tiktoken merges the pair of the lowest id first: ids must count up in the order of merging.
    ids = model["vocab"]                                        # {letters: id}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if any(ids.get(a + b) != 256 + n for n, (a, b) in enumerate(pairs)):
        return None
    added = {token["content"]: token["id"] for token in about["added_tokens"]
             if token["content"] not in ids and not token["special"]}
    runs = {" " * n for n in range(2, 32)} | {"\t" * n for n in range(2, 10)}
    if added and added.keys() != runs:                          # neither GPT-2 nor Phi
        return None

    to_byte = byte_letters()
    ranks = {bytes(to_byte[letter] for letter in token): n for token, n in ids.items()
             if n < 256 + len(pairs)}
    ranks |= {run.encode(): n for run, n in added.items()}
    first = r" {2,31}|\t{2,9}|" if added else ""                # Phi's runs
    space = r"(?:(?! {2}|\t{2})\s)" if added else r"\s"         # one that starts no run
    # GPT-2's words; ++ does not backtrack. Then white space, in three alternatives: all of it
    # before the text's end or one of Phi's runs; all but the last character, which begins the next
    # word; one character.
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|"
    pattern = first + words + rf"{space}++(?!\S)|{space}+(?={space})|{space}"
    # encode_to_numpy is slow where there is no special token to look for.
    special = {token["content"]: token["id"] for token in about["added_tokens"]
               if token["special"]}
    return tiktoken.Encoding("gpt2 like", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens=special)


# -----------------------------------------------------------------------------
# Sources of text

# Stands for bytes that are not in the encoding, until they are counted. It is half a surrogate
# pair, so without_surrogates makes it U+FFFD.
UNREADABLE = "\udcff"
MOST_UNREADABLE = 0.25      # share of a file's beginning: more is another encoding, or no text
END = b"\xff"               # marks a document's end in a text's crc32: never a byte of UTF-8
# Byte order marks. That of UTF-32-LE begins with that of UTF-16-LE, so it is tried first.
MARKS = {codecs.BOM_UTF8: "utf-8",
         codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
         codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
codecs.register_error("unreadable", lambda error: (UNREADABLE, error.end))
NOTHING_READ = {"files": 0, "pieces": 0, "crc32": 0, "repaired": {}, "left out": {}}


class Documents:
    """The text of `source` in pieces, from any piece on.

    A piece is a document (a row, a line of JSONL), or about PIECE characters of a text file.
    source: "stdlib", a file or folder of text, JSONL or Parquet, or a Hugging Face id
    UsageError if there is nothing to read, or no text in it.
    """

    def __init__(self, source, config=None):
        self.source = str(source)
        self.config = config
        self.read = NOTHING_READ                # how much was read so far, repaired and left out
        self.rows = None                        # the Hugging Face data set, once it is open
        self.paths = files_of(self.source)      # None for a Hugging Face data set, as the next two
        self.files = None                       # a checksum of all names and sizes
        self.times = None                       # and one of when the files were last changed
        if self.paths is not None:
            stats = [(str(path), path.stat()) for path in self.paths]
            self.files = checksum([(name, stat.st_size) for name, stat in stats])
            self.times = checksum([stat.st_mtime_ns for _, stat in stats])

    def batches(self, record=None):
        """Yields (pieces, record): about BATCH characters, and where to go on after them.

        pieces: as pieces() yields them; the last batch may be empty
        record: {"place", "read"}, as JSON. Of files, place is the number of pieces before: they are
                read again and thrown away, which takes little time beside tokenising. Of a data
                set of the hub it is the state of its iterator. read is self.read. prepare() has
                both in its meta.json, place until all is saved; None: nothing is read yet
        """
        batch, size = [], 0
        for text, ends in self.pieces(record or {}):
            batch.append((text, ends))
            size += len(text)
            if size >= BATCH:
                yield batch, self.record()
                batch, size = [], 0
        yield batch, self.record()

    def record(self):
        """What a later call of batches() needs to go on from here"""
        place = self.read["pieces"] if self.rows is None else self.rows.state_dict()
        return {"place": place, "read": copy.deepcopy(self.read)}

    def pieces(self, record):
        """Yields (text, ends) after `record`, {} for all. `ends`: here the document is complete."""
        place = record.get("place")
        if self.paths is None:
            self.read = copy.deepcopy(record.get("read", NOTHING_READ))
            texts, skip = self._from_hub(place), 0
        else:                           # files are read again from the first on, and counted again
            self.read = copy.deepcopy(NOTHING_READ)
            texts, skip = self._from_files(), place or 0
        for number, (text, ends) in enumerate(texts, 1):
            if not isinstance(text, str):
                raise UsageError(f'{self.source} row {number}: expected text in a field '
                                 f'"text", found {str(text)[:60]}')
            text = self._clean(text, ends)
            if number > skip:           # else it lies before `record`
                yield text, ends

    def _clean(self, text, ends):
        """-> `text` without surrogates. Piece, repairs and checksum are counted in self.read."""
        clean = without_surrogates(text)
        if clean is not text:
            unreadable = text.count(UNREADABLE)
            repairs = {"lone surrogate": len(SURROGATE.findall(text)) - unreadable,
                       "unreadable character": unreadable}
            total = collections.Counter(self.read["repaired"]) + collections.Counter(repairs)
            self.read["repaired"] = dict(total)             # `+` drops what never happened
        self.read["pieces"] += 1
        self.read["crc32"] = zlib.crc32(clean.encode() + END * ends, self.read["crc32"])
        return clean

    def _from_files(self):
        # Python's library: all its files are text, and short. Each is read at once, and goes
        # to training or to validation as one piece.
        library = self.source == "stdlib"
        for path in self.paths:
            with errors_in_one_line(f"read {path}"):
                why = None if library else why_left_out(path, alone=len(self.paths) == 1)
                if why is None:
                    self.read["files"] += 1
                    yield from (read_whole if library else reader(path))(path)
                else:
                    files = self.read["left out"].setdefault(why, {"n": 0, "first": path.name})
                    files["n"] += 1

    def _from_hub(self, place):
        import datasets                         # it takes seconds, and only this needs it
        with errors_in_one_line(f"stream the data set {self.source} "
                                "(with no network: python distill.py --preset tiny)"):
            go_offline_if_unreachable()         # datasets has its own copy of what that sets:
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
            self.rows = datasets.load_dataset(self.source, self.config, split="train",
                                              streaming=True)
            if place:
                self.rows.load_state_dict(place)
            for row in self.rows:
                yield row.get("text", row), True            # pieces() refuses a row without text

    def differ_from(self, meta):
        """Is this text another than the one that `meta` was made from?

        Files of the same names, sizes and times are taken to be the same. A copy has other times:
        then its text is read.
        """
        if self.files == meta["files"] and self.times == meta["times"]:
            return False
        print(f"{self.source} was copied or changed since it was prepared: it is read to compare")
        # Data that is unfinished, or had enough of a larger text, has the checksum of a part.
        enough = meta["budget"] and meta["train_tokens"] >= meta["budget"]
        in_part = "place" in meta or enough
        again = Documents(self.source)
        for _ in again.pieces({}):
            if in_part and again.read["pieces"] == meta["read"]["pieces"]:
                break
        return any(again.read[key] != meta["read"][key] for key in ("pieces", "crc32"))


def checksum(about):
    """of anything that JSON can write"""
    return zlib.crc32(json.dumps(about).encode())


@contextlib.contextmanager
def errors_in_one_line(doing):
    """UsageError for what reading raises: network, unknown id, gzip and Parquet have many types."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"cannot {doing}: {first_line(error)}") from error


def text_files(source):
    """The files of `source` in the order of reading; [] if there are none, or it is not here."""
    path = Path(source).expanduser()
    if source == "stdlib":
        root = Path(os.__file__).parent
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    return sorted(p for p in (path, *path.rglob("*")) if p.is_file() and reader(p))


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

    Binary files, and text in an unmarked other encoding, would be trained on as U+FFFD and NUL. A
    .json file beside other files may be about them. (If it is `alone`, its reader raises an error.)
    """
    kind = reader(path)
    if kind is read_parquet:
        return None
    with opened(path) as file:
        head = file.read(2**13)
    if head.count(UNREADABLE) + head.count("\0") > MOST_UNREADABLE * len(head):
        return "not UTF-8"
    if kind is read_json_lines and ".json" in path.suffixes and not alone:
        try:
            next(read_json_lines(path), None)
        except UsageError:
            return 'no "text"'
    return None


def opened(path):
    """The text of a file, after its byte order mark. What is not in its encoding is UNREADABLE."""
    file = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    mark = next((mark for mark in MARKS if file.peek(4).startswith(mark)), b"")
    file.read(len(mark))                            # the text begins after it
    return io.TextIOWrapper(file, MARKS.get(mark, "utf-8"), errors="unreadable")


def read_whole(path):
    """One document a file, also an empty one. All four readers yield (text, ends)."""
    with opened(path) as file:
        yield file.read(), True


def read_text(path):
    """One document a file, in pieces of PIECE characters and the rest of a line"""
    with opened(path) as file:
        text = file.read(PIECE)
        while text:
            if text[-1] != "\n":
                text += file.readline(PIECE)        # so that no word is cut in two
            following = file.read(PIECE)
            yield text, not following               # the last piece ends the document
            text = following


def read_json_lines(path):
    """One document a line"""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:                                    # files put together leave a mark inside
                yield json.loads(line.lstrip("\ufeff"))["text"], True
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{path} line {number}: expected one JSON object "
                                 'with a "text" field') from error


def read_parquet(path):
    """One document a row"""
    import pyarrow.parquet                          # only this needs it
    file = pyarrow.parquet.ParquetFile(path)
    for rows in file.iter_batches(batch_size=1000, columns=["text"]):
        try:
            texts = rows["text"].to_pylist()
        except UnicodeDecodeError:                  # Arrow does not check its writer's UTF-8
            texts = [data if data is None else data.decode("utf-8", "unreadable")
                     for data in rows["text"].cast(pyarrow.binary()).to_pylist()]
        for text in texts:
            yield text, True


READERS = {".txt": read_text, ".md": read_text, ".rst": read_text, ".py": read_text,
           ".jsonl": read_json_lines, ".json": read_json_lines, ".parquet": read_parquet}


def reader(path):
    """The function that reads `path`, by its name; None for a file of another kind."""
    return READERS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)


# -----------------------------------------------------------------------------
# text -> tokens

def encoded(batches, tokenizer):
    """(pieces, record), ... -> (an array of ids for each piece, record), ... in the same order

    One thread a core encodes a batch while this one reads and writes. At most one batch a thread
    and two more are in memory.
    """
    threads = min(8, os.cpu_count())            # one reader feeds about eight
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    running = collections.deque()               # (future, record)
    try:
        for pieces, record in batches:
            running.append((pool.submit(encode, pieces, tokenizer), record))
            if len(running) > threads:
                oldest, its_record = running.popleft()
                yield oldest.result(), its_record
        for future, record in running:
            yield future.result(), record
    finally:
        # Those that have begun still end. No wait: the garbage collector may come here in the first
        # lines of any new thread, and a join there waits for a lock of the thread itself.
        pool.shutdown(wait=False, cancel_futures=True)


def encode(pieces, tokenizer):
    """[(text, ends), ...] -> an array of ids for each, with `eot` where a document ends

    If the tokenizer fails, the UsageError names the text.
    """
    texts = [text for text, _ in pieces]
    arrays = []
    try:
        batch = tokenizer.encode_batch(texts) if texts else []      # transformers takes no []
        for ids, (_, ends) in zip(batch, pieces, strict=True):
            ids = np.array(ids, np.uint32)                          # (tokens,)
            if ends:
                ids = np.append(ids, np.uint32(tokenizer.eot))
            assert ids.max(initial=0) < tokenizer.vocab_size, "an id beyond the vocabulary"
            arrays.append(ids.astype(tokenizer.dtype))              # which would cut it silently
        return arrays
    except BaseException as error:      # a panic in tiktoken's or tokenizers' Rust is no Exception
        if len(pieces) > 1:             # which of them? Each by itself shows it.
            return [encode([piece], tokenizer)[0] for piece in pieces]
        text = texts[0]
        raise UsageError(f"the tokenizer of {tokenizer.name} fails on a text of {len(text):,} "
                         f"characters, {text[:40]!r} ...: {type(error).__name__}: "
                         f"{first_line(error)}") from error


# -----------------------------------------------------------------------------
# tokens -> shards

def prepare(source, folder, tokenizer, config=None, tokens=None, wait=False):
    """Tokenise `source` into `folder`, until it has `tokens` to train on if given -> the meta dict

    wait: if another process prepares the folder already, take what that one makes.

    The bytes do not depend on how often the call was killed and made again. UsageError for what
    Documents and encode report, if the folder exists, if another process prepares it, or if the
    disk is too small.
    """
    folder, documents = Path(folder), Documents(source, config)
    # Only a call with the same recipe may go on with what this one leaves unfinished.
    recipe = {"source": str(source), "config": config, "files": documents.files, "budget": tokens,
              "tokenizer": tokenizer.name, "fingerprint": tokenizer.fingerprint,
              "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
              "dtype": tokenizer.dtype.name}
    partial = folder.with_name(f".{folder.name}.partial")
    with locked(folder, wait):
        if wait and folder.exists():
            return read_meta(folder)
        meta = unfinished(folder, partial, recipe, documents)
        try:
            needed = tokenizer.dtype.itemsize * ((tokens or 0) - meta["train_tokens"])
            free = shutil.disk_usage(folder.parent).free
            if needed > free:
                raise UsageError(f"{folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
                                 "free: make room, or stream with distill.py --stream")
            partial.mkdir(exist_ok=True)
            write_shards(documents, partial, tokenizer, meta)
            partial.rename(folder)              # from here on it is complete
        except BaseException as error:
            raise with_progress(error, folder, partial) from error.__cause__
    print(f"prepared {folder} | {meta['train_tokens']:,} training and {meta['val_tokens']:,} "
          f"validation tokens of {meta['documents']:,} documents | {tokenizer.name} tokenizer, "
          f"vocabulary {tokenizer.vocab_size:,}\n{what_was_read(documents, meta)}")
    return meta


@contextlib.contextmanager
def locked(folder, wait=False):
    """No other process writes `folder` meanwhile. If this one is killed, the system unlocks.

    If another process does, this one waits for it, or without `wait` raises UsageError.
    """
    path = folder.with_name(f".{folder.name}.lock")
    busy = f"another process is at work on {folder}"
    path.parent.mkdir(parents=True, exist_ok=True)
    acquired = False
    while not acquired:
        file = open(path, "a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                file.close()
                raise UsageError(f"{busy}: wait for it, or choose another --out") from None
            print(f"{busy}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        # The one before has removed the file, and perhaps a third one has made it again.
        acquired = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        if not acquired:
            file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)    # before the release: after it another process may lock it
        file.close()


def unfinished(folder, partial, recipe, documents):
    """-> the meta dict of what an earlier call has written to `partial`, or of nothing yet"""
    if folder.exists():
        raise UsageError(f"{folder} exists already: delete it to prepare it again, "
                         "or choose another --out")
    file = partial / "meta.json"
    if not file.exists():
        shutil.rmtree(partial, ignore_errors=True)      # shards that no meta.json counts
        return recipe | {"times": documents.times, "documents": 0, "train_tokens": 0,
                         "val_tokens": 0, "train": {}, "val": {}, "place": None}
    meta = read_json(file, f"delete {partial} to start over")
    check_meta(file, meta, f"delete {partial} to start over")
    for key, want in recipe.items():
        if meta[key] != want:
            raise UsageError(f"{partial} is unfinished and of another recipe ({key} was "
                             f"{meta[key]}, is {want}): delete it to start over")
    if documents.differ_from(meta):
        raise UsageError(f"{partial} is unfinished and of another text than {documents.source} "
                         "has now: delete it to start over")
    return meta


def with_progress(error, folder, partial):
    """-> what to raise for `error`. It says where the saved part is; if none is, nothing stays."""
    # Errors of reading are UsageErrors already, and a broken pipe is that of our own output.
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        error = UsageError(f"cannot write to {folder}: {first_line(error)}")
    if (partial / "meta.json").exists():
        # Ctrl-C's error is empty, so this begins with ";": run_program says "stopped" before it.
        error.args = (f"{error}; what is prepared is kept in {partial}, "
                      "the same command goes on from there",)
    else:
        shutil.rmtree(partial, ignore_errors=True)
    return error


def write_shards(documents, partial, tokenizer, meta):
    """Write shards from meta["place"] on to the end of the text or the budget, and update `meta`.

    A document, or each part of a long one, goes to val.bin whenever that has less than HELD_OUT of
    the tokens so far, up to HELD_OUT_MOST. Until then val.bin comes evenly from the text. A
    document of m tokens in val.bin is its 4% of 25 m: so long it waits for the next, and until the
    one in hand ends. Of any 26 m tokens in a row, m those of the longest, some are in val.bin.
    """
    budget = meta["budget"]
    unsaved = {"train": [], "val": []}              # arrays of ids
    saved = time.perf_counter()
    # No "place": all is saved. An earlier call was killed just before its partial.rename().
    batches = documents.batches(meta) if "place" in meta else iter(())
    with (contextlib.closing(encoded(batches, tokenizer)) as stream,
          tqdm(total=budget, initial=meta["train_tokens"], unit=" tokens", unit_scale=True,
               mininterval=0.5, desc=f"prepare {documents.source}") as bar):
        for pieces, record in stream:
            meta |= record                          # "place" and "read"
            if documents.source != "stdlib":        # whose files are never cut
                pieces = parts_of(pieces, tokenizer.eot)
            for ids in pieces:
                share = HELD_OUT * (meta["train_tokens"] + meta["val_tokens"])
                split = "val" if meta["val_tokens"] < min(share, HELD_OUT_MOST) else "train"
                unsaved[split].append(ids)                                  # (tokens,)
                meta[f"{split}_tokens"] += len(ids)
                meta["documents"] += int((ids[-1:] == tokenizer.eot).sum())     # 1 if it ends here
            bar.update(meta["train_tokens"] - bar.n)
            if budget and meta["train_tokens"] >= budget:
                break                               # after a complete batch, so by a little more
            if time.perf_counter() - saved >= SAVE_SECONDS:
                save(partial, meta, unsaved)
                saved = time.perf_counter()
    if not meta["train_tokens"] or not meta["val_tokens"]:
        raise UsageError(f"{documents.source} is too short: {meta['train_tokens']:,} training and "
                         f"{meta['val_tokens']:,} validation tokens | "
                         f"{what_was_read(documents, meta)}")
    meta.pop("place", None)
    save(partial, meta, unsaved)


def parts_of(pieces, eot):
    """Split each long document: otherwise all of it would be for training, or for validation.

    Into 25 parts or more, so that about one of them, a share of HELD_OUT, goes to val.bin. What has
    no `eot` at its end is a part already, of a text file that read_text has cut; its last part has
    one, and is cut again if it is longer than PIECE tokens.
    """
    for ids in pieces:
        parts = 1
        if len(ids) > PIECE and ids[-1] == eot:
            parts = max(round(1 / HELD_OUT), math.ceil(len(ids) / PIECE))
        yield from np.array_split(ids, parts)                               # (tokens / parts,)


def save(partial, meta, unsaved):
    """First the tokens, then the meta.json that counts them: each on the disk before the next."""
    for split, pieces in unsaved.items():
        if pieces:
            append(partial, split, np.concatenate(pieces), meta[split])
            pieces.clear()
    write_json(partial / "meta.json", meta)


def append(folder, split, ids, shards):
    """Append `ids` to the last shard, opening a new one when it is full, and count them in `shards`

    shards: {name: {"tokens", "crc32"}}. A file with more tokens than are counted here is of a run
    that was killed in between: the surplus is overwritten.
    """
    while len(ids):
        name, shard = next(reversed(shards.items()), (None, None))
        if not name or shard["tokens"] == SHARD_TOKENS:
            name = f"{split}_{len(shards):05d}.bin".replace("val_00000", "val")
            shard = shards[name] = {"tokens": 0, "crc32": 0}
        data = ids[:SHARD_TOKENS - shard["tokens"]]         # what still fits
        with open(folder / name, "r+b" if shard["tokens"] else "wb") as file:
            file.seek(shard["tokens"] * ids.itemsize)
            file.write(data)
            file.truncate()                                 # the rest of what a killed run wrote
            file.flush()
            os.fsync(file.fileno())                         # on the disk, not only in its cache
        shard["crc32"] = zlib.crc32(data, shard["crc32"])
        shard["tokens"] += len(data)
        ids = ids[len(data):]


def what_was_read(documents, meta):
    """One line: how much was read, repaired and left out"""
    read = meta.get("read", NOTHING_READ)
    others = Path(documents.source).expanduser().rglob("*") if documents.source != "stdlib" else []
    endings = collections.Counter(sorted(p.suffix or "without ending" for p in others
                                         if p.is_file() and not reader(p)))
    not_text = sum(files["n"] for files in read["left out"].values())

    line = "read " + counted(meta["documents"], "document")
    if documents.paths:
        line += " in " + counted(read["files"], "file")
        if read["files"] + not_text < len(documents.paths):     # --tokens were enough
            line += f" of {len(documents.paths):,}"
    if read["repaired"]:
        repaired = [counted(n, what) for what, n in read["repaired"].items()]
        line += f" | repaired {', '.join(repaired)} (now U+FFFD)"

    common = endings.most_common(5)
    kinds = [f"{ending} {n:,}" for ending, n in common]
    if len(endings) > 5:
        kinds.append(f"other endings {endings.total() - sum(n for _, n in common):,}")
    for why, files in read["left out"].items():
        kinds.append(f"{why} {files['n']:,}, first {files['first']}")
    if kinds:
        line += f" | left out {counted(endings.total() + not_text, 'file')} ({', '.join(kinds)})"
    return line


def counted(n, what):
    """
    >>> counted(1, "file"), counted(2000, "file")
    ('1 file', '2,000 files')
    """
    return f"{n:,} {what}{'s' * (n != 1)}"


# -----------------------------------------------------------------------------
# shards -> windows

def cut(ids, L):
    """ids (n,) -> (windows, L + 1), a view. Neighbours share one token, so none between two of them
    is lost as an input. The rest, too short for a window, is left out.

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
                        a pure function of (seed, at, L)
    windows(n, L)    -> (n, L + 1) int64: n windows spaced evenly over the split, always the same;
                        all of them, if there are fewer
    """

    def __init__(self, folder, split="train", seed=0):
        folder = Path(folder)
        self.meta = read_meta(folder)
        if not self.meta:
            raise UsageError(f"no prepared data in {folder} (no meta.json of prepare.py): "
                             "run prepare.py")
        if "place" in self.meta:
            raise UsageError(f"{folder} is unfinished: run prepare.py again as before")
        self.shards = []
        prepare_again = f"delete {folder} and prepare it again"
        for name, shard in progress_bar(self.meta[split].items(), f"check {folder}"):
            path = folder / name
            with damage_in_one_line(path, prepare_again):
                data = np.memmap(path, mode="r")                # ValueError if it is empty
                if zlib.crc32(data) != shard["crc32"]:
                    raise ValueError("its checksum is not the one in meta.json")
                ids = data.view(self.meta["dtype"])                         # (tokens,)
                if ids.max() >= self.meta["vocab_size"]:
                    raise ValueError(f"it has the id {ids.max():,}, and meta.json a vocabulary of "
                                     f"{self.meta['vocab_size']:,}")
            self.shards.append(ids)
        # Of these tokens: a run goes on only with the same. (meta's is of the tokenizer.)
        self.fingerprint = [shard["crc32"] for shard in self.meta[split].values()]
        self.order = functools.lru_cache(maxsize=1)(            # of this epoch alone
            lambda epoch, count: np.random.default_rng((seed, epoch)).permutation(count))

    def __len__(self):
        return sum(map(len, self.shards))

    def largest_id(self, rows):
        """0 if the vocabulary fits a model's `rows` of embeddings, else the largest id in use"""
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
        rows = []
        for position in range(at, at + B):
            epoch, i = divmod(position, len(windows))  # window i of the epoch's order
            rows.append(windows[self.order(epoch, len(windows))[i]])
        return torch.from_numpy(np.stack(rows).astype(np.int64))            # (B, L + 1)

    def windows(self, n, L):
        windows = self._cut(L)
        chosen = np.linspace(0, len(windows) - 1, min(n, len(windows))).astype(int)     # (n,)
        rows = [windows[i] for i in chosen]
        return torch.from_numpy(np.stack(rows).astype(np.int64))            # (n, L + 1)


class Stream:
    """The tokens of a source as it is read, with nothing on disk: batch and windows as in Tokens.

    batch(at, B, L)  -> (B, L + 1) int64: windows at ... at + B - 1 in the source's own order.
                        Nothing is shuffled: C4 and FineWeb-Edu come shuffled, a book does not.
    windows(n, L)    -> (n, L + 1) int64: the first n windows, of the `held_out` tokens that no
                        batch contains

    A position is still one number. To reach a later one, the text between is read; to reach an
    earlier one, the text is read from its beginning. At its end the source begins again.
    UsageError if it is too short for one window, and for what Documents reports.
    """

    def __init__(self, source, tokenizer, config=None, held_out=0):
        self.documents = Documents(source, config)
        self.tokenizer = tokenizer
        self.held_out = held_out
        # An iterator over all windows of length L from position `next` on, made by batch().
        self.rest, self.next, self.L = None, 0, None
        self.fingerprint = [str(source), config, self.documents.files, tokenizer.fingerprint,
                            held_out]

    def _once(self, L, skip):
        """The windows after the first `skip` tokens, one by one to the end of the source."""
        ids = np.empty(0, np.int64)         # tokens of no window yet
        read = 0
        for pieces, _ in encoded(self.documents.batches(), self.tokenizer):
            ids = np.concatenate([ids, *pieces])                            # (tokens,)
            start = max(0, skip - read)     # what is still to skip of these
            read += sum(map(len, pieces))
            ids = ids[start:]
            windows = cut(ids, L)                                           # (n, L + 1)
            yield from windows
            ids = ids[len(windows) * L:]
        if read - skip <= L:
            raise UsageError(f"{self.documents.source} has {read:,} tokens, {self.held_out:,} of "
                             f"them for validation: too few for one window of {L + 1}")

    def batch(self, at, B, L):
        if at < self.next or L != self.L:
            # The last validation window has one token more, as what comes next.
            skip = self.held_out + 1 if self.held_out else 0
            epochs = (self._once(L, skip) for _ in itertools.count())
            self.rest, self.next, self.L = itertools.chain.from_iterable(epochs), 0, L
        rows = list(itertools.islice(self.rest, at - self.next, at - self.next + B))
        self.next = at + B
        return torch.from_numpy(np.stack(rows))                             # (B, L + 1)

    def windows(self, n, L):
        rows = list(itertools.islice(self._once(L, 0), n))
        if len(rows) < n or n * L > self.held_out:
            raise UsageError(f"{n} validation windows of {L} need {n * L:,} tokens: "
                             f"{self.documents.source} has {self.held_out:,} for validation")
        return torch.from_numpy(np.stack(rows))                             # (n, L + 1)


def open_data(args, tokenizer, budget=None):
    """-> what to train on, validation windows (n, L + 1), and a name for it

    args: data, config, stream, context, eval_tokens and seed, as distill.py's flags have them
    budget: training tokens that are needed, of a hub data set that is prepared now
    """
    L = args.context
    n = max(1, args.eval_tokens // L)
    if args.stream:
        stream = Stream(args.data, tokenizer, args.config, held_out=n * L)
        return stream, stream.windows(n, L), f"{args.data}, streamed"
    folder = load_or_prepare(args.data, tokenizer, args.config, budget)
    return Tokens(folder, "train", args.seed), Tokens(folder, "val").windows(n, L), str(folder)


def load_or_prepare(source, tokenizer, config=None, tokens=None):
    """-> the folder of `source` in the tokens of `tokenizer`, prepared now if it is not there yet.

    tokens: how much of a hub data set to take. Files are taken to their end, here.
    """
    folder = data_folder(source, tokenizer)
    if not folder.exists():
        local = source == "stdlib" or Path(source).expanduser().exists()
        prepare(source, folder, tokenizer, config, None if local else tokens, wait=True)
    meta = Tokens(folder, "val").meta
    if meta["fingerprint"] != tokenizer.fingerprint:
        raise UsageError(f"{folder} holds {meta['tokenizer']} tokens of a "
                         f"{meta['vocab_size']:,}-word vocabulary, but the teacher reads "
                         f"{tokenizer.name} ({tokenizer.vocab_size:,}): prepare it with --teacher "
                         "and another --out, and give that as --data")
    if folder == Path(source).expanduser():
        return folder                       # the user named this folder, whatever its source was
    if not same_source(meta, source, config):
        was = with_config(meta["source"], meta["config"])
        raise UsageError(f"{folder} was made from {was}, not from {with_config(source, config)}: "
                         "rename one of them")
    if text_files(meta["source"]) and Documents(meta["source"]).differ_from(meta):
        now = (f"the library of Python {platform.python_version()}" if source == "stdlib"
               else f"{source} is now")
        raise UsageError(f"{folder} was made from other text than {now}: delete it to prepare it "
                         f"again, or give --data {folder} to use it as it is")
    return folder


def same_source(meta, source, config):
    """Is `source` what `meta` was made from? A path has many spellings."""
    was, now = (name if name == "stdlib" else os.path.realpath(os.path.expanduser(name))
                for name in (meta["source"], str(source)))
    same_config = meta["files"] is not None or meta["config"] == config     # a hub data set's
    return was == now and same_config


def with_config(source, config):
    """As a user would write it"""
    return f"{source} --config {config}" if config else source


def data_folder(source, tokenizer):
    """Where prepared data is: `source` if it is such a folder, else data/<source>-<tokenizer>."""
    folder = Path(source).expanduser()
    if read_meta(folder):
        return folder
    slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in last_name(source))
    return Path("data") / f"{slug}-{last_name(tokenizer.name).removesuffix('.gguf')}"


def read_meta(folder):
    """-> meta.json of a folder that prepare() wrote; {} of another folder, whatever it has

    A folder is prepare()'s if shards lie beside its meta.json: then UsageError if that is damaged.
    """
    path, again = folder / "meta.json", f"delete {folder} and prepare it again"
    if not path.is_file():
        return {}
    if not (folder / "val.bin").exists() and not any(folder.glob("train_*.bin")):
        return {}                               # a folder of text, with a meta.json of its own
    meta = read_json(path, again)
    check_meta(path, meta, again)
    return meta


def check_meta(path, meta, again):
    """UsageError if `meta`, read from `path`, is not as prepare() writes it"""
    with damage_in_one_line(path, again):
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"its dtype is {str(meta['dtype'])[:40]}, not uint16 or uint32")
        numbers = [meta[key] for key in ("vocab_size", "eot", "train_tokens", "val_tokens")]
        for split, names in (("train", r"train_\d{5}\.bin"), ("val", r"val(_\d{5})?\.bin")):
            for name, shard in meta[split].items():
                if not re.fullmatch(names, name):
                    raise ValueError(f"it has a shard {name[:40]!r}")
                numbers += [shard["tokens"], shard["crc32"]]
        if not all(isinstance(n, int) and 0 <= n < 2**48 for n in numbers):
            raise ValueError("some of its counts are no counts")
        texts = [meta[key] for key in ("source", "tokenizer", "fingerprint")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("it does not name its source and its tokenizer")
        if missing := {"config", "files", "budget"} - meta.keys():
            raise ValueError(f"it has no {', '.join(missing)}")


def last_name(name):
    """What a path or a hub id ends with

    >>> last_name("../texts/"), last_name("microsoft/phi-1_5"), last_name("org/Model-v0.1")
    ('texts', 'phi-1_5', 'Model-v0.1')
    """
    path = Path(name).expanduser()
    return Path(os.path.abspath(path)).name if os.path.exists(path) else path.name


# -----------------------------------------------------------------------------
# The command line, here and in distill.py, eval.py and extras/

def count(text, least=0):
    """An integer as people write it.

    >>> count("3e9"), count("2**15"), count("4096")
    (3000000000, 32768, 4096)
    """
    base, _, power = str(text).partition("**")          # "2**15"
    try:
        value = float(base) ** int(power or 1)          # base may be 3e9
    except ArithmeticError:                             # too large for a float
        value = math.inf
    if not least <= value < 2**63 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} on")
    return int(value)


def at_least_one(text):
    """As count; budgets and sizes of 0 mean nothing"""
    return count(text, least=1)


def not_negative(text, most=1e38):
    """A number, and of a size that fp32 has. nan is none: no later comparison would find it."""
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


def temperature(text):
    """Not near 0, where logits divided by it overflow: greedy choice has a flag value of its own"""
    value = not_negative(text, most=100)
    if value < 0.01:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0.01 to 100")
    return value


def nonempty(text):
    """A path or an id, which is not empty"""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def source_of_text(text):
    """--data in one spelling: a path is relative where it is within this folder, else absolute."""
    path = Path(nonempty(text)).expanduser()
    if text == "stdlib" or not os.path.exists(path):
        return text
    # abspath() would take a `..` after a link for the folder that has the link.
    path = path.resolve() if ".." in path.parts else Path(os.path.abspath(path))
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return "./stdlib" if str(path) == "stdlib" else str(path)  # a folder of that name


class Parser(argparse.ArgumentParser):
    """-h shows the header of the file with its line breaks; a wrong flag is a UsageError."""

    def __init__(self, header):
        super().__init__(description=header, allow_abbrev=False,    # a typo is no other flag
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UsageError(f"{message} (python {self.prog} -h lists the flags)")


# Ctrl-C raises KeyboardInterrupt. SIGTERM, by which clusters stop a program, would end it
# without a word (outside of training steps, where distill.py saves first).

class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a program as Ctrl-C does"""


def terminate(number, frame):
    raise Terminated


def close_bars():
    """Progress bars that are still open end, so that an error has a line of its own."""
    for bar in list(tqdm._instances):
        bar.close()


def run_program(main):
    """main(), where a mistake that the user can mend is one line and exit code 2.

    A character that the terminal's encoding lacks is printed as a question mark. Where the reader
    of the output is gone, as behind `| head`, the program ends as others do, silently and with
    128 + SIGPIPE.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):       # None: closed by `>&-`
        stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, terminate)
    prints = os.environ.get("RANK", "0") == "0"             # one of several processes
    code = 0
    try:
        try:
            main()
        except UsageError as error:
            code = 2
            close_bars()
            if prints:
                print(f"error: {error}", file=sys.stderr)
        except BrokenPipeError:
            raise
        except OSError as error:            # a full disk, a folder that may not be written
            code = 2
            close_bars()
            if prints:
                print(f"error: {first_line(error)}; what was saved is kept", file=sys.stderr)
        except KeyboardInterrupt as stop:
            code = 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
            if prints:
                print(f"\nstopped{str(stop) or '; what was saved is kept'}", file=sys.stderr)
        finally:
            print(end="", flush=True)       # what is still buffered meets the broken pipe here
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
        for stream in (1, 2):               # Python flushes both once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.exit(code)


def parse(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", type=source_of_text, default="stdlib", help="stdlib, a file or folder, or a "
        "Hugging Face id [stdlib]")
    add("--config", help="which part of a Hugging Face data set, such as en for C4")
    add("--teacher", type=nonempty, default="tiny", help="whose tokenizer to use [%(default)s]")
    add("--tokens", type=at_least_one, help="stop after this many training tokens [all there are]")
    add("--out", type=nonempty, help="folder to write [data/<data>-<tokenizer>]")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    tokenizer = Tokenizer(args.teacher)
    folder = args.out or data_folder(args.data, tokenizer)
    prepare(args.data, folder, tokenizer, args.config, args.tokens)


if __name__ == "__main__":
    run_program(main)
