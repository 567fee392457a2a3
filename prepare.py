"""Turn text into token shards on disk, once, so that training only reads memory-mapped integers.

Run:  python prepare.py                                   # Python's library, as bytes; no download
      python prepare.py --data ~/books --teacher smollm2  # a folder of text, in SmolLM2's tokens
      python prepare.py --data allenai/c4 --config en --teacher microsoft/phi-1_5 --tokens 3e9

What comes out is one folder, and it appears whole or not at all. Killed half way, the same command
goes on from data/.<name>.partial, and ends with the same bytes:

    data/<name>/train_00000.bin ...   only token ids, uint16 (uint32 if the vocabulary needs it)
                val.bin               every 25th token or so, in whole documents, not trained on
                                      (a text file of more than 65,536 characters counts as several)
                meta.json             tokenizer, vocabulary, counts, source, every shard's checksum

    document | <|endoftext|> | document | <|endoftext|> | ...   packed end to end, read in windows

Training sees the windows in an order that depends on (seed, epoch) alone. So a place in the data is
one number, the count of windows before it, and a run can be taken up anywhere.

It leaves out: filtering, deduplication, mixing of several sources. Do these before, with tools made
for them.
"""
import argparse
import contextlib
import functools
import gzip
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import filelock
import huggingface_hub
import numpy as np
import torch
from tqdm import tqdm

from model_ssm import UsageError, ask_hub, first_line
from model_teacher import Tokenizer

SHARD_TOKENS = 10**8    # 200 MB a shard in uint16
PIECE = 2**16           # characters read at once, so that memory does not depend on a file's size
BATCH = 2**20           # characters tokenised at once
SAVE_SECONDS = 5        # between two saves: what a kill can cost, and what memory holds
HELD_OUT = 0.04         # share of the tokens that go to val.bin
HELD_OUT_MOST = 2**22   # and its largest size


# -----------------------------------------------------------------------------
# sources

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
        pieces = (self._from_hub(place) if self.paths is None else
                  itertools.islice(enumerate(self._from_files(), 1), place, None))
        batch, size = [], 0
        try:
            for number, (text, ends) in pieces:
                if not isinstance(text, str):
                    raise UsageError(f'{self.source} row {number}: expected text in a field '
                                     f'"text", found {str(text)[:60]}')
                batch.append((text, ends))
                size += len(text)
                if size >= BATCH:
                    yield batch, self.rows.state_dict() if self.rows else number
                    batch, size = [], 0
        except UsageError:
            raise
        except Exception as error:      # network, unknown id, gzip, Parquet: many types, one cure
            raise UsageError(f"cannot {self.doing}: {first_line(error)}") from error
        if batch:
            yield batch, self.rows.state_dict() if self.rows else number

    def _from_files(self):
        for path in self.paths:
            self.doing = f"read {path}"
            yield from (read_whole if self.source == "stdlib" else reader(path))(path)

    def _from_hub(self, place):
        import datasets
        self.doing = (f"stream the data set {self.source} "
                      "(with no network: python distill.py --preset tiny)")
        ask_hub()
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
        self.rows = datasets.load_dataset(self.source, self.config, split="train", streaming=True)
        if place:
            self.rows.load_state_dict(place)
        for number, row in enumerate(self.rows, 1):
            yield number, (row.get("text", row), True)


def files_of(source):
    """-> the files of `source` in the order they are read; None if it is a Hugging Face id"""
    path = Path(source).expanduser()
    if source == "stdlib":
        root = Path(os.__file__).parent
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        files = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
    elif path.exists():
        files = [p for p in (path, *path.rglob("*")) if p.is_file() and reader(p)]
    elif source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix in READERS:
        raise UsageError(f"no such file or folder: {source} "
                         "(and not a Hugging Face id like allenai/c4)")
    else:
        return None
    if not files:
        raise UsageError(f"nothing to read in {source}: it takes {' '.join(READERS)}, "
                         "text and JSON also as .gz")
    return sorted(files)


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
    for rows in file.iter_batches(batch_size=1000, columns=["text"]):
        yield from ((text, True) for text in rows["text"].to_pylist())


READERS = {".txt": read_text, ".md": read_text, ".rst": read_text, ".py": read_text,
           ".jsonl": read_json, ".json": read_json, ".parquet": read_parquet}


def reader(path):
    """The function that reads `path`, by its name; None for a kind of file that we cannot read."""
    return READERS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)


# -----------------------------------------------------------------------------
# text -> tokens

def encoded(batches, tokenizer, processes=1):
    """(pieces, place), ... -> (an array of ids for each piece, place), ... in the same order

    Several processes take turns. Each has one batch in hand, so memory stays flat:

        batch    1 2 3 4 5 6 ...
        sent to  1 2 3 1 2 3 ...    just after its answer to the batch before was taken from it
    """
    if processes == 1:
        for pieces, place in batches:
            yield tokenizer.encode_pieces(pieces), place
        return
    context, workers = multiprocessing.get_context("fork"), {}
    for _ in range(processes):
        ours, theirs = context.Pipe()
        workers[ours] = context.Process(target=work, args=(ours, theirs, tokenizer), daemon=True)
        workers[ours].start()
        theirs.close()                              # now only it has this end: if it dies, we know
    sent = []
    try:
        for (pieces, place), worker in zip(batches, itertools.cycle(workers)):
            answer = [(worker.recv(), sent.pop(0)[1])] if len(sent) == processes else []
            worker.send(pieces)
            sent.append((worker, place))
            yield from answer
        for worker, place in sent:
            yield worker.recv(), place
    except (EOFError, OSError) as error:
        raise UsageError("a process that tokenises has died, perhaps for want of memory: "
                         "try fewer --processes") from error
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
            theirs.send(tokenizer.encode_pieces(theirs.recv()))


# -----------------------------------------------------------------------------
# tokens -> shards

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
    # One reader feeds about eight. Bytes are as fast to encode as to hand over, and only Linux has
    # forks that can be trusted.
    alone = tokenizer.name == "bytes" or sys.platform != "linux"
    processes = processes or (1 if alone else min(8, os.cpu_count()))
    with unfinished(folder, recipe) as (partial, meta):
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
          f"vocabulary {tokenizer.vocab_size:,}")
    return meta


@contextlib.contextmanager
def unfinished(folder, recipe):
    """-> where `folder` is made, and the note (meta.json) of what this recipe has done there so far

    It is ours alone, by a lock that the system opens if we are killed. Whatever else stops us, what
    the note counts is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "lock"))
    note, meta = partial / "meta.json", recipe | {
        "documents": 0, "train_tokens": 0, "val_tokens": 0, "train": {}, "val": {}, "place": None}
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
    rest = documents.batches(meta["place"]) if "place" in meta else iter(())
    with (contextlib.closing(encoded(rest, tokenizer, processes)) as stream,
          tqdm(total=budget, initial=meta["train_tokens"], unit=" tokens", unit_scale=True,
               mininterval=0.5, desc=f"prepare {documents.source}") as bar):
        for pieces, meta["place"] in stream:
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
                         f"{meta['val_tokens']:,} held-out tokens")
    meta.pop("place", None)
    save(partial, meta, unsaved)


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
        if not (folder / "meta.json").is_file():
            raise UsageError(f"no prepared data in {folder} (no meta.json): run prepare.py")
        self.meta = json.loads((folder / "meta.json").read_text("utf-8"))
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
    add("--data", default="stdlib", help="stdlib, a file or folder, or a Hugging Face id [stdlib]")
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
