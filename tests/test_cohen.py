from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chestxray_covid.datasets.base import FRONTAL_VIEWS, LABELS, Sample, concatenate
from chestxray_covid.datasets.cohen import (
    CohenCovidDataset,
    is_frontal_radiograph,
    label_of_finding,
    read_metadata,
)
from chestxray_covid.datasets.duplicates import patient_groups
from chestxray_covid.datasets.folder import HannoverCovidDataset, open_dataset
from chestxray_covid.errors import DatasetError, DatasetNotFoundError, DownloadError
from sources import (
    COHEN_HEADERS,
    HANNOVER_URL,
    HIERARCHICAL,
    SHARED_IMAGE_ID,
    cohen_row,
    write_cohen,
    write_csv,
)

EVERY_CLASS = (*LABELS, "other")
GENERATIONS = tuple(COHEN_HEADERS)


def by_name(dataset: CohenCovidDataset) -> dict[str, Sample]:
    samples = {s.path.name: s for s in dataset.samples}
    assert len(samples) == len(dataset)
    return samples


# Both taxonomies, all headers


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_of_the_metadata_gives_the_same_samples(
    tmp_path: Path, generation: str
) -> None:
    root = write_cohen(tmp_path, generation, patients=1)
    samples = by_name(CohenCovidDataset(root, classes=EVERY_CLASS))
    assert {name: (s.label, s.patient_id, s.view) for name, s in samples.items()} == {
        "a-1.jpeg": ("covid19", "2", "AP Supine"),
        "a-2.jpeg": ("normal", "2", "AP Erect"),
        "b.JPG": ("covid19", "311a", "AP"),
        "png-inside.jpg": ("covid19", "311b", "AP Semi Erect"),
        "sars.png": ("pneumonia", "3", "AP Erect"),
        "herpes.png": ("pneumonia", "4", "PA"),
        "lipoid.png": ("pneumonia", "5", "PA"),
        "tuberculosis.png": ("other", "6", "PA"),
        "ards.png": ("other", "7", "PA"),
        "twice.jpg": ("pneumonia", "285", "PA"),
        "another-of-339.jpg": ("pneumonia", "285", "PA"),
        f"{SHARED_IMAGE_ID}.png": ("covid19", "190", "AP"),
        "covid-0-0.png": ("covid19", "400", "PA"),
        "covid-0-1.png": ("covid19", "400", "PA"),
        "normal-0.jpeg": ("normal", "500", "PA"),
    }
    for s in samples.values():
        assert s.path.is_file()
        assert (s.source, s.metadata["filename"]) == ("cohen", s.path.name)


def test_the_generations_differ_as_the_published_files_do(tmp_path: Path) -> None:
    headers = {}
    findings = {}
    for generation in GENERATIONS:
        root = write_cohen(tmp_path / generation, generation)
        with (root / "metadata.csv").open(encoding="utf-8", newline="") as file:
            headers[generation], *rows = csv.reader(file)
        column = headers[generation].index("finding")
        findings[generation] = {row[column] for row in rows}
    assert {" filename", " url", "Patientid", "notes"} <= set(headers["first"])
    assert headers["flat"][-1] == headers["hierarchical"][-1] == ""
    assert headers["hierarchical"][5] == "RT_PCR_positive"
    assert "COVID-19" in findings["first"] & findings["flat"]
    assert "COVID-19" not in findings["hierarchical"]
    assert "Pneumonia/Viral/Herpes " in findings["hierarchical"]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_columns_are_known_by_normalised_name(tmp_path: Path, generation: str) -> None:
    first = read_metadata(write_cohen(tmp_path, generation) / "metadata.csv")[0]
    assert first["patientid"] == "2"
    assert first["filename"] == "a-1.jpeg"
    assert {"url", "license", "view", "modality"} <= set(first)
    assert not {"", "Patientid", " filename", "clinical notes"} & set(first)
    assert ("clinical_notes" in first) == (generation != "first")
    assert ("rt_pcr_positive" in first) == (generation == "hierarchical")


def test_columns_may_come_in_any_order(tmp_path: Path) -> None:
    root = write_cohen(tmp_path)
    with (root / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    expected = by_name(CohenCovidDataset(root))
    write_csv(root / "metadata.csv", rows[0][::-1], [row[::-1] for row in rows[1:]])
    assert by_name(CohenCovidDataset(root)) == expected


def test_a_byte_order_mark_and_bytes_that_are_no_utf8_do_no_harm(tmp_path: Path) -> None:
    root = write_cohen(tmp_path)
    expected = len(CohenCovidDataset(root))
    text = (root / "metadata.csv").read_bytes()
    notes = b"caf\xe9 \x93quoted\x94 \xff"
    (root / "metadata.csv").write_bytes(
        b"\xef\xbb\xbf" + text.replace(b"CC BY-NC-SA", notes, 1).replace(b"\r\n", b"\n")
    )
    dataset = CohenCovidDataset(root)
    assert len(dataset) == expected
    assert sum("\ufffd" in s.metadata["license"] for s in dataset.samples) == 1


@pytest.mark.parametrize(
    ("finding", "label"),
    [
        ("COVID-19", "covid19"),
        ("COVID-19, ARDS", "covid19"),
        ("covid-19", "covid19"),
        ("Pneumonia/Viral/COVID-19", "covid19"),
        ("Pneumonia / Viral / COVID-19 ", "covid19"),
        ("Suspected COVID-19", None),
        ("suspected COVID-19, ARDS", None),
        ("Pneumonia/Viral/Suspected COVID-19", None),
        ("todo", None),
        ("Unknown", None),
        ("?", None),
        ("", None),
        ("  ", None),
        ("No Finding", "normal"),
        ("No finding", "normal"),
        ("Pneumonia", "pneumonia"),
        ("Pneumonia/Viral/Herpes ", "pneumonia"),
        ("Pneumonia/Bacterial/E.Coli", "pneumonia"),
        ("Pneumonia/Something New", "pneumonia"),
        ("Mycoplasma Bacterial Pneumonia", "pneumonia"),
        ("SARS", "pneumonia"),
        ("ARDS", "other"),
        ("Tuberculosis", "other"),
        ("Not COVID-19", "other"),
        ("COVID-19-like illness", "other"),
    ],
)
def test_a_finding_has_one_label_in_either_taxonomy(finding: str, label: str | None) -> None:
    assert label_of_finding(finding) == label


@pytest.mark.parametrize(("flat", "hierarchical"), HIERARCHICAL.items())
def test_both_taxonomies_agree(flat: str, hierarchical: str) -> None:
    assert label_of_finding(flat) == label_of_finding(hierarchical)


def test_own_labels_come_before_the_taxonomy(tmp_path: Path) -> None:
    findings = {" ards ": "pneumonia", "Suspected COVID-19": "covid19", "tuberculosis": "tb"}
    dataset = CohenCovidDataset(
        write_cohen(tmp_path), classes=("pneumonia", "covid19", "tb"), findings=findings
    )
    labels = {name: s.label for name, s in by_name(dataset).items()}
    assert labels["ards.png"] == "pneumonia"
    assert labels["suspected.png"] == "covid19"
    assert labels["tuberculosis.png"] == "tb"
    assert labels["sars.png"] == "pneumonia"


# What is kept and what is dropped


def test_only_frontal_radiographs_of_the_classes_are_kept_and_the_rest_is_counted(
    tmp_path: Path,
) -> None:
    dataset = CohenCovidDataset(write_cohen(tmp_path, patients=2))
    report = dataset.report()
    assert {s.view for s in dataset.samples} <= set(FRONTAL_VIEWS)
    assert report.images == {"normal": 3, "covid19": 8}
    assert report.patients == {"normal": 3, "covid19": 6}
    assert report.dropped == {
        "finding outside the classes (pneumonia)": 6,
        "finding uncertain or not given": 4,
        "view unknown": 3,
        "modality CT": 2,
        "finding outside the classes (other)": 2,
        "image file missing": 2,
        "view L": 1,
        "CT volume, not in the repository": 1,
    }
    assert report.found == report.kept + sum(report.dropped.values()) == 32
    assert report.notes == {"files without a metadata row": 2}


def test_other_views_and_modalities_can_be_asked_for(tmp_path: Path) -> None:
    root = write_cohen(tmp_path)
    plain = set(by_name(CohenCovidDataset(root)))
    every = by_name(CohenCovidDataset(root, views=None, modalities=("X-ray", "CT")))
    added = {"lateral.png", "unclear-view.png", "no-view.png", "shifted-view.png"}
    assert set(every) - plain == added | {"slice.png", "slice-2.png"}
    assert {every[name].view for name in added} == {"L", "unknown"}
    assert not any(every[name].is_frontal for name in added | {"slice.png"})
    assert by_name(CohenCovidDataset(root, views=None, modalities=None)) == every
    lateral = CohenCovidDataset(root, views=["L"], classes=["covid19"])
    assert set(by_name(lateral)) == {"lateral.png"}
    slices = CohenCovidDataset(root, views=None, modalities=["CT"], classes=["covid19"])
    assert set(by_name(slices)) == {"slice.png", "slice-2.png"}


def test_frontal_rows_can_be_told_before_the_images_are_there(tmp_path: Path) -> None:
    root = write_cohen(tmp_path, patients=0)
    names = {
        r["filename"] for r in read_metadata(root / "metadata.csv") if is_frontal_radiograph(r)
    }
    there = by_name(CohenCovidDataset(root, classes=EVERY_CLASS))
    uncertain = {"suspected.png", "todo.png", "unknown.png", "empty.png"}
    assert names == set(there) | uncertain | {"lost-upstream.jpg"}


def test_files_that_no_row_names_are_never_samples(tmp_path: Path) -> None:
    dataset = CohenCovidDataset(
        write_cohen(tmp_path), classes=EVERY_CLASS, views=None, modalities=("X-ray", "CT")
    )
    assert not {n for n in by_name(dataset) if n.startswith("FAFA") or n == "no-row.png"}


def test_a_folder_with_the_name_of_an_image_is_no_image(tmp_path: Path) -> None:
    rows = [cohen_row("1", "COVID-19", "a.png"), cohen_row("2", "COVID-19", "b.png")]
    root = write_cohen(tmp_path, rows=rows)
    (root / "images" / "b.png").unlink()
    (root / "images" / "b.png").mkdir()
    dataset = CohenCovidDataset(root, classes=["covid19"])
    assert set(by_name(dataset)) == {"a.png"}
    assert dataset.report().dropped == {"image file missing": 1}


def test_links_that_lead_nowhere_are_no_images(tmp_path: Path) -> None:
    names = ["a.png", "lost-loop.png", "lost-long.png"]
    root = write_cohen(tmp_path, rows=[cohen_row("1", "COVID-19", name) for name in names])
    (root / "images" / "lost-loop.png").symlink_to("lost-loop.png")
    (root / "images" / "lost-long.png").symlink_to("x" * 300)
    dataset = CohenCovidDataset(root, classes=["covid19"])
    assert set(by_name(dataset)) == {"a.png"}
    assert dataset.report().dropped == {"image file missing": 2}


def test_a_file_name_cannot_leave_the_images(tmp_path: Path) -> None:
    rows = [cohen_row("1", "COVID-19", "a.png"), cohen_row("2", "COVID-19", "../secret.png")]
    dataset = CohenCovidDataset(write_cohen(tmp_path, rows=rows), classes=["covid19"])
    assert (tmp_path / "secret.png").is_file()
    assert set(by_name(dataset)) == {"a.png"}


def test_rows_without_a_patient_are_dropped(tmp_path: Path) -> None:
    rows = [cohen_row(patient, "COVID-19", f"{i}.png") for i, patient in enumerate(["1", "", " "])]
    dataset = CohenCovidDataset(write_cohen(tmp_path, rows=rows), classes=["covid19"])
    assert [s.patient_id for s in dataset.samples] == ["1"]
    assert dataset.report().dropped == {"patient not given": 2}


def test_rows_without_a_patient_make_no_others_one(tmp_path: Path) -> None:
    pairs = [("", "a"), ("5", "a"), ("", "b"), ("6", "b"), ("5", "c")]
    rows = [cohen_row(patient, "COVID-19", f"{name}.png") for patient, name in pairs]
    dataset = CohenCovidDataset(write_cohen(tmp_path, rows=rows), classes=["covid19"])
    patients = {name: s.patient_id for name, s in by_name(dataset).items()}
    assert patients == {"a.png": "5", "b.png": "6", "c.png": "5"}


def test_png_data_under_a_jpeg_name_and_upper_case_suffixes_are_read(tmp_path: Path) -> None:
    dataset = CohenCovidDataset(write_cohen(tmp_path))
    images = {s.path.name: dataset[i][0] for i, s in enumerate(dataset.samples)}
    for name in ("png-inside.jpg", "b.JPG"):
        assert (images[name].mode, images[name].size) == ("L", (48, 40))


# Patients


def test_patients_with_both_findings_stay_one_patient(tmp_path: Path) -> None:
    dataset = CohenCovidDataset(write_cohen(tmp_path))
    labels = {s.label for s in dataset.samples if s.patient_id == "2"}
    assert labels == {"normal", "covid19"}
    groups = patient_groups(dataset, find_copies=False)
    assert (
        len({g for g, s in zip(groups, dataset.samples, strict=True) if s.patient_id == "2"}) == 1
    )


def test_patient_numbers_are_text(tmp_path: Path) -> None:
    rows = [cohen_row(p, "COVID-19", f"{p}.png") for p in ("311a", "311b", "007", "7", "1e3")]
    dataset = CohenCovidDataset(write_cohen(tmp_path, rows=rows), classes=["covid19"])
    assert [s.patient_id for s in dataset.samples] == ["311a", "311b", "007", "7", "1e3"]


def test_a_file_named_twice_is_one_sample_and_its_two_patients_are_one(tmp_path: Path) -> None:
    dataset = CohenCovidDataset(write_cohen(tmp_path), classes=["pneumonia"])
    samples = by_name(dataset)
    assert samples["twice.jpg"].patient_id == samples["another-of-339.jpg"].patient_id == "285"
    assert samples["another-of-339.jpg"].metadata["patientid"] == "339"
    assert dataset.report().dropped["file listed twice"] == 1


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("classes", [("normal", "covid19"), ("normal", "pneumonia", "covid19")])
def test_a_file_whose_findings_contradict_each_other_is_left_out_whichever_comes_first(
    tmp_path: Path, order: int, classes: tuple[str, ...]
) -> None:
    rows = [
        cohen_row("1", "COVID-19", "a.png"),
        cohen_row("2", "No Finding", "b.png"),
        cohen_row("3", "SARS", "c.png"),
        cohen_row("4", "COVID-19", "both.png"),
        cohen_row("4", "SARS", "both.png"),
        cohen_row("5", "COVID-19", "known.png"),
        cohen_row("5", "Unknown", "known.png"),
    ]
    dataset = CohenCovidDataset(write_cohen(tmp_path, rows=rows[::order]), classes=classes)
    kept = by_name(dataset)
    assert set(kept) == {"a.png", "b.png", "known.png"} | (
        {"c.png"} if "pneumonia" in classes else set()
    )
    assert kept["known.png"].finding.endswith("COVID-19")  # not the row that knows nothing
    assert dataset.report().dropped["findings of one file contradict each other"] == 2


@pytest.mark.parametrize(
    "shared",
    [
        ["1:x", "2:y", "2:x", "3:y"],
        ["1:x", "2:y", "3:x", "3:y"],
        ["1:x", "2:x", "2:y", "3:y"],
        ["3:y", "2:x", "1:x", "2:y"],
    ],
)
def test_patients_are_one_through_a_chain_of_files(tmp_path: Path, shared: list[str]) -> None:
    pairs = [text.split(":") for text in [*shared, "1:own-1", "2:own-2", "3:own-3", "4:z"]]
    rows = [cohen_row(patient, "COVID-19", f"{name}.png") for patient, name in pairs]
    dataset = CohenCovidDataset(write_cohen(tmp_path, rows=rows), classes=["covid19"])
    patients = {name: s.patient_id for name, s in by_name(dataset).items()}
    last = patients.pop("z.png")
    assert len(set(patients.values())) == 1
    assert last == "4"


def test_rows_without_a_file_name_do_not_make_their_patients_one(tmp_path: Path) -> None:
    rows = [cohen_row(patient, "COVID-19", f"{patient}.png") for patient in ("1", "2")]
    rows += [cohen_row(patient, "COVID-19", "", folder="volumes") for patient in ("1", "2")]
    dataset = CohenCovidDataset(write_cohen(tmp_path, rows=rows), classes=["covid19"])
    assert [s.patient_id for s in dataset.samples] == ["1", "2"]


# Provenance


def test_licences_are_at_the_sample_also_where_there_is_none(tmp_path: Path) -> None:
    samples = by_name(CohenCovidDataset(write_cohen(tmp_path)))
    assert samples["a-1.jpeg"].metadata["license"] == ""
    assert samples["a-2.jpeg"].metadata["license"] == "CC BY-NC-SA"
    assert samples[f"{SHARED_IMAGE_ID}.png"].metadata["license"] == "CC BY 3.0"
    free = CohenCovidDataset(tmp_path).filter(lambda s: s.metadata["license"] == "CC BY 3.0")
    assert len(free) == 1


def test_an_unclear_pcr_is_passed_on_and_changes_no_label(tmp_path: Path) -> None:
    samples = by_name(CohenCovidDataset(write_cohen(tmp_path)))
    unclear = samples["b.JPG"]
    assert (unclear.label, unclear.metadata["rt_pcr_positive"]) == ("covid19", "Unclear")
    assert samples["a-1.jpeg"].metadata["rt_pcr_positive"] == "Y"
    assert samples["a-2.jpeg"].metadata["rt_pcr_positive"] == ""


def test_hannover_rows_know_their_origin(tmp_path: Path) -> None:
    samples = by_name(CohenCovidDataset(write_cohen(tmp_path)))
    shared = samples.pop(f"{SHARED_IMAGE_ID}.png")
    assert shared.metadata["url"] == HANNOVER_URL
    assert shared.metadata["origin"] == "hannover"
    assert shared.metadata["image_id"] == SHARED_IMAGE_ID
    assert not any({"origin", "image_id"} & set(s.metadata) for s in samples.values())


def test_annotated_lungs_are_at_the_sample(tmp_path: Path) -> None:
    root = write_cohen(tmp_path)
    masks = root / "annotations" / "lungVAE-masks"
    found = {n: s.metadata.get("lung_mask") for n, s in by_name(CohenCovidDataset(root)).items()}
    assert found.pop("a-1.jpeg") == str(masks / "a-1_mask.png")
    assert set(found.values()) == {None}
    (masks / "a-1_mask.png").unlink()
    masks.rmdir()
    assert not any("lung_mask" in s.metadata for s in CohenCovidDataset(root).samples)


# Bad input


def test_a_class_that_is_promised_and_empty_is_an_error(tmp_path: Path) -> None:
    root = write_cohen(tmp_path, rows=[cohen_row("1", "SARS", "sars.png")])
    with pytest.raises(DatasetError, match=r"No usable image of \['normal', 'covid19'\]") as error:
        CohenCovidDataset(root)
    assert "finding outside the classes (pneumonia)" in str(error.value)
    with pytest.raises(DatasetError, match=r"\['tuberculosis'\]"):
        CohenCovidDataset(root, classes=("pneumonia", "tuberculosis"))


def test_views_and_modalities_may_come_one_by_one(tmp_path: Path) -> None:
    root = write_cohen(tmp_path)
    views, modalities = ["PA", "AP Supine"], ["CT", "X-ray"]
    expected = CohenCovidDataset(root, views=views, modalities=modalities)
    once: Any = {"views": iter(views), "modalities": iter(modalities)}
    assert CohenCovidDataset(root, **once).samples == expected.samples


def test_a_view_that_nothing_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="ask for other classes=, views= or modalities="):
        CohenCovidDataset(write_cohen(tmp_path), views=["Coronal"])


@pytest.mark.parametrize("download", [False, True])
def test_views_and_modalities_are_names_that_are_known(tmp_path: Path, download: bool) -> None:
    root = write_cohen(tmp_path)
    for option in ({"views": "AP Supine"}, {"modalities": "X-ray"}):
        with pytest.raises(TypeError, match=r"must be a sequence of names, got the string"):
            CohenCovidDataset(root, download=download, **option)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Unknown views \['AP supine'\]\. Valid are \['AP', "):
        CohenCovidDataset(root, views=["PA", "AP supine"], download=download)


def test_a_row_that_does_not_say_what_it_is_cannot_be_judged() -> None:
    with pytest.raises(DatasetError, match=r"lacks \['modality'\]; it has \['view'\]"):
        is_frontal_radiograph({"view": "PA"})


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"nowhere is no folder, expected .*download="):
        CohenCovidDataset(tmp_path / "nowhere")


def test_a_download_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="is needed, but HF_HUB_OFFLINE is set"):
        CohenCovidDataset(tmp_path / "new", download=True)


@pytest.mark.parametrize("inside", ["images", "annotations"])
def test_a_wrong_root_is_not_found(tmp_path: Path, inside: str) -> None:
    root = write_cohen(tmp_path / "data")
    for wrong in (tmp_path, root / inside):
        with pytest.raises(
            DatasetNotFoundError, match=r"metadata\.csv is missing\. Pass the folder"
        ):
            CohenCovidDataset(wrong)


@contextmanager
def closed(folder: Path) -> Iterator[None]:
    """Close a folder; the superuser, whom that does not stop, is nobody meanwhile."""
    own, mode = os.geteuid(), folder.stat().st_mode
    folder.chmod(0)
    try:
        if own == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(own)
        folder.chmod(mode)


@pytest.mark.parametrize("inside", [".", "images", "annotations/lungVAE-masks"])
def test_a_closed_folder_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    write_cohen(tmp_path / "cohen")
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # nobody may not enter what is above
    for read in (CohenCovidDataset, open_dataset):
        with (
            closed(Path("cohen", inside)),
            pytest.raises(DatasetError, match=rf"{Path('cohen', inside)} cannot be listed: .*Mend"),
        ):
            read("cohen")


def test_missing_images_are_not_found(tmp_path: Path) -> None:
    write_csv(tmp_path / "metadata.csv", COHEN_HEADERS["flat"], [["2"] * 29])
    with pytest.raises(DatasetNotFoundError, match=r"images is missing beside metadata\.csv"):
        CohenCovidDataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\n\n", "is empty"),
        (b"a,b,c\n1,2,3\n", r"lacks the columns .*it has \['a', 'b', 'c'\]"),
        (b"patientid,finding,view,modality\n1,2,3,4\n", r"lacks the columns \['filename'\]"),
        (b"patientid;finding;view;modality;filename\n", r"lacks the columns \['patientid'"),
        (b"patientid,finding,view,modality,filename,View\n", r"more than one column \['view'\]"),
        (b"patientid,finding,view,modality,filename\r\n", "has a header and no rows"),
        (b"patientid,finding,view,modality,filename\n,,,,\n\n ,\n", "has a header and no rows"),
        (b"<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n", "is an HTML or XML page"),
        (b"  <html lang='en'>\n", "is an HTML or XML page"),
        (b"\n\n\n<!DOCTYPE html>\n<html lang='en'>\n", "is an HTML or XML page"),
        (b"<?xml version='1.0'?><Error/>", "is an HTML or XML page"),
        (b'{"message": "API rate limit exceeded"}', "lacks the columns"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "lacks the columns"),
        (bytes(range(256)) * 40, "lacks the columns|cannot be read as CSV"),
        (b"\0" * 4096, "lacks the columns"),
        ("patientid,finding\n".encode("utf-16"), "lacks the columns"),
        (b'patientid,finding,view,modality,filename\n"' + b"x" * 200_000, "cannot be read as CSV"),
        (b'patientid,finding,view,modality,filename\n1,,"PA,,a\n2,,PA,,b\n', "begins in line 2"),
    ],
)
def test_damaged_metadata_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=message) as error:
        CohenCovidDataset(tmp_path)
    assert str(tmp_path / "metadata.csv") in str(error.value)


def test_nul_bytes_and_ragged_rows_among_good_ones_are_counted(tmp_path: Path) -> None:
    rows = [cohen_row("1", "COVID-19", "a.png")]
    root = write_cohen(tmp_path, "first", rows=rows)
    with (root / "metadata.csv").open("ab") as file:
        file.write(b"2\r\n3,\0\0,\0\r\n")
        file.write(b"4,0,M,65,COVID-19,Y,PA,X-ray,2020,here,nul\0.png,,,,,too,many,cells\r\n")
    report = CohenCovidDataset(root, classes=["covid19"]).report()
    assert (report.found, report.kept) == (4, 1)
    assert report.dropped == {"image file missing": 3}


# Real radiographs


@pytest.mark.real_data
def test_the_real_collection_has_the_published_counts(real_data: Path) -> None:
    root = real_data / "covid-chestxray-dataset"
    rows = read_metadata(root / "metadata.csv")
    files = {p.name for p in (root / "images").iterdir()}
    with_file = [r for r in rows if r["filename"] in files]
    frontal = [r for r in with_file if is_frontal_radiograph(r)]
    assert (len(rows), len(with_file), len(frontal)) == (673, 638, 531)
    assert Counter(label_of_finding(r["finding"]) for r in frontal) == {
        "covid19": 427,
        "pneumonia": 81,
        "normal": 19,
        "other": 4,
    }
    dataset = CohenCovidDataset(root, classes=EVERY_CLASS)
    report = dataset.report()
    # four of the five files that two rows name are frontal; all of them are pneumonias
    assert report.images == {"normal": 19, "pneumonia": 77, "covid19": 427, "other": 4}
    assert report.dropped["file listed twice"] == 4
    assert report.found == 673 == report.kept + sum(report.dropped.values())
    assert report.dropped["CT volume, not in the repository"] == 21
    assert report.dropped["image file missing"] == 14
    assert report.dropped["modality CT"] == 63
    assert report.notes == {"files without a metadata row": 13}
    assert len({s.patient_id for s in dataset.samples if s.label in {"pneumonia", "other"}}) == 45
    supine = Counter(label_of_finding(r["finding"]) for r in rows if r["view"] == "AP Supine")
    assert (supine["covid19"], supine.total() - supine["covid19"]) == (122, 12)


@pytest.mark.real_data
def test_real_normals_mostly_belong_to_patients_with_covid19(real_data: Path) -> None:
    dataset = CohenCovidDataset(real_data / "covid-chestxray-dataset")
    rows = read_metadata(real_data / "covid-chestxray-dataset" / "metadata.csv")
    covid = {r["patientid"] for r in rows if label_of_finding(r["finding"]) == "covid19"}
    normal = [s for s in dataset.samples if s.label == "normal"]
    assert len(normal) == 19
    assert sum(s.patient_id in covid for s in normal) == 14
    assert {"311a", "311b"} <= {s.patient_id for s in dataset.samples}
    assert sum("lung_mask" in s.metadata for s in dataset.samples) > 150


@pytest.mark.real_data
def test_real_hannover_images_are_joined_with_their_copies(real_data: Path) -> None:
    cohen = CohenCovidDataset(
        real_data / "covid-chestxray-dataset", views=None, modalities=("X-ray", "CT")
    )
    hannover = HannoverCovidDataset(real_data / "covid-19-image-repository")
    both = concatenate([cohen, hannover])
    groups = patient_groups(both, find_copies=False)
    own = {
        s.metadata["image_id"]: g
        for s, g in zip(both.samples, groups, strict=True)
        if s.source == "hannover" and "numbered_by" not in s.metadata
    }
    taken = [
        (s.metadata["image_id"], g)
        for s, g in zip(both.samples, groups, strict=True)
        if s.metadata.get("numbered_by") == "cohen"
    ]
    joined = [(i, g) for i, g in taken if i in own]
    assert (len(own), len(joined)) == (243, 77)
    assert both.report().dropped["contradicts its origin"] == 8  # of five, Hannover has the image
    assert not [s for s in both.samples if s.source == "hannover" and s.label != "covid19"]
    assert all(own[image_id] == group for image_id, group in joined)
    assert len({group for _, group in joined}) == 43
