"""From the visits of all pages (a folder of items) make what the next job needs: their sum and the most popular."""

import json
import sys
from pathlib import Path

TOP = 10


def main(folder: str, result: str) -> None:
    items = [json.loads(line) for file in sorted(Path(folder).rglob("part-*.data")) for line in file.open()]
    items.sort(key=lambda item: (-item[1], item[0]))
    found = {"visits": sum(visits for _, visits in items), "popular": [page for page, _ in items[:TOP]]}
    Path(result).write_text(json.dumps(found))
    print(f"{found['visits']:,} visits of {len(items):,} pages; the most popular: {', '.join(found['popular'][:3])}")


if __name__ == "__main__":
    main(*sys.argv[1:])
