"""Pieces of Markdown documents."""


def grid(header, rows, *, text=1):
    """A Markdown table: the first `text` columns left, the others, figures, right."""
    lines = [header, ["---:" if index >= text else "---" for index in range(len(header))], *rows]
    cells = [[str(cell).strip().replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def distinct(values):
    return list(dict.fromkeys(values))
