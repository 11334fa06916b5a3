"""Write what was tried for the bundled weights, and what a website gives away inside Cohen.

Called by ``generate.py``; reads ``docs/results/default/*.json``, as ``generate_model.py`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generate import DOCS, fill, table, wrapped
from generate_model import paragraphs
from generate_relatives import MORE_PROBES, estimate, exists, of_all_layers, pair, read, untrained


def write_blocks() -> None:
    """Write them into the recipe's README and into the page on shortcuts."""
    blocks = {"tried": tried_block(), "unseen": unseen_block(), "inside": inside_block()}
    fill(DOCS.parent / "recipes" / "README.md", blocks)
    fill(DOCS / "shortcuts.md", {"website": website_block()})


def tried_block() -> str:
    """Return what was tried for the weights, and what it gave."""
    found = read("tried")
    return f"{wrapped(found['note'])}\n\n{table(found['columns'], found['rows'])}"


#: Result of the recipe by a hospital that it never saw → whom it compares, whom training lacks, and
#: results of other ways of some stages.
HOSPITALS = {
    "recipe_unseen": (
        "Hannover's COVID-19",
        "NIH's normals of held-out patients",
        "Hannover's",
        ("recipe_unseen_strong", "recipe_unseen_within"),
    ),
    "recipe_unseen_nih": (
        "NIH's pneumonia",
        "NIH's normals",
        "NIH's",
        ("recipe_unseen_nih_strong", "recipe_unseen_nih_lungs", "recipe_unseen_nih_within"),
    ),
}


def unseen_block() -> str:
    """Return what the recipe's stages reach by hospitals that they never saw."""
    return paragraphs(*map(unseen_table, filter(exists, HOSPITALS)))


def unseen_table(result: str) -> str:
    """Return what they reach by one hospital, and what other ways of some stages do."""
    one, other, whose, tried = HOSPITALS[result]
    found = read(result)
    results = [found, *map(read, filter(exists, tried))]
    rows: dict[str, list[str]] = {}
    for row in (row for each in results for row in each["rows"]):
        name = f"{row['stage']}, frame projected out" if row["projected"] else row["stage"]
        called = (" / ".join(f"{share:.2f}" for share in side) for side in row["called"])
        rows.setdefault(name, [name, *called]).append(estimate(row["auroc"]))
    note = f"""
        AUROC of {one} against {other}, {pair(found["n"])}, by another run of the stages
        (`judge_recipe.py`), from {found["trained_on"]:,} images without {whose}, on
        {found["made"]}; and how many of both, of whole radiographs, are called normal / pneumonia /
        COVID-19."""
    parts = dict.fromkeys(row["hidden"] for row in found["rows"])
    hidden = (f"{100 * part:.0f} % hidden" if part else "Whole" for part in parts)
    head = ("Stage", one, other.split(" of ")[0], *hidden)
    return f"{wrapped(note)}\n\n{table(head, rows.values())}"


def inside_block() -> str:
    """Return what relatives trained in several ways reach inside Cohen's collection."""
    found = read("tried_inside")
    columns = {"all": "All", "without Hannover's": "Without Hannover's"}
    columns["same_website"] = (
        f"Pairs of one website, {pair(read('folds')['all']['same_website_n'])}"
    )
    rows = [[row["relatives"], *(estimate(row[key]) for key in columns)] for row in found["rows"]]
    rows += [row for name, what in AGAIN.items() if exists(name) for row in rows_of(name, what)]
    if exists("folds_160px_224px"):
        both = read("folds_160px_224px")
        name = f"average of the probabilities of {len(both['runs'])} runs after a warm-up"
        rows.append([f"{name}, two at 160 px and two at 224 px", *reached(both)])
    if exists(MORE_FOLDS):
        rows += rows_of(MORE_FOLDS, AGAIN["folds_warm_up"])[-2:]
    before = found["before"]
    note = f"""
        {found["note"]} Where a row does not say otherwise, they were trained on {found["made"]}.
        Before, on {before["made"]}, the way
        of the first row had given {estimate(before["all"])}, without Hannover's
        {estimate(before["without Hannover's"])}."""
    return paragraphs(
        wrapped(note),
        table(("Relatives", *columns.values()), rows),
        wrapped(left_out_websites(before)),
        wrapped(hannover_unseen(found["hannover"])),
        wrapped(probes_note()),
        probes_table("probes"),
        *((wrapped(warm_up_note()), probes_table(*WARM_UPS)) if warmed_up() else ()),
        *((wrapped(mixup_note()),) if exists("probes_mixup") else ()),
        *((wrapped(sizes_note()), sizes_table()) if exists("probes_warm_up_sizes") else ()),
        *((wrapped(more_note()), more_table()) if exists(MORE_PROBES) else ()),
        wrapped(crops_note()),
        probes_table("probes_lungs"),
        *((wrapped(frame_note()), frame_table()) if exists("probes_frame") else ()),
    )


#: Results of the same folds, trained in another way or once more, and what is shown.
AGAIN = {
    "folds_again": "whole radiographs at {size} px, another run from the start on (seed {seed})",
    "folds_lungs": "crops to the lungs at {size} px, also in the start",
    "folds_warm_up_first": "whole radiographs at {size} px, after a warm-up without labels",
    "folds_warm_up": "whole radiographs at {size} px, after a warm-up without labels, another run "
    "from the start on (seed {seed})",
    "folds_mixup": "whole radiographs at {size} px, after the warm-up of seed {seed}, with mixup "
    "{mixup:g}",
    "folds_224px": "whole radiographs at {size} px, after the warm-up of seed {seed}",
}


def rows_of(result: str, what: str) -> list[list[str]]:
    """Return what other relatives reach in the same folds, and how they were made.

    Of several runs these are rows of each, and of the average of their probabilities.
    """
    found = read(result)
    training, size = found["training"], found["training"]["preprocess"]["size_px"]
    how = f", on {found['made']}" if "made" in found else ""
    name = (
        f"Cohen's rows alone, {what}, mild augmentation, {training['epochs']} epochs of "
        f"{training['samples_per_epoch']}{how}; DeLong's intervals but for pairs"
    )
    runs = found.get("runs", [{**found, "seed": training["seed"]}])
    mixup = training.get("mixup", 0)  # older results have none
    rows = [
        [name.format(size=r.get("size_px", size), seed=r["seed"], mixup=mixup), *reached(r)]
        for r in runs
    ]
    if len(runs) > 1:
        average = f"the same, average of the probabilities of these {len(runs)} runs"
        rows.append([average, *reached(found)])
    return rows


#: What :func:`read_out` returns.
READ_OUT = ("All", "Without Hannover's", "Pairs of one website", "All, with the folds' networks")


def read_out(row: Mapping[str, Any]) -> list[str]:
    """Return the four values of a row of readouts."""
    return [*reached(row), estimate(row["with_folds"]["all"])]


def reached(found: Mapping[str, Any]) -> list[str]:
    """Return the three values of a row of relatives in the same folds."""
    whole, rest = found["all"], found["without Hannover's"]
    return [*map(estimate, (whole["auroc"], rest["auroc"], whole["same_website"]))]


#: Weights that were read out, and what each is called.
WEIGHTS = {
    "random": "random",
    "base": "of a shorter start on Kermany and NIH",
    "warm-up": "of that start, warmed up",
}


#: The same, where the frame alone was read.
FRAMES = {"random": "random", "base": "of a start on Kermany and NIH"}


def probes_note() -> str:
    """Return in words how networks that learned little were read out, and on what."""
    found = read("probes")
    how = f", on {found['made']}" if "made" in found else ""
    return f"""
        And what needs no training of a network: a logistic regression on the mean, the maximum and
        the standard deviation of each channel of a layer, in the same {found["folds"]} folds, at
        {found["size_px"]} px, as the average over {found["views"]} views of each image
        (`probe_inside.py`){how}. Where nothing else is said, random weights are one draw, and the
        start is one run; averages are of readouts, each divided by its standard deviation, of as
        many draws or runs of other seeds, or of the four layers. The batch norm of random weights
        has the average statistics of batches of these images, held-out ones among them, of which no
        label is looked at. The strength of the penalty was chosen among five with such results in
        sight. The last column is of the average of a readout and of the folds' own networks, which
        alone reach {estimate(read("folds")["all"]["auroc"])}; each of the two is divided by its
        standard deviation."""


#: The readouts of networks that were warmed up without labels: of a first run, and of others.
WARM_UPS = ("probes_warm_up_first", "probes_warm_up")


def warmed_up() -> bool:
    """Return whether it was measured what a warm-up gives, of both folds and readouts."""
    return all(map(exists, (*WARM_UPS, "folds_warm_up_first", "folds_warm_up")))


def warm_up_note() -> str:
    """Return in words what is otherwise after a warm-up without labels."""
    found, folds = read(WARM_UPS[1]), read("folds_warm_up")
    how = f", on {found['made']}" if "made" in found else ""
    first = estimate(read("folds_warm_up_first")["all"]["auroc"])
    return f"""
        The same after a warm-up without labels (`warm_up.py`, `probe_inside.py --warm-up`){how}:
        while the start goes on telling Kermany's and NIH's training images apart, it learns to tell
        two views of a radiograph, of all four sources, from other patients' of the same source,
        where what Cohen's took over from Hannover's counts as Cohen's. No label of Cohen's or
        Hannover's is looked at, but all of their images are shown, held-out ones among them. A
        first run was followed by {len(folds["runs"])} others, each with its own start, of which it
        was settled before they were made that their average would be judged by the last column of
        the last row. The folds' networks in that column are those that begin with the warm-up: of
        the first run, which alone reach {first}, or the average probabilities of the others, which
        alone reach {estimate(folds["all"]["auroc"])}."""


def mixup_note() -> str:
    """Return what folds with mixup reach together with those readouts."""
    found = read("folds_mixup")
    alone, seeds = estimate(found["all"]["auroc"]), [str(run["seed"]) for run in found["runs"]]
    row = next(r for r in of_all_layers("probes_mixup") if r["networks"] == len(seeds))
    both = row["with_folds"]
    return f"""
        With mixup of {found["training"]["mixup"]:g} and nothing else changed, the folds' networks
        after the warm-up of seed {" and ".join(seeds)} reach {alone} (first table), and together
        with the readouts of all four layers {estimate(both["all"])}, without Hannover's
        {estimate(both["without Hannover's"])}; both were settled on before they were made
        (`judge_default.py --mixup`, `probe_inside.py --folds folds_mixup`)."""


def sizes_note() -> str:
    """Return in words what was read out of images in several sizes, and how it is judged."""
    found = read("probes_warm_up_sizes")
    networks = max(row["networks"] for row in found["rows"])
    text = f"""
        The readouts of all four layers of the last {networks} of these networks again, of images in
        several sizes (`probe_inside.py --sizes`), on {found["made"]}. Settled before any was seen
        was that the value of the last row together with the folds' networks would be judged, of
        both networks and all sizes; these folds saw 160 px."""
    if not exists("probes_224px_sizes"):
        return text
    return f"""{text} After that it was settled, before they were trained, that the same would be
        judged with folds that see 224 px and differ in nothing else (`judge_default.py --sizes`,
        `probe_inside.py --folds`), on {read("folds_224px")["made"]}; and when one of these two runs
        had been seen, that the average of all four, two of each size, would be judged next."""


#: Results of the same readouts together with other folds, and what their column is called.
LARGER = {"probes_224px_sizes": "of 224 px", "probes_160px_224px_sizes": "of 160 and 224 px"}


def sizes_table() -> str:
    """Return what these readouts give away by the size of the images."""
    head = ["Size", "Networks", *READ_OUT]
    rows = [
        [" and ".join(map(str, row["size_px"])) + " px", several(row), *read_out(row)]
        for row in of_all_layers("probes_warm_up_sizes")
    ]
    for name in filter(exists, LARGER):
        head.append(f"{READ_OUT[-1]} {LARGER[name]}")
        for row, larger in zip(rows, of_all_layers(name), strict=True):
            row.append(estimate(larger["with_folds"]["all"]))
    return table(head, rows)


#: The same of one warm-up more.
MORE_FOLDS = "folds_warm_up_of_3"


def more_note() -> str:
    """Return in words what was settled of one warm-up more."""
    folds, found = read(MORE_FOLDS), read(MORE_PROBES)
    return f"""
        And with one warm-up more, of seed {folds["runs"][-1]["seed"]}, on {found["made"]}. Settled
        before anything of it was trained: the readouts of all sizes and all
        {len(folds["runs"])} networks together with the average of as many folds at 160 px, which
        alone reach {estimate(folds["all"]["auroc"])}, would be judged first, and these readouts
        alone second; and that no further warm-up would follow if they missed."""


def more_table() -> str:
    """Return what readouts of one network more give away by the size of the images."""
    rows = [
        [" and ".join(map(str, row["size_px"])) + " px", several(row), *read_out(row)]
        for row in of_all_layers(MORE_PROBES)
        if row["networks"] > 1
    ]
    return table(["Size", "Networks", *READ_OUT], rows)


def several(row: Mapping[str, Any]) -> str:
    """Return in words of how many networks a row is."""
    return f"average of {row['networks']}" if row["networks"] > 1 else "one network"


def crops_note() -> str:
    """Return in words what is otherwise where crops to the lungs are shown."""
    how = f", on {read('probes_lungs')['made']}" if "made" in read("probes_lungs") else ""
    return f"""
        The same on crops to the lungs, which the bundled segmenter finds, with 3 % of the side
        around them, also in the start's training (`probe_inside.py --lungs`){how}. The folds' own
        networks saw whole radiographs."""


def probes_table(*names: str) -> str:
    """Return what networks that learned little give away inside Cohen's collection."""
    rows = []
    for name, row in ((n, row) for n in names for row in read(n)["rows"]):
        more = f", average of {row['networks']}" if row["networks"] > 1 else ""
        title = WEIGHTS[row["weights"]] + more + ", first run" * name.endswith("_first")
        layer = row["layer"] if row["layer"] == "all four" else f"`{row['layer']}`"
        rows.append((title, layer, *read_out(row)))
    return table(("Weights", "Layer", *READ_OUT), rows)


def frame_note() -> str:
    """Return in words how the frame alone was read out."""
    found = read("probes_frame")
    how = f", on {found['made']}" if "made" in found else ""
    return f"""
        And of the frame alone: the same readout, of one draw of random weights and of another
        start, where the central part of the side of all images, those of the readout's training
        too, is hidden under one grey (`probe_inside.py --frame`){how}. The intervals of all images
        are DeLong's."""


def frame_table() -> str:
    """Return what the frame alone gives away inside Cohen's collection."""
    cells: dict[tuple[str, str], list[str]] = {}
    columns: dict[str, None] = {}
    for row in (row for row in read("probes_frame")["rows"] if row["networks"] == 1):
        name = FRAMES[row["weights"]], f"`{row['layer']}`"
        shown = f"{row['hidden']:.0%} hidden".replace("%", " %") if row["hidden"] else "Whole"
        columns |= dict.fromkeys([f"{shown}, all", f"{shown}, pairs of one website"])
        values = row["all"]["auroc"], row["all"]["same_website"]
        cells.setdefault(name, []).extend(map(estimate, values))
    rows = [[*name, *values] for name, values in cells.items()]
    return table(("Weights", "Layer", *columns), rows)


def left_out_websites(before: Mapping[str, Any]) -> str:
    """Return what is reached on websites that were left out, now and in the way before."""
    now = read("subsources")
    earlier = {row["left_out"]: row["auroc"] for row in before["left_out"]}
    reached = "; ".join(
        f"{row['left_out']} {estimate(row['auroc'])}, before {estimate(earlier[row['left_out']])}"
        for row in now["rows"]
    )
    how = f", on {now['made']}" if "made" in now else ""
    chance = sum(row["auroc"]["low"] <= 0.5 <= row["auroc"]["high"] for row in now["rows"])
    return f"""
        Websites left out of training, Cohen's rows alone, mild augmentation{how}; and
        before, in the way of the first row, on {before["made"]}: {reached}. Of the
        {len(now["rows"])} intervals now, {chance} contain 0.5. SIRM, which has one image of another
        finding, and GitHub, whose images are Hannover's, are in none of them."""


def hannover_unseen(runs: list[Mapping[str, Any]]) -> str:
    """Return what relatives that never saw Hannover reached there."""
    places = {run["made"]: "" for run in runs}
    for how in places:
        own = [run for run in runs if run["made"] == how]
        reached = ", ".join(f"{estimate(run['auroc'])} {run['relative']}" for run in own)
        places[how] = f"{reached} ({how})"
    return f"""
        Hannover's COVID-19 against NIH's normals, by relatives of all sources that never saw
        Hannover: {"; ".join(places.values())}. These {len(runs)} differ in machine, files, code,
        backgrounds or length, so they do not say how much a seed does."""


def website_block() -> str:
    """Return how far a website gives the label away inside one collection."""
    found = read("folds")["all"]
    return wrapped(
        f"""
        One collection can be many sources. Cohen's is gathered from websites and journals, and the
        website's name alone, without any image, tells its COVID-19 from its other findings with an
        AUROC of {estimate(found["website_alone"])} in the same kind of folds. So look at pairs from
        one website, too, and leave websites out: [The bundled model](model.md) does both. And ask
        what needs no training of a network: a DenseNet-121 with random weights, read out by a
        logistic regression, tells them apart with {estimate(untrained()["auroc"])}, among pairs of
        one website with {estimate(untrained()["same_website"])}; networks that were trained on them
        reach {estimate(found["auroc"])} and {estimate(found["same_website"])}."""
    )
