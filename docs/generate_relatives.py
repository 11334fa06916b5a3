"""Say what relatives of the bundled weights and other readouts reach where a source helps less.

And what has to be said beside some numbers of the weights. Used by ``generate_model.py``,
``generate_tried.py`` and the card; reads ``docs/results/default/*.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from generate import DOCS, shown

from chestxray_covid.intervals import Estimate

RESULTS = DOCS / "results" / "default"
#: What rows of relatives end in that saw nothing but Cohen's images after their start.
ALONE = "(trained on Cohen alone)"
#: What rows of relatives end in that are trained as the weights are, but for a source.
UNSEEN = "(the recipe without Hannover)"
UNSEEN_NIH = "(the recipe without NIH)"
#: What rows of the weights end in that compare two classes by these alone.
OF_TWO = "by these two alone, held-out patients"
CLASS_NAMES = {"covid19": "COVID-19"}
SOURCE_NAMES = {"cohen": "Cohen", "hannover": "Hannover", "kermany": "Kermany", "nih": "NIH"}
#: Results of relatives, and what each of them is called.
OF_RELATIVES = {
    "folds": "the folds",
    "subsources": "websites left out",
    "locations": "countries left out",
    "hannover": "Hannover unseen",
    "recipe_unseen": "the recipe without Hannover",
    "recipe_unseen_nih": "the recipe without NIH",
}
#: What has to stand beside the shares that the gate flags and refuses.
GATE_INTERVALS = (
    "Intervals are Wilson's, in which every image counts as if it were alone: images of one "
    "patient and crops of one photograph are alike, and of Hannover's radiographs Cohen's copies "
    "count, too, so that these intervals are too narrow."
)


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def exists(name: str) -> bool:
    return (RESULTS / f"{name}.json").is_file()


def estimate(data: Mapping[str, Any]) -> str:
    return shown(Estimate.from_dict(data))


def pair(counts: list[int]) -> str:
    return f"{counts[0]} against {counts[1]}"


def honest_rows() -> list[tuple[str, str, str]]:
    """Return what was measured where the source cannot give all of the label away."""
    inside = read("inside")
    title = "COVID-19 against other findings inside Cohen, held-out patients"
    rows = [(title, pair(inside["n"]), estimate(inside["auroc"]))]
    for row in inside["pairs"]:
        one, other = (CLASS_NAMES.get(row[name], row[name]) for name in ("of", "against"))
        title = f"{one} against {other} inside {SOURCE_NAMES[row['source']]}, {OF_TWO}"
        rows.append((title, pair(row["n"]), estimate(row["auroc"])))
    if exists("folds"):
        folds = read("folds")
        one, rest = folds["all"], folds["without Hannover's"]
        what = f"COVID-19 inside Cohen, {folds['folds']} folds by patient"
        rows += [
            (f"{what} {ALONE}", pair(one["n"]), estimate(one["auroc"])),
            (
                "the same, pairs of one website",
                pair(one["same_website_n"]),
                estimate(one["same_website"]),
            ),
            (
                "the same, by the website's name alone, no image looked at",
                pair(one["n"]),
                estimate(one["website_alone"]),
            ),
        ]
        if exists("probes"):
            found = untrained()
            title = "the same, a linear readout of random weights"
            rows.append((title, pair(found["n"]), estimate(found["auroc"])))
        rows += warmed_rows()
        title = f"{what}, without Hannover's {ALONE}"
        rows.append((title, pair(rest["n"]), estimate(rest["auroc"])))
    for result in filter(exists, ("subsources", "locations")):
        for row in read(result)["rows"]:
            title = f"COVID-19 inside Cohen, {row['left_out']} left out of training {ALONE}"
            rows.append((title, pair(row["n"]), estimate(row["auroc"])))
    if exists("hannover"):
        found = read("hannover")
        how = "(shorter relative, varied strongly)"
        title = f"Hannover's COVID-19 against NIH's normals, Hannover unseen {how}"
        rows.append((title, pair(found["n"]), estimate(found["auroc"])))
    for row in published_rows():
        part = f", {100 * row['hidden']:.0f} % hidden" if row["hidden"] else ""
        title = f"Hannover's COVID-19 against NIH's normals{part} {UNSEEN}"
        rows.append((title, pair(read("recipe_unseen")["n"]), estimate(row["auroc"])))
    for row in published_rows("recipe_unseen_nih")[:1]:
        title = f"pneumonia against normal inside NIH, NIH unseen {UNSEEN_NIH}"
        rows.append((title, pair(read("recipe_unseen_nih")["n"]), estimate(row["auroc"])))
    return rows


#: Readouts of several networks that were warmed up without labels, of images in several sizes.
MORE_PROBES = "probes_warm_up_of_3_sizes"


def warmed_rows() -> list[tuple[str, str, str]]:
    """Return what readouts of all warmed-up networks and sizes reach, alone and with the folds."""
    if not exists(MORE_PROBES):
        return []
    found = max(of_all_layers(MORE_PROBES), key=lambda r: (len(r["size_px"]), r["networks"]))
    n = pair(found["all"]["n"])
    title = (
        f"the same, linear readouts of {found['networks']} networks that a warm-up without labels "
        "showed all images, held-out ones too"
    )
    both = "the same, together with networks trained in the folds, settled to be judged first"
    return [
        (title, n, estimate(found["all"]["auroc"])),
        (both, n, estimate(found["with_folds"]["all"])),
    ]


def of_all_layers(result: str) -> list[Mapping[str, Any]]:
    """Return rows of readouts of all four layers together."""
    return [row for row in read(result)["rows"] if row["layer"] == "all four"]


def published_rows(result: str = "recipe_unseen") -> list[Mapping[str, Any]]:
    """Return what the last stage, the frame projected out, reaches by an unseen hospital.

    Args:
        result: Of which hospital; by the part that is hidden, nothing first.
    """
    rows = read(result)["rows"] if exists(result) else []
    return [row for row in rows if row["stage"] == rows[-1]["stage"] and row["projected"]]


def frame_caveat() -> str:
    """Return what has to stand beside every AUROC with the centre hidden."""
    text = (
        "With the centre hidden, 0.5 is what a model should reach that looks at lungs alone; but "
        "the mean is that of the whole image, so that its grey says something of what is hidden. "
        "The frame was unlearned in this very way, and which weights to publish was chosen with "
        "these patients in sight."
    )
    if not (rows := [row for row in published_rows() if row["hidden"]]):
        return text
    reached = " and ".join(f"{row['auroc']['value']:.2f}" for row in rows)
    return (
        f"{text} Of Hannover, where the recipe never saw it, against NIH such AUROCs are {reached} "
        "(above), of one run; what is unlearned of some sources need not be of every hospital."
    )


def untrained() -> Mapping[str, Any]:
    """Return what the last layer before the classifier gives where its weights are random."""
    rows = {(row["weights"], row["networks"], row["layer"]): row for row in read("probes")["rows"]}
    found: Mapping[str, Any] = rows["random", 1, "norm5"]["all"]
    return found


def frame(hidden: float) -> str:
    """Return from where to where the layers' AUROCs go with that part of the side hidden."""
    rows = (row for row in read("probes_frame")["rows"] if row["hidden"] == hidden)
    single = (row for row in rows if row["networks"] == 1 and row["layer"] != "all four")
    values = [row["all"]["auroc"]["value"] for row in single]
    return f"{min(values):.2f} to {max(values):.2f}"


def about_relatives() -> str:
    """Return in words that rows of relatives say nothing of the bundled weights, and why."""
    if not exists("folds"):
        return ""
    text = f"""
        In rows "by these two alone", and with Hannover or NIH unseen, the score is p(the first) /
        (p(the first) + p(the second)), of other networks p(covid19). Rows marked
        "{ALONE[1:-1]}" are of networks that, after a start on Kermany's and NIH's images, saw
        only Cohen's: they say what can be learned there, not what the bundled weights do."""
    if exists("tried_inside"):
        tried = {row["name"]: estimate(row["all"]) for row in read("tried_inside")["rows"]}
        text += f"""
        In the same folds, shorter relatives trained on all sources reach {tried["mild"]} where
        images are varied mildly, but none are hidden, {tried["short"]} where they are varied
        strongly, with hidden centres and swapped frames, for a shorter time, and
        {tried["short-bg"]} with swapped backgrounds, too."""
    if exists("probes"):
        text += f"""
        A network that never learned anything, one draw of weights, with a linear readout on top,
        reaches {estimate(untrained()["auroc"])} (the readout's penalty was chosen with the folds in
        sight, too)."""
    if exists("probes_frame"):
        text += f"""
        Where one grey hides the central 70 % and 90 % of the side, such readouts of random weights
        and of a network that saw Kermany's and NIH's images alone still reach {frame(0.7)} and
        {frame(0.9)} by layer, of whole radiographs {frame(0.0)}: part of what they tell need not be
        read in the lungs."""
    if exists("recipe_unseen"):
        text += f"""
        Rows marked "{UNSEEN[1:-1]}" are of one network that the whole recipe made, without
        calibration, from {read("recipe_unseen")["trained_on"]:,} images, none of them
        Hannover's. Of Hannover there is COVID-19 alone, and training saw others of NIH's normals:
        what tells the two collections apart without looking at lungs counts, too, and the rows
        with the centre hidden say how much there is of it."""
    if rows := published_rows("recipe_unseen_nih"):
        called = rows[0]["called"][1][-1]
        text += f"""
        The row marked "{UNSEEN_NIH[1:-1]}" is of such a network, too, from
        {read("recipe_unseen_nih")["trained_on"]:,} images, none of them NIH's. Without NIH nearly
        all normals of training are children's, and those of this unseen hospital are called
        COVID-19 in {called:.0%}: of what training shows in one collection alone, the recipe learns
        the collection. How the recipe trains was chosen with these hospitals in sight."""
    return " ".join(
        f"""{text} {about_countries()} {about_intervals()} How those on Cohen alone are trained
        was chosen with the folds in sight, and the website's name alone, without any image, reaches
        {estimate(read("folds")["all"]["website_alone"])}.""".split()
    )


def made() -> str:
    """Return in words on what the relatives were trained, as far as their results say."""
    names: dict[str, list[str]] = {}
    for name, title in OF_RELATIVES.items():
        if exists(name) and (how := read(name).get("made")):
            names.setdefault(how, []).append(title)
    listed = "; ".join(f"{' and '.join(titles)} on {how}" for how, titles in names.items())
    if not listed:
        return ""
    return f"""Relatives were trained so: {listed}. How intervals are made,
        [Metrics](metrics.md#intervals) says."""


def about_intervals() -> str:
    """Return in words which AUROCs of relatives have intervals of the bootstrap, if any."""
    firsts = {
        title: (found := read(name)).get("all") or found.get("rows", [found])[0]
        for name, title in OF_RELATIVES.items()
        if exists(name)
    }
    older = [title for title, row in firsts.items() if "delong" not in row["auroc"]["method"]]
    of_folds = "of the folds' networks, of the website's name"
    listed = [of_folds if t == OF_RELATIVES["folds"] else f"of {t}" for t in older]
    listed += ["of the shorter relatives"] * exists("tried_inside")
    return f"""Intervals {", ".join([*listed, "of pairs of one website"])} are the bootstrap's, the
        others DeLong's."""


def about_countries() -> str:
    """Return in words what has to be known of the rows of countries, if there are any."""
    if not exists("locations"):
        return ""
    rows = read("locations")["rows"]
    few = "; ".join(
        f"{row['left_out']} {row['patients'][0]} and {row['patients'][1]}" for row in rows
    )
    unlearned = [
        f"without {row['left_out']} too few {name} are left to learn, which {n} of the others are"
        for row in rows
        for name, n in row["unlearned"].items()
    ]
    text = f"""Countries left out are few patients, with COVID-19 and with other findings: {few};
        those with fewer than ten radiographs of other findings were not left out; an image of a
        place that nobody wrote down stays in
        training{"".join("; " + part for part in unlearned)}."""
    if exists("folds_again") and read("folds_again")["made"] == read("locations")["made"]:
        folds = estimate(read("folds_again")["all"]["auroc"])
        text += f" Folds whose networks were made in this way, too, reach {folds}."
    return text


def unmeasured() -> str:
    """Return in words what the recipe measures and nobody has run yet."""
    what = {
        "folds": "five folds inside Cohen",
        "subsources": "Cohen's websites left out in turn",
        "locations": "Cohen's countries left out in turn",
        "hannover": "Hannover left out",
        "recipe_unseen": "the whole recipe without Hannover",
        "recipe_unseen_nih": "the whole recipe without NIH",
    }
    missing = ", ".join(told for name, told in what.items() if not exists(name))
    return f" Not measured yet: {missing} (`recipes/run.sh` does)." if missing else ""
