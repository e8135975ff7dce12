"""Make the embedded text tasks, atm_fl/texts/NAME.jsonl.gz, of what Debian and npm carry.

    pretraining/fetch_texts.sh /tmp/texts
    python pretraining/texts.py /tmp/texts --out atm_fl/texts

A line a text: {"text", "label", "split"}, split "train" or "test". Texts are cut at 400 characters and told apart by
their letters (the same twice: the first stays; the same under two labels: neither does). They are split by *source*:
all of one package, mail sender, speech or chapter are on one side. At most 24 labels, the largest, and 2,000 texts a
split, evenly over the labels, chosen by digest, so that the input's order does not matter. pretraining/README.md
names sources and licences.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import lzma
import re
import subprocess
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from email import message_from_string, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import rdata  # type: ignore[import-not-found,import-untyped,unused-ignore]

LENGTH, MOST, CLASSES = 400, 2000, 24
Text = tuple[str, str, str]
"""text, label, source"""

LANGUAGES = {
    "cs": "Czech", "da": "Danish", "de": "German", "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French",
    "it": "Italian", "ja": "Japanese", "ko": "Korean", "pl": "Polish", "pt_BR": "Portuguese", "ru": "Russian",
    "sk": "Slovak", "uk": "Ukrainian", "zh_CN": "Chinese",
}  # fmt: skip
ERAS = {1829: "1790-1828", 1861: "1829-1860", 1897: "1861-1896", 1933: "1897-1932", 1969: "1933-1968", 2030: "1969-"}
BOOKS = {
    "law": ["Ge", "Exo", "Lev", "Num", "Deut"],
    "history": ["Josh", "Judg", "Ruth", "1Sam", "2Sam", "1Kings", "2Kings", "1Chr", "2Chr", "Ezra", "Neh", "Esth"],
    "poetry": ["Job", "Psa", "Prov", "Eccl", "Song"],
    "prophets": ["Isa", "Jer", "Lam", "Ezek", "Dan", "Hos", "Joel", "Amos", "Mic", "Zech", "Mal"],
    "gospels": ["Mat", "Mark", "Luke", "John"],
    "acts": ["Acts"],
    "letters": ["Rom", "1Cor", "2Cor", "Gal", "Eph", "Phil", "Col", "1Tim", "2Tim", "Heb", "Jam", "1Pet", "1John"],
    "revelation": ["Rev"],
}


def paragraphs(file: Path) -> Iterator[dict[str, str]]:
    """The entries of one of apt's lists."""
    packed = subprocess.run(["lz4", "-dc", str(file)], capture_output=True, check=True).stdout.decode()
    for paragraph in packed.split("\n\n"):
        entry: dict[str, str] = {}
        key = ""
        for line in paragraph.splitlines():
            if line.startswith(" "):
                entry[key] += "\n" + line[1:]
            else:
                key, _, value = line.partition(":")
                entry[key] = value.strip()
        if entry:
            yield entry


def apt_list(folder: Path, end: str) -> Path:
    (file,) = folder.glob(f"lists/*dists_bookworm_main_{end}.lz4")
    return file


def sections(folder: Path) -> Iterator[Text]:
    """Debian: the section of a package, by the first line of its description; the source package is the source."""
    for entry in paragraphs(apt_list(folder, "binary-amd64_Packages")):
        source = entry.get("Source", entry["Package"]).split()[0]
        yield entry["Description"], entry["Section"], source


def languages(folder: Path) -> Iterator[Text]:
    """Debian: the language of a package's long description."""
    for code, name in LANGUAGES.items():
        for entry in paragraphs(apt_list(folder, f"i18n_Translation-{code.replace('_', '%5f')}")):
            long = next(value for key, value in entry.items() if key.startswith("Description-") and key[12:] != "md5")
            body = " ".join(line for line in long.splitlines()[1:] if line != ".")
            yield body, name, entry["Package"]


def lexicographer(folder: Path, kind: str, names: list[str]) -> Iterator[Text]:
    """WordNet: the lexicographer's file of a synset, by its gloss without examples."""
    first = {"noun": 3, "verb": 29}[kind]
    for line in (folder / "wordnet-base" / "usr/share/wordnet" / f"data.{kind}").read_text().splitlines():
        if not line.startswith(" "):
            number = int(line.split()[1])
            gloss = line.partition("| ")[2].split('; "')[0]
            yield gloss, names[number - first], line[:8]


def glosses(folder: Path) -> Iterator[Text]:
    names = "Tops act animal artifact attribute body cognition communication event feeling food group location"
    names += " motive object person phenomenon plant possession process quantity relation shape state substance time"
    for text, label, source in lexicographer(folder, "noun", names.split()):
        if label not in ("Tops", "motive"):
            yield text, label, source


def actions(folder: Path) -> Iterator[Text]:
    names = "body change cognition communication competition consumption contact creation emotion motion perception"
    return lexicographer(folder, "verb", [*names.split(), "possession", "social", "stative", "weather"])


def plain(mail: EmailMessage) -> str:
    part = mail.get_body(("plain", "html"))
    text = part.get_content() if part else ""
    text = re.sub(r"(?is)<(script|style).*?</\1>|<!--.*?-->|<[^>]*>", " ", text)
    return html.unescape(text)


def mails(folder: Path) -> Iterator[Text]:
    """SpamAssassin: spam, messages and newsletters (hard ham), by subject and body without addresses."""
    labels = {"spam": "spam", "easy": "message", "hard": "newsletter"}
    for file in sorted((folder / "spam-assassin" / "package/data").glob("*/*.txt")):
        mail = message_from_string(file.read_text(errors="replace"), policy=policy.default)
        assert isinstance(mail, EmailMessage)
        try:
            text = f"{mail['subject'] or ''}. {plain(mail)}"
            sender = str(mail["from"] or file.name).lower()
        except (LookupError, ValueError, AttributeError, IndexError, TypeError):
            continue  # a header or a character set that Python's parser does not take
        text = re.sub(r"\[[\w -]+\]|\bre:|(?m:^[>|].*$)|\S*(@|://|www\.)\S*", " ", text, flags=re.IGNORECASE)
        yield text, labels[file.parent.name.split("-")[0]], sender


def speeches(folder: Path) -> Iterator[Text]:
    """State of the Union addresses: the era, by passages of three sentences."""
    for file in sorted((folder / "sotu" / "package/data").glob("*.json")):
        speech = json.loads(file.read_text())
        era = next(name for end, name in ERAS.items() if speech["year"] < end)
        sentences = re.split(r"(?<=[.!?]) +(?=[A-Z])", speech["text"])
        for start in range(0, len(sentences), 12):
            yield " ".join(sentences[start : start + 3]), era, file.name


def verses(folder: Path) -> Iterator[Text]:
    """The King James Bible: the kind of book, by two verses; the chapter is the source."""
    for kind, books in BOOKS.items():
        for book in books:
            printed = subprocess.run(["bible", "-f", f"{book}1:1-{book}200:200"], capture_output=True, text=True).stdout
            chapters: dict[str, list[str]] = defaultdict(list)
            for place, verse in re.findall(r"(?m)^(\S+):\d+ (.*)$", printed):
                chapters[place].append(verse)
            for place, lines in chapters.items():
                for start in range(0, len(lines) - 1, 2):
                    yield " ".join(lines[start : start + 2]), kind, place


def reviews(folder: Path) -> Iterator[Text]:
    """modeldata's small_fine_foods: whether a food got five stars, by the review."""
    place = folder / "r-cran-modeldata/usr/lib/R/site-library/modeldata/data/Rdata"
    for name in ("training_data", "testing_data"):
        frame = rdata_lazy(place, name)
        for product, review, score in zip(frame["product"], frame["review"], frame["score"], strict=True):
            yield str(review), {"great": "five stars", "other": "fewer stars"}[str(score)], str(product)


def rdata_lazy(place: Path, name: str) -> Mapping[str, Any]:
    """One table of R's lazy-load database."""
    index = rdata.conversion.convert(rdata.parser.parse_data(gzip.decompress(place.with_suffix(".rdx").read_bytes())))
    begin, length = (int(number) for number in index["variables"][name])
    packed = place.with_suffix(".rdb").read_bytes()[begin : begin + length]
    # four bytes of length, then "Z" and bare LZMA2 or a stream of zlib
    bare = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    unpacked = (
        lzma.decompress(packed[5:], lzma.FORMAT_RAW, filters=bare)
        if packed[4:5] == b"Z"
        else zlib.decompress(packed[4:])
    )
    table: Mapping[str, Any] = rdata.conversion.convert(rdata.parser.parse_data(unpacked))
    return table


def digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def choose(texts: Iterator[Text]) -> list[dict[str, str]]:
    """Clean, told apart, split by source (a third for the test), at most MOST a split, evenly over the labels."""
    labels: dict[str, set[str]] = defaultdict(set)
    first: dict[str, Text] = {}
    for text, label, source in texts:
        text = " ".join(text.split())[:LENGTH].strip()
        letters = re.sub(r"\W+", " ", text.lower()).strip()
        if len(letters) >= 12:
            labels[letters].add(label)
            first.setdefault(letters, (text, label, source))
    rows: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for letters, (text, label, source) in first.items():
        if len(labels[letters]) == 1:
            split = "test" if int(digest("split", source)[:8], 16) % 3 == 0 else "train"
            rows[split, label].append((digest(text), text))
    size = {label: min(len(rows["train", label]), len(rows["test", label])) for _, label in list(rows)}
    classes = sorted(size, key=lambda label: (-size[label], label))[:CLASSES]
    kept = []
    for split in ("train", "test"):
        room, taken = MOST, []
        smallest_first = sorted(classes, key=lambda label: len(rows[split, label]))
        for left, label in zip(range(len(classes), 0, -1), smallest_first, strict=True):
            share = sorted(rows[split, label])[: room // left]
            room -= len(share)
            taken += [(key, {"text": text, "label": label, "split": split}) for key, text in share]
        kept += [row for _, row in sorted(taken, key=lambda pair: pair[0])]
    return kept


TASKS: dict[str, Callable[[Path], Iterator[Text]]] = {
    "mails": mails, "sections": sections, "languages": languages, "glosses": glosses, "actions": actions,
    "speeches": speeches, "verses": verses, "reviews": reviews,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, read in TASKS.items():
        rows = choose(read(given.folder))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.out / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
        counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "test")}
        smallest = min(Counter(row["label"] for row in rows if row["split"] == "train").values())
        print(f"{name}: {len({row['label'] for row in rows})} classes, {counts}, smallest class {smallest}")


if __name__ == "__main__":
    main()
