"""Fails on C and CUDA sources that break the house rules a compiler does not see:
functions over 80 lines (kernels: 200), files over 800, unfinished work without an issue number.
usage (ctest): check_style.py REPOSITORY"""
import pathlib
import re
import sys

FOLDERS = "core kvcache attention model calibration ipc parallel scheduler eval cmd tests bench".split()
MAX_FILE = 800
MAX_FUNCTION = {".c": 80, ".h": 80, ".cu": 200, ".cuh": 200}


def function_lengths(lines):
    """(line, length) of every function: clang-format puts its braces in column 0."""
    start = None
    for number, line in enumerate(lines, 1):
        if line == "{":
            start = number
        elif line == "}" and start:
            yield start, number - start + 1
            start = None


def problems(path):
    lines = path.read_text().splitlines()
    if len(lines) > MAX_FILE:
        yield f"{path}: {len(lines)} lines, at most {MAX_FILE}"
    limit = MAX_FUNCTION[path.suffix]
    for line, length in function_lengths(lines):
        if length > limit:
            yield f"{path}:{line}: function of {length} lines, at most {limit}"
    for number, line in enumerate(lines, 1):
        if re.search(r"\b(TODO|FIXME)\b(?!\(#\d+\))", line):
            yield f"{path}:{number}: unfinished work without an issue number"


def main():
    root = pathlib.Path(sys.argv[1])
    files = [p for d in FOLDERS for p in sorted((root / d).rglob("*")) if p.suffix in MAX_FUNCTION]
    found = [text for p in files for text in problems(p)]
    print("\n".join(found) if found else f"{len(files)} files are in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
