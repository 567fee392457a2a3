"""Turn text into token shards on disk, once, so that training only reads memory-mapped integers.

Run:  python prepare.py                                   # Python's library, as bytes; no download
      python prepare.py --data ~/books --teacher smollm2  # a folder of text, in SmolLM2's tokens
      python prepare.py --data allenai/c4 --config en --teacher microsoft/phi-1_5 --tokens 3e9

What comes out is one folder, and it appears whole or not at all. Killed half way, the same command
goes on from data/.<name>.partial, and ends with the same bytes:

    data/<name>/train_00000.bin ...   only token ids, uint16 (uint32 if the vocabulary needs it)
                val.bin               every 25th token or so, in whole documents, not trained on
                                      (a document longer than 65,536 characters counts as several)
                meta.json             tokenizer, vocabulary, counts, source, every shard's checksum

    document | <|endoftext|> | document | <|endoftext|> | ...   packed end to end, read in windows

Training sees the windows in an order that depends on (seed, epoch) alone. So a place in the data is
one number, the count of windows before it, and a run can be taken up anywhere.

It leaves out: filtering, deduplication, mixing of several sources. Do these before, with tools made
for them.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
import zlib
from pathlib import Path

import filelock
import huggingface_hub
import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from model_ssm import UsageError, ask_hub, first_line
from model_teacher import byte_letters, find

END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SHARD_TOKENS = 10**8    # 200 MB a shard in uint16
PIECE = 2**16           # characters read at once, so that memory does not depend on a file's size
BATCH = 2**20           # characters tokenised at once
ALONE = 16              # batches done before other processes are started, which takes seconds
SAVE_SECONDS = 5        # between two notes of how far it has come: what a kill can cost
HELD_OUT = 0.04         # share of the tokens that go to val.bin
HELD_OUT_MOST = 2**22   # and its largest size
PROBE = ("def f(x):\n    return 'naïve' + str(3.14)\t# The  quick — brown fox\n\n"
         + END_OF_TEXT[:5])


def count(text):
    """A number of tokens as people write it.

    >>> count("3e9"), count("2**15"), count("4096")
    (3000000000, 32768, 4096)
    """
    base, _, power = str(text).partition("**")
    value = float(base) ** int(power or 1)
    if value != int(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of tokens")
    return int(value)


# -----------------------------------------------------------------------------
# text -> tokens

def byte_encoding():
    """UTF-8 bytes as tokens 0..255, <|endoftext|> as 256: nothing to download or to learn."""
    # The pattern cuts the text before ranks are merged. It must never match the empty string:
    # tiktoken panics on that.
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})",
                             mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={END_OF_TEXT: 256})


class Tokenizer:
    """One face for the byte encoding and for any Hugging Face tokenizer.

    name: "bytes", or whatever Teacher.load takes ("tiny" has the byte encoding).
    vocab_size: one more than the largest id.   eot: the id that separates documents.
    dtype: the narrowest that holds an id.   threads: how many tiktoken may use.
    fingerprint: a hash of what it makes of a fixed sentence; those with one fingerprint agree.
    """

    def __init__(self, name):
        self.name, self.threads, self.hf = "bytes" if name == "tiny" else str(name), 8, None
        if self.name == "bytes":
            self.tiktoken = byte_encoding()
            self.vocab_size, self.eot = self.tiktoken.n_vocab, self.tiktoken.eot_token
        else:
            self._from_transformers()
        seen = json.dumps([self.encode(PROBE), self.eot]).encode()
        self.fingerprint = hashlib.sha256(seen).hexdigest()[:16]

    def _from_transformers(self):
        from transformers import AutoTokenizer
        path, options = find(self.name)
        try:
            self.hf = AutoTokenizer.from_pretrained(path, **options)
        except Exception as error:                # the hub client raises a dozen unrelated types
            raise UsageError(f"no tokenizer for {self.name}: {first_line(error)} "
                             "(with no network: python distill.py --preset tiny)") from error
        self.tiktoken = gpt2_encoding(self.hf)    # the same ids, several times as fast, or None
        vocabulary = self.hf.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.eot = vocabulary.get(END_OF_TEXT, self.hf.eos_token_id)
        if self.eot is None:
            raise UsageError(f"the tokenizer of {self.name} has no end-of-text token "
                             "to separate documents with")

    @property
    def dtype(self):
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode_batch(self, texts):
        # Text that spells a special token is text, not a command: splitting it keeps data from
        # ending documents.
        if self.tiktoken:
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

    def bytes_in(self, ids):
        """How many bytes of text ids stand for: a document's end is none."""
        ids = [i for i in ids if i != self.eot]
        return len(self.tiktoken.decode_bytes(ids) if self.tiktoken else self.decode(ids).encode())

    def decode(self, ids):
        if self.hf is None:
            return self.tiktoken.decode(ids)
        return self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


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
    to_byte = {letter: byte for byte, letter in byte_letters().items()}
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

class Unfinished(UsageError):
    """Stopped by what is not the data's fault: what is prepared is kept."""


class Documents:
    """The text of `source`, piece by piece, from any place on.

    source: "stdlib", a file or folder of text, JSONL or Parquet, or a Hugging Face id
    files: a checksum of the names and sizes of what is read, None for a Hugging Face data set
    UsageError if there is nothing to read, or no text in it.
    """

    def __init__(self, source, config=None):
        self.source, self.config = str(source), config
        self.paths, self.rows = files_of(self.source), None
        self.files = None if self.paths is None else zlib.crc32(
            json.dumps([(str(path), path.stat().st_size) for path in self.paths]).encode())

    def batches(self, place=None):
        """Yields (pieces, place): about BATCH characters, and where to go on after them.

        pieces: [(text, ends), ...], `ends` says that a document is complete
        place: JSON. In files it counts pieces: reading over them takes no time beside tokenising.
        A Hugging Face data set has a word for its own.
        """
        pieces = self._from_hub(place) if self.paths is None else self._from_files(place or 0)
        batch, size = [], 0
        for number, (text, ends) in pieces:
            if not isinstance(text, str):
                raise UsageError(f'{self.source} row {number}: expected text in a field "text", '
                                 f"found {str(text)[:60]}")
            batch.append((text, ends))
            size += len(text)
            if size >= BATCH:
                yield batch, self.rows.state_dict() if self.rows else number
                batch, size = [], 0
        if batch:
            yield batch, self.rows.state_dict() if self.rows else number

    def _from_files(self, place):
        def pieces():
            for path in self.paths:
                try:
                    yield from (read_whole if self.source == "stdlib" else reader(path))(path)
                except Exception as error:          # text, gzip and Parquet fail in many ways
                    if isinstance(error, UsageError):
                        raise
                    raise UsageError(f"cannot read {path}: {first_line(error)}") from error
        return itertools.islice(enumerate(pieces(), 1), place, None)

    def _from_hub(self, place):
        import datasets
        ask_hub()
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
        try:
            self.rows = datasets.load_dataset(self.source, self.config, split="train",
                                              streaming=True)
            if place:
                self.rows.load_state_dict(place)
            for number, row in enumerate(self.rows, 1):
                if "text" not in row:
                    raise UsageError(f'{self.source}: no column named "text", '
                                     f"only {', '.join(row)}")
                yield number, (row["text"], True)
        except Exception as error:      # network, unknown id, missing config: many types, one cure
            if isinstance(error, UsageError):
                raise
            raise Unfinished(f"cannot stream the data set {self.source}: {first_line(error)} "
                             "(with no network: python distill.py --preset tiny)") from error


def files_of(source):
    """-> the files of `source` in the order they are read; None if it is a Hugging Face id"""
    path = Path(source).expanduser()
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
        if not files:
            raise UsageError(f"no .py files under {root}: this Python ships without its source; "
                             "pass --data FOLDER")
        return files
    if path.exists():
        files = ([path] if path.is_file() else
                 sorted(p for p in path.rglob("*") if p.is_file() and reader(p)))
        if not files or not reader(files[0]):
            kinds = " ".join(TEXT_SUFFIXES) + " .jsonl .json .parquet"
            raise UsageError(f"nothing to read in {source}: it takes {kinds}, "
                             "the first two kinds also as .gz")
        return files
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix in TEXT_SUFFIXES:
        raise UsageError(f"no such file or folder: {source} "
                         "(and not a Hugging Face id like allenai/c4)")


def reader(path):
    """The function that reads `path`, by its name; None for a kind of file that we cannot read."""
    suffix = [s for s in path.suffixes if s != ".gz"][-1:]
    if suffix and suffix[0] in TEXT_SUFFIXES:
        return read_text
    others = {".jsonl": read_json, ".json": read_json, ".parquet": read_parquet}
    return others.get(suffix[0] if suffix else "")


def opened(path):
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8", errors="replace")


def read_whole(path):
    yield path.read_text("utf-8", errors="replace"), True


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
                    yield json.loads(line)["text"], True
                except (ValueError, KeyError, TypeError) as error:
                    raise UsageError(f"{path} line {number}: expected one JSON object "
                                     'with a "text" field') from error


def read_parquet(path):
    import pyarrow.parquet
    file = pyarrow.parquet.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        columns = ", ".join(file.schema_arrow.names)
        raise UsageError(f'{path}: no column named "text", only {columns}')
    for rows in file.iter_batches(batch_size=1000, columns=["text"]):
        yield from ((text, True) for text in rows["text"].to_pylist())


# -----------------------------------------------------------------------------
# text -> tokens in several processes

def encoded(batches, tokenizer, processes=1):
    """(pieces, place), ... -> (arrays of ids, documents that end in them, place), ...

    In the order of `batches`, whatever the number of processes.
    """
    def here(n):
        for pieces, place in itertools.islice(batches, n):
            yield tokenizer.encode_pieces(pieces), ended(pieces), place

    yield from here(ALONE if processes > 1 else None)
    following = list(itertools.islice(batches, 1))
    batches = itertools.chain(following, batches)
    if following and is_known_by_name(tokenizer):
        yield from elsewhere(batches, tokenizer, processes)
    yield from here(None)


def elsewhere(batches, tokenizer, processes):
    # Not forked, since torch's threads would be missing in the copy. Not sent the tokenizer, since
    # a process is started only when the one before has read what it was sent.
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), start_worker, (tokenizer.name,))
    submitted = ((pool.submit(work, pieces), ended(pieces), place) for pieces, place in batches)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})   # inherited: Ctrl-C is for us
    try:
        # The reader is ahead of the writer, by so much and no more that memory stays flat. So each
        # batch has its place with it.
        ahead = collections.deque(itertools.islice(submitted, 2 * processes))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while ahead:
            future, *rest = ahead.popleft()
            yield future.result(), *rest
            ahead.extend(itertools.islice(submitted, 1))
    except concurrent.futures.process.BrokenProcessPool as error:
        raise Unfinished("a process that tokenises has died, perhaps for want of memory: "
                         "try fewer --processes") from error
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        pool.shutdown(cancel_futures=True)


def is_known_by_name(tokenizer):
    """Will another process, told the name, build the same?"""
    try:
        twin = Tokenizer(tokenizer.name)
    except UsageError:
        return False
    return twin.encode(PROBE) == tokenizer.encode(PROBE) and twin.dtype == tokenizer.dtype


def ended(pieces):
    return sum(ends for _, ends in pieces)


def start_worker(name):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"      # one core each
    parent = multiprocessing.parent_process()           # killed, it cannot end us: we watch it
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    work.tokenizer = Tokenizer(name)
    work.tokenizer.threads = 1


def work(pieces):
    return work.tokenizer.encode_pieces(pieces)


# -----------------------------------------------------------------------------
# tokens -> shards

class Shards:
    """Writes one split, <prefix>_00000.bin ... (or just <prefix>.bin), counted and checksummed.

    shards: {name: {"tokens", "crc32"}} that are there; what the last file has beyond is cut off
    """

    def __init__(self, folder, prefix, dtype, numbered=True, shards=None):
        self.folder, self.prefix, self.dtype = folder, prefix, np.dtype(dtype)
        self.numbered, self.shards, self.file = numbered, {} if shards is None else shards, None
        self.tokens = sum(shard["tokens"] for shard in self.shards.values())
        if self.shards:
            self._open(list(self.shards)[-1], "r+b")
            self.file.truncate(self.shard["tokens"] * self.dtype.itemsize)
            self.file.seek(0, os.SEEK_END)

    def _open(self, name, mode):
        self.close()
        self.file = open(self.folder / name, mode)
        self.shard = self.shards.setdefault(name, {"tokens": 0, "crc32": 0})

    def write(self, ids):
        ids = np.asarray(ids, dtype=self.dtype)
        while len(ids):
            if not self.file or self.numbered and self.shard["tokens"] == SHARD_TOKENS:
                number = f"_{len(self.shards):05d}" if self.numbered else ""
                self._open(f"{self.prefix}{number}.bin", "wb")
            room = SHARD_TOKENS - self.shard["tokens"] if self.numbered else len(ids)
            data = ids[:room].tobytes()
            self.file.write(data)
            self.shard["tokens"] += len(ids[:room])
            self.shard["crc32"] = zlib.crc32(data, self.shard["crc32"])
            self.tokens += len(ids[:room])
            ids = ids[room:]

    def sync(self):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        self.sync()
        if self.file:
            self.file.close()


def prepare(source, folder, tokenizer, config=None, tokens=None, processes=None):
    """Tokenise `source` into `folder`, up to `tokens` training tokens if given; -> the meta dict.

    Documents are held out greedily: one goes to val.bin whenever less than HELD_OUT of the tokens
    have, so the held-out ones are spread evenly. The bytes depend neither on `processes` (None:
    chosen here) nor on how often the call was killed and made again. UsageError for what Documents
    says, if the folder is there, if another process is making it, or if the disk is short.
    """
    folder, documents = Path(folder), Documents(source, config)
    recipe = {"source": str(source), "config": config, "files": documents.files, "budget": tokens,
              "tokenizer": tokenizer.name, "fingerprint": tokenizer.fingerprint,
              "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
              "dtype": tokenizer.dtype.name}
    # One reader feeds about eight. Bytes are as fast to encode as to hand over.
    processes = processes or (1 if tokenizer.name == "bytes" else min(8, os.cpu_count()))
    with only_one(folder) as partial:
        meta = begin(partial, recipe)
        needed = tokenizer.dtype.itemsize * ((tokens or 0) - meta["train_tokens"])
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise UsageError(f"{folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                             "make room, or stream with distill.py --stream")
        partial.mkdir(exist_ok=True)
        try:
            speed = write_shards(documents, partial, tokenizer, meta, processes)
            partial.rename(folder)
        except BaseException as error:
            mendable = isinstance(error, UsageError) and not isinstance(error, Unfinished)
            if mendable or not (partial / "meta.json").exists():
                shutil.rmtree(partial, ignore_errors=True)
                raise
            kept = f"what is prepared is kept in {partial}, the same command goes on from there"
            if isinstance(error, Unfinished):
                raise Unfinished(f"{error}; {kept}") from error
            print(f"\n{kept}", file=sys.stderr)
            raise
    print(f"prepared {folder} | {meta['train_tokens']:,} training and {meta['val_tokens']:,} "
          f"held-out tokens of {meta['documents']:,} documents | {tokenizer.name} tokenizer, "
          f"vocabulary {tokenizer.vocab_size:,} | {speed:,.0f} tokens/s")
    return meta


@contextlib.contextmanager
def only_one(folder):
    """-> where to make `folder`, under a lock that the system opens when its holder is killed"""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    try:
        lock = filelock.FileLock(path).acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"another process is preparing {folder}: wait for it") from None
    with lock:
        try:
            if folder.exists():
                raise UsageError(f"{folder} exists already: delete it to prepare it again, "
                                 "or choose another --out")
            yield folder.with_name(f".{folder.name}.partial")
        finally:
            path.unlink()


def begin(partial, recipe):
    """-> the meta dict of what this recipe has left in `partial`, or of nothing"""
    if not (partial / "meta.json").exists():
        shutil.rmtree(partial, ignore_errors=True)
        return recipe | {"documents": 0, "train_tokens": 0, "val_tokens": 0,
                         "train": {}, "val": {}, "place": None}
    meta = json.loads((partial / "meta.json").read_text())
    if changed := [f"{key} was {meta[key]}, is {recipe[key]}" for key in recipe
                   if meta[key] != recipe[key]]:
        raise UsageError(f"{partial} is unfinished and of another recipe ({changed[0]}): "
                         "delete it to start over")
    return meta


def write_shards(documents, partial, tokenizer, meta, processes):
    """Go on from meta["place"] to the end, where `meta` has no place any more. -> tokens/s"""
    tokens, before = meta["budget"], meta["train_tokens"]
    start = saved = time.perf_counter()
    train = Shards(partial, "train", tokenizer.dtype, shards=meta["train"])
    val = Shards(partial, "val", tokenizer.dtype, numbered=False, shards=meta["val"])
    # A note with no place is of a run that was killed when it had only to rename the folder.
    rest = documents.batches(meta["place"]) if "place" in meta else iter(())
    try:
        with (contextlib.closing(encoded(rest, tokenizer, processes)) as stream,
              tqdm(total=tokens, initial=before, unit=" tokens", unit_scale=True, mininterval=0.5,
                   desc=f"prepare {documents.source}") as bar):
            for pieces, ended, place in stream:
                for ids in pieces:
                    held_out = val.tokens < min(HELD_OUT * (train.tokens + val.tokens),
                                                HELD_OUT_MOST)
                    (val if held_out else train).write(ids)
                meta.update(documents=meta["documents"] + ended, place=place,
                            train_tokens=train.tokens, val_tokens=val.tokens)
                bar.update(train.tokens - bar.n)
                if tokens and train.tokens >= tokens:
                    break
                if time.perf_counter() - saved >= SAVE_SECONDS:
                    save(partial, meta, train, val)
                    saved = time.perf_counter()
        if not train.tokens or not val.tokens:
            raise UsageError(f"{documents.source} is too short: {train.tokens:,} training and "
                             f"{val.tokens:,} held-out tokens")
        meta.pop("place", None)
        save(partial, meta, train, val)
    except OSError as error:                    # writing: what fails to be read is a UsageError
        raise Unfinished(f"cannot write to {partial}: {first_line(error)}") from error
    finally:
        for file in filter(None, (train.file, val.file)):
            with contextlib.suppress(OSError):      # a full disk has been complained of already
                file.close()
    return (train.tokens - before) / (time.perf_counter() - start)


def save(partial, meta, *splits):
    """First the tokens, then the note that counts them: each on the disk before the next."""
    for split in splits:
        split.sync()
    with open(partial / "meta.tmp", "w") as file:
        file.write(json.dumps(meta, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial / "meta.tmp", partial / "meta.json")


# -----------------------------------------------------------------------------
# shards -> batches

class Tokens:
    """The tokens of one split of a prepared folder, memory-mapped and checked against meta.json.

    batch(at, B, L)  -> (B, L + 1) int64: windows at ... at + B - 1 of the shuffled stream,
                        a pure function of (seed, at)
    windows(n, L)    -> (n, L + 1) int64: n windows spread evenly over the split, always the same
    A window has L + 1 tokens, so that tokens[:, :-1] go in and tokens[:, 1:] are what comes next.
    """

    def __init__(self, folder, split="train", seed=0):
        folder, self.seed = Path(folder), seed
        if not (folder / "meta.json").is_file():
            raise UsageError(f"no prepared data in {folder} (no meta.json): run prepare.py")
        self.meta = json.loads((folder / "meta.json").read_text())
        self.dtype, self.shards = np.dtype(self.meta["dtype"]), []
        for name, shard in self.meta[split].items():
            path = folder / name
            have = path.stat().st_size if path.exists() else -1
            want = shard["tokens"] * self.dtype.itemsize
            if have != want:
                raise UsageError(f"{path} has {have:,} bytes, not the {want:,} that meta.json "
                                 f"records: delete {folder} and prepare it again")
            data = np.memmap(path, dtype=self.dtype, mode="r")
            parts = (data[i:i + 2**24] for i in range(0, len(data), 2**24))
            if functools.reduce(lambda c, part: zlib.crc32(part, c), parts, 0) != shard["crc32"]:
                raise UsageError(f"{path} is damaged (its checksum differs): "
                                 f"delete {folder} and prepare it again")
            self.shards.append(data)
        self.fingerprint = [shard["crc32"] for shard in self.meta[split].values()]
        self.permutations = {}

    def __len__(self):
        return sum(map(len, self.shards))

    def _starts(self, L):
        """Shard and offset of every window of L + 1 tokens.

        Neighbours share one token, so none is lost as an input.
        """
        counts = [max(0, (len(shard) - 1) // L) for shard in self.shards]
        if not sum(counts):
            raise UsageError(f"the data has {len(self):,} tokens, "
                             f"too few for one window of {L + 1}")
        return np.cumsum([0, *counts])

    def _window(self, i, starts, L):
        shard = int(np.searchsorted(starts, i, side="right")) - 1
        start = (i - starts[shard]) * L
        return self.shards[shard][start:start + L + 1].astype(np.int64)

    def batch(self, at, B, L):
        starts, rows = self._starts(L), []
        for position in range(at, at + B):
            epoch, i = divmod(position, int(starts[-1]))
            if (epoch, L) not in self.permutations:
                order = np.random.default_rng((self.seed, epoch)).permutation(starts[-1])
                self.permutations = {(epoch, L): order}       # one epoch's order is kept, not all
            rows.append(self._window(self.permutations[epoch, L][i], starts, L))
        return torch.from_numpy(np.stack(rows))               # (B, L + 1)

    def windows(self, n, L):
        starts = self._starts(L)
        chosen = np.linspace(0, starts[-1] - 1, min(n, int(starts[-1]))).astype(int)
        rows = [self._window(i, starts, L) for i in chosen]
        return torch.from_numpy(np.stack(rows))               # (n, L + 1)


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
        self.held_out, self.length = held_out, None         # length: known once the end was seen
        # The last held-out window also has the token after it, as what comes next.
        self.begin = held_out + 1 if held_out else 0
        self.fingerprint = [str(source), config, self.documents.files, tokenizer.fingerprint,
                            held_out]
        self._rewind()

    def _rewind(self):
        batches = self.documents.batches()
        self.encoded, self.first, self.ids = encoded(batches, self.tokenizer), 0, np.empty(0, int)

    def _read(self, start, stop):
        """Tokens `start` to `stop` of the source, fewer where it ends, as int64."""
        if start < self.first:
            self._rewind()
        while self.first + len(self.ids) < stop:
            pieces, *_ = next(self.encoded, (None,))
            if pieces is None:
                self.length = self.first + len(self.ids)
                break
            # What lies before `start` was read over, or has been asked for: it can go.
            done = min(max(0, start - self.first), len(self.ids))
            self.ids, self.first = np.concatenate([self.ids[done:], *pieces]), self.first + done
        return self.ids[max(0, start - self.first):stop - self.first].astype(np.int64)

    def _window(self, position, L):
        if self.length is not None:
            each = (self.length - self.begin - 1) // L      # windows an epoch
            if each < 1:
                raise UsageError(f"{self.documents.source} has {self.length:,} tokens, "
                                 f"{self.held_out:,} of them held out: too few for one window of "
                                 f"{L + 1}")
            position %= each
        start = self.begin + position * L                   # neighbours share one token
        ids = self._read(start, start + L + 1)
        return ids if len(ids) == L + 1 else self._window(position, L)

    def batch(self, at, B, L):
        rows = [self._window(position, L) for position in range(at, at + B)]
        return torch.from_numpy(np.stack(rows))             # (B, L + 1)

    def windows(self, n, L):
        ids = self._read(0, n * L + 1)
        if len(ids) <= n * L or n * L > self.held_out:
            raise UsageError(f"{n} held-out windows of {L} are asked for: {self.held_out:,} tokens "
                             f"are held out of {self.documents.source}")
        return torch.from_numpy(ids).unfold(0, L + 1, L).contiguous()       # (n, L + 1)


def data_folder(source, tokenizer):
    """Where prepared data is: `source` if it is such a folder, else data/<source>-<tokenizer>."""
    if (Path(source) / "meta.json").is_file():
        return Path(source)
    slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(source).expanduser().name)
    return Path("data") / f"{slug}-{Path(tokenizer.name).stem}"


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
                         f"{tokenizer.name} ({tokenizer.vocab_size:,}): prepare it with --teacher")
    if folder != Path(source) and (meta["source"], meta["config"]) != (str(source), config):
        raise UsageError(f"{folder} was made from {meta['source']}, not from {source}: "
                         "rename one of them")
    return folder


# -----------------------------------------------------------------------------
# the command line, here and in distill.py and eval.py

class Parser(argparse.ArgumentParser):
    """-h shows the header of the file, as typed; a wrong flag is one line, as every mistake is."""

    def __init__(self, header):
        super().__init__(description=header, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UsageError(f"{message} (python {self.prog} -h lists the flags)")


def run_program(main):
    """main(), where what the user can mend is one line and exit code 2."""
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what was saved is kept", file=sys.stderr)
        sys.exit(130)


def parse(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="stdlib", help="stdlib, a file or folder, or a Hugging Face id [stdlib]")
    add("--config", help="which part of a Hugging Face data set, such as en for C4")
    add("--teacher", default="tiny", help="whose tokenizer to use [%(default)s]")
    add("--tokens", type=count, help="stop after this many training tokens [all there are]")
    add("--processes", type=int, help="that tokenise [one a core, at most 8; for bytes 1]")
    add("--out", help="folder to write [data/<data>-<tokenizer>]")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    tokenizer = Tokenizer(args.teacher)
    folder = args.out or data_folder(args.data, tokenizer)
    prepare(args.data, folder, tokenizer, args.config, args.tokens, args.processes)


if __name__ == "__main__":
    run_program(main)
