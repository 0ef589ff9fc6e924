"""Bring files to a machine that takes only so much at a time: split here, collect there, check, install.

python3 bench/gpu/peers/split_wheel.py split WHEEL... --to DIR [--piece-mib 40]
python3 bench/gpu/peers/split_wheel.py collect DIR --store STORE     # once per transfer; says what is still missing
python3 bench/gpu/peers/split_wheel.py install STORE --target SITE   # joins, checks sha256, pip without index and deps
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

LIST_NAME = "pieces.json"
PIECE_MIB = 40
_CHUNK = 1 << 20


class PieceError(Exception):
    """What is missing or damaged, in one line."""


@dataclass(frozen=True)
class Piece:
    """One part of one file."""

    name: str
    size_bytes: int
    sha256: str


def sha256_of(path: Path) -> str:
    """Of a file, read in pieces."""
    found = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def split(files: Sequence[Path], directory: Path, piece_bytes: int) -> dict[str, dict]:
    """Cut each file into pieces of at most `piece_bytes`, and write the list of them."""
    if piece_bytes < 1:
        raise PieceError(f"a piece of {piece_bytes} bytes holds nothing; give --piece-mib 1 or more")
    directory.mkdir(parents=True, exist_ok=True)
    listing: dict[str, dict] = {}
    for file in files:
        if not file.is_file():
            raise PieceError(f"{file}: no such file")
        if file.name in listing:
            raise PieceError(f"{file.name} is given twice")
        pieces = []
        with file.open("rb") as handle:
            while content := handle.read(piece_bytes):
                part = directory / f"{file.name}.part{len(pieces):03d}"
                part.write_bytes(content)
                pieces.append(Piece(part.name, len(content), hashlib.sha256(content).hexdigest()))
        listing[file.name] = {"sha256": sha256_of(file), "pieces": [asdict(piece) for piece in pieces]}
    (directory / LIST_NAME).write_text(json.dumps(listing, indent=1), encoding="utf-8")
    return listing


def collect(directory: Path, store: Path) -> list[str]:
    """Copy the list and whole pieces into the store; returns the names of those still missing there."""
    store.mkdir(parents=True, exist_ok=True)
    if (directory / LIST_NAME).is_file():
        shutil.copyfile(directory / LIST_NAME, store / LIST_NAME)
    absent = []
    for piece in (piece for entry in listing_of(store).values() for piece in entry["pieces"]):
        kept, arrived = store / piece["name"], directory / piece["name"]
        if not _whole(kept, piece) and arrived.is_file():
            shutil.copyfile(arrived, kept)
        if not _whole(kept, piece):
            kept.unlink(missing_ok=True)
            absent.append(piece["name"])
    return absent


def listing_of(store: Path) -> dict[str, dict]:
    """The list of pieces."""
    try:
        found: dict[str, dict] = json.loads((store / LIST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PieceError(f"{store}: no {LIST_NAME}; bring it with the first pieces") from None
    return found


def _whole(path: Path, piece: dict) -> bool:
    return path.is_file() and path.stat().st_size == piece["size_bytes"] and sha256_of(path) == piece["sha256"]


def join(store: Path) -> list[Path]:
    """Put every file together again beside its pieces, and check it.

    Raises:
        PieceError: a piece is missing or damaged, or the whole is not what was split.
    """
    made = []
    for name, entry in listing_of(store).items():
        whole = store / name
        if not (whole.is_file() and sha256_of(whole) == entry["sha256"]):
            _join_one(store, whole, entry)
        made.append(whole)
    return made


def _join_one(store: Path, whole: Path, entry: dict) -> None:
    partial = whole.with_name(whole.name + ".partial")
    with partial.open("wb") as out:
        for piece in entry["pieces"]:
            path = store / piece["name"]
            if not _whole(path, piece):
                partial.unlink()
                raise PieceError(f"{piece['name']}: missing or damaged in {store}; bring it again")
            with path.open("rb") as handle:
                shutil.copyfileobj(handle, out, _CHUNK)
    if sha256_of(partial) != entry["sha256"]:
        partial.unlink()
        raise PieceError(f"{whole.name}: its pieces are whole but together they are another file; split it again")
    partial.replace(whole)


def install(store: Path, target: Path) -> list[str]:
    """Join, then pip into `target`: no index, no dependencies, nothing of the machine's own changed."""
    wheels = [str(path) for path in join(store) if path.suffix == ".whl"]
    if not wheels:
        raise PieceError(f"{store}: no wheel among its files")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--target", str(target), *wheels], check=True)
    return wheels


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("split")
    first.add_argument("files", nargs="+", type=Path)
    first.add_argument("--to", type=Path, required=True)
    first.add_argument("--piece-mib", type=int, default=PIECE_MIB)
    second = commands.add_parser("collect")
    second.add_argument("directory", type=Path)
    second.add_argument("--store", type=Path, required=True)
    third = commands.add_parser("install")
    third.add_argument("store", type=Path)
    third.add_argument("--target", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        if args.command == "split":
            listing = split(args.files, args.to, args.piece_mib << 20)
            print(f"{sum(len(entry['pieces']) for entry in listing.values())} pieces in {args.to}")
        elif args.command == "collect":
            absent = collect(args.directory, args.store)
            print(f"{len(absent)} pieces still missing{': ' + ', '.join(absent[:8]) if absent else ''}")
        else:
            print(f"{len(install(args.store, args.target))} wheels in {args.target}")
    except PieceError as error:
        print(f"split_wheel: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"split_wheel: pip ended with exit code {error.returncode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
