"""The tables of docs/PROTOCOL.md as Markdown: verdicts, components, captioners, arms, words."""

import csv
import io

import numpy as np

from experiments.hypotheses import (
    CLAIMS,
    COMPONENTS,
    METRICS,
    UNITS,
    added_component,
    arm_difference,
    bootstrap_difference,
    explanation_hypotheses,
    macro_precision,
    sign_components,
    tuning_hypotheses,
)
from experiments.inference import TEST_DRAWS, verdicts
from experiments.statistics import draw_images
from experiments.tables import markdown_table
from plots import differences_figure

# Hypotheses that are tested together, see the amendments: the title, whose trainings H5 to H8
# compare, and whose explanations H1 to H4 are about.
FAMILIES = (
    ("", ("aoa",), "aoa"),
    (" of the replication", ("gridtd", "adaptive"), "gridtd"),
)
# What each metric is compared for: an arm, and the arm that it is compared with.
COMPARISONS = (
    ("lrp", "continued"),
    ("lrp", "random"),
    ("lrp", "shuffled"),
    ("lrp", "magnitude"),
    ("lrp", "temperature"),
    ("lrp 1e-6", "continued 1e-6"),
    ("lrp_scst", "scst"),
)


def report(units, explanations, rates, draws=TEST_DRAWS):
    """All tables as Markdown, the table of single words as CSV, and the figure of H1 to H8.

    units: {captioner: for each seed {arm: list of the images' caption records}}; explanations:
    {captioner: list of the images' `explained_record`}; rates: {what: chosen learning rate}; draws:
    of the bootstraps. What has no data is left out; the figure is None if nothing has any.
    """
    tables, components = family_tables(units, explanations, draws)
    seeds = {captioner: len(found) for captioner, found in units.items()}
    parts = [
        f"Seeds: {seeds or 'none'}. Explained: {', '.join(explanations) or 'none'}.",
        *tables,
        section("Learning rates", [{"what": what, "rate": rate} for what, rate in rates.items()]),
        section("Arms, mean over seeds", arm_rows(units)),
        section("Differences of arms", comparison_rows(units, draws)),
        section("Explanations by captioner", explanation_rows(explanations, draws)),
        section("What was explained", [counted(*found) for found in explanations.items()]),
    ]
    arms = arms_of(units)
    means, words = macro_precision(units, arms)
    rows = [{"arm": arm, "macro precision": value} for arm, value in means.items()]
    parts.append(section("Macro precision of words that every arm says often", rows))
    figure = differences_figure(components) if components else None
    return "\n\n".join(parts) + "\n", words_as_csv(words, arms), figure


def family_tables(units, explanations, draws):
    """The tables of verdicts and components of each family that has data, and always of the first
    one, and the rows of that one's components; see `report`.
    """
    tables = []
    first_components = None
    for title, tuned, explained in FAMILIES:
        own = with_common_seeds({name: units[name] for name in tuned if name in units})
        if not own and explained not in explanations and first_components is not None:
            continue
        hypotheses = explanation_hypotheses(explanations.get(explained, []), draws)
        hypotheses |= tuning_hypotheses(own)
        components = component_rows(hypotheses)
        tables.append(section(f"Verdicts{title}", verdict_rows(hypotheses)))
        tables.append(section(f"Components{title}", components))
        if first_components is None:
            first_components = components
    return tables, first_components


def with_common_seeds(units):
    """The same units, of each captioner as many seeds as all have."""
    common = min(map(len, units.values()), default=0)
    return {captioner: found[:common] for captioner, found in units.items()}


def section(title, rows):
    """A title and a table."""
    return f"## {title}\n\n{markdown_table(rows)}"


def verdict_rows(hypotheses):
    """A row for each hypothesis: its claim, p, Holm's p, and the verdict."""
    rows = []
    found = verdicts(hypotheses)
    for name, claim in CLAIMS.items():
        rows.append({"hypothesis": name, "claim": claim, **found[name]})
    return rows


def component_rows(hypotheses):
    """A row for each component of each hypothesis: the estimate, its intervals and its p."""
    rows = []
    for name in CLAIMS:
        components, margins = hypotheses[name]
        for place, (component, margin) in enumerate(zip(components, margins)):
            row = {"component": f"{name}{'abcd'[place]}" if len(components) > 1 else name}
            row["what"] = COMPONENTS[name][place] if name in COMPONENTS else CLAIMS[name]
            row["unit"] = UNITS[name][place]
            rows.append(row | estimate_columns(component) | {"margin": margin})
    return rows


def estimate_columns(estimate):
    """The columns of a row about an Estimate."""
    inner_low, inner_high = estimate.inner
    return {
        "difference": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "low 90 %": inner_low,
        "high 90 %": inner_high,
        "p": estimate.p,
    }


def arms_of(units):
    """The arms that every unit has, in the order of the first unit."""
    everything = []
    for found in units.values():
        everything += found
    if not everything:
        return []
    common = set(everything[0]).intersection(*everything)
    return [arm for arm in everything[0] if arm in common]


def arm_rows(units):
    """A row for each captioner and arm: each metric's mean over the seeds."""
    rows = []
    for captioner, found in units.items():
        for arm in arms_of(units):
            row = {"captioner": captioner, "arm": arm, "seeds": len(found)}
            for metric, (columns, statistic) in METRICS.items():
                values = [statistic(columns(arms[arm]).sum(axis=0)) for arms in found]
                row[metric] = float(np.mean(values))
            rows.append(row)
    return rows


def comparison_rows(units, draws):
    """A row for each metric, comparison and captioner, and for all captioners together.

    Its p is unadjusted; the bootstrap's interval decides nothing.
    """
    rows = []
    groups = {captioner: {captioner: found} for captioner, found in units.items()}
    if len(units) > 1:
        groups["all"] = with_common_seeds(units)
    common = arms_of(units)
    for name, captioners in groups.items():
        for first, second in COMPARISONS:
            if first not in common or second not in common:
                continue
            for metric in METRICS:
                estimate = arm_difference(captioners, metric, first, second)
                drawn = bootstrap_difference(captioners, metric, first, second, draws)
                row = {"captioners": name, "arms": f"{first} - {second}", "metric": metric}
                row |= estimate_columns(estimate)
                row |= {"bootstrap low": drawn.low, "bootstrap high": drawn.high}
                rows.append(row)
    return rows


def explanation_rows(explanations, draws):
    """A row for each component of H1 to H4 and of their secondary results, of every captioner."""
    rows = []
    for captioner, images in explanations.items():
        found = explanation_hypotheses(images, draws)
        counts = draw_images(len(images), draws)
        components = {name: parts for name, (parts, _) in found.items()}
        components["H3, words"] = sign_components(images, counts, "words")
        components["H4, beyond the word"] = added_component(images, counts, with_word=True)
        for name, parts in components.items():
            for place, part in enumerate(parts):
                row = {"captioner": captioner, "what": name, "component": "abcd"[place]}
                rows.append(row | estimate_columns(part))
    return rows


def counted(captioner, images):
    """A row about a captioner's explained images: how many words each hypothesis is about, and the
    mean correctness of each method, in points.
    """
    drops = [word["kind"] for image in images for word in image["drops"]]
    inside = [word for image in images for word in image["inside"]]
    sign = [word for image in images for word in image["sign"]]
    frequent = [word["supported"] for image in images for word in image["frequent"]]
    row = {"captioner": captioner, "images": len(images)}
    row |= {"H1, object words": drops.count("object"), "H1, stop words": drops.count("stop")}
    row |= {"H2": len(inside), "H3, all": len(sign)}
    row["H3, with boxes and negative relevance"] = sum(word["inside"] is not None for word in sign)
    row["H3, with negative patches"] = sum(word["patches"] is not None for word in sign)
    row |= {"H4": len(frequent), "H4, hallucinated": frequent.count(False)}
    for method in inside[0] if inside else ():
        mean = np.mean([word[method] for word in inside])
        row[f"correctness of {method}"] = 100 * float(mean)
    return row


def words_as_csv(rows, arms):
    """The table of single words: of each arm how many captions say it, and how many rightly."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header = ["word"]
    for arm in arms:
        header += [f"{arm}: right", f"{arm}: said"]
    writer.writerow(header)
    for row in rows:
        cells = [row["word"]]
        for arm in arms:
            cells += row[arm]
        writer.writerow(cells)
    return file.getvalue()
