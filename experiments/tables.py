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


def markdown_table(rows):
    """Rows, dicts of the same keys, as a Markdown table; a column that holds dicts is left out."""
    if not rows:
        return "nothing to measure"
    columns = {}  # their names, in order
    for row in rows:
        columns |= row
    for row in rows:
        for name, value in row.items():
            if isinstance(value, dict):
                columns.pop(name, None)
    lines = [" | ".join(columns), "|".join(["---"] * len(columns))]
    for row in rows:
        lines.append(" | ".join(_cell(row.get(name)) for name in columns))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value):
    """The text of a table's cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)
