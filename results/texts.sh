#!/usr/bin/env bash
# English text from five Debian packages: essays, three manuals and a dictionary. No hub, no root.
#
# Run:  bash results/texts.sh texts          # downloads 77 MB, writes 39 MB, in half a minute
#       bash results/texts.sh texts ~/debs   # keeps the packages there, and takes those that are
#
# The result is texts/<package>/*.txt, for --data texts. The same packages give the same bytes.
# It needs apt-get, dpkg-deb, python3 and perl. python3.11-doc is the name in Debian 12: another
# release has another number.
set -euo pipefail
packages="anarchism debian-handbook dict-gcide perl-doc python3.11-doc"
to=${1:?give the folder to write: bash results/texts.sh texts}
to=${to%/}
if [ -e "$to" ]; then
    echo "error: $to exists already: delete it to make it again" >&2
    exit 2
fi
place=$(mktemp -d)
trap 'rm -rf "$place" "$to.partial"' EXIT
debs=${2:-$place}

# Reads the files of one package, a tar archive, and writes their text into a folder, its argument.
program=$(cat <<'PYTHON'
import gzip
import html.parser
import pathlib
import re
import subprocess
import sys
import tarfile

SIZE = 60_000   # characters in a file, about: prepare.py would cut files of more than 65,536
SLICES = 3      # one dictionary file in three, because its entries are terse, and most of the text


class Page(html.parser.HTMLParser):
    """What a browser shows of a page, without its navigation"""
    DROP = set("script style head nav footer form banner docnav toc book-navigation related "
               "sphinxsidebar headerlink mobile-nav toctree-wrapper contents".split())
    BLOCK = set("p div h1 h2 h3 h4 h5 h6 li dt dd pre table blockquote".split())

    def __init__(self):
        super().__init__()
        self.text, self.dropped, self.depth, self.pre = ["\n"], None, 0, 0

    def handle_starttag(self, tag, attrs):
        names = " ".join(value or "" for key, value in attrs if key in ("class", "id"))
        if not self.depth and self.DROP & {tag, *names.split()}:
            self.dropped = tag
        self.depth += tag == self.dropped       # tags of one name nest
        self.pre += tag == "pre"
        self.add("\n\n" * (tag in self.BLOCK) + "\n" * (tag in ("br", "tr")))

    def handle_endtag(self, tag):
        self.add("\n\n" * (tag in self.BLOCK) + " " * (tag in ("td", "th")))
        self.pre -= tag == "pre"
        self.depth -= tag == self.dropped
        if not self.depth:
            self.dropped = None

    def handle_data(self, data):
        if not self.pre:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if self.text[-1].endswith("\n") else data
        self.add("" if self.depth else data)

    def add(self, text):
        self.text += [text] * (text != "")


def page(data):
    parser = Page()
    parser.feed(data.decode())
    return "".join(parser.text)


def pod(data):
    command = ["pod2text", "--utf8", "--indent=0", "--width=99999"]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout.decode()


def dictionary(data):
    text = gzip.decompress(data).decode(errors="ignore")        # a few bytes are no UTF-8
    text = text[text.index("\n0 "):]                            # the first entry, after the licence
    text = re.sub(r" \\[^\\\n]+\\(\s+\([^()]*\))?", "", text)   # without the pronunciation,
    text = re.sub(r"\s*\[(Webster|1913|WordNet|PJC)[^\]]*\]", "", text)  # and names of sources,
    text = re.sub(r"[{}]", "", text)                            # and links,
    return re.sub(r"(?<=\S)\n? +(?=\S)", " ", text)             # a paragraph is one line


READERS = {     # by the end of a file's path
    r"anarchism/html/.*\.html": page,
    r"debian-handbook/html/en-US/.*\.html": page,
    r"python3[.0-9]*/html/(?!genindex|contents|search|whatsnew/changelog).*\.html": page,
    r"pod/(?!perltoc|perluniprops)\w*\.pod": pod,
    r"gcide\.dict\.dz": dictionary}


def reader(path):
    for end, read in READERS.items():
        if re.search(f"/{end}$", path):
            return read
    return None


def files(text):
    """The text in parts of about SIZE characters; each begins with a section, or an entry."""
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    parts = [""]
    for section in re.split(r"(?<=\n\n)(?=\S)", text):
        if parts[-1] and len(parts[-1]) + len(section) > SIZE:
            parts.append("")
        parts[-1] += section
    return parts


folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True)
package = tarfile.open(fileobj=sys.stdin.buffer, mode="r|")
for member in package:
    read = reader(member.name)
    if read is None or not member.isfile():
        continue
    name = re.sub(r".*/(html|pod|dictd|en-US)/|(\.dict)?\.\w+$", "", member.name).replace("/", "-")
    for n, part in enumerate(files(read(package.extractfile(member).read()))):
        if read is not dictionary or n % SLICES == 0:
            (folder / f"{name}-{n:03}.txt").write_text(part, encoding="utf-8")
PYTHON
)

rm -rf "$to.partial"
mkdir -p "$debs"
for package in $packages; do
    if ! compgen -G "$debs/${package}_*.deb" > "$place/found"; then
        (cd "$debs" && apt-get download -q "$package")
    fi
    dpkg-deb --fsys-tarfile "$debs/${package}"_*.deb | python3 -c "$program" "$to.partial/$package"
done
mv "$to.partial" "$to"
du -sm "$to"/*
