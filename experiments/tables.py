"""The experiments' tables, and how a table looks in Markdown."""


def tables_of(records, experiments, model_type):
    """The table of each experiment: {name: rows}.

    records: of the images of a split, as of `examine`; experiments: {name: Experiment}; model_type:
    the captioner's.
    """
    tables = {}
    for name, experiment in experiments.items():
        images = [record.get(name, []) for record in records]
        tables[name] = experiment.table(images, model_type)
    return tables


def intervals_joined(rows):
    """Rows whose fields NAME, "NAME low" and "NAME high" are one text, "0.12 [0.05, 0.20]"."""
    joined = []
    for row in rows:
        short = {}
        for name, value in row.items():
            low = row.get(f"{name} low")
            if low is not None and value is not None:
                high = row[f"{name} high"]
                short[name] = f"{value:.3f} [{low:.3f}, {high:.3f}]"
            elif not name.endswith((" low", " high")):
                short[name] = value
        joined.append(short)
    return joined


def markdown_table(rows):
    """Rows, dicts of the same keys, as a Markdown table; a column that holds dicts is left out.

    The cells of a column are of one width, so that the text can be read as it is.
    """
    if not rows:
        return "nothing to measure"
    columns = {}  # their names, in order
    for row in rows:
        columns |= row
    for row in rows:
        for name, value in row.items():
            if isinstance(value, dict):
                columns.pop(name, None)
    aligned = []
    for name in columns:
        values = [row.get(name) for row in rows]
        aligned.append(_aligned_column(name, values))
    header, *lines = [" | ".join(cells) for cells in zip(*aligned)]
    rule = "-|-".join("-" * len(cells[0]) for cells in aligned)
    return "\n".join([f"| {header} |", f"|-{rule}-|", *(f"| {line} |" for line in lines)])


def _aligned_column(name, values):
    """The name and the values of a column as texts of one width, numbers to the right."""
    texts = [_cell(value) for value in values]
    width = max(len(text) for text in [name, *texts])
    cells = [name.ljust(width)]
    for value, text in zip(values, texts):
        is_number = isinstance(value, (int, float))
        cells.append(text.rjust(width) if is_number else text.ljust(width))
    return cells


def _cell(value):
    """The text of a table's cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)
