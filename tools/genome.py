"""A genome to train on with `recipe=dna`: E. coli 536 from Debian's package bowtie-examples, or a made-up one, which is said.

python tools/genome.py [OUTPUT]         (default corpora/genome.fna)
python tools/genome.py --generate BASES [OUTPUT]

The package is downloaded with apt-get and unpacked without being installed. Sequences are written as records of RECORD bases,
so that some of them can be held out for evaluation.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PACKAGE = "bowtie-examples"
RECORD = 1 << 16
"""Bases per record of the file that is written."""
LINE = 80
MADE_UP = 2_000_000
"""Bases of a made-up genome."""
TIMEOUT_S = 300


class Unavailable(Exception):
    """Why there is no real genome here."""


def real_genome(folder: Path) -> tuple[str, bytes]:
    """Name and bases of the longest sequence in the package. Unavailable if it cannot be had."""
    for command in (["apt-get", "download", PACKAGE], ["dpkg", "-x", f"{PACKAGE}.deb", "unpacked"]):
        if command[0] == "dpkg":
            packages = list(folder.glob(f"{PACKAGE}_*.deb"))
            if not packages:
                raise Unavailable(f"apt-get download left no {PACKAGE}_*.deb")
            packages[0].rename(folder / f"{PACKAGE}.deb")
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{' '.join(command)}: {error}") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Unavailable(f"{' '.join(command)}: {reason}")
    records = [
        record for path in (folder / "unpacked").rglob("*.fna.gz") for record in read_fasta(gzip.decompress(path.read_bytes()))
    ]
    if not records:
        raise Unavailable(f"{PACKAGE} has no .fna.gz")
    return max(records, key=lambda record: len(record[1]))


def read_fasta(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and bases of every record."""
    for record in data.split(b">")[1:]:
        header, _, sequence = record.partition(b"\n")
        name = header.decode(errors="replace").split()[0].strip("|").rpartition("|")[2]
        yield name, sequence.translate(None, b" \t\r\n")


def made_up_genome(bases: int, seed: int = 0) -> bytes:
    """Bases with something to learn: a random Markov chain of order 5, and a third of repeats with mistakes in them."""
    random = np.random.default_rng(seed)
    order = 5
    odds = random.dirichlet([1.0] * 4, size=4**order).cumsum(axis=1)
    draws, codes, context = random.random(bases), np.empty(bases, np.uint8), 0
    for at in range(bases):
        base = min(3, int(np.searchsorted(odds[context], draws[at])))
        codes[at] = base
        context = (context * 4 + base) % 4**order
    at, copied = bases // 2, 0
    while 3 * copied < bases and at < bases:
        length = int(min(random.integers(200, 3000), bases - at))
        source = int(random.integers(0, at - length)) if at > length else 0
        repeat = codes[source : source + length].copy()
        mistakes = random.random(length) < 0.05
        repeat[mistakes] = random.integers(0, 4, int(mistakes.sum()))
        codes[at : at + length] = repeat
        at, copied = at + length + int(random.integers(0, 500)), copied + length
    return np.frombuffer(b"ACGT", np.uint8)[codes].tobytes()


def write_fasta(path: Path, name: str, sequence: bytes) -> None:
    """Write records of RECORD bases; the file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for start in range(0, len(sequence), RECORD):
            record = sequence[start : start + RECORD]
            file.write(f">{name}:{start + 1}-{start + len(record)}\n".encode())
            for at in range(0, len(record), LINE):
                file.write(record[at : at + LINE] + b"\n")
    partial.rename(path)


def main(arguments: list[str] | None = None) -> int:
    """Write the file and say what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=Path("corpora/genome.fna"))
    parser.add_argument("--generate", type=int, metavar="BASES", help="make a genome up, of this many bases")
    options = parser.parse_args(arguments)
    if options.generate is not None and options.generate < 1:
        parser.error(f"--generate {options.generate}: a genome has at least one base")
    if options.generate is None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                name, sequence = real_genome(Path(folder))
            what = f"{name} from Debian's {PACKAGE}"
        except Unavailable as reason:
            print(f"no real genome: {reason}", file=sys.stderr)
            options.generate = MADE_UP
    if options.generate is not None:
        name, sequence, what = "made-up", made_up_genome(options.generate), "a MADE-UP genome (Markov chain with repeats)"
    write_fasta(options.output, name, sequence)
    print(f"{options.output}: {what}, {len(sequence):,} bases in records of {RECORD:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
