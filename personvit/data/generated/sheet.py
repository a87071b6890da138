"""The contact sheet: some test identities over all cameras, and a cut through the pool."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from personvit.data.generated.plan import Item

CELL_WIDTH, CELL_HEIGHT, GAP, MARGIN = 84, 176, 6, 54
IDENTITIES, POOL_ROWS = 10, 3


def write_contact_sheet(path: Path, root: Path, plan: list[Item]) -> None:
    """Draw the sheet from the files of a set and save it as PNG."""
    labelled: dict[int, list[Item]] = {}
    for item in sorted(plan, key=lambda entry: entry.shot.serial):
        folder, pid = item.name.split("/")[0], item.name.split("/")[-1].split("_")[0]
        if folder in ("query", "bounding_box_test") and int(pid) > 0:
            labelled.setdefault(int(pid), []).append(item)
    columns = 14
    rows: list[tuple[str, list[Item]]] = [
        (f"{pid:04d}", _spread(items, columns)) for pid, items in sorted(labelled.items())[:IDENTITIES]
    ]
    pool = sorted((item for item in plan if item.name.startswith("pool/")), key=lambda entry: entry.name)
    for start in range(0, min(len(pool), POOL_ROWS * columns), columns):
        rows.append(("pool", pool[start : start + columns]))
    width = MARGIN + columns * (CELL_WIDTH + GAP) + GAP
    height = 34 + len(rows) * (CELL_HEIGHT + GAP + 14)
    sheet = Image.new("RGB", (width, height), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    draw.text(
        (GAP, 8), "Generated persons: test identities over cameras (Q query, o occluded), then pool", (20, 20, 20), font
    )
    for number, (title, items) in enumerate(rows):
        y = 34 + number * (CELL_HEIGHT + GAP + 14)
        draw.text((GAP, y + CELL_HEIGHT // 2), title, (20, 20, 20), font)
        for column, item in enumerate(items):
            x = MARGIN + column * (CELL_WIDTH + GAP)
            with Image.open(root / item.name) as image:
                image.thumbnail((CELL_WIDTH, CELL_HEIGHT), Image.Resampling.BICUBIC)
                sheet.paste(image, (x + (CELL_WIDTH - image.width) // 2, y + CELL_HEIGHT - image.height))
            draw.text((x, y + CELL_HEIGHT), _caption(item), (90, 90, 90), font)
    sheet.save(path)


def _spread(items: list[Item], count: int) -> list[Item]:
    """At most `count` items, evenly over the list."""
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]


def _caption(item: Item) -> str:
    if item.name.startswith("pool/"):
        return "o" if item.shot.occluded else ""
    text = f"c{item.shot.camera}"
    if item.name.startswith("query/"):
        text += " Q"
    return text + (" o" if item.shot.occluded else "")
